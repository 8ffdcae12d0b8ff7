"""Simulated evaluations: judged outcomes of drawn prompts, and the energy and time that they use."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from services.evaluator.budget import MIN_PROMPTS
from services.evaluator.judges import majority
from services.evaluator.plan import thin
from services.optimizer.costs import ResourceUse, decay_factor
from shared.carbon import JOULES_PER_KWH
from shared.messages import Paired, QualityCount
from tools.simulator.requests import REFERENCE, Flags, Floats, Ints, Measured
from tools.simulator.world import CORRECTNESS, POOL, PREFERENCE, SMALL_POOL


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCost:
    """Energy and time of one call of the judge.

    The default is a prompt of 600 tokens at 0.3 J and 0.3 ms each, as in the project's stand-in judge; the one
    generated token is not counted. The evaluator asks further orders only where the first votes differ. How often that
    happens follows from the positions that a judge names when the order is random: the paper's judge named the first,
    second and third answer in 972, 648 and 380 of 2,000 votes. So at least 1 - 3 * 380 / 2,000 = 43 % of the votes
    followed the position. If these are votes on certain prompts, the votes of two orders differ on 34 % of all prompts;
    if every vote follows the position with that probability, on 47 %. The larger share costs more, and is the default.
    """

    energy_j: float = 600 * 0.3
    time_s: float = 600 * 0.0003
    differing_share: float = 0.47

    def of(self, prompts: int, *, answers: int) -> tuple[float, float]:
        """(kWh, s) of judging some prompts."""
        always = majority(answers)
        calls = prompts * (always + self.differing_share * (answers - always))
        return calls * self.energy_j / JOULES_PER_KWH, calls * self.time_s


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """Result of one evaluation.

    Attributes:
        prompts: that were evaluated.
        counts: as the evaluator publishes them.
        answers: energy and time of all judged answers, by group, then option.
        energy_kwh, time_s: of the evaluator: of its judge, and of the answers that it generated.
    """

    prompts: int
    counts: tuple[QualityCount, ...]
    answers: Mapping[str, Mapping[str, ResourceUse]]
    energy_kwh: float
    time_s: float


@dataclass(frozen=True, slots=True)
class Thinning:
    """Groups whose decision is settled, and the share of their prompts that is evaluated all the same."""

    settled: frozenset[str] = frozenset()
    share: float = 1.0

    def kept(self, groups: Sequence[str], rng: np.random.Generator) -> Ints:
        """Places of the prompts to evaluate, of prompts of some groups."""
        names = {str(place): group for place, group in enumerate(groups)}
        kept = thin(names, self.settled, share=self.share, minimum=MIN_PROMPTS, draw=lambda _: float(rng.random()))
        return np.array(sorted(map(int, kept)), dtype=np.int64)


ALL: Final = Thinning()
"""Every drawn prompt is evaluated."""


class Judge(Protocol):
    """Evaluates prompts. Of every prompt one answer was served and is not generated again."""

    def evaluate_all(self, *, at_s: float) -> Findings:
        """Evaluate all prompts to learn from once: the bootstrap evaluation before the first policy."""
        ...

    def draw(
        self,
        mix: Floats,
        prompts: int,
        rng: np.random.Generator,
        *,
        served: Floats,
        at_s: float,
        thinning: Thinning = ALL,
    ) -> Findings:
        """Evaluate `prompts` prompts drawn by `mix`, (tasks,), each answered under every option.

        Args:
            served: (G, O), probabilities with which the prompts were served.
            thinning: groups of which only a share of the drawn prompts is evaluated.
        """
        ...


def _findings(
    counts: tuple[QualityCount, ...],
    answers: Mapping[str, Mapping[str, ResourceUse]],
    served: Mapping[str, Mapping[str, float]],
    cost: JudgeCost,
    *,
    prompts: int,
) -> Findings:
    options = max(len(row) for row in answers.values())
    energy_kwh, time_s = cost.of(prompts, answers=options)
    for group, row in answers.items():
        for option, used in row.items():
            generated = 1.0 - served.get(group, {}).get(option, 0.0)
            energy_kwh += generated * used.energy_kwh
            time_s += generated * used.processing_s
    return Findings(prompts, counts, answers, energy_kwh, time_s)


class LevelJudge:
    """Judges the levels of one model by the recorded verdicts.

    Judgments are reused, because there are more evaluations than prompts. A reused judgment only restores the weight
    that it lost to decay, so that a prompt never counts as more than one. It is charged again.

    A production evaluator draws from the traffic, whereas the measured prompts may have other shares of the tasks. In a
    group of several tasks, prompts are therefore weighted by the traffic share of their task per measured prompt; the
    largest such weight in a group is 1.
    """

    def __init__(
        self,
        learn: Measured,
        group: Ints,
        groups: tuple[str, ...],
        cost: JudgeCost,
        *,
        traffic: Floats,
        half_life_s: float,
    ) -> None:
        """Use the judged prompts of `learn`.

        Args:
            learn: prompts to learn from.
            group: place in `groups` of every prompt, as assigned by a model trained without it.
            groups: names.
            cost: of a judge call.
            traffic: (tasks,), share of the traffic.
            half_life_s: of a judgment.
        """
        judged = learn.judged
        self._learn = learn.taken(judged)
        self._group = group[judged]
        self._groups = groups
        self._cost = cost
        self._options = tuple(f"{POOL}/{level}" for level in learn.levels)
        self._by_task = [np.flatnonzero(self._learn.task == task) for task in range(len(learn.tasks))]
        self._fresh = [np.empty(0, dtype=np.int64) for _ in self._by_task]
        self._weights = _prompt_weights(self._learn, self._group, traffic)
        self._half_life_s = half_life_s
        self._counted_at_s = np.full(len(self._learn), np.nan)

    def evaluate_all(self, *, at_s: float) -> Findings:
        """See `Judge`."""
        served = np.zeros((len(self._groups), len(self._options)))
        served[:, 0] = 1.0
        return self._findings(np.arange(len(self._learn)), served, at_s)

    def draw(
        self,
        mix: Floats,
        prompts: int,
        rng: np.random.Generator,
        *,
        served: Floats,
        at_s: float,
        thinning: Thinning = ALL,
    ) -> Findings:
        """See `Judge`; a task without a judged prompt is left out.

        Prompts of a task are drawn without replacement until all were drawn: traffic seldom repeats a prompt.
        """
        has_prompts = np.array([len(rows) > 0 for rows in self._by_task])
        shares = np.where(has_prompts, mix, 0.0)
        numbers = rng.multinomial(prompts, shares / shares.sum())
        rows = np.concatenate([self._next(task, number, rng) for task, number in enumerate(numbers) if number])
        return self._findings(
            rows[thinning.kept([self._groups[place] for place in self._group[rows]], rng)], served, at_s
        )

    def _next(self, task: int, number: int, rng: np.random.Generator) -> Ints:
        while len(self._fresh[task]) < number:
            self._fresh[task] = np.concatenate([self._fresh[task], rng.permutation(self._by_task[task])])
        drawn, self._fresh[task] = np.split(self._fresh[task], [number])
        return np.asarray(drawn)

    def _judgment_weights(self, rows: Ints, at_s: float) -> Floats:
        """Weight of every drawn judgment; one that was drawn twice counts once."""
        once, first = np.unique(rows, return_index=True)
        decayed = [
            1.0 if math.isnan(before) else 1.0 - decay_factor(at_s - before, self._half_life_s)
            for before in self._counted_at_s[once]
        ]
        self._counted_at_s[once] = at_s
        weights = np.zeros(len(rows))
        weights[first] = self._weights[once] * decayed
        return weights

    def _findings(self, rows: Ints, served: Floats, at_s: float) -> Findings:
        learn, group, weights = self._learn, self._group[rows], self._judgment_weights(rows, at_s)
        counts: list[QualityCount] = []
        answers: dict[str, dict[str, ResourceUse]] = {}
        for place in np.unique(group):
            here = group == place
            name, mine, weight = self._groups[place], rows[here], weights[here]
            checkable = learn.checkable[mine]
            answers[name] = {}
            for level, option in enumerate(self._options):
                preferred = learn.preferred[mine]
                counts.append(_count(name, option, PREFERENCE, preferred == level, preferred == 0, weights=weight))
                if checkable.any():
                    right = learn.correct[mine[checkable]]
                    counts.append(
                        _count(name, option, CORRECTNESS, right[:, level], right[:, 0], weights=weight[checkable])
                    )
                energy, time_s = learn.energy_kwh[mine, level], learn.time_s[mine, level]
                answers[name][option] = ResourceUse(float(len(mine)), float(energy.sum()), float(time_s.sum()))
        by_name = {
            name: dict(zip(self._options, row.tolist(), strict=True))
            for name, row in zip(self._groups, served, strict=True)
        }
        return _findings(tuple(counts), answers, by_name, self._cost, prompts=len(rows))


class ModelJudge:
    """Judges two models against each other by the tasks' shares of preference."""

    def __init__(self, learn: Measured, large_preferred: Floats, *, bootstrap_prompts: int, cost: JudgeCost) -> None:
        self._large = large_preferred
        self._prompts = bootstrap_prompts
        self._cost = cost
        small_kwh, small_s = learn.small_kwh, learn.small_s
        if small_kwh is None or small_s is None:
            raise ValueError("no smaller model was measured")
        shares = np.bincount(learn.task, minlength=len(learn.tasks))
        self._bootstrap_mix = shares / shares.sum()
        by_task = [learn.task == task for task in range(len(learn.tasks))]
        self._energy = np.array([[learn.energy_kwh[t, 0].mean(), small_kwh[t].mean()] for t in by_task])
        self._time = np.array([[learn.time_s[t, 0].mean(), small_s[t].mean()] for t in by_task])

    def evaluate_all(self, *, at_s: float) -> Findings:  # noqa: ARG002
        """See `Judge`."""
        return self._findings(
            self._bootstrap_mix, float(self._bootstrap_mix @ self._large) * self._prompts, self._prompts, (1.0, 0.0)
        )

    def draw(
        self,
        mix: Floats,
        prompts: int,
        rng: np.random.Generator,
        *,
        served: Floats,
        at_s: float,  # noqa: ARG002
        thinning: Thinning = ALL,  # noqa: ARG002
    ) -> Findings:
        """See `Judge`; every judgment is a new one."""
        won = float(rng.binomial(prompts, float(mix @ self._large)))
        return self._findings(mix, won, prompts, served[0].tolist())

    def _findings(self, mix: Floats, won: float, prompts: int, served: Sequence[float]) -> Findings:
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
        answers = {
            "all": {
                option: ResourceUse(float(prompts), float(energy[place]), float(time_s[place]))
                for place, option in enumerate(options)
            }
        }
        by_name = {"all": dict(zip(options, served, strict=True))}
        return _findings(counts, answers, by_name, self._cost, prompts=prompts)


def _prompt_weights(learn: Measured, group: Ints, traffic: Floats) -> Floats:
    """Weight of each prompt's first judgment: its task's traffic share per prompt, relative to the group's largest."""
    share = (traffic / np.maximum(learn.prompts_of_tasks(), 1))[learn.task]
    largest = np.zeros(group.max() + 1)
    np.maximum.at(largest, group, share)
    # The weights of a group without traffic do not matter.
    return np.divide(share, largest[group], out=np.ones(len(share)), where=largest[group] > 0.0)


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
