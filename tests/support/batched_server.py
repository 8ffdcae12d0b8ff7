"""A model server with in-flight batching, simulated exactly: its calls, and its energy counter at given times.

All running sequences advance at the same speed, so one count of steps serves them all, and between two arrivals or
endings everything is linear.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from services.ledger.attribution import Call
from shared.batch_curve import BatchCurve

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A prompt that reaches the server."""

    at_s: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What a simulated server did: its calls in order of their ends, and its counter (J) over time (s), linear between
    the points."""

    calls: Sequence[Call]
    times_s: np.ndarray
    energy_j: np.ndarray
    steps: np.ndarray

    def counter(self, at_s: np.ndarray) -> np.ndarray:
        """The energy counter at some times, J."""
        return np.interp(at_s, self.times_s, self.energy_j)


def poisson_arrivals(
    rate: Callable[[float], float],
    most: float,
    *,
    until_s: float,
    seed: int,
    tokens: tuple[float, float] = (150.0, 0.6),
    prompt: tuple[float, float] = (80.0, 0.5),
) -> Iterator[Arrival]:
    """Poisson arrivals with a rate that varies; lengths are log-normal (median, sigma).

    Args:
        rate: arrivals per second at a time.
        most: at least the largest rate.
    """
    draw = random.Random(seed)
    at_s = 0.0
    while (at_s := at_s + draw.expovariate(most)) < until_s:
        if draw.random() * most < rate(at_s):
            lengths = [max(2, round(draw.lognormvariate(math.log(one), sigma))) for one, sigma in (prompt, tokens)]
            yield Arrival(at_s, *lengths)


def diurnal(mean: float) -> Callable[[float], float]:
    """A rate with its least value at midnight, its largest at noon, 15 times as large."""
    return lambda at_s: mean * (1.0 - 0.875 * math.cos(2 * math.pi * at_s / DAY_S))


def simulate(
    curve: BatchCurve, arrivals: Iterator[Arrival] | Sequence[Arrival], *, until_s: float = DAY_S, slots: int = 10_000
) -> Trace:
    """Run all arrivals to their end, and an idle server until `until_s`.

    A prompt is read before its sequence joins the batch, beside the others' steps.
    """
    joins: list[tuple[float, int, Arrival]] = []
    for number, one in enumerate(arrivals):
        joins.append((one.at_s + one.prompt_tokens * curve.prompt_token_s, number, one))
    joins.sort()
    now_s = steps = energy_j = 0.0
    running: list[tuple[float, int]] = []
    begun: dict[int, tuple[Arrival, float]] = {}
    firsts: list[tuple[float, int]] = []
    first_s: dict[int, float] = {}
    times, energies, counts, calls = [0.0], [0.0], [0.0], []
    position = 0
    while position < len(joins) or running:
        batch = len(running)
        speed = 1.0 / curve.step_time_s(batch) if batch else 0.0
        goals = [math.inf if position >= len(joins) or batch >= slots else max(joins[position][0], now_s)]
        goals += [now_s + max(0.0, queue[0][0] - steps) / speed if queue else math.inf for queue in (firsts, running)]
        moment = min(goals)
        energy_j += curve.idle_w * (moment - now_s) + curve.step_energy_j(batch) * speed * (moment - now_s)
        steps += speed * (moment - now_s)
        now_s = moment
        if moment == goals[0]:
            _, number, arrival = joins[position]
            position += 1
            energy_j += curve.prompt_token_j * arrival.prompt_tokens
            begun[number] = (arrival, steps)
            heapq.heappush(firsts, (steps + 1, number))
            heapq.heappush(running, (steps + arrival.completion_tokens, number))
        elif moment == goals[1]:
            first_s[heapq.heappop(firsts)[1]] = now_s
        else:
            _, number = heapq.heappop(running)
            arrival, _ = begun.pop(number)
            calls.append(
                Call(
                    f"c{number}", arrival.at_s, first_s.pop(number, now_s), now_s, arrival.prompt_tokens,
                    arrival.completion_tokens,
                )
            )  # fmt: skip
        times.append(now_s)
        energies.append(energy_j)
        counts.append(steps)
    if now_s < until_s:
        times.append(until_s)
        energies.append(energy_j + curve.idle_w * (until_s - now_s))
        counts.append(steps)
    return Trace(calls, np.array(times), np.array(energies), np.array(counts))
