"""The demo's requests: prompts of a workload and arrival times, drawn from a seed."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean

from deploy.triton.stand_in.prompt import REFERENCE_LEVEL
from deploy.triton.stand_in.workload import load_workload
from shared.messages.generation import MAX_REFERENCE_CHARS

PEAK_HOUR = 14
"""Local hour of the peak load."""
SWING = 0.5
"""Amplitude of the load over a day, relative to its mean."""
TASK_SWING = 0.35
"""Amplitude of each task's weight over a day; the tasks are out of phase, so the mix always changes."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of the workload.

    Attributes:
        tokens: length of the model's answer without a directive; None where it was not recorded.
        reference: the right answer; None where the workload has none.
    """

    task: str
    text: str
    tokens: int | None = None
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request and its event time; `reference` is the right answer, if it is known."""

    at: datetime
    id: str
    task: str
    prompt: str
    reference: str | None = None


def prompts_of(workload: Path, *, model: str, tasks: frozenset[str] = frozenset()) -> list[Prompt]:
    """The judged prompts of a workload, because only their answers have texts; all prompts if none was judged.

    Args:
        model: whose answers' lengths are wanted.
        tasks: tasks to use; every task if it is empty or the workload has none of them.

    Raises:
        WorkloadError: the file cannot be read, or has no usable line.
    """
    entries = load_workload(workload).entries
    judged = [entry for entry in entries if entry.preferred is not None] or list(entries)
    wanted = [entry for entry in judged if entry.task in tasks] or judged
    recorded = [entry.responses.get((model, REFERENCE_LEVEL)) for entry in wanted]
    return [
        Prompt(entry.task, entry.prompt, None if answer is None else answer.tokens, _usable(entry.reference))
        for entry, answer in zip(wanted, recorded, strict=True)
    ]


def _usable(reference: str | None) -> str | None:
    return reference if reference is not None and len(reference) <= MAX_REFERENCE_CHARS else None


def mean_tokens(prompts: Sequence[Prompt]) -> float:
    """Mean length of the answers without a directive when every task is equally frequent; 1 if none is recorded."""
    by_task: dict[str, list[int]] = {}
    for prompt in prompts:
        if prompt.tokens is not None:
            by_task.setdefault(prompt.task, []).append(prompt.tokens)
    return fmean(fmean(lengths) for lengths in by_task.values()) if by_task else 1.0


def load_at(hour_of_day: float) -> float:
    """Load at an hour of the day, relative to its daily mean."""
    return 1.0 + SWING * math.cos(2 * math.pi * (hour_of_day - PEAK_HOUR) / 24.0)


def peak_load(start: datetime, hours: float) -> float:
    """Peak of the load between two times, relative to its mean there."""
    loads = [load_at(start.hour + start.minute / 60.0 + hours * part / 200) for part in range(201)]
    return max(loads) * len(loads) / sum(loads)


def plan_traffic(
    prompts: Sequence[Prompt], *, start: datetime, hours: float, requests: int, seed: int, utc_offset_hours: float = 0.0
) -> list[PlannedRequest]:
    """Draw arrivals of a Poisson process with a daily cycle, and prompts from a task mix that changes over the day.

    Args:
        prompts: every task is used; each prompt of a task is equally likely.
        hours: duration of the traffic, > 0.
        requests: exact number of arrivals (a Poisson process given its count).
        utc_offset_hours: local time minus UTC; the peak is at a local hour.

    Returns:
        The requests in order of time, with ids `demo-<seed>-<number>`.

    Raises:
        ValueError: there are no prompts, or the duration or number is not positive.
    """
    if not prompts:
        raise ValueError("the workload has no prompts")
    if hours <= 0 or requests <= 0:
        raise ValueError(f"hours and requests must be greater than 0, got hours={hours}, requests={requests}")
    rng = random.Random(seed)
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    tasks = sorted(by_task)

    def local_hour(offset_h: float) -> float:
        moment = start + timedelta(hours=offset_h + utc_offset_hours)
        return moment.hour + moment.minute / 60.0

    arrivals: list[float] = []
    while len(arrivals) < requests:  # thinning: accept a uniform time with a probability proportional to the load
        offset_h = rng.uniform(0.0, hours)
        if rng.uniform(0.0, 1.0 + SWING) < load_at(local_hour(offset_h)):
            arrivals.append(offset_h)
    arrivals.sort()

    plan = []
    for number, offset_h in enumerate(arrivals):
        phase = 2 * math.pi * local_hour(offset_h) / 24.0
        weights = [1.0 + TASK_SWING * math.cos(phase - 2 * math.pi * i / len(tasks)) for i in range(len(tasks))]
        task = rng.choices(tasks, weights)[0]
        prompt = rng.choice(by_task[task])
        plan.append(
            PlannedRequest(
                at=start + timedelta(hours=offset_h),
                id=f"demo-{seed}-{number:06d}",
                task=task,
                prompt=prompt.text,
                reference=prompt.reference,
            )
        )
    return plan
