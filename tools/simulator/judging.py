"""What evaluations find, and what they take: draws of prompts that may be learned from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from services.optimizer.decay import fading
from shared.messages import Paired, QualityCount
from tools.simulator.measured import JOULES_PER_KWH, REFERENCE, Flags, Floats, Ints, Measured
from tools.simulator.world import CORRECTNESS, POOL, PREFERENCE, SMALL_POOL


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCost:
    """What one call of the judge takes. A prompt takes as many calls as it has answers: the evaluator shows them in all
    their cyclic rotations (docs/decisions/0005).

    The default is a prompt of 600 tokens at 0.3 J and 0.3 ms each, as the project's stand-in judge has them; the one
    token that it answers with is not counted.
    """

    energy_j: float = 600 * 0.3
    time_s: float = 600 * 0.0003

    def of(self, prompts: int, *, answers: int) -> tuple[float, float]:
        """(kWh, s) for judging some prompts."""
        calls = prompts * answers
        return calls * self.energy_j / JOULES_PER_KWH, calls * self.time_s


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """Of one evaluation.

    Attributes:
        counts: as the evaluator publishes them.
        taken: (requests, kWh, s) by group, then option: the generations.
        judging_kwh, judging_s: the judge's part.
    """

    counts: tuple[QualityCount, ...]
    taken: Mapping[str, Mapping[str, tuple[float, float, float]]]
    judging_kwh: float
    judging_s: float

    @property
    def energy_kwh(self) -> float:
        """Of all calls."""
        return self.judging_kwh + sum(cell[1] for row in self.taken.values() for cell in row.values())

    @property
    def time_s(self) -> float:
        """Of all calls."""
        return self.judging_s + sum(cell[2] for row in self.taken.values() for cell in row.values())


class Judge(Protocol):
    """Evaluates prompts."""

    def study(self, *, at_s: float) -> Findings:
        """All prompts that may be learned from, once: what is known before the first request."""
        ...

    def draw(self, mix: Floats, prompts: int, rng: np.random.Generator, *, at_s: float) -> Findings:
        """Some prompts, drawn by the shares of the tasks, each answered under every option."""
        ...


class LevelJudge:
    """Judges one model's levels by the recorded verdicts.

    A verdict that comes again tells nothing new. It counts for as much as has been forgotten since its last count, so
    that a prompt never counts as more than one, however often it is drawn. Its generations and calls are taken anew.

    An evaluator draws from the traffic, and there may be more prompts of a task than its share of what is asked. In a
    group of several tasks, prompts therefore count by how often theirs is asked, those of the rarest judged ones fully.
    """

    def __init__(
        self,
        learn: Measured,
        group: Ints,
        groups: tuple[str, ...],
        cost: JudgeCost,
        *,
        asked: Floats,
        half_life_s: float,
    ) -> None:
        """Take the prompts that may be learned from.

        Args:
            group: of every prompt, as a grouping would assign it that had not seen it.
            asked: share of the traffic by task.
            half_life_s: of a count.
        """
        judged = learn.judged
        self._learn = learn.taken(judged)
        self._group = group[judged]
        self._groups = groups
        self._cost = cost
        self._options = tuple(f"{POOL}/{level}" for level in learn.levels)
        self._by_task = [np.flatnonzero(self._learn.task == task) for task in range(len(learn.tasks))]
        self._fresh = [np.empty(0, dtype=np.int64) for _ in self._by_task]
        self._counts = _counting(self._learn, self._group, asked)
        self._half_life_s = half_life_s
        self._counted_at_s = np.full(len(self._learn), np.nan)

    def study(self, *, at_s: float) -> Findings:
        """See `Judge`."""
        return self._findings(np.arange(len(self._learn)), at_s)

    def draw(self, mix: Floats, prompts: int, rng: np.random.Generator, *, at_s: float) -> Findings:
        """See `Judge`; a task without a judged prompt is left out.

        No prompt comes again before all of its task have come: traffic seldom asks the same twice.
        """
        there = np.array([len(rows) > 0 for rows in self._by_task])
        shares = np.where(there, mix, 0.0)
        numbers = rng.multinomial(prompts, shares / shares.sum())
        rows = [self._next(task, number, rng) for task, number in enumerate(numbers) if number]
        return self._findings(np.concatenate(rows), at_s)

    def _next(self, task: int, number: int, rng: np.random.Generator) -> Ints:
        while len(self._fresh[task]) < number:
            self._fresh[task] = np.concatenate([self._fresh[task], rng.permutation(self._by_task[task])])
        drawn, self._fresh[task] = np.split(self._fresh[task], [number])
        return np.asarray(drawn)

    def _news(self, rows: Ints, at_s: float) -> Floats:
        """How much of a verdict each counts as; one that comes twice in a draw counts once."""
        once, first = np.unique(rows, return_index=True)
        forgotten = [
            1.0 if math.isnan(before) else 1.0 - fading(at_s - before, self._half_life_s)
            for before in self._counted_at_s[once]
        ]
        self._counted_at_s[once] = at_s
        news = np.zeros(len(rows))
        news[first] = self._counts[once] * forgotten
        return news

    def _findings(self, rows: Ints, at_s: float) -> Findings:
        learn, group, news = self._learn, self._group[rows], self._news(rows, at_s)
        counts: list[QualityCount] = []
        taken: dict[str, dict[str, tuple[float, float, float]]] = {}
        for place in np.unique(group):
            here = group == place
            name, mine, new = self._groups[place], rows[here], news[here]
            told = learn.checkable[mine]
            taken[name] = {}
            for level, option in enumerate(self._options):
                preferred = learn.preferred[mine]
                counts.append(_count(name, option, PREFERENCE, preferred == level, preferred == 0, weights=new))
                if told.any():
                    right = learn.correct[mine[told]]
                    counts.append(_count(name, option, CORRECTNESS, right[:, level], right[:, 0], weights=new[told]))
                energy, time_s = learn.energy_kwh[mine, level], learn.time_s[mine, level]
                taken[name][option] = (float(len(mine)), float(energy.sum()), float(time_s.sum()))
        return Findings(tuple(counts), taken, *self._cost.of(len(rows), answers=len(self._options)))


class ModelJudge:
    """Judges two models against each other by the tasks' shares of preference."""

    def __init__(self, learn: Measured, large_preferred: Floats, *, study_prompts: int, cost: JudgeCost) -> None:
        self._large = large_preferred
        self._prompts = study_prompts
        self._cost = cost
        small_kwh, small_s = learn.small_kwh, learn.small_s
        if small_kwh is None or small_s is None:
            raise ValueError("no smaller model was measured")
        shares = np.bincount(learn.task, minlength=len(learn.tasks))
        self._study_mix = shares / shares.sum()
        by_task = [learn.task == task for task in range(len(learn.tasks))]
        self._energy = np.array([[learn.energy_kwh[t, 0].mean(), small_kwh[t].mean()] for t in by_task])
        self._time = np.array([[learn.time_s[t, 0].mean(), small_s[t].mean()] for t in by_task])

    def study(self, *, at_s: float) -> Findings:  # noqa: ARG002
        """See `Judge`."""
        return self._findings(self._study_mix, float(self._study_mix @ self._large) * self._prompts, self._prompts)

    def draw(self, mix: Floats, prompts: int, rng: np.random.Generator, *, at_s: float) -> Findings:  # noqa: ARG002
        """See `Judge`; every verdict is a new one."""
        return self._findings(mix, float(rng.binomial(prompts, float(mix @ self._large))), prompts)

    def _findings(self, mix: Floats, won: float, prompts: int) -> Findings:
        options = (f"{POOL}/L0", f"{SMALL_POOL}/L0")
        energy, time_s = prompts * (mix @ self._energy), prompts * (mix @ self._time)
        counts = tuple(
            QualityCount(
                group="all",
                option=option,
                metric=PREFERENCE,
                successes=wins,
                trials=prompts,
                paired=Paired(reference=options[0], successes=won, both=both),
            )
            for option, wins, both in ((options[0], won, won), (options[1], prompts - won, 0.0))
        )
        taken = {
            "all": {
                option: (float(prompts), float(energy[place]), float(time_s[place]))
                for place, option in enumerate(options)
            }
        }
        return Findings(counts, taken, *self._cost.of(prompts, answers=len(options)))


def _counting(learn: Measured, group: Ints, asked: Floats) -> Floats:
    """How much of a verdict every prompt counts as, before any is forgotten."""
    often = (asked / np.maximum(learn.prompts_of_tasks(), 1))[learn.task]
    most = np.zeros(group.max() + 1)
    np.maximum.at(most, group, often)
    # Of a group that is never asked for it does not matter.
    return np.divide(often, most[group], out=np.ones(len(often)), where=most[group] > 0.0)


def _count(
    group: str, option: str, metric: str, won: Flags | Floats, reference_won: Flags | Floats, *, weights: Floats
) -> QualityCount:
    return QualityCount(
        group=group,
        option=option,
        metric=metric,
        successes=float(weights @ won),
        trials=float(weights.sum()),
        paired=Paired(
            reference=f"{POOL}/{REFERENCE}",
            successes=float(weights @ reference_won),
            both=float(weights @ (won * reference_won)),
        ),
    )
