"""What traffic takes and how it is judged, in expectation: by task, prompt group and option."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simulator.errors import SimulationInputError
from simulator.measured import Flags, Floats, Ints, Measured

PREFERENCE = "preference"
CORRECTNESS = "correctness"
POOL = "pool"
SMALL_POOL = "small"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """Expectations over prompts. T tasks, G groups, O options; the first option is the reference.

    Attributes:
        options: `pool/level`.
        share: (T, G), of a task's prompts in each group; every row sums to 1.
        energy_kwh, time_s: (T, G, O), means of a group's prompts times its share.
        quality: by metric, (T, G, O): share of a task's judged prompts that lie in the group and are won by the option.
    """

    options: tuple[str, ...]
    groups: tuple[str, ...]
    share: Floats
    energy_kwh: Floats
    time_s: Floats
    quality: Mapping[str, Floats]

    def mean(self, values: Floats, mix: Floats, x: Floats) -> Floats:
        """Mean over the traffic, in every hour.

        Args:
            values: (T, G, O).
            mix: (hours, T).
            x: (hours, G, O), probabilities.
        """
        return np.asarray(np.einsum("ht,tgo,hgo->h", mix, values, x, optimize=True))

    def all_reference(self, hours: int) -> Floats:
        """(hours, G, O): the reference serves all."""
        x = np.zeros((hours, len(self.groups), len(self.options)))
        x[:, :, 0] = 1.0
        return x


def world_of_levels(measured: Measured, group: Ints, groups: tuple[str, ...]) -> World:
    """One model at every level.

    Args:
        group: place of every prompt's group in `groups`.
    """
    judged = measured.judged
    won = np.zeros_like(measured.energy_kwh)
    won[np.flatnonzero(judged), measured.preferred[judged]] = 1.0
    quality = {PREFERENCE: _shares(measured, group, len(groups), won, judged)}
    known: Flags = np.asarray(~np.isnan(measured.correct).any(axis=1))
    if known.any():
        quality[CORRECTNESS] = _shares(measured, group, len(groups), np.nan_to_num(measured.correct), known)
    everything = np.ones(len(measured), dtype=bool)
    return World(
        options=tuple(f"{POOL}/{level}" for level in measured.levels),
        groups=groups,
        share=_shares(measured, group, len(groups), np.ones((len(measured), 1)), everything)[:, :, 0],
        energy_kwh=_shares(measured, group, len(groups), measured.energy_kwh, everything),
        time_s=_shares(measured, group, len(groups), measured.time_s, everything),
        quality=quality,
    )


def world_of_models(measured: Measured, large_preferred: Floats) -> World:
    """Two models without directives, one group.

    Args:
        large_preferred: share of each task's prompts on which the larger model is preferred.

    Raises:
        SimulationInputError: no smaller model was measured.
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
        share=np.ones((len(measured.tasks), 1)),
        energy_kwh=_shares(measured, group, 1, energy, everything),
        time_s=_shares(measured, group, 1, time_s, everything),
        quality={PREFERENCE: np.stack([large_preferred, 1.0 - large_preferred], axis=1)[:, None, :]},
    )


def _shares(measured: Measured, group: Ints, groups: int, values: Floats, rows: Flags) -> Floats:
    """Sums of values over prompts by task and group, divided by the task's prompts: (T, G, columns)."""
    tasks = len(measured.tasks)
    sums = np.zeros((tasks, groups, values.shape[1]))
    np.add.at(sums, (measured.task[rows], group[rows]), values[rows])
    counts = np.bincount(measured.task[rows], minlength=tasks)
    return sums / np.maximum(counts, 1)[:, None, None]
