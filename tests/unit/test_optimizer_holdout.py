"""The control group is as small as the wanted precision of the saving allows."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from services.optimizer.costs import Consumption, CostModel, ResourceUse
from services.optimizer.holdout import choose_holdout, saving_half_width_pct
from services.optimizer.problem import OptionPrice, Problem
from services.optimizer.settings import OptimizerSettings
from shared.messages import OptionEstimate
from tools.reporting.savings import Comparison, estimate_saving

REFERENCE, BRIEF = "p/L0", "p/L1"
ROWS = {"long": {BRIEF: 1.0}, "short": {REFERENCE: 0.4, BRIEF: 0.6}}
GRAMS = {"long": {REFERENCE: 2.0, BRIEF: 0.4}, "short": {REFERENCE: 0.5, BRIEF: 0.2}}
VARIATION = {"long": 0.8, "short": 0.5}
WEIGHTS = {"long": 0.7, "short": 0.3}


def problem(requests_per_hour: float) -> Problem:
    return Problem(
        reference=REFERENCE,
        options={
            option: OptionPrice(pool="p", g_per_kwh=1.0, embodied_g_per_s=0.0) for option in (REFERENCE, BRIEF)
        },
        weights=WEIGHTS,
        estimates={
            group: {
                option: OptionEstimate(energy_kwh=grams, processing_s=1.0, quality={}) for option, grams in row.items()
            }
            for group, row in GRAMS.items()
        },
        requests_per_s=requests_per_hour / 3_600.0,
    )  # fmt: skip


def chosen(requests_per_hour: float, **settings):
    return choose_holdout(problem(requests_per_hour), ROWS, variation=VARIATION, settings=OptimizerSettings(**settings))


@pytest.mark.parametrize("requests_per_hour", [500.0, 2_000.0])
def test_the_report_knows_the_saving_of_a_day_as_precisely_as_wanted(requests_per_hour):
    """Days of requests drawn from the policy, measured with the report's own estimator."""
    found = chosen(requests_per_hour)
    assert found.half_width_pct == pytest.approx(2.0, abs=0.01)
    rng, requests = np.random.default_rng(1), int(24 * requests_per_hour)
    errors, widths = [], []
    for _ in range(40):
        long = rng.random(requests) < WEIGHTS["long"]
        of_group = {name: np.where(long, GRAMS["long"][name], GRAMS["short"][name]) for name in (REFERENCE, BRIEF)}
        propensity = np.where(long, found.probability, max(found.probability, ROWS["short"][REFERENCE]))
        by_reference = rng.random(requests) < propensity
        variation = np.where(long, VARIATION["long"], VARIATION["short"])
        noise = rng.gamma(1.0 / variation**2, variation**2)
        grams = np.where(by_reference, of_group[REFERENCE], of_group[BRIEF]) * noise
        truth = 1.0 - grams.sum() / (of_group[REFERENCE] * noise).sum()
        saving = estimate_saving(
            Comparison.of_all(
                emitted_g=grams,
                propensity=propensity,
                served_by_baseline=by_reference,
                predicted_g=of_group[REFERENCE],
                variance=(variation * of_group[REFERENCE]) ** 2,
            )
        )
        assert saving.saving_pct is not None
        assert saving.saving_interval is not None
        errors.append(saving.saving_pct - 100.0 * truth)
        widths.append((saving.saving_interval.high - saving.saving_interval.low) / 2.0)
    assert np.mean(widths) == pytest.approx(2.0, rel=0.08)
    assert 1.96 * np.std(errors) == pytest.approx(2.0, rel=0.35)


def test_more_requests_need_a_smaller_control_group_within_the_limits():
    found = [chosen(rate).probability for rate in (50.0, 1_000.0, 4_000.0, 1_000_000.0)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (0.05, 0.001)
    assert chosen(4_000.0, holdout_half_width_pct=1.0).probability > 3.0 * found[2]
    assert chosen(400.0, holdout_maximum=0.5).half_width_pct == pytest.approx(2.0, abs=0.01)


def test_without_a_request_rate_it_is_the_largest():
    found = chosen(0.0)
    assert (found.probability, found.half_width_pct) == (0.05, None)
    assert found.reason == "holdout 5 %, the maximum"


def test_a_fixed_holdout_stays_and_its_precision_is_said():
    found = chosen(1_000.0, holdout=0.3)
    assert found.probability == 0.3
    assert found.half_width_pct is not None
    assert found.half_width_pct < 1.0
    assert chosen(1_000.0, holdout=0.0).half_width_pct is None


def test_a_policy_that_serves_the_baseline_everywhere_needs_no_control_group():
    everything = {group: {REFERENCE: 1.0} for group in ROWS}
    made = replace(problem(10.0), requests_per_s=0.0)
    assert saving_half_width_pct(made, everything, 0.001, VARIATION) == 0.0


def test_limits_that_contradict_each_other_are_rejected(monkeypatch):
    monkeypatch.setenv("SPROUT_OPTIMIZER_HOLDOUT_MINIMUM", "0.2")
    with pytest.raises(ValidationError, match=r"HOLDOUT_MINIMUM 0.2 is larger than .*HOLDOUT_MAXIMUM 0.05"):
        OptimizerSettings()


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0.05", 0.05), ("1", 1.0)])
def test_the_holdout_is_read_from_the_environment(monkeypatch, text, value):
    monkeypatch.setenv("SPROUT_OPTIMIZER_HOLDOUT", text)
    assert OptimizerSettings().holdout == value


def test_the_spread_of_the_energy_is_measured_and_taken_to_be_large_before():
    settings, made = OptimizerSettings(), Consumption()
    for number in range(2_000):
        energy = 1e-4 if number % 2 else 3e-4
        used = ResourceUse(1.0, energy, 1.0, energy_squares=energy**2)
        made.add("known", REFERENCE, used, at_s=0.0, settings=settings, traffic=1.0)
    made.add("assumed", REFERENCE, ResourceUse(500.0, 0.1, 500.0), at_s=0.0, settings=settings, traffic=500.0)
    model = CostModel(made.totals(0.0, settings), settings.pseudo_requests)
    assert model.energy_variation("known", REFERENCE) == pytest.approx(0.5, abs=0.01)
    assert model.energy_variation("assumed", REFERENCE) == pytest.approx(1.0)
    assert model.energy_variation("unseen", REFERENCE) == 1.0


def test_sums_of_an_earlier_release_are_read_with_the_large_spread():
    settings, made = OptimizerSettings(), Consumption()
    made.add("g", REFERENCE, ResourceUse(500.0, 0.1, 500.0), at_s=0.0, settings=settings, traffic=500.0)
    document = made.to_document()
    document["cells"]["g"][REFERENCE] = document["cells"]["g"][REFERENCE][:4]
    assert Consumption.from_document(document) == made
