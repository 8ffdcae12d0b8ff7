"""Measured requests as arrays: energy, time and judged quality of every prompt at every level."""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.triton.stand_in.prompt import normalised
from deploy.triton.stand_in.workload import Entry, Workload, WorkloadError, load_workload, unit_hash
from services.evaluator.answers import reference_number
from shared.carbon import JOULES_PER_KWH

REFERENCE = "L0"
UNJUDGED = -1

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

Matches = Mapping[tuple[str, str], float]
"""Whether answers mean the same as the reference, by `model/level` and normalised prompt: 1 or 0; NaN if unknown."""


class SimulationInputError(ValueError):
    """A file or an option cannot be used; the message names it and the remedy."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Requests of one model; a row is a prompt, a column a level.

    Attributes:
        model: its name.
        prompts: the texts.
        tasks: names.
        task: (prompts,), place in `tasks`.
        levels: the reference first.
        energy_kwh, time_s: (prompts, levels).
        tokens: (prompts, levels), generated tokens.
        preferred: (prompts,), place in `levels` of the level that the judge prefers; `UNJUDGED` if it was not judged.
        correct: (prompts, levels), 1 or 0; NaN if unknown.
        small_kwh, small_s: (prompts,), of the smaller model without a directive; None if it was not measured.
        notes: what was left out of the file.
    """

    model: str
    prompts: tuple[str, ...]
    tasks: tuple[str, ...]
    task: Ints
    levels: tuple[str, ...]
    energy_kwh: Floats
    time_s: Floats
    tokens: Floats
    preferred: Ints
    correct: Floats
    small_kwh: Floats | None
    small_s: Floats | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def judged(self) -> Flags:
        """Which prompts were judged."""
        return np.asarray(self.preferred != UNJUDGED)

    @property
    def checkable(self) -> Flags:
        """Which prompts have a known correctness at every level."""
        return np.asarray(~np.isnan(self.correct).any(axis=1))

    def prompts_of_tasks(self, rows: Flags | None = None) -> Ints:
        """Number of prompts by task, (tasks,); of `rows` only unless that is None."""
        return np.bincount(self.task if rows is None else self.task[rows], minlength=len(self.tasks))

    def taken(self, rows: Flags) -> "Measured":
        """Some of the prompts; `tasks` stays the same."""
        return Measured(
            model=self.model,
            prompts=tuple(prompt for prompt, kept in zip(self.prompts, rows, strict=True) if kept),
            tasks=self.tasks,
            task=self.task[rows],
            levels=self.levels,
            energy_kwh=self.energy_kwh[rows],
            time_s=self.time_s[rows],
            tokens=self.tokens[rows],
            preferred=self.preferred[rows],
            correct=self.correct[rows],
            small_kwh=None if self.small_kwh is None else self.small_kwh[rows],
            small_s=None if self.small_s is None else self.small_s[rows],
            notes=self.notes,
        )

    def folds(self, seed: int, count: int) -> list[tuple["Measured", "Measured"]]:
        """Split into `count` parts by a hash of prompt and seed, for cross-validation.

        Returns:
            By part: the other parts, to learn from; the part itself, to measure on.
        """
        part = np.array([int(unit_hash(prompt, str(seed)) * count) for prompt in self.prompts])
        return [(self.taken(part != one), self.taken(part == one)) for one in reversed(range(count))]

    def halves(self, seed: int) -> tuple["Measured", "Measured"]:
        """The first of two folds: prompts to learn from, prompts to measure on."""
        return self.folds(seed, 2)[0]

    def with_tasks(self, tasks: tuple[str, ...]) -> "Measured":
        """A copy with other tasks, or the same in another order.

        Raises:
            SimulationInputError: a prompt's task is not among them.
        """
        has_prompts = self.prompts_of_tasks() > 0
        if missing := sorted(
            task for task, any_prompt in zip(self.tasks, has_prompts, strict=True) if any_prompt and task not in tasks
        ):
            raise SimulationInputError(
                f"prompts of {', '.join(missing)} have no place among the tasks {', '.join(tasks)}"
            )
        places = np.array([tasks.index(task) if task in tasks else -1 for task in self.tasks])
        return Measured(
            **{name: getattr(self, name) for name in self.__slots__ if name not in ("tasks", "task")},
            tasks=tasks,
            task=places[self.task],
        )


def joined(parts: Sequence[Measured]) -> Measured:
    """The prompts of several parts of one file."""
    if len(parts) == 1:
        return parts[0]
    small_kwh = [part.small_kwh for part in parts if part.small_kwh is not None]
    small_s = [part.small_s for part in parts if part.small_s is not None]
    return Measured(
        model=parts[0].model,
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        tasks=parts[0].tasks,
        task=np.concatenate([part.task for part in parts]),
        levels=parts[0].levels,
        energy_kwh=np.concatenate([part.energy_kwh for part in parts]),
        time_s=np.concatenate([part.time_s for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        preferred=np.concatenate([part.preferred for part in parts]),
        correct=np.concatenate([part.correct for part in parts]),
        small_kwh=np.concatenate(small_kwh) if small_kwh else None,
        small_s=np.concatenate(small_s) if small_s else None,
        notes=parts[0].notes,
    )


def read_measured(path: Path, *, model: str | None = None, matches: Matches | None = None) -> Measured:
    """Read a workload file (format: `deploy/triton/stand_in/workload.py`).

    Args:
        path: of the file.
        model: whose levels are simulated; None: the one that was measured at most levels.
        matches: correctness by meaning; None: `correct` of the file, by string.

    Raises:
        SimulationInputError: the file cannot be read, a prompt was not measured at every level, a preferred level was
            not measured, or no prompt was judged.
    """
    try:
        workload = load_workload(path)
    except WorkloadError as error:
        raise SimulationInputError(str(error)) from error
    chosen = _model(workload, model, path)
    levels = workload.levels_of(chosen)
    if levels[0] != REFERENCE:
        raise SimulationInputError(f"{path}: model {chosen!r} was not measured at {REFERENCE}, the reference")
    for level in levels:
        missing = [place for place, entry in enumerate(workload.entries, 1) if (chosen, level) not in entry.responses]
        if missing:
            raise SimulationInputError(
                f"{path}: {len(missing)} prompts lack '{chosen}/{level}' (the first is prompt {missing[0]}); "
                "measure it, or leave these prompts out"
            )
    for entry in workload.entries:
        if entry.preferred is not None and entry.preferred not in levels:
            raise SimulationInputError(
                f"{path}, line {_line_of(path, entry)}: 'preferred' is {entry.preferred!r}, at which {chosen!r} was "
                f"not measured; its levels are {', '.join(levels)}: correct it, or use null if it was not judged"
            )
    if not any(entry.preferred is not None for entry in workload.entries):
        raise SimulationInputError(f"{path}: no prompt was judged; set 'preferred' to a level in some of them")
    notes = list(workload.problems)
    if workload.skipped > len(notes):
        notes.append(f"{path}: {workload.skipped} lines left out in all")
    measured = _arrays(workload.entries, chosen, levels, _smaller(workload, chosen), tuple(notes))
    if matches is None:
        return measured
    return replace(measured, correct=_judged_correctness(measured, workload.entries, matches, path))


def _judged_correctness(measured: Measured, entries: Sequence[Entry], matches: Matches, path: Path) -> Floats:
    """Correctness by meaning, (prompts, levels); a task of numbers without any match keeps its own."""
    options = [f"{measured.model}/{level}" for level in measured.levels]
    prompts = [normalised(prompt) for prompt in measured.prompts]
    judged = np.array([[matches.get((option, prompt), np.nan) for option in options] for prompt in prompts])
    if np.isnan(judged).any(axis=1).all():
        raise SimulationInputError(f"--correctness: no prompt of {path} has matches of {' and '.join(options)}")
    unmatched = np.isnan(judged).all(axis=1)
    kept = np.zeros(len(measured), dtype=bool)
    for task in range(len(measured.tasks)):
        rows = np.flatnonzero(measured.task == task)
        references = [entries[int(row)].reference for row in rows]
        numbers = [reference_number(one) is not None for one in references if one is not None]
        kept[rows] = bool(unmatched[rows].all()) and 2 * sum(numbers) > len(numbers)
    return np.where(kept[:, None], measured.correct, judged)


def _line_of(path: Path, entry: Entry) -> int:
    """Line number of an entry, for an error message; the file is read again."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict) and (line.get("prompt"), line.get("preferred")) == (
                entry.prompt,
                entry.preferred,
            ):
                return number
    raise ValueError(f"{path} changed while it was read")


def _model(workload: Workload, wanted: str | None, path: Path) -> str:
    if wanted is None:
        return max(workload.models, key=lambda name: len(workload.levels_of(name)))
    if wanted not in workload.models:
        raise SimulationInputError(f"{path} has no model {wanted!r}; it has {', '.join(workload.models)}")
    return wanted


def _smaller(workload: Workload, model: str) -> str | None:
    """Another model that was measured without a directive on every prompt; None if there is none."""
    for name in workload.models:
        if name != model and all((name, REFERENCE) in entry.responses for entry in workload.entries):
            return name
    return None


def _arrays(
    entries: list[Entry], model: str, levels: tuple[str, ...], small: str | None, notes: tuple[str, ...]
) -> Measured:
    tasks = tuple(sorted({entry.task for entry in entries}))
    answers = [[entry.responses[model, level] for level in levels] for entry in entries]
    small_answers = None if small is None else [entry.responses[small, REFERENCE] for entry in entries]
    places = {level: place for place, level in enumerate(levels)}
    return Measured(
        model=model,
        prompts=tuple(entry.prompt for entry in entries),
        tasks=tasks,
        task=np.array([tasks.index(entry.task) for entry in entries]),
        levels=levels,
        energy_kwh=np.array([[one.energy_j for one in row] for row in answers]) / JOULES_PER_KWH,
        time_s=np.array([[one.time_s for one in row] for row in answers]),
        tokens=np.array([[one.tokens for one in row] for row in answers], dtype=float),
        preferred=np.array([places.get(entry.preferred or "", UNJUDGED) for entry in entries]),
        correct=np.array([[np.nan if one.correct is None else float(one.correct) for one in row] for row in answers]),
        small_kwh=None if small_answers is None else np.array([one.energy_j for one in small_answers]) / JOULES_PER_KWH,
        small_s=None if small_answers is None else np.array([one.time_s for one in small_answers]),
        notes=notes,
    )
