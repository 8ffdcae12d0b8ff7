"""Expected energy, time and quality of the traffic by task, prompt group and option."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tools.simulator.requests import Flags, Floats, Ints, Measured, SimulationInputError

PREFERENCE = "preference"
CORRECTNESS = "correctness"
POOL = "pool"
SMALL_POOL = "small"

_ROUNDING = 1e-9
"""Weights below this are 0; the reference compared with itself leaves rounding errors."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """The prompts that a quality was measured on.

    Attributes:
        prompts: (T,), their number.
        both: (T, G, O, O), share of a task's prompts that are in the group and on which both options succeed.
    """

    prompts: Ints
    both: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """Expectations over prompts. T tasks, G groups, O options; the first option is the reference.

    Attributes:
        options: `pool/level`.
        groups: names.
        prompts: (T,), their number.
        share: (T, G), share of a task's prompts in each group; rows sum to 1.
        energy_kwh, time_s: (T, G, O), mean of the group's prompts times its share.
        tokens: (T, G, O), as `energy_kwh`; None if they are not known.
        quality: by metric, (T, G, O), share of a task's judged prompts that are in the group and on which the option
            succeeds.
        samples: by metric, the prompts that its quality was measured on; absent if only shares are known.
    """

    options: tuple[str, ...]
    groups: tuple[str, ...]
    prompts: Ints
    share: Floats
    energy_kwh: Floats
    time_s: Floats
    quality: Mapping[str, Floats]
    tokens: Floats | None = None
    samples: Mapping[str, Sample] = field(default_factory=dict)

    def mean(self, values: Floats, mix: Floats, x: Floats) -> Floats:
        """Mean over the traffic of every hour, (hours,).

        Args:
            values: (T, G, O), as `energy_kwh`.
            mix: (hours, T), shares of the traffic.
            x: (hours, G, O), probabilities.
        """
        return np.asarray(np.einsum("ht,tgo,hgo->h", mix, values, x, optimize=True))

    def standard_error(self, metric: str, mix: Floats, x: Floats) -> float | None:
        """Standard error, over samples of prompts, of the mean relative quality of a given policy.

        The delta method for a ratio of means, stratified by task: the variance within a task of each prompt's weight in
        the mean. A task without prompts adds nothing.

        Args:
            metric: of `quality`.
            mix, x: as for `mean`.

        Returns:
            None if the prompts are not known, a task has a single prompt, or the reference has no quality in an hour.
        """
        sample, values = self.samples.get(metric), self.quality[metric]
        reference = np.einsum("ht,tg->h", mix, values[:, :, 0])
        if sample is None or (reference <= 0.0).any():
            return None
        ratio = self.mean(values, mix, x) / reference
        weights = np.einsum("ht,hgo->tgo", mix / reference[:, None], x, optimize=True) / len(mix)
        weights[:, :, 0] -= np.einsum("ht,h->t", mix, ratio / reference)[:, None] / len(mix)
        squares = np.einsum("tgo,tgp,tgop->t", weights, weights, sample.both)
        variance = squares - np.einsum("tgo,tgo->t", weights, values) ** 2
        weighed = (np.abs(weights) > _ROUNDING).any(axis=(1, 2)) & (sample.prompts > 0)
        if (sample.prompts[weighed] == 1).any():
            return None
        return float(np.sqrt((variance[weighed].clip(min=0.0) / (sample.prompts[weighed] - 1)).sum()))

    def all_reference(self, hours: int) -> Floats:
        """Probabilities with which the reference serves everything, (hours, G, O)."""
        x = np.zeros((hours, len(self.groups), len(self.options)))
        x[:, :, 0] = 1.0
        return x


def pooled(worlds: Sequence[World]) -> World:
    """Combine worlds that have different prompts of the same tasks, and prompt groups of their own.

    Every prompt has the same weight.
    """
    if len(worlds) == 1:
        return worlds[0]

    def joined(arrays: Sequence[Floats], prompts: Sequence[Ints]) -> Floats:
        """Shares of each world's prompts of a task, concatenated as shares of all prompts of the task."""
        total = np.maximum(np.sum(prompts, axis=0), 1)
        parts = (
            values * (mine / total).reshape(-1, *(1,) * (values.ndim - 1))
            for values, mine in zip(arrays, prompts, strict=True)
        )
        return np.concatenate(list(parts), axis=1)

    first, prompts = worlds[0], [world.prompts for world in worlds]
    tokens = [world.tokens for world in worlds if world.tokens is not None]
    samples = {metric: [world.samples[metric] for world in worlds] for metric in first.samples}
    counted = {metric: [one.prompts for one in parts] for metric, parts in samples.items()}
    return World(
        options=first.options,
        groups=tuple(f"{place}/{group}" for place, world in enumerate(worlds) for group in world.groups),
        prompts=np.sum(prompts, axis=0),
        share=joined([world.share for world in worlds], prompts),
        energy_kwh=joined([world.energy_kwh for world in worlds], prompts),
        time_s=joined([world.time_s for world in worlds], prompts),
        tokens=joined(tokens, prompts) if len(tokens) == len(worlds) else None,
        quality={
            metric: joined([world.quality[metric] for world in worlds], counted.get(metric, prompts))
            for metric in first.quality
        },
        samples={
            metric: Sample(np.sum(counted[metric], axis=0), joined([one.both for one in parts], counted[metric]))
            for metric, parts in samples.items()
        },
    )


def world_of_levels(measured: Measured, group: Ints, groups: tuple[str, ...]) -> World:
    """One model at every level.

    Args:
        measured: prompts to measure on.
        group: (prompts,), place in `groups`.
        groups: names.
    """
    judged, checkable = measured.judged, measured.checkable
    won = np.zeros_like(measured.energy_kwh)
    won[np.flatnonzero(judged), measured.preferred[judged]] = 1.0
    outcomes = {PREFERENCE: (won, judged)}
    if checkable.any():
        outcomes[CORRECTNESS] = (np.nan_to_num(measured.correct), checkable)
    everything = np.ones(len(measured), dtype=bool)
    return World(
        options=tuple(f"{POOL}/{level}" for level in measured.levels),
        groups=groups,
        prompts=measured.prompts_of_tasks(),
        share=_shares(measured, group, len(groups), np.ones((len(measured), 1)), everything)[:, :, 0],
        energy_kwh=_shares(measured, group, len(groups), measured.energy_kwh, everything),
        time_s=_shares(measured, group, len(groups), measured.time_s, everything),
        tokens=_shares(measured, group, len(groups), measured.tokens, everything),
        quality={metric: _shares(measured, group, len(groups), *one) for metric, one in outcomes.items()},
        samples={metric: _sample(measured, group, len(groups), *one) for metric, one in outcomes.items()},
    )


def world_of_models(measured: Measured, large_preferred: Floats) -> World:
    """Two models without directives, one group.

    Args:
        measured: prompts to measure on.
        large_preferred: (tasks,), share of prompts on which the larger model is preferred.

    Raises:
        SimulationInputError: the smaller model was not measured.
    """
    if measured.small_kwh is None or measured.small_s is None:
        raise SimulationInputError(
            "scheme model_opt needs a second model, measured without a directive on every prompt"
        )
    group, everything = np.zeros(len(measured), dtype=np.int64), np.ones(len(measured), dtype=bool)
    energy = np.column_stack([measured.energy_kwh[:, 0], measured.small_kwh])
    time_s = np.column_stack([measured.time_s[:, 0], measured.small_s])
    return World(
        options=(f"{POOL}/L0", f"{SMALL_POOL}/L0"),
        groups=("all",),
        prompts=measured.prompts_of_tasks(),
        share=np.ones((len(measured.tasks), 1)),
        energy_kwh=_shares(measured, group, 1, energy, everything),
        time_s=_shares(measured, group, 1, time_s, everything),
        quality={PREFERENCE: np.stack([large_preferred, 1.0 - large_preferred], axis=1)[:, None, :]},
    )


def _sample(measured: Measured, group: Ints, groups: int, won: Floats, rows: Flags) -> Sample:
    options = won.shape[1]
    both = _shares(measured, group, groups, (won[:, :, None] * won[:, None, :]).reshape(len(won), -1), rows)
    return Sample(measured.prompts_of_tasks(rows), both.reshape(*both.shape[:2], options, options))


def _shares(measured: Measured, group: Ints, groups: int, values: Floats, rows: Flags) -> Floats:
    """Sums of values over prompts by task and group, divided by the task's prompts: (T, G, columns)."""
    tasks = len(measured.tasks)
    sums = np.zeros((tasks, groups, values.shape[1]))
    np.add.at(sums, (measured.task[rows], group[rows]), values[rows])
    counts = measured.prompts_of_tasks(rows)
    return sums / np.maximum(counts, 1)[:, None, None]
