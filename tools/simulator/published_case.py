"""A window under the protocol of the published code: quality draws, and the program with one group and one limit."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.optimizer.bounds import TrailingRange
from services.optimizer.problem import OptionPrice, Problem
from services.optimizer.program import solve
from shared.messages import OptionEstimate
from shared.pools import DEFAULT_EMBODIED_G_PER_S
from tools.simulator.grid import Window
from tools.simulator.requests import Floats, Measured, SimulationInputError

METRIC = "preference"
GROUP = "all"
POOL = "pool"

NO_SOLUTION = "no solution keeps the bounds"

DRAWN_PROMPTS = 1_000
_COLUMNS = (
    "sprout_q0", "sprout_q1", "sprout_q2", "model_q13b", "static_q0", "static_q1",
    "oracle_q0", "oracle_q1", "oracle_q2",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class QualityDraws:
    """Shares of preference among the 1,000 fresh prompts that the published protocol draws every hour.

    Attributes:
        levels: (hours, 3), of L0, L1 and L2: for SPROUT, BASE and CO2_OPT.
        large_model: (hours,), of the larger model over the smaller one.
        static: (hours, 2), of L0 and L1: for SPROUT_STA.
        oracle: (hours, 3): for ORACLE.
    """

    levels: Floats
    large_model: Floats
    static: Floats
    oracle: Floats


def read_draws(path: Path, *, hours: int) -> QualityDraws:
    """Read the draws behind the published results: a table with one row per hour.

    Raises:
        SimulationInputError: the file cannot be read, a column is missing, or there are too few rows.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            if missing := [name for name in _COLUMNS if name not in header]:
                raise SimulationInputError(f"{path} has no column {missing[0]!r}; it needs {', '.join(_COLUMNS)}")
            rows = [[float(row[name]) for name in _COLUMNS] for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error, TypeError, ValueError) as error:
        if isinstance(error, SimulationInputError):
            raise
        raise SimulationInputError(f"{path} cannot be read: {error}") from error
    if len(rows) < hours:
        raise SimulationInputError(f"{path} has {len(rows)} hours, {hours} are simulated: lower --hours")
    table = np.array(rows[:hours])
    return QualityDraws(table[:, 0:3], table[:, 3], table[:, 4:6], table[:, 6:9])


def draw_quality(measured: Measured, mix: Floats, large_model: Floats | None, *, seed: int) -> QualityDraws:
    """Draw 1,000 judged prompts every hour.

    Args:
        measured: the judged prompts.
        mix: (hours, tasks), shares of the traffic.
        large_model: (tasks,), share of prompts on which the larger model is preferred; None: not known, a half.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    judged = measured.taken(measured.judged)
    tasks = range(len(measured.tasks))
    shares = np.array(
        [[np.mean(judged.preferred[judged.task == task] == level) for level in range(3)] for task in tasks]
    )

    def draws() -> Floats:
        return rng.multinomial(DRAWN_PROMPTS, np.clip(mix @ shares, 0.0, 1.0)) / DRAWN_PROMPTS

    of_large = mix @ large_model if large_model is not None else np.full(len(mix), 0.5)
    return QualityDraws(draws(), rng.binomial(DRAWN_PROMPTS, of_large) / DRAWN_PROMPTS, draws()[:, :2], draws())


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
        """Hours of the window."""
        return len(self.window.g_per_kwh)

    @property
    def bounds(self) -> Floats:
        """b(k0) of every hour, with the range of the whole year."""
        return np.array([self.bound(k0) for k0 in self.window.g_per_kwh])

    def bound(self, k0: float) -> float:
        """b(k0) = 1 - xi * (k0 - k0_min) / (k0_max - k0_min)."""
        year = self.window.grid.g_per_kwh
        whole_year = TrailingRange(float(np.nanmin(year)), float(np.nanmax(year)))
        return 1.0 - self.xi * whole_year.position(k0)

    @property
    def correct(self) -> Floats | None:
        """Expected share of right answers by level, (hours, levels), over the prompts for which it is known.

        None if it is known for no prompt. A task without such a prompt adds nothing at any level.
        """
        known = self.measured.checkable
        if not known.any():
            return None
        by_task = np.zeros((len(self.measured.tasks), len(self.measured.levels)))
        for task in np.unique(self.measured.task[known]):
            by_task[task] = self.measured.correct[known & (self.measured.task == task)].mean(axis=0)
        return np.asarray(self.mix @ by_task)

    def mean_by_hour(self, values: Floats) -> Floats:
        """Means under each hour's mix, (hours, columns), of values by prompt, (prompts, columns)."""
        by_task = np.array(
            [values[self.measured.task == task].mean(axis=0) for task in range(len(self.measured.tasks))]
        )
        return np.asarray(self.mix @ by_task)

    def grams(self, energy_kwh: Floats, time_s: Floats) -> Floats:
        """gCO2eq of a request, (hours, options), from its energy and time."""
        return energy_kwh * self.window.g_per_kwh[:, None] + DEFAULT_EMBODIED_G_PER_S * time_s


class Solver:
    """Solves the program with one group.

    Attributes:
        fallbacks: how often only the reference could be served, by reason.
    """

    def __init__(self) -> None:
        self.fallbacks: dict[str, int] = {}

    def solve(
        self,
        energy_kwh: Sequence[float],
        time_s: Sequence[float],
        quality: Sequence[float],
        *,
        g_per_kwh: float,
        bound: float,
    ) -> Floats:
        """Probability of every option; the first is the reference.

        Args:
            energy_kwh, time_s, quality: means of a request, by option.
            g_per_kwh: carbon intensity.
            bound: minimum quality, relative to the reference's.
        """
        names = [str(place) for place in range(len(energy_kwh))]
        estimates = {
            name: OptionEstimate(energy_kwh=e, processing_s=p, quality={METRIC: q})
            for name, e, p, q in zip(names, energy_kwh, time_s, quality, strict=True)
        }
        price = OptionPrice(pool=POOL, g_per_kwh=g_per_kwh, embodied_g_per_s=DEFAULT_EMBODIED_G_PER_S)
        solution = solve(
            Problem(
                reference=names[0],
                options=dict.fromkeys(names, price),
                weights={GROUP: 1.0},
                estimates={GROUP: estimates},
                bounds={METRIC: bound},
            )
        )
        if solution.status != "optimal":
            self.fallbacks[NO_SOLUTION] = self.fallbacks.get(NO_SOLUTION, 0) + 1
        row = solution.rows[GROUP]
        return np.array([row.get(name, 0.0) for name in names])
