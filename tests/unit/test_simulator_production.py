"""The schemes as they run in production: what each may choose, what is charged, and that the future is not known."""

from dataclasses import replace

import numpy as np
import pytest
from simulator_support import grid, measured

from services.optimizer.settings import OptimizerSettings
from simulator.errors import SimulationInputError
from simulator.grid import Grid
from simulator.outcome import Outcome
from simulator.schemes import Study, run
from simulator.traffic import constant_mix

HOURS = 96
START = 200


@pytest.fixture(scope="module")
def study() -> Study:
    learn, test = measured(600).halves(1)
    return Study(
        variant="production",
        learn=learn,
        measured=test,
        mix=constant_mix(test, hours=HOURS),
        optimizer=OptimizerSettings(holdout=0.0),
        large_preferred=np.array([0.55, 0.6]),
    )


def outcome(study: Study, scheme: str, *, xi: float = 0.1, on: Grid | None = None, **more: float) -> Outcome:
    return run(study, scheme, (on or grid()).window(START, HOURS), {"preference": xi, **more})


def test_the_reference_saves_nothing_and_is_never_judged(study):
    base = outcome(study, "base")
    assert base.saving_pct == pytest.approx(0.0)
    assert base.kept_pct is None
    assert base.evaluator_grams.sum() == 0.0


def test_the_cheapest_level_saves_most_and_the_program_keeps_more_quality(study):
    cheapest, sprout, by_task = (outcome(study, scheme) for scheme in ("co2_opt", "sprout", "sprout_task"))
    assert cheapest.saving_pct > by_task.saving_pct > sprout.saving_pct > 0.0
    assert cheapest.preference.mean() < sprout.preference.mean()
    assert by_task.preference.mean() > 0.9


def test_a_stricter_bound_saves_less(study):
    savings = [outcome(study, "sprout_task", xi=xi).saving_pct for xi in (0.0, 0.1, 0.3)]
    assert savings == sorted(savings)
    assert savings[0] < savings[-1]


def test_a_bound_on_correctness_costs_saving_and_keeps_answers_right(study):
    free, bound = outcome(study, "sprout_task", xi=0.3), outcome(study, "sprout_task", xi=0.3, correctness=0.02)
    assert bound.saving_pct < free.saving_pct
    assert bound.correctness.mean() > free.correctness.mean()
    assert bound.correctness_bound is not None
    assert bound.correctness_bound.min() == pytest.approx(0.98, abs=0.002)  # nearly the dirtiest hour


@pytest.mark.parametrize("scheme", ["sprout", "sprout_task", "model_opt", "sprout_sta"])
def test_nothing_is_known_of_the_future(study, scheme):
    known = grid()
    other = known.g_per_kwh.copy()
    other[START + 48 :] = other[START + 48 :][::-1] * 3.0
    before, after = outcome(study, scheme, on=known), outcome(study, scheme, on=replace(known, g_per_kwh=other))
    np.testing.assert_allclose(before.mix[:48], after.mix[:48])
    assert [hour for hour in before.evaluation_hours if hour < 48] == [
        hour for hour in after.evaluation_hours if hour < 48
    ]


def test_evaluations_are_charged_at_the_grid_that_they_ran_on(study):
    sprout = outcome(study, "sprout")
    assert sprout.evaluation_hours
    assert set(np.flatnonzero(sprout.evaluator_grams)) == {0, *sprout.evaluation_hours}
    summary = sprout.summary()
    assert summary["evaluator_share_pct"] > 0.0
    assert summary["mean_gco2_per_request"] == pytest.approx(sprout.grams.mean() + sprout.evaluator_grams.mean())


def test_the_static_scheme_never_changes_its_mind(study):
    static = outcome(study, "sprout_sta")
    np.testing.assert_allclose(static.mix, np.tile(static.mix[0], (HOURS, 1)))
    assert static.evaluation_hours == ()


def test_two_models_share_the_traffic_of_model_opt(study):
    models = outcome(study, "model_opt", xi=0.3)
    assert 0.0 < models.saving_pct < 40.0
    assert models.mix.sum(axis=1) == pytest.approx(1.0)
    with pytest.raises(SimulationInputError, match="needs --model-preference"):
        outcome(replace(study, large_preferred=None), "model_opt")


def test_the_same_seed_gives_the_same_figures(study):
    assert outcome(study, "sprout_task").summary() == outcome(study, "sprout_task").summary()
