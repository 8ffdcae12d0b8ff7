"""Simulated evaluations of measured prompts."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from services.optimizer.settings import OptimizerSettings
from services.optimizer.state import QualityCounts
from shared.messages import QualityCount
from tests.support.simulator import measured
from tools.simulator.evaluation import JudgeCost, LevelJudge, ModelJudge
from tools.simulator.requests import Floats, Measured

HALF_LIFE_S = 3600.0


def one_group(
    learn: Measured, cost: JudgeCost | None = None, *, traffic: Floats | None = None, half_life_s: float = HALF_LIFE_S
) -> LevelJudge:
    """A judge of one group; by default the tasks have the same shares of the traffic as of the prompts."""
    shares = learn.prompts_of_tasks() / len(learn) if traffic is None else traffic
    group, cost = np.zeros(len(learn), dtype=np.int64), cost or JudgeCost()
    return LevelJudge(learn, group, ("all",), cost, traffic=shares, half_life_s=half_life_s)


def by_task(learn: Measured, cost: JudgeCost | None = None) -> LevelJudge:
    traffic = np.array([0.1, 0.9])
    return LevelJudge(learn, learn.task, learn.tasks, cost or JudgeCost(), traffic=traffic, half_life_s=HALF_LIFE_S)


def preferences(counts: Iterable[QualityCount]) -> list[QualityCount]:
    return [one for one in counts if one.metric == "preference"]


def wins(judge: LevelJudge, prompts: int, rng: np.random.Generator, *, at_s: float) -> np.ndarray:
    """How often each level is preferred among prompts of the first task, in one evaluation."""
    counts = judge.draw(np.array([1.0, 0.0]), prompts, rng, at_s=at_s).counts
    return np.array([one.successes for one in preferences(counts)])


def test_no_prompt_is_judged_again_before_all_others_of_its_task_were():
    learn = measured(60)
    facts = learn.task == 0
    judge, rng, size = one_group(learn), np.random.default_rng(3), int(facts.sum())
    every = np.array([(learn.preferred[facts] == level).sum() for level in range(3)])
    assert wins(judge, 7, rng, at_s=0.0) + wins(judge, size - 7, rng, at_s=0.0) == pytest.approx(every)
    # A half-life later, each judgment counts again for the half that has decayed.
    halves = wins(judge, 5, rng, at_s=HALF_LIFE_S) + wins(judge, size - 5, rng, at_s=HALF_LIFE_S)
    assert halves == pytest.approx(every / 2)
    assert wins(judge, 2 * size, rng, at_s=3 * HALF_LIFE_S) == pytest.approx(every * 3 / 4)


def test_a_prompt_never_counts_as_more_than_one():
    learn, rng = measured(60), np.random.default_rng(7)
    judge = one_group(learn)
    settings = OptimizerSettings(
        quality_half_life_h=HALF_LIFE_S / 3600.0, pseudo_trials=1, prior_trials=1, min_trials=1
    )
    counts = QualityCounts(settings=settings)
    counts.add_counts(judge.evaluate_all(at_s=0.0).counts, at_s=0.0)
    for hour in range(1, 20):
        found = judge.draw(np.array([0.5, 0.5]), 100, rng, at_s=hour * 600.0)
        assert {used.requests for row in found.generations.values() for used in row.values()} == {100.0}, (
            "generations are charged again"
        )
        for count in found.counts:
            assert count.paired is not None
            assert count.paired.both <= min(count.successes, count.paired.successes) <= count.trials
        counts.add_counts(found.counts, at_s=hour * 600.0)
    model = counts.model("preference", "pool/L0", 19 * 600.0)
    assert 55.0 < model.trials("pool/L0") <= 60.0


def test_reused_judgments_have_the_same_weight_in_every_group_and_metric():
    requests = measured(60)
    correct = np.where((np.arange(60) % 4 == 0)[:, None], np.nan, requests.correct)
    learn = replace(requests, correct=correct)
    judge = by_task(learn)
    first = judge.evaluate_all(at_s=0.0).counts
    again = judge.evaluate_all(at_s=HALF_LIFE_S).counts
    assert {one.metric for one in first} == {"preference", "correctness"}
    assert {one.group for one in first} == {"facts", "sums"}
    for before, after in zip(first, again, strict=True):
        assert before.paired is not None
        assert after.paired is not None
        assert (after.group, after.option, after.metric) == (before.group, before.option, before.metric)
        assert [after.successes, after.trials, after.paired.successes, after.paired.both] == pytest.approx(
            [before.successes / 2, before.trials / 2, before.paired.successes / 2, before.paired.both / 2]
        )
    checkable = sum(one.trials for one in first if one.metric == "correctness" and one.option == "pool/L0")
    assert checkable == 45.0


def test_in_a_group_of_several_tasks_prompts_are_weighted_by_the_traffic_of_their_task():
    learn = measured(400)
    of_task = learn.prompts_of_tasks()
    counts = preferences(one_group(learn, traffic=np.array([0.2, 0.8])).evaluate_all(at_s=0.0).counts)
    # All sums, and as many facts as would have been drawn with them from the traffic.
    assert [one.trials for one in counts] == pytest.approx([of_task[1] * 1.25] * 3)
    shares = [np.mean(learn.preferred[learn.task == task] == 0) for task in (0, 1)]
    assert counts[0].successes / counts[0].trials == pytest.approx(0.2 * shares[0] + 0.8 * shares[1])
    alone = one_group(learn, traffic=np.array([0.0, 1.0])).evaluate_all(at_s=0.0).counts
    assert {one.trials for one in preferences(alone)} == {float(of_task[1])}
    # A group with one task is independent of the traffic of other tasks.
    by_group = preferences(by_task(learn).evaluate_all(at_s=0.0).counts)
    assert {one.group: one.trials for one in by_group} == dict(zip(learn.tasks, map(float, of_task), strict=True))


def test_without_decay_a_judgment_counts_once():
    judge = one_group(measured(60), half_life_s=np.inf)
    trials = [{one.trials for one in judge.evaluate_all(at_s=at_s).counts} for at_s in (0.0, 3600.0)]
    assert trials == [{60.0}, {0.0}]


def test_an_evaluation_draws_by_the_mix_and_uses_energy_at_every_level():
    learn = measured(200)
    cost = JudgeCost(energy_j=3.6e6, time_s=1.0)
    judge = by_task(learn, cost)
    found = judge.draw(np.array([0.25, 0.75]), 80, np.random.default_rng(1), at_s=0.0)
    requests = {task: {used.requests for used in row.values()} for task, row in found.generations.items()}
    assert sum(next(iter(counts)) for counts in requests.values()) == 80
    assert 8 <= next(iter(requests["facts"])) <= 32
    assert found.judging_kwh == pytest.approx(80.0 * 3)
    assert found.judging_s == pytest.approx(80.0 * 3)
    assert found.energy_kwh > found.judging_kwh


def test_the_judge_is_called_once_for_each_cyclic_order_of_the_answers():
    learn, cost, mix = measured(60), JudgeCost(), np.array([0.5, 0.5])
    assert cost.of(1, answers=1) == pytest.approx((600 * 0.3 / 3.6e6, 600 * 0.0003))
    two_levels = replace(learn, levels=learn.levels[:2], correct=learn.correct[:, :2])
    rng = np.random.default_rng(1)
    for requests, answers in ((learn, 3), (two_levels, 2)):
        found = one_group(requests, cost).draw(mix, 20, rng, at_s=0.0)
        assert (found.judging_kwh, found.judging_s) == pytest.approx(cost.of(20, answers=answers))
    models = ModelJudge(learn, np.array([0.5, 0.5]), bootstrap_prompts=10, cost=cost).draw(mix, 20, rng, at_s=0.0)
    assert (models.judging_kwh, models.judging_s) == pytest.approx(cost.of(20, answers=2))
