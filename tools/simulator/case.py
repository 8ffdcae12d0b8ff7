"""A window under the authors' protocol, and the program of their schemes: one group, one bound."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.optimizer.bounds import TrailingRange, quality_bounds
from services.optimizer.problem import Option, Problem
from services.optimizer.program import solve
from shared.messages import OptionEstimate
from tools.simulator.draws import QualityDraws
from tools.simulator.grid import Window
from tools.simulator.measured import Floats, Measured

METRIC = "preference"
GROUP = "all"
POOL = "pool"

EMBODIED_G_PER_S = 26_356.568 / (5 * 365 * 86_400)
"""k1: the server's embodied carbon over five years of 365 days (paper, section 5)."""

NO_SOLUTION = "no solution keeps the bounds"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PublishedCase:
    """A window to reproduce; `mix` is (hours, tasks)."""

    window: Window
    measured: Measured
    mix: Floats
    draws: QualityDraws
    xi: float

    @property
    def hours(self) -> int:
        """Of the window."""
        return len(self.window.g_per_kwh)

    @property
    def bounds(self) -> Floats:
        """b(k0) of every hour, with the year's range."""
        return np.array([self.bound(k0) for k0 in self.window.g_per_kwh])

    def bound(self, k0: float) -> float:
        """b(k0)."""
        year = self.window.grid.g_per_kwh
        return quality_bounds(
            TrailingRange(float(np.nanmin(year)), float(np.nanmax(year))).dirtiness(k0), {METRIC: self.xi}
        )[METRIC]

    @property
    def correct(self) -> Floats | None:
        """Share of right answers at every level in every hour, (hours, levels), in expectation over the prompts of
        which it is known; null where it is of none. A task without such a prompt adds nothing at any level.
        """
        known = self.measured.checkable
        if not known.any():
            return None
        by_task = np.zeros((len(self.measured.tasks), len(self.measured.levels)))
        for task in np.unique(self.measured.task[known]):
            by_task[task] = self.measured.correct[known & (self.measured.task == task)].mean(axis=0)
        return np.asarray(self.mix @ by_task)

    def of_mix(self, values: Floats) -> Floats:
        """Means under the mix of every hour, of values by prompt: (hours, columns)."""
        by_task = np.array(
            [values[self.measured.task == task].mean(axis=0) for task in range(len(self.measured.tasks))]
        )
        return np.asarray(self.mix @ by_task)

    def grams(self, energy_kwh: Floats, time_s: Floats) -> Floats:
        """Of a request in every hour, (hours, options)."""
        return energy_kwh * self.window.g_per_kwh[:, None] + EMBODIED_G_PER_S * time_s


class Solver:
    """Solves the program with one group.

    Attributes:
        fallbacks: how often only the reference could be served, by reason.
    """

    def __init__(self) -> None:
        self.fallbacks: dict[str, int] = {}

    def solved(
        self,
        energy_kwh: Sequence[float],
        time_s: Sequence[float],
        quality: Sequence[float],
        *,
        g_per_kwh: float,
        bound: float,
    ) -> Floats:
        """Probability of every option in the program with one group; the first is the reference."""
        names = [str(place) for place in range(len(energy_kwh))]
        estimates = {
            name: OptionEstimate(energy_kwh=e, processing_s=p, quality={METRIC: q})
            for name, e, p, q in zip(names, energy_kwh, time_s, quality, strict=True)
        }
        option = Option(pool=POOL, g_per_kwh=g_per_kwh, embodied_g_per_s=EMBODIED_G_PER_S)
        problem = Problem(
            reference=names[0],
            options=dict.fromkeys(names, option),
            weights={GROUP: 1.0},
            estimates={GROUP: estimates},
            bounds={METRIC: bound},
        )
        solution = solve(problem)
        if solution.status != "optimal":
            self.fallbacks[NO_SOLUTION] = self.fallbacks.get(NO_SOLUTION, 0) + 1
        row = solution.rows[GROUP]
        return np.array([row.get(name, 0.0) for name in names])
