"""What evaluations find on measured prompts."""

import numpy as np
import pytest
from simulator_support import measured

from simulator.judging import JudgeCost, LevelJudge


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
    assert found.judging_kwh == pytest.approx(80.0)
    assert found.energy_kwh > found.judging_kwh
