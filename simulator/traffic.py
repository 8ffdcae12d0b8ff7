"""What is asked in which hour: the tasks' shares, and which of two models is preferred on them."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simulator.errors import SimulationInputError
from simulator.measured import Floats, Measured


def read_mix(path: Path, *, hours: int) -> tuple[tuple[str, ...], Floats]:
    """Task names, and their shares by hour, (hours, tasks).

    The file is a table with a column `hour` (0, 1, ...) and a column per task; each row's shares sum to 1.

    Raises:
        SimulationInputError: the file cannot be read, is too short, or a share is wrong.
    """
    header, rows = _table(path, needed=("hour",))
    tasks = tuple(name for name in header if name != "hour")
    if len(rows) < hours:
        raise SimulationInputError(f"{path} has {len(rows)} hours, {hours} are simulated: add rows or lower --hours")
    shares = np.array([[_number(path, line, task, row[task]) for task in tasks] for line, row in rows[:hours]])
    for (line, _), total in zip(rows, shares.sum(axis=1), strict=False):
        if not math.isclose(total, 1.0, abs_tol=1e-3):
            raise SimulationInputError(f"{path}, line {line}: the shares must sum to 1, they sum to {total:.4f}")
    return tasks, shares / shares.sum(axis=1, keepdims=True)


def constant_mix(measured: Measured, *, hours: int) -> Floats:
    """The shares that the tasks have among the prompts, in every hour."""
    counts = np.bincount(measured.task, minlength=len(measured.tasks))
    return np.tile(counts / counts.sum(), (hours, 1))


def read_model_preference(path: Path, tasks: Sequence[str]) -> Floats:
    """Share of prompts, by task, on which the larger model's answer is preferred.

    Raises:
        SimulationInputError: the file cannot be read, or lacks a task.
    """
    header, rows = _table(path, needed=("task",))
    value = next(name for name in header if name != "task")
    found = {row["task"]: _number(path, line, value, row[value]) for line, row in rows}
    if missing := [task for task in tasks if task not in found]:
        raise SimulationInputError(f"{path} has no row for task {', '.join(missing)}")
    return np.array([found[task] for task in tasks])


def _table(path: Path, *, needed: Sequence[str]) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Header and rows with their line numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            header = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SimulationInputError(f"{path} cannot be read: {error}") from error
    if missing := [name for name in needed if name not in header]:
        raise SimulationInputError(f"{path} has no column {missing[0]!r}; its columns: {', '.join(header) or 'none'}")
    if len(header) <= len(needed) or not rows:
        raise SimulationInputError(f"{path} is empty: it needs values beside {', '.join(needed)}")
    return header, rows


def _number(path: Path, line: int, name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise SimulationInputError(f"{path}, line {line}: {name!r} must be a share from 0 to 1, got {text!r}")
    return value
