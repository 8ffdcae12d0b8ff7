"""The saving estimator is unbiased, its interval covers the truth, and it reports nothing without evidence."""

import numpy as np
import pytest

from shared.metering.columns import IntensitySeries
from tests.support.report import DAY, POOL, REFERENCE, ZONE, calls_of, intensity_at, made_day, policy_at, record_of
from tools.reporting.accounts import sites_of
from tools.reporting.counterfactual import Counterfactual
from tools.reporting.quality import PolicyHistory
from tools.reporting.savings import Comparison, allocate_total, estimate_saving, net_of_evaluator

NO_EVALUATIONS = calls_of([])[0]
POLICIES = PolicyHistory.of(policy_at(hour) for hour in range(24))
HOURS = np.arange(24.0)
START_S = DAY.timestamp()


def series(relative=1.0):
    values = np.array([intensity_at(hour) * relative for hour in HOURS])
    return IntensitySeries(START_S + HOURS * 3600, values, np.zeros(24, dtype=bool))


GRID = {ZONE: series(), "NORTH": series(0.5)}


def comparable_of(records):
    calls, distributions = calls_of(records)
    counterfactual = Counterfactual(calls, NO_EVALUATIONS, sites=sites_of(calls), grid=GRID)
    return counterfactual, counterfactual.compare(calls, distributions, POLICIES), distributions


def comparison_of(*, emitted, propensity, served_by_baseline, predicted=None, variance=None):
    emitted = np.array(emitted, dtype=float)
    zeros = np.zeros(len(emitted))
    return Comparison.of_all(
        emitted_g=emitted,
        propensity=np.array(propensity, dtype=float),
        served_by_baseline=np.array(served_by_baseline),
        predicted_g=zeros if predicted is None else np.array(predicted, dtype=float),
        variance=zeros if variance is None else np.array(variance, dtype=float),
    )


def test_grams_of_baseline_requests_are_weighted_by_the_inverse_propensity():
    saving = estimate_saving(comparison_of(emitted=[4.0, 1.0], propensity=[0.5, 0.5], served_by_baseline=[True, False]))
    assert saving.reference_g == pytest.approx(8.0)
    assert saving.emitted_g == pytest.approx(5.0)
    assert saving.saving_pct == pytest.approx(100 * (1 - 5 / 8))
    assert saving.saved_g == pytest.approx(3.0)


def test_a_prediction_is_corrected_by_its_weighted_residual():
    saving = estimate_saving(
        comparison_of(emitted=[4.0, 1.0], propensity=[0.5, 0.5], served_by_baseline=[True, False], predicted=[3.0, 3.0])
    )
    assert saving.reference_g == pytest.approx(3.0 + 3.0 + (4.0 - 3.0) / 0.5)


def test_requests_in_fallback_are_their_own_counterfactual_with_certainty():
    saving = estimate_saving(comparison_of(emitted=[4.0, 2.0], propensity=[1.0, 1.0], served_by_baseline=[True, True]))
    assert saving.saving_pct == pytest.approx(0.0)
    assert saving.saving_interval.low == saving.saving_interval.high == pytest.approx(0.0)


def test_a_propensity_of_zero_is_rejected():
    with pytest.raises(ValueError, match="propensity"):
        comparison_of(emitted=[1.0], propensity=[0.0], served_by_baseline=[False])


def test_without_requests_there_is_no_saving():
    saving = estimate_saving(comparison_of(emitted=[], propensity=[], served_by_baseline=np.array([], dtype=bool)))
    assert saving.requests == 0
    assert saving.saving_pct is None
    assert saving.saving_interval is None


def test_without_a_baseline_request_or_a_variance_there_is_no_interval():
    saving = estimate_saving(
        comparison_of(emitted=[1.0], propensity=[0.1], served_by_baseline=[False], predicted=[2.0])
    )
    assert saving.saving_pct == pytest.approx(50.0)
    assert saving.saving_interval is None


def test_the_allocation_sums_to_the_total():
    _, comparable, _ = comparable_of(made_day(requests=300).records)
    total = estimate_saving(comparable.comparison)
    parts = allocate_total(comparable.comparison)
    assert parts.reference_g.sum() == pytest.approx(total.reference_g)
    assert parts.half_width_g.sum() == pytest.approx(total.reference_interval.high - total.reference_g)


def test_forced_unidentified_and_unpriced_requests_are_excluded_and_counted():
    records = [
        record_of("policy", row={REFERENCE: 0.5, f"{POOL}/L1": 0.5}),
        record_of("forced", option=f"{POOL}/L2", source="forced"),
        record_of("never", option=f"{POOL}/L1", row={f"{POOL}/L1": 1.0}),
        record_of("unpriced", intensity=None, row={REFERENCE: 1.0}),
        record_of("fallback", source="fallback", policy_version=None),
    ]
    _, comparable, _ = comparable_of(records)
    assert comparable.forced.tolist() == [False, True, False, False, False]
    assert comparable.unidentified.tolist() == [False, False, True, False, False]
    assert comparable.without_intensity.tolist() == [False, False, False, True, False]
    assert len(comparable.calls) == 2
    assert comparable.comparison.propensity.tolist() == [0.5, 1.0]


def test_requests_in_reference_blocks_are_their_own_counterfactual_and_predict_no_other():
    """There the whole fleet serves without Sprout, so a token is charged other energy than in the other requests."""
    row = {REFERENCE: 0.5, f"{POOL}/L1": 0.5}
    records = [
        record_of("holdout", energy_j=100.0, row=row),
        record_of("other holdout", energy_j=200.0, row=row),
        record_of("brief", option=f"{POOL}/L1", energy_j=50.0, row=row),
        record_of("block", energy_j=900.0, row={REFERENCE: 1.0}, source="switchback"),
    ]
    counterfactual, comparable, _ = comparable_of(records)
    comparison = comparable.comparison
    assert comparison.propensity.tolist() == [0.5, 0.5, 0.5, 1.0]
    g_per_j = comparison.emitted_g[0] / 100.0
    assert comparison.predicted_g[:3] / g_per_j == pytest.approx([200.0, 100.0, 150.0])
    assert counterfactual.means.get("alpaca", REFERENCE).mean[0] == pytest.approx(150.0)
    saving = estimate_saving(comparison)
    assert saving.references == 2
    alone = estimate_saving(comparison.select(np.array([True, True, True, False])))
    assert saving.saved_g == pytest.approx(alone.saved_g)
    assert saving.reference_interval.high - saving.reference_g == pytest.approx(
        alone.reference_interval.high - alone.reference_g
    )


def test_reference_blocks_predict_where_nothing_else_was_served_by_the_reference():
    records = [
        record_of("brief", option=f"{POOL}/L1", energy_j=50.0, row={REFERENCE: 0.5, f"{POOL}/L1": 0.5}),
        record_of("block", energy_j=900.0, source="switchback", policy_version=None),
    ]
    counterfactual, comparable, _ = comparable_of(records)
    assert counterfactual.means.get("alpaca", REFERENCE).mean[0] == pytest.approx(900.0)
    assert len(comparable.calls) == 2


def test_the_net_saving_subtracts_the_evaluator_over_the_same_baseline():
    saving = estimate_saving(
        comparison_of(
            emitted=[4.0, 1.0],
            propensity=[0.5, 0.5],
            served_by_baseline=[True, False],
            predicted=[3.0, 3.0],
            variance=[1.0, 1.0],
        )
    )
    net = net_of_evaluator(saving, 0.5)
    half = saving.reference_interval.high - saving.reference_g
    assert net.saved_g == pytest.approx(saving.saved_g - 0.5)
    assert net.saving_pct == pytest.approx(100 * (1 - 5.5 / saving.reference_g))
    assert net.saved_interval.high - net.saved_g == pytest.approx(half)
    assert net.saving_interval.high - net.saving_pct == pytest.approx(100 * 5.5 / saving.reference_g**2 * half)
    assert net_of_evaluator(saving, 0.0).saving_interval.low == pytest.approx(saving.saving_interval.low)


def test_an_unknown_saving_has_no_net_saving():
    nothing = estimate_saving(comparison_of(emitted=[], propensity=[], served_by_baseline=np.array([], dtype=bool)))
    net = net_of_evaluator(nothing, 2.0)
    assert (net.evaluator_g, net.saving_pct, net.saving_interval, net.saved_interval) == (2.0, None, None, None)


def test_a_call_does_not_predict_itself():
    row = {REFERENCE: 0.5, f"{POOL}/L1": 0.5}
    records = [record_of(str(energy), energy_j=energy, row=row) for energy in (100.0, 200.0, 600.0)]
    _, comparable, _ = comparable_of(records)
    g_per_j = comparable.comparison.emitted_g / np.array([100.0, 200.0, 600.0])
    assert comparable.comparison.predicted_g / g_per_j == pytest.approx([400.0, 350.0, 150.0])


@pytest.mark.statistical
@pytest.mark.parametrize("holdout", [0.1, 0.3])
def test_the_estimate_is_unbiased_and_its_interval_covers_the_truth(holdout):
    errors, covered, runs = [], 0, 120
    for seed in range(runs):
        day = made_day(requests=400, seed=seed, holdout=holdout)
        _, comparable, _ = comparable_of(day.records)
        saving = estimate_saving(comparable.comparison)
        truth = 100 * (1 - day.emitted_g / day.reference_g.sum())
        errors.append(saving.saving_pct - truth)
        covered += saving.saving_interval.low <= truth <= saving.saving_interval.high
    assert abs(np.mean(errors)) < 3 * np.std(errors) / runs**0.5 + 0.2  # the ratio itself is biased by O(1/n)
    assert 0.92 <= covered / runs <= 0.99


@pytest.mark.statistical
def test_the_counterfactual_is_unbiased_even_with_a_wrong_prediction():
    errors, runs = [], 120
    for seed in range(runs):
        day = made_day(requests=150, seed=seed, holdout=0.2)
        _, comparable, _ = comparable_of(day.records)
        comparison = comparable.comparison
        wrong = Comparison.of_all(
            emitted_g=comparison.emitted_g,
            propensity=comparison.propensity,
            served_by_baseline=comparison.served_by_baseline,
            predicted_g=np.full(len(comparison), comparison.predicted_g.mean() / 3),
            variance=comparison.variance,
        )
        errors.append(estimate_saving(wrong).reference_g / day.reference_g.sum() - 1)
    assert abs(np.mean(errors)) < 3 * np.std(errors) / runs**0.5


@pytest.mark.statistical
def test_each_of_two_zones_is_compared_with_the_baseline_of_its_own_requests():
    errors, covered, runs = {ZONE: [], "NORTH": []}, 0, 100
    for seed in range(runs):
        day = made_day(requests=400, seed=seed, holdout=0.2, zones={"NORTH": 0.5})
        counterfactual, comparable, distributions = comparable_of(day.records)
        served = np.array([record["zone"] for record in day.records])
        emitted = np.array([record["total_g"] for record in day.records])
        for zone, found in errors.items():
            saving = estimate_saving(counterfactual.in_zone(comparable, distributions, zone))
            truth = 100 * (1 - emitted[served == zone].sum() / day.reference_g[served == zone].sum())
            assert saving.emitted_g == pytest.approx(emitted[served == zone].sum())
            found.append(saving.saving_pct - truth)
            covered += saving.saving_interval.low <= truth <= saving.saving_interval.high
    for found in errors.values():
        assert abs(np.mean(found)) < 3 * np.std(found) / runs**0.5 + 0.5
    assert covered / (2 * runs) >= 0.92


def test_the_counterfactuals_of_the_zones_sum_to_the_total():
    counterfactual, comparable, distributions = comparable_of(made_day(requests=400, zones={"NORTH": 0.5}).records)
    parts = [estimate_saving(counterfactual.in_zone(comparable, distributions, zone)) for zone in (ZONE, "NORTH")]
    total = estimate_saving(comparable.comparison)
    assert sum(part.reference_g for part in parts) == pytest.approx(total.reference_g)
    assert sum(part.emitted_g for part in parts) == pytest.approx(total.emitted_g)
