"""The mean carbon intensity during a call, and its energy and time in grams."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.footprint import IntensitySteps, footprint_grams, footprint_row
from shared.fleet import Endpoint, Pool

HOUR = 3600.0
STEPS = IntensitySteps([(HOUR, 300.0), (0.0, 100.0), (2 * HOUR, 200.0)], max_age_s=3 * HOUR)


@pytest.mark.parametrize(
    ("started_s", "finished_s", "mean"),
    [
        (10, 20, 100.0),
        (HOUR - 30, HOUR + 10, 150.0),
        (HOUR, HOUR, 300.0),
        (0, 3 * HOUR, 200.0),
        (-10, 10, None),
        (4.9 * HOUR, 5 * HOUR, 200.0),
        (4.9 * HOUR, 5.1 * HOUR, None),
        (6 * HOUR, 6 * HOUR, None),
    ],
)
def test_each_value_holds_until_the_next_and_not_beyond_its_age(started_s, finished_s, mean):
    assert STEPS.mean(started_s, finished_s) == (None if mean is None else pytest.approx(mean))


def test_a_gap_in_the_trace_stays_unknown():
    gap = IntensitySteps([(0, 100.0), (10 * HOUR, 300.0)], max_age_s=3 * HOUR)
    assert gap.mean(2 * HOUR, 10.5 * HOUR) is None
    assert IntensitySteps([], max_age_s=1).mean(0, 1) is None


@given(st.lists(st.floats(0, 1_000), min_size=1, max_size=10), st.floats(0, 9), st.floats(0, 9, allow_subnormal=False))
def test_a_mean_lies_between_the_values(values, start_h, length_h):
    steps = IntensitySteps([(hour * HOUR, value) for hour, value in enumerate(values)], max_age_s=1e9)
    mean = steps.mean(start_h * HOUR, (start_h + length_h) * HOUR)
    assert min(values) - 1e-6 <= mean <= max(values) + 1e-6


POOL = Pool(
    name="p", model="m", zone="GB", pue=1.2, embodied_g_per_s=0.5, endpoints=(Endpoint(name="e", grpc="localhost:1"),)
)


def test_grams_are_electricity_with_overhead_and_embodied_carbon():
    grams = footprint_grams(energy_j=3.6e6, server_s=10, pool=POOL, intensity_g_per_kwh=250)
    assert grams == {"operational_g": pytest.approx(300), "embodied_g": 5.0, "total_g": pytest.approx(305)}


def test_an_unknown_intensity_stays_unknown():
    grams = footprint_grams(energy_j=3.6e6, server_s=10, pool=POOL, intensity_g_per_kwh=None)
    assert grams == {"operational_g": None, "embodied_g": 5.0, "total_g": None}


def test_a_footprint_is_priced_at_the_mean_intensity_of_the_call():
    row = footprint_row(
        request_id="r", started_s=HOUR - 30, finished_s=HOUR + 10, energy_j=3.6e6, server_s=8.0, partial=True,
        pool=POOL, intensity=STEPS,
    )  # fmt: skip
    assert (row["request_id"], row["processing_s"], row["server_s"], row["partial"]) == ("r", 40.0, 8.0, True)
    assert row["intensity_g_per_kwh"] == pytest.approx(150)
    assert row["total_g"] == pytest.approx(1.2 * 150 + 8 * 0.5)


def test_a_call_whose_share_of_the_server_is_unknown_is_charged_for_all_of_its_time():
    row = footprint_row(
        request_id="r", started_s=HOUR - 30, finished_s=HOUR + 10, energy_j=0.0, server_s=None, partial=False,
        pool=POOL, intensity=STEPS,
    )  # fmt: skip
    assert (row["server_s"], row["embodied_g"]) == (None, 40 * 0.5)
