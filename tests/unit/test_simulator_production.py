"""The schemes as they run in production: their choices, what is charged, and that there is no look-ahead."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from services.optimizer.bounds import trailing_range
from services.optimizer.settings import OptimizerSettings
from shared.messages import CarbonIntensity, IntensityPoint
from tests.support.simulator import BEGIN, grid, measured
from tools.simulator.figures import figures
from tools.simulator.grid import HOUR, Grid
from tools.simulator.outcome import Outcome
from tools.simulator.report import render_page
from tools.simulator.requests import Measured, SimulationInputError
from tools.simulator.schemes import Experiment, Fold, run
from tools.simulator.traffic import constant_mix

pytestmark = pytest.mark.simulation

HOURS = 48
HALF = 24
START = 200
KEYS = (
    "zone", "window_start_hour", "scheme", "xi", "carbon_saving_pct", "preference_pct", "correctness_pct",
    "hours_bound_kept_pct", "evaluations", "evaluation_hours", "evaluator_share_pct", "mean_gco2_per_request",
)  # fmt: skip


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    learn, test = measured(600).halves(1)
    return Experiment(
        variant="production",
        folds=(Fold(learn, test),),
        mix=constant_mix(test, hours=HOURS),
        optimizer=OptimizerSettings(holdout=0.0, confidence_z=1.645),
        large_preferred=np.array([0.55, 0.6]),
    )


def measured_on(experiment: Experiment, prompts: Measured) -> Experiment:
    return replace(experiment, folds=(Fold(experiment.folds[0].learn, prompts),))


def in_folds(experiment: Experiment, prompts: Measured, count: int) -> Experiment:
    return replace(experiment, folds=tuple(Fold(learn, test) for learn, test in prompts.folds(1, count)))


def outcome(experiment: Experiment, scheme: str, *, xi: float = 0.1, on: Grid | None = None, **more: float) -> Outcome:
    return run(experiment, scheme, (on or grid()).window(START, HOURS), {"preference": xi, **more})


@pytest.fixture(scope="module")
def usual(experiment: Experiment) -> Callable[..., Outcome]:
    """The outcome of a scheme for the experiment and a limit of loss, computed once."""
    return cache(lambda scheme, xi=0.1: outcome(experiment, scheme, xi=xi))


def test_the_reference_saves_nothing_and_is_never_evaluated(usual):
    base = usual("base")
    assert base.saving_pct == pytest.approx(0.0)
    assert base.kept_pct is None
    assert base.evaluator_grams.sum() == 0.0


def test_the_cheapest_level_saves_most_and_the_program_keeps_more_quality(usual):
    cheapest, sprout, by_task = (usual(scheme) for scheme in ("co2_opt", "sprout", "sprout_task"))
    assert cheapest.saving_pct > by_task.saving_pct > sprout.saving_pct > 0.0
    assert cheapest.preference.mean() < sprout.preference.mean()
    assert by_task.preference.mean() > 0.9


def test_a_stricter_bound_saves_less(usual):
    savings = [usual("sprout_task", xi).saving_pct for xi in (0.0, 0.1, 0.3)]
    assert savings == sorted(savings)
    assert savings[0] < savings[-1]


def test_a_limit_on_correctness_costs_saving_and_keeps_answers_right(experiment, usual):
    free, bound = usual("sprout_task", 0.3), outcome(experiment, "sprout_task", xi=0.3, correctness=0.02)
    assert bound.saving_pct < free.saving_pct
    assert bound.correctness.mean() > free.correctness.mean()
    assert bound.correctness_bound is not None
    assert bound.correctness_bound.min() == pytest.approx(0.98, abs=0.002)  # nearly the highest intensity
    constant = replace(experiment, constant_bounds=frozenset({"correctness"}))
    always = outcome(constant, "sprout_task", xi=0.3, correctness=0.02)
    assert set(always.correctness_bound) == {0.98}
    assert bound.saving_pct < always.saving_pct < free.saving_pct


@pytest.mark.parametrize("scheme", ["sprout", "sprout_task", "model_opt", "sprout_sta"])
def test_there_is_no_look_ahead(experiment, usual, scheme):
    known = grid()
    other = known.g_per_kwh.copy()
    other[START + HALF :] = other[START + HALF :][::-1] * 3.0
    before, after = usual(scheme), outcome(experiment, scheme, on=replace(known, g_per_kwh=other))
    np.testing.assert_allclose(before.mix[:HALF], after.mix[:HALF])
    assert [hour for hour in before.evaluation_hours if hour < HALF] == [
        hour for hour in after.evaluation_hours if hour < HALF
    ]


def by_period(experiment: Experiment, *, days: int = 1, **settings) -> Experiment:
    """The same with a promise for the mean over so many days."""
    update = {"promise": "period", "period_days": days, **settings}
    return replace(experiment, optimizer=experiment.optimizer.model_copy(update=update))


@pytest.fixture(scope="module")
def period(experiment: Experiment) -> Outcome:
    return outcome(by_period(experiment, days=2), "sprout_task", xi=0.02)


def test_a_promise_by_period_saves_more_and_moves_the_loss_to_dirty_hours(usual, period):
    hourly = usual("sprout_task", 0.02)
    assert period.saving_pct > hourly.saving_pct
    assert (period.promise, hourly.promise) == ("period", "hourly")
    dirty = period.g_per_kwh > np.median(period.g_per_kwh)
    assert period.preference[dirty].mean() < hourly.preference[dirty].mean()
    assert period.preference[~dirty].mean() > hourly.preference[~dirty].mean()
    # The limits of the hours are credited unchanged, and their mean is the promise.
    np.testing.assert_allclose(period.bound, hourly.bound)
    assert period.preference.mean() > period.bound.mean()
    assert period.kept_pct < period.period_kept_pct == 100.0


def test_a_promise_by_period_does_not_look_ahead(experiment, period):
    known = grid()
    other = known.g_per_kwh.copy()
    other[START + HALF :] = other[START + HALF :][::-1] * 3.0
    after = outcome(by_period(experiment, days=2), "sprout_task", xi=0.02, on=replace(known, g_per_kwh=other))
    np.testing.assert_allclose(period.mix[:HALF], after.mix[:HALF])


def test_an_hourly_floor_is_kept_in_every_hour_of_a_period(experiment, period):
    certain = {"hourly_floors": {"preference": 0.97}, "confidence_z": 0.0}
    floored = outcome(by_period(experiment, days=2, **certain), "sprout_task", xi=0.02)
    free = outcome(by_period(experiment, days=2, confidence_z=0.0), "sprout_task", xi=0.02)
    assert floored.saving_pct < free.saving_pct
    assert floored.preference.min() > free.preference.min()


def test_the_last_period_of_a_window_may_be_shorter(experiment):
    hours = HALF + 12
    shorter = replace(by_period(experiment), mix=experiment.mix[:hours])
    found = run(shorter, "sprout_task", grid().window(START, hours), {"preference": 0.02})
    assert found.period_kept_pct in (0.0, 50.0, 100.0)
    assert found.summary()["period_kept_pct"] == found.period_kept_pct


def test_evaluations_are_charged_at_the_intensity_at_which_they_ran(usual):
    sprout = usual("sprout")
    assert sprout.evaluation_hours
    assert set(np.flatnonzero(sprout.evaluator_grams)) == {0, *sprout.evaluation_hours}
    summary = sprout.summary()
    assert summary["evaluator_share_pct"] > 0.0
    assert summary["mean_gco2_per_request"] == pytest.approx(sprout.grams.mean() + sprout.evaluator_grams.mean())
    # The saving is net of the evaluator's carbon.
    base_g = sprout.base_grams.mean()
    assert summary["carbon_saving_pct"] == pytest.approx(100.0 * (1.0 - summary["mean_gco2_per_request"] / base_g))
    gross = 100.0 * (1.0 - sprout.grams.mean() / base_g)
    assert summary["carbon_saving_pct"] == pytest.approx(gross - summary["evaluator_share_pct"])


def test_the_static_scheme_never_changes_its_probabilities(usual):
    static = usual("sprout_sta")
    np.testing.assert_allclose(static.mix, np.tile(static.mix[0], (HOURS, 1)))
    assert static.evaluation_hours == ()


def test_two_models_share_the_traffic_of_model_opt(experiment, usual):
    models = usual("model_opt", 0.3)
    assert 0.0 < models.saving_pct < 40.0
    assert models.mix.sum(axis=1) == pytest.approx(1.0)
    with pytest.raises(SimulationInputError, match="needs --model-preference"):
        outcome(replace(experiment, large_preferred=None), "model_opt")


def test_the_same_seed_gives_the_same_figures(experiment, usual):
    assert usual("sprout_task").summary() == outcome(experiment, "sprout_task").summary()


def test_near_the_start_of_a_trace_no_loss_is_tolerated_as_in_the_services(experiment):
    known = grid()
    values = known.g_per_kwh.copy()
    values[[3, 4, 10]] = np.nan
    trace = replace(known, g_per_kwh=values)
    found = run(experiment, "sprout", trace.window(12, HOURS), {"preference": 0.3})
    points = [
        IntensityPoint(at=BEGIN + hour * HOUR, intensity_g_per_kwh=float(value))
        for hour, value in enumerate(values)
        if not np.isnan(value)
    ]
    for hour in range(HOURS):
        past = [point for point in points if point.at <= BEGIN + (12 + hour) * HOUR]
        message = CarbonIntensity(
            zone="Z", latest=past[-1], history=tuple(past[:-1]), source="test", published_at=past[-1].at
        )
        span = trailing_range(message, OptimizerSettings())
        position = span.position(past[-1].intensity_g_per_kwh)
        assert found.bound[hour] == pytest.approx(1.0 - 0.3 * position), hour
    assert (found.bound[:14] == 1.0).all()  # 9 values before the window and 15 in it are 24
    assert found.bound[14:].min() < 1.0


def test_hours_in_which_only_the_reference_could_be_served_are_counted(experiment, usual):
    few = replace(experiment, optimizer=OptimizerSettings(holdout=0.0, min_trials=1e6))
    for scheme in ("sprout", "sprout_sta"):
        found = outcome(few, scheme).summary()
        assert found["fallback_hours"] == HOURS
        assert found["fallback_reasons"] == {"too few judged prompts (preference)": HOURS}
        assert found["withheld_hours"] == {"pool/L1": HOURS, "pool/L2": HOURS}
        assert found["mix_pct"]["pool/L0"] == pytest.approx(100.0)
    enough = usual("sprout").summary()
    assert (enough["fallback_hours"], enough["fallback_reasons"]) == (0, {})
    assert list(enough)[:12] == list(KEYS)


def test_the_upper_bound_reports_its_correctness(experiment):
    oracle = outcome(experiment, "oracle", xi=0.3)
    assert 80.0 < oracle.summary()["correctness_pct"] < 100.0
    measured_right = experiment.measured.correct.mean(axis=0)
    expected = (oracle.mix @ measured_right).mean() / measured_right[0]
    assert oracle.correctness.mean() == pytest.approx(expected, abs=0.03)
    unknown = replace(experiment.measured, correct=np.full_like(experiment.measured.correct, np.nan))
    assert outcome(measured_on(experiment, unknown), "oracle").summary()["correctness_pct"] is None


@pytest.mark.parametrize("scheme", ["base", "co2_opt", "sprout", "sprout_task", "oracle"])
def test_an_unknown_figure_is_null_with_a_note_and_never_nan(experiment, scheme):
    never = np.maximum(experiment.measured.preferred, 1)
    wrong = experiment.measured.correct.copy()
    wrong[:, 0] = 0.0
    lacking = measured_on(experiment, replace(experiment.measured, preferred=never, correct=wrong))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = outcome(lacking, scheme).summary()
    json.dumps(found, allow_nan=False)
    if scheme == "base":
        assert (found["preference_pct"], found["notes"]) == (100.0, [])
        return
    assert found["preference_pct"] is found["correctness_pct"] is found["hours_bound_kept_pct"] is None
    assert [note.split(" is null")[0] for note in found["notes"]] == ["preference_pct", "correctness_pct"]
    assert found["notes"][0].endswith(f"of {HOURS} hours the reference is never preferred on a measured prompt")


@pytest.mark.parametrize("scheme", ["sprout", "oracle"])
def test_a_task_that_was_not_measured_is_refused(experiment, scheme):
    one_task = experiment.measured.taken(experiment.measured.task == 0)
    with pytest.raises(SimulationInputError, match="the mix has task sums, for which there is no prompt"):
        outcome(measured_on(experiment, one_task), scheme)


@pytest.mark.parametrize("scheme", ["base", "co2_opt", "model_opt", "oracle"])
def test_where_nothing_is_learned_folds_measure_what_all_prompts_do(experiment, scheme):
    prompts = measured(600)
    whole = replace(experiment, folds=(Fold(prompts, prompts),))
    in_three = outcome(in_folds(experiment, prompts, 3), scheme, xi=0.0)
    at_once = outcome(whole, scheme, xi=0.0)
    assert in_three.base_grams == pytest.approx(at_once.base_grams)
    assert in_three.preference == pytest.approx(at_once.preference)
    assert in_three.grams == pytest.approx(at_once.grams)
    assert in_three.standard_errors == pytest.approx(at_once.standard_errors)


def test_every_fold_is_served_by_what_was_learned_from_the_others(experiment):
    prompts = measured(600)
    halves = [replace(experiment, folds=(Fold(learn, test),)) for learn, test in prompts.folds(1, 2)]
    first, second = (outcome(half, "sprout_task") for half in halves)
    both = outcome(in_folds(experiment, prompts, 2), "sprout_task")
    assert min(first.saving_pct, second.saving_pct) < both.saving_pct < max(first.saving_pct, second.saving_pct)
    assert both.standard_errors["preference"] == pytest.approx(first.standard_errors["preference"] / 2**0.5, rel=0.1)
    assert both.evaluation_hours == first.evaluation_hours == second.evaluation_hours
    assert both.evaluator_grams.mean() == pytest.approx(
        (first.evaluator_grams.mean() + second.evaluator_grams.mean()) / 2
    )


def test_hours_without_a_choice_are_the_mean_over_the_folds(experiment):
    few = replace(experiment, optimizer=OptimizerSettings(holdout=0.0, min_trials=1e6))
    in_three = outcome(in_folds(few, measured(600), 3), "sprout").summary()
    assert in_three["fallback_hours"] == HOURS
    assert set(in_three["withheld_hours"].values()) == {HOURS}


def test_the_page_and_the_summary_agree(experiment, usual):
    found = [usual("sprout"), usual("sprout_task")]
    plots = {plot.title: plot.figure for plot in figures(found)}
    for title, key in (("Saving by zone", "carbon_saving_pct"), ("Evaluator", "evaluator_share_pct")):
        shown = {bar.name: bar.y[0] for bar in plots[title].data}
        assert shown == {one.scheme: pytest.approx(one.summary()[key]) for one in found}
    # BASE was not simulated; its time is known.
    whole = float(
        experiment.mix[0] @ [experiment.measured.time_s[experiment.measured.task == task, 0].mean() for task in (0, 1)]
    )
    throughput = plots["Throughput"].data[0]
    assert list(throughput.y) == pytest.approx([100.0 * whole / one.processing_s.mean() for one in found])
    assert min(throughput.y) > 100.0


def test_the_page_reports_unknown_figures_and_hours_without_a_choice(experiment):
    few = replace(experiment, optimizer=OptimizerSettings(holdout=0.0, min_trials=1e6))
    never = measured_on(
        experiment, replace(experiment.measured, preferred=np.maximum(experiment.measured.preferred, 1))
    )
    lacking = outcome(never, "sprout_task")
    page = render_page([outcome(few, "sprout"), lacking])
    assert f"In {HOURS} hours of all runs only the reference could be served: too few judged prompts" in page
    assert "1 runs lack figures; summary.json says why." in page
    assert "NaN" not in json.dumps(lacking.summary())


def test_the_standard_error_is_shown_beside_the_quality(usual):
    """Levels are measured on prompts; for two models only shares are known."""
    levels, models = usual("sprout_task"), usual("model_opt")
    found = levels.summary()
    assert 1.0 < found["preference_se_pct"] < 20.0
    assert 0.1 < found["correctness_se_pct"] < 10.0
    assert models.summary()["preference_se_pct"] is models.summary()["correctness_se_pct"] is None
    page = render_page([levels])
    assert f"± {found['preference_se_pct']:.1f} %" in page
    assert "± is one standard error of a quality" in page
    assert "±" not in render_page([models, usual("base")])
