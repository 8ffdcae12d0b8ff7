"""When faults strike, whom, and for how long: drawn from a seed, so that a drill can be repeated. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal


def randomness(seed: int, scenario: str) -> Random:
    """The draws of one scenario; the same whichever other scenarios are played."""
    return Random(f"{seed}/{scenario}")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        after: share of the traffic that is through when it strikes, in (0, 1).
        victim: number of the one that it strikes.
        hold_s: wall seconds until the victim is helped up.
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
    """Faults in order of time, at least half a step of an even spread apart.

    Args:
        hold_s: shortest and longest.
        within: shares of the traffic between which they strike.
    """
    begin, end = within
    step = (end - begin) / number
    return tuple(
        Fault(begin + step * (place + 0.5 * rng.random()), rng.randrange(victims), rng.uniform(*hold_s))
        for place in range(number)
    )


@dataclass(frozen=True, slots=True)
class Move:
    """A router joins or leaves.

    Attributes:
        after: share of the traffic that is through.
        victim: place among those that run, of the one that leaves.
    """

    after: float
    kind: Literal["join", "leave"]
    victim: int = 0


def storm(
    rng: Random, *, moves: int, routers: int, most: int, within: Sequence[float] = (0.05, 0.95)
) -> tuple[Move, ...]:
    """Comings and goings at uneven intervals; one router at least stays, and there are never more than `most`.

    Args:
        routers: how many run at first.
    """
    begin, end = within
    step = (end - begin) / moves
    made: list[Move] = []
    for place in range(moves):
        after = begin + step * (place + 0.5 * rng.random())
        if routers <= 1 or (routers < most and rng.random() < 0.5):
            made.append(Move(after, "join"))
            routers += 1
        else:
            made.append(Move(after, "leave", rng.randrange(routers)))
            routers -= 1
    return tuple(made)
