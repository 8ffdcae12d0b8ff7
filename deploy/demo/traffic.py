"""The demo's traffic: which prompt is asked when. Pure and seeded, so that a day can be replayed exactly."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

PEAK_HOUR = 14
"""Local hour of most requests."""
SWING = 0.5
"""Load swings by this share around its mean over a day."""
TASK_SWING = 0.35
"""Each task's share swings by this much over a day, the tasks out of phase: the mix is never still."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that may be asked."""

    task: str
    text: str


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of the day."""

    at: datetime
    id: str
    task: str
    prompt: str


def load_at(hour_of_day: float) -> float:
    """Relative load at an hour of the day; its mean over a day is 1."""
    return 1.0 + SWING * math.cos(2 * math.pi * (hour_of_day - PEAK_HOUR) / 24.0)


def plan_traffic(
    prompts: Sequence[Prompt], *, start: datetime, hours: float, requests: int, seed: int, utc_offset_hours: float = 0.0
) -> list[PlannedRequest]:
    """Arrivals of a Poisson process with a daily swing, prompts drawn by a mix of tasks that drifts over the day.

    Args:
        prompts: what may be asked; every task is drawn, each prompt of a task is equally likely.
        hours: length of the traffic, > 0.
        requests: how many arrive in all, exactly (a Poisson process given its count).
        utc_offset_hours: local time minus UTC, so that the peak falls on the local afternoon.

    Returns:
        The requests in order of time, with ids `demo-<seed>-<number>`.

    Raises:
        ValueError: no prompts, or a length or count that is not positive.
    """
    if not prompts:
        raise ValueError("the workload holds no prompts: nothing to ask")
    if hours <= 0 or requests <= 0:
        raise ValueError(f"hours and requests must be greater than 0, got hours={hours}, requests={requests}")
    rng = random.Random(seed)  # a simulation, no secret
    by_task: dict[str, list[str]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt.text)
    tasks = sorted(by_task)

    def local_hour(offset_h: float) -> float:
        moment = start + timedelta(hours=offset_h + utc_offset_hours)
        return moment.hour + moment.minute / 60.0

    arrivals: list[float] = []
    while len(arrivals) < requests:  # thinning: accept a uniform time in proportion to the load then
        offset_h = rng.uniform(0.0, hours)
        if rng.uniform(0.0, 1.0 + SWING) < load_at(local_hour(offset_h)):
            arrivals.append(offset_h)
    arrivals.sort()

    plan = []
    for number, offset_h in enumerate(arrivals):
        phase = 2 * math.pi * local_hour(offset_h) / 24.0
        weights = [1.0 + TASK_SWING * math.cos(phase - 2 * math.pi * i / len(tasks)) for i in range(len(tasks))]
        task = rng.choices(tasks, weights)[0]
        plan.append(
            PlannedRequest(
                at=start + timedelta(hours=offset_h),
                id=f"demo-{seed}-{number:06d}",
                task=task,
                prompt=rng.choice(by_task[task]),
            )
        )
    return plan
