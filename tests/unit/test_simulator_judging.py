"""What evaluations find on measured prompts."""

from dataclasses import replace

import numpy as np
import pytest
from simulator_support import measured

from simulator.judging import JudgeCost, LevelJudge, ModelJudge


def wins(judge: LevelJudge, mix: list[float], prompts: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Prompts preferred at each level, by one evaluation."""
    counts = judge.draw(np.array(mix), prompts, rng).counts
    return tuple(one.successes for one in counts if one.metric == "preference")


def test_no_prompt_is_judged_again_before_all_of_its_task_have_been():
    learn = measured(60)
    facts = learn.task == 0
    judge = LevelJudge(learn, np.zeros(60, dtype=np.int64), ("all",), JudgeCost())
    rng = np.random.default_rng(3)
    size = int(facts.sum())
    every = tuple(float((learn.preferred[facts] == level).sum()) for level in range(3))
    parts = [wins(judge, [1.0, 0.0], part, rng) for part in (7, size - 7, size, 5, 2 * size - 5)]
    assert tuple(map(sum, zip(*parts[:2], strict=True))) == every
    assert parts[2] == every
    assert tuple(map(sum, zip(*parts[3:], strict=True))) == tuple(2 * one for one in every)


def test_an_evaluation_draws_by_the_mix_and_takes_energy_at_every_level():
    learn = measured(200)
    judge = LevelJudge(learn, learn.task, learn.tasks, JudgeCost(energy_j=3.6e6, time_s=1.0))
    found = judge.draw(np.array([0.25, 0.75]), 80, np.random.default_rng(1))
    asked = {task: {cell[0] for cell in row.values()} for task, row in found.taken.items()}
    assert sum(next(iter(counts)) for counts in asked.values()) == 80
    assert 8 <= next(iter(asked["facts"])) <= 32
    assert found.judging_kwh == pytest.approx(80.0 * 3)
    assert found.judging_s == pytest.approx(80.0 * 3)
    assert found.energy_kwh > found.judging_kwh


def test_the_judge_is_asked_once_for_each_rotation_of_the_answers():
    learn, cost, mix = measured(60), JudgeCost(), np.array([0.5, 0.5])
    assert cost.of(1, answers=1) == pytest.approx((600 * 0.3 / 3.6e6, 600 * 0.0003))
    two_levels = replace(learn, levels=learn.levels[:2], correct=learn.correct[:, :2])
    one_group, rng = np.zeros(60, dtype=np.int64), np.random.default_rng(1)
    for requests, answers in ((learn, 3), (two_levels, 2)):
        found = LevelJudge(requests, one_group, ("all",), cost).draw(mix, 20, rng)
        assert (found.judging_kwh, found.judging_s) == pytest.approx(cost.of(20, answers=answers))
    models = ModelJudge(learn, np.array([0.5, 0.5]), study_prompts=10, cost=cost).draw(mix, 20, rng)
    assert (models.judging_kwh, models.judging_s) == pytest.approx(cost.of(20, answers=2))
