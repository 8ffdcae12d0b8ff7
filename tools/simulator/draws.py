"""Quality in every hour as the published protocol has it: shares among 1,000 fresh prompts, drawn or recorded."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.simulator.errors import SimulationInputError
from tools.simulator.measured import Floats, Measured

DRAWN_PROMPTS = 1_000
_COLUMNS = (
    "sprout_q0", "sprout_q1", "sprout_q2", "model_q13b", "static_q0", "static_q1",
    "oracle_q0", "oracle_q1", "oracle_q2",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class QualityDraws:
    """Shares of preference among the fresh prompts of every hour.

    Attributes:
        levels: (hours, 3), of L0, L1 and L2: for SPROUT, BASE and CO2_OPT.
        large_model: of the larger model over the smaller one.
        static: (hours, 2), of L0 and L1: for SPROUT_STA.
        oracle: (hours, 3): for ORACLE.
    """

    levels: Floats
    large_model: Floats
    static: Floats
    oracle: Floats


def read_draws(path: Path, *, hours: int) -> QualityDraws:
    """The very draws behind published results: a table with a row an hour.

    Raises:
        SimulationInputError: the file cannot be read, lacks a column or is too short.
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
    """Fresh draws of 1,000 judged prompts an hour, by the hour's mix."""
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
