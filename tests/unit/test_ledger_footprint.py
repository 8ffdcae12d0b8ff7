"""The mean carbon intensity during a call, and its energy and time in grams."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ledger.footprint import IntensitySteps, footprint_grams, footprint_head, footprint_json
from shared.messages import Footprint
from shared.pools import Endpoint, Pool

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


DIMENSION = {
    "purpose": "request", "evaluation_id": None, "model": "m", "grp": 'g "1"', "task": "qa", "tenant": None,
    "pool": "p", "level": "L1", "zone": "GB", "endpoint": "e", "policy_version": 3, "propensity": 0.25,
    "finish_reason": "cancelled", "distribution": '{"p/L0": 0.75, "p/L1": 0.25}',
}  # fmt: skip
AT = datetime(2024, 2, 1, 12, 0, 0, 250_000, tzinfo=UTC)
ROW = {
    "id": "requests/0/1/2", "request_id": 'my "id"', "started_at": AT, "finished_at": AT + timedelta(seconds=2.5),
    "prompt_tokens": 12, "completion_tokens": 40, "energy_j": 1e-07, "server_s": 1.25, "intensity_g_per_kwh": 150.0,
    "operational_g": 0.5, "embodied_g": 0.25,
}  # fmt: skip


def test_the_message_of_a_footprint_has_all_that_is_known_of_the_call():
    found = Footprint.model_validate_json(footprint_json(footprint_head(DIMENSION), ROW))
    assert found == Footprint(
        request_id='my "id"', record="requests/0/1/2", purpose="request", model="m", group='g "1"', task="qa",
        pool="p", level="L1", zone="GB", endpoint="e", policy_version=3, propensity=0.25,
        propensities={"p/L0": 0.75, "p/L1": 0.25}, started_at=AT, finished_at=AT + timedelta(seconds=2.5),
        processing_s=2.5, server_s=1.25, prompt_tokens=12, completion_tokens=40, finish_reason="cancelled",
        energy_j=1e-07, intensity_g_per_kwh=150.0, operational_g=0.5, embodied_g=0.25, total_g=0.75,
    )  # fmt: skip


def test_what_is_unknown_of_a_call_is_null_in_its_footprint():
    unknown = dict.fromkeys(("request_id", "prompt_tokens", "server_s", "intensity_g_per_kwh", "operational_g"), None)
    found = Footprint.model_validate_json(footprint_json(footprint_head(DIMENSION), {**ROW, **unknown}))
    assert (found.request_id, found.record, found.server_s, found.total_g) == ("requests/0/1/2", None, None, None)
    assert (found.prompt_tokens, found.intensity_g_per_kwh, found.embodied_g) == (None, None, 0.25)
