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


LEVELS = ("L0", "L1", "L2")
NOTHING = np.zeros((1, 3))
SERVED = [np.tile(row, (2, 1)) for row in np.eye(3)]
"""Everything is served at one level."""


def preferences(counts: Iterable[QualityCount]) -> list[QualityCount]:
    return [one for one in counts if one.metric == "preference"]


def wins(judge: LevelJudge, prompts: int, rng: np.random.Generator, *, at_s: float) -> np.ndarray:
    """How often each level is preferred among prompts of the first task, in one evaluation."""
    counts = judge.draw(np.array([1.0, 0.0]), prompts, rng, served=NOTHING, at_s=at_s).counts
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
    counts.add_counts(judge.evaluate_all(at_s=0.0).counts, {}, at_s=0.0)
    for hour in range(1, 20):
        found = judge.draw(np.array([0.5, 0.5]), 100, rng, served=NOTHING, at_s=hour * 600.0)
        assert {used.requests for row in found.answers.values() for used in row.values()} == {100.0}
        for count in found.counts:
            assert count.paired is not None
            assert count.paired.both <= min(count.successes, count.paired.successes) <= count.trials
        counts.add_counts(found.counts, {}, at_s=hour * 600.0)
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


def test_an_evaluation_draws_by_the_mix_and_generates_what_was_not_served():
    learn = measured(200)
    cost = JudgeCost(energy_j=3.6e6, time_s=1.0, differing_share=0.5)
    mix = np.array([0.25, 0.75])
    by_level = [by_task(learn, cost).draw(mix, 80, np.random.default_rng(1), served=one, at_s=0.0) for one in SERVED]
    requests = {task: {used.requests for used in row.values()} for task, row in by_level[0].answers.items()}
    assert sum(next(iter(counts)) for counts in requests.values()) == 80
    assert 8 <= next(iter(requests["facts"])) <= 32
    # The judge is asked for two of the three orders, and for the third one on half of the prompts.
    answers_kwh = [sum(row[f"pool/{level}"].energy_kwh for row in by_level[0].answers.values()) for level in LEVELS]
    for level, found in enumerate(by_level):
        assert found.energy_kwh == pytest.approx(80.0 * 2.5 + sum(answers_kwh) - answers_kwh[level])
        assert found.time_s > 80.0 * 2.5


def test_before_the_first_policy_the_reference_was_served():
    learn = measured(60)
    found = one_group(learn).evaluate_all(at_s=0.0)
    levels = found.answers["all"]
    generated = levels["pool/L1"].energy_kwh + levels["pool/L2"].energy_kwh
    assert found.energy_kwh == pytest.approx(generated + JudgeCost().of(60, answers=3)[0])


def test_orders_of_the_judge_beyond_a_majority_are_asked_where_votes_differ():
    learn, cost, mix = measured(60), JudgeCost(), np.array([0.5, 0.5])
    assert cost.of(1, answers=1) == pytest.approx((600 * 0.3 / 3.6e6, 600 * 0.0003))
    assert cost.of(20, answers=2)[1] == pytest.approx(40 * 600 * 0.0003)
    assert cost.of(20, answers=3)[1] == pytest.approx((40 + 0.47 * 20) * 600 * 0.0003)
    served = np.array([[0.25, 0.75]])
    judge = ModelJudge(learn, np.array([0.5, 0.5]), bootstrap_prompts=10, cost=cost)
    found = judge.draw(mix, 20, np.random.default_rng(1), served=served, at_s=0.0)
    large, small = found.answers["all"].values()
    generated = 0.75 * large.energy_kwh + 0.25 * small.energy_kwh
    assert found.energy_kwh == pytest.approx(generated + cost.of(20, answers=2)[0])
