"""Judged prompts of two kinds: questions with a preferred brief answer, sums with a preferred long answer."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np

from services.evaluator.cost import EnergyByPool
from services.evaluator.quality import JudgedPrompt
from services.evaluator.training import LearnedGrouping, TrainingSet, learn_grouping
from tests.support.evaluator import judged_answer, judged_prompt

CITIES = ("Oslo", "Lima", "Cairo", "Delhi", "Quito", "Seoul", "Tunis", "Dakar", "Hanoi", "Minsk")
THINGS = ("apples", "marbles", "stamps", "coins", "books", "shells", "cards", "beads", "pens", "keys")
NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)


def question(rng: np.random.Generator) -> str:
    return f"Which country is the city of {rng.choice(CITIES)} the capital of?"


def sum_of(rng: np.random.Generator) -> str:
    return f"Ann has {rng.integers(2, 90)} {rng.choice(THINGS)} and gives {rng.integers(1, 9)} away. How many remain?"


def judged_kinds(count: int, *, seed: int, pool: str = "p") -> list[JudgedPrompt]:
    """Judged questions and sums alternately, over two days; the strata are called question and sum."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        kind = ("question", "sum")[number % 2]
        text = question(rng) if kind == "question" else sum_of(rng)
        brief = rng.random() < {"question": 0.9, "sum": 0.1}[kind]
        answers = [
            judged_answer("L0", options=[f"{pool}/L0"], tokens=80, preference=float(not brief)),
            judged_answer("L1", options=[f"{pool}/L1"], tokens=30, preference=float(brief)),
        ]
        at = NOW - timedelta(days=1) if number < count // 2 else NOW
        made.append(judged_prompt(f"s{seed}-{number}", answers=answers, text=text, stratum=kind, at=at))
    return made


def learned_grouping(
    model: str,
    prompts: Sequence[JudgedPrompt],
    *,
    traffic: Mapping[str, float] | None = None,
    energy: EnergyByPool | None = None,
    learn_from: int = 3_000,
) -> LearnedGrouping:
    """Groups learned from prompts that were judged at L0 and L1."""
    judged = TrainingSet.select(prompts, ("L0", "L1"), minimum=0)
    return learn_grouping(
        model, judged, learn_from=learn_from, traffic=traffic or {}, energy=energy or {}, learned_at=NOW
    )
