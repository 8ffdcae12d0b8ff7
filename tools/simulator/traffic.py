"""Traffic shares of the tasks by hour, and the prompts of each task."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tools.simulator.requests import Flags, Floats, Measured, SimulationInputError


def read_mix(path: Path, *, hours: int) -> tuple[tuple[str, ...], Floats]:
    """Read task names, and their shares by hour, (hours, tasks).

    The file is a table with a column `hour` (0, 1, ...) and one column per task; the shares of a row sum to 1.

    Raises:
        SimulationInputError: the file cannot be read, is too short, an hour is out of order, or a share is wrong.
    """
    tasks, lines, shares = _shares_by_hour(path, hours=hours)
    for line, total in zip(lines, shares.sum(axis=1), strict=True):
        if not math.isclose(total, 1.0, abs_tol=1e-3):
            raise SimulationInputError(f"{path}, line {line}: the shares must sum to 1, they sum to {total:.4f}")
    return tasks, shares / shares.sum(axis=1, keepdims=True)


def check_shares_by_hour(path: Path, *, hours: int) -> None:
    """Check a table with a column `hour` (0, 1, ...) and columns of shares.

    Raises:
        SimulationInputError: it cannot be read, is too short, an hour is out of order, or a value is not in [0, 1].
    """
    _shares_by_hour(path, hours=hours)


def constant_mix(measured: Measured, *, hours: int) -> Floats:
    """Shares of the tasks among the prompts, the same in every hour, (hours, tasks)."""
    counts = measured.prompts_of_tasks()
    return np.tile(counts / counts.sum(), (hours, 1))


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Prompts to measure on, and others to learn from.

    Attributes:
        learn: prompts to learn from.
        learn_name: where they come from, for messages.
        measured: prompts to measure on.
        measured_name: where they come from, for messages.
    """

    learn: Measured
    learn_name: str
    measured: Measured
    measured_name: str


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Prompts, and the traffic shares of their tasks.

    Attributes:
        parts: all prompts to measure on, each in one part, with the prompts to learn from.
        mix: (hours, tasks); all parts have the same tasks.
    """

    parts: tuple[Part, ...]
    mix: Floats

    def checked(self, say: Callable[[str], None]) -> "Traffic":
        """A copy without the tasks that have no traffic; reports what is left out.

        Raises:
            SimulationInputError: a task with traffic has no prompts, or no judged prompt to measure on.
        """
        has_traffic = self.mix.max(axis=0) > 0.0
        named = self.parts[0].measured
        if not has_traffic.all():
            say(f"left out {_names(named, ~has_traffic)} with all prompts: no share in any simulated hour")
        tasks = tuple(task for task, kept in zip(named.tasks, has_traffic, strict=True) if kept)

        def with_traffic(prompts: Measured) -> Measured:
            return prompts.taken(has_traffic[prompts.task]).with_tasks(tasks)

        parts = tuple(
            replace(part, learn=with_traffic(part.learn), measured=with_traffic(part.measured)) for part in self.parts
        )
        for part in parts:
            _check(part, say)
        return Traffic(parts, self.mix[:, has_traffic])


def _check(part: Part, say: Callable[[str], None]) -> None:
    """Check that a part has prompts of every task.

    Raises:
        SimulationInputError: a task has no prompt, or no judged prompt.
    """
    for prompts, name in ((part.measured, part.measured_name), (part.learn, part.learn_name)):
        if (missing := prompts.prompts_of_tasks() == 0).any():
            raise SimulationInputError(
                f"{name} no prompt of {_names(prompts, missing)}, which has traffic: add prompts of it, take another "
                "--seed or fewer --folds where the requests are split, or give it no share in --mix"
            )
    measured, learn = part.measured, part.learn
    if (missing := measured.prompts_of_tasks(measured.judged) == 0).any():
        raise SimulationInputError(
            f"{part.measured_name} no judged prompt of {_names(measured, missing)}, which has traffic: quality cannot "
            "be measured on it; set 'preferred' to a level in some of its prompts, or give it no share in --mix"
        )
    if not learn.judged.any():
        raise SimulationInputError(
            f"{part.learn_name} no judged prompt: nothing can be learned; set 'preferred' to a level in some of them"
        )
    if (missing := learn.prompts_of_tasks(learn.judged) == 0).any():
        say(f"{part.learn_name} no judged prompt of {_names(learn, missing)}: the evaluator learns nothing on it")


def _names(measured: Measured, which: Flags) -> str:
    return "task " + ", ".join(task for task, one in zip(measured.tasks, which, strict=True) if one)


def read_model_preference(path: Path, tasks: Sequence[str]) -> Floats:
    """Read the share of prompts, (tasks,), on which the larger model's answer is preferred.

    Raises:
        SimulationInputError: the file cannot be read, or a task is missing.
    """
    header, rows = _table(path, needed=("task",))
    value = next(name for name in header if name != "task")
    found = {row["task"]: _number(path, line, value, row[value]) for line, row in rows}
    if missing := [task for task in tasks if task not in found]:
        raise SimulationInputError(f"{path} has no row for task {', '.join(missing)}")
    return np.array([found[task] for task in tasks])


def _shares_by_hour(path: Path, *, hours: int) -> tuple[tuple[str, ...], list[int], Floats]:
    """Column names, line numbers of the rows, and values, (hours, columns)."""
    header, rows = _table(path, needed=("hour",))
    names = tuple(name for name in header if name != "hour")
    if len(rows) < hours:
        raise SimulationInputError(f"{path} has {len(rows)} hours, {hours} are simulated: add rows or lower --hours")
    del rows[hours:]
    for place, (line, row) in enumerate(rows):
        if not _is(place, row["hour"]):
            raise SimulationInputError(
                f"{path}, line {line}: 'hour' must be {place}, got {row['hour']!r}; give one row for every hour, in "
                "order from 0"
            )
    shares = np.array([[_number(path, line, name, row[name]) for name in names] for line, row in rows])
    return names, [line for line, _ in rows], shares


def _is(number: int, text: str | None) -> bool:
    try:
        return float(text or "") == number
    except ValueError:
        return False


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
