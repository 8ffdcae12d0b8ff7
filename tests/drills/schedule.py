"""Times, victims and durations of faults, drawn from a seed so that a drill can be repeated."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal


def randomness(seed: int, scenario: str) -> Random:
    """The random numbers of a scenario; they do not depend on the other scenarios of the drill."""
    return Random(f"{seed}/{scenario}")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        after: share of the traffic before the fault, in (0, 1).
        victim: index of the affected process.
        hold_s: duration of the fault, wall seconds.
    """

    after: float
    victim: int
    hold_s: float


def faults(
    rng: Random,
    *,
    number: int,
    victims: int,
    hold_s: tuple[float, float],
    within: tuple[float, float] = (0.1, 0.8),
) -> tuple[Fault, ...]:
    """Draw faults in order of time, at least half of their mean distance apart.

    Args:
        hold_s: minimum and maximum duration.
        within: shares of the traffic between which the faults occur.
    """
    begin, end = within
    step = (end - begin) / number
    return tuple(
        Fault(begin + step * (index + 0.5 * rng.random()), rng.randrange(victims), rng.uniform(*hold_s))
        for index in range(number)
    )


@dataclass(frozen=True, slots=True)
class Move:
    """A router joins or leaves.

    Attributes:
        after: share of the traffic before the change.
        victim: index of the leaving router among the running ones.
    """

    after: float
    kind: Literal["join", "leave"]
    victim: int = 0


def storm(
    rng: Random, *, moves: int, routers: int, most: int, within: Sequence[float] = (0.05, 0.95)
) -> tuple[Move, ...]:
    """Draw joins and leaves of routers at uneven intervals; between 1 and `most` routers run.

    Args:
        routers: number of routers at the start.
    """
    begin, end = within
    step = (end - begin) / moves
    made: list[Move] = []
    for index in range(moves):
        after = begin + step * (index + 0.5 * rng.random())
        if routers <= 1 or (routers < most and rng.random() < 0.5):
            made.append(Move(after, "join"))
            routers += 1
        else:
            made.append(Move(after, "leave", rng.randrange(routers)))
            routers -= 1
    return tuple(made)
