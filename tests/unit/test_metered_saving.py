"""The saving on the meter by switchback."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from shared.carbon import JOULES_PER_KWH
from shared.metered_saving import (
    DAY_S,
    HOUR,
    MIN_BLOCKS,
    FleetBins,
    metered_saving,
    student_t,
)
from tests.support.switchback_days import FleetDays, day_bounds, simulate_days

BIN_S = 300.0
DAY_BINS = 288


def bins_of(
    *, days: int = 3, blocks: int = 8, noise: float = 0.0, by_hour: float = 0.0, zones: int = 1, seed: int = 1
) -> FleetBins:
    """A fleet that takes 1000 J and 2 J per token of the reference in a bin, and 300 J and 0.5 J with Sprout."""
    rng = np.random.default_rng(seed)
    place = np.arange(days * DAY_BINS)
    demand = 1_000.0 - 500.0 * np.cos(2.0 * np.pi * place / DAY_BINS) + rng.normal(0.0, 50.0, len(place))
    world = np.full(len(place), "sprout", dtype="<U9")
    for block in range(blocks):
        first = int((block + 0.5) * len(place) / blocks)
        world[first : first + 6] = "reference"
        world[first] = world[first + 6] = "washout"
    joules = np.where(world == "sprout", 300.0 + 0.5 * demand, 1_000.0 + 2.0 * demand)
    joules += noise * rng.normal(size=len(place)) + by_hour * np.sin(2.0 * np.pi * (place + 0.5) / DAY_BINS)
    return FleetBins(
        length_s=BIN_S,
        start_s=np.asarray(BIN_S * place, dtype=np.float64),
        joules=np.tile(joules[:, None] / zones, zones),
        g_per_kwh=np.full((len(place), zones), 200.0),
        demand=demand,
        world=world,
    )


def without_sprout(bins: FleetBins) -> float:
    return float((1_000.0 + 2.0 * bins.demand).sum())


def test_an_affine_fleet_is_predicted_exactly() -> None:
    bins = bins_of()
    result = metered_saving(bins)
    assert result.reason is None
    assert result.blocks == 8
    assert result.bins_left_out == 0
    assert result.energy is not None
    assert result.energy.saved_pct is not None
    assert result.energy.actual == pytest.approx(bins.joules.sum())
    assert result.energy.without_sprout.value == pytest.approx(without_sprout(bins))
    assert result.energy.saved.value == pytest.approx(without_sprout(bins) - bins.joules.sum())
    assert result.energy.saved_pct.half_width == pytest.approx(0.0, abs=1e-6)


def test_carbon_weights_every_bin_and_zone_by_its_intensity() -> None:
    bins = bins_of(zones=2)
    intensity = np.column_stack([np.linspace(50.0, 400.0, len(bins.demand)), np.full(len(bins.demand), 100.0)])
    result = metered_saving(replace(bins, g_per_kwh=intensity))
    expected = ((1_000.0 + 2.0 * bins.demand)[:, None] / 2.0 * intensity / JOULES_PER_KWH).sum()
    assert result.carbon is not None
    assert result.carbon.without_sprout.value == pytest.approx(expected)
    assert result.carbon.actual == pytest.approx((bins.joules * intensity / JOULES_PER_KWH).sum())


def test_zones_together_are_as_uncertain_as_their_sum() -> None:
    one, two = metered_saving(bins_of(noise=20.0)), metered_saving(bins_of(noise=20.0, zones=2))
    assert one.energy is not None
    assert two.energy is not None
    assert two.energy.saved.value == pytest.approx(one.energy.saved.value)
    assert two.energy.saved.half_width == pytest.approx(one.energy.saved.half_width)


def test_noise_that_a_block_shares_widens_the_interval() -> None:
    rng = np.random.default_rng(2)
    bins = bins_of()
    alone, shared = bins.joules.copy(), bins.joules.copy()
    alone[:, 0] += rng.normal(0.0, 60.0, len(alone))
    shared[:, 0] += np.repeat(rng.normal(0.0, 60.0, len(shared) // 12), 12)
    narrow = metered_saving(replace(bins, joules=alone)).energy
    wide = metered_saving(replace(bins, joules=shared)).energy
    assert narrow is not None
    assert wide is not None
    assert wide.saved.half_width > 1.5 * narrow.saved.half_width


def test_a_period_uses_blocks_of_the_window_before_its_end() -> None:
    bins = bins_of(days=10, blocks=20)
    day = metered_saving(bins, since_s=8 * DAY_S, until_s=9 * DAY_S)
    assert day.blocks == 18
    assert day.bins == DAY_BINS
    assert metered_saving(bins, since_s=8 * DAY_S, until_s=9 * DAY_S, window_s=4 * DAY_S).blocks == 8
    assert day.energy is not None
    in_day = (bins.start_s >= 8 * DAY_S) & (bins.start_s < 9 * DAY_S)
    assert day.energy.actual == pytest.approx(bins.joules[in_day].sum())


@pytest.mark.parametrize("blocks", range(MIN_BLOCKS))
def test_too_few_blocks_are_counted(blocks: int) -> None:
    result = metered_saving(bins_of(blocks=blocks))
    assert result.energy is None
    assert result.carbon is None
    assert result.blocks_missing == MIN_BLOCKS - blocks
    assert result.reason is not None
    assert result.reason.endswith(f"{MIN_BLOCKS - blocks} more")


def test_bins_without_a_reading_are_left_out_and_counted() -> None:
    bins = bins_of()
    joules = bins.joules.copy()
    joules[100:130] = np.nan
    result = metered_saving(replace(bins, joules=joules))
    assert result.bins_left_out == 30
    assert result.energy is not None
    kept = ~np.isnan(joules[:, 0])
    assert result.energy.without_sprout.value == pytest.approx(float((1_000.0 + 2.0 * bins.demand)[kept].sum()))
    nothing = metered_saving(replace(bins, joules=np.full_like(joules, np.nan)))
    assert nothing.energy is None
    assert nothing.reason is not None
    assert "no bin" in nothing.reason


def test_the_hour_is_used_where_power_depends_on_it() -> None:
    bins = bins_of(days=20, blocks=47, noise=5.0, by_hour=200.0)
    result = metered_saving(bins)
    assert HOUR in result.terms
    assert HOUR not in metered_saving(bins_of(days=20, blocks=47, noise=5.0)).terms


def test_demand_that_never_differs_is_named() -> None:
    bins = bins_of()
    result = metered_saving(replace(bins, demand=np.full_like(bins.demand, 7.0)))
    assert result.energy is None
    assert result.reason is not None
    assert "does not differ" in result.reason


def test_demand_outside_of_the_blocks_range_is_reported() -> None:
    bins = bins_of()
    demand = bins.demand.copy()
    demand[bins.world == "sprout"] += 10_000.0
    assert metered_saving(replace(bins, demand=demand)).extrapolated_share > 0.9


def test_a_grid_without_carbon_has_no_percentage() -> None:
    bins = bins_of()
    result = metered_saving(replace(bins, g_per_kwh=np.zeros_like(bins.g_per_kwh)))
    assert result.carbon is not None
    assert result.carbon.saved_pct is None
    assert result.carbon.saved.value == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"demand": np.zeros(3)}, "'demand' must have one value"),
        ({"g_per_kwh": np.zeros((864, 2))}, "shape"),
        ({"length_s": 0.0}, "'length_s'"),
        ({"length_s": 301.0}, "must not overlap"),
        ({"world": np.full(864, "dream")}, "'world' must be one of"),
    ],
)
def test_inconsistent_bins_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(bins_of(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 26, 101])
def test_quantiles_are_those_of_students_distribution(degrees: int) -> None:
    for confidence in (0.5, 0.95, 0.999):
        assert student_t(confidence, degrees) == pytest.approx(stats.t.ppf(0.5 + confidence / 2.0, degrees), rel=1e-9)


@pytest.mark.statistical
def test_the_interval_covers_the_truth_of_simulated_days() -> None:
    covered, halves = [], []
    for seed in (101, 102):
        bins, truth = simulate_days(FleetDays(days=40, seed=seed))
        for day in range(14, 40):
            since_s, until_s = day_bounds(day)
            result = metered_saving(bins, since_s=since_s, until_s=until_s)
            assert result.energy is not None
            assert result.energy.saved_pct is not None
            assert result.carbon is not None
            assert result.carbon.saved_pct is not None
            energy, carbon = result.energy.saved_pct, result.carbon.saved_pct
            covered += [
                energy.low <= truth.saved_pct[day] <= energy.high,
                carbon.low <= truth.carbon_saved_pct[day] <= carbon.high,
            ]
            halves += [energy.half_width, carbon.half_width]
    assert np.mean(covered) >= 0.93
    assert np.median(halves) <= 1.5
    assert max(halves) <= 2.5
