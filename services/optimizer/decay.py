"""Sums that forget, in event time."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class DecayedSums:
    """Sums of observations, each weighted by 2^(−age / half-life); the order in which they come in does not matter.

    Attributes:
        as_of_s: event time for which `values` hold, seconds since the Unix epoch: that of the newest observation.
    """

    as_of_s: float
    values: list[float]

    def add(self, observation: Sequence[float], *, at_s: float, half_life_s: float) -> None:
        """Add an observation made at an event time."""
        if at_s > self.as_of_s:
            fade = fading(at_s - self.as_of_s, half_life_s)
            self.values = [value * fade + new for value, new in zip(self.values, observation, strict=True)]
            self.as_of_s = at_s
        else:
            weight = fading(self.as_of_s - at_s, half_life_s)
            self.values = [value + new * weight for value, new in zip(self.values, observation, strict=True)]

    def at(self, now_s: float, half_life_s: float) -> list[float]:
        """The sums at an event time."""
        fade = fading(now_s - self.as_of_s, half_life_s)
        return [value * fade for value in self.values]


def fading(age_s: float, half_life_s: float) -> float:
    """What is left of an observation; what is not old yet counts fully."""
    return float(2.0 ** (-max(0.0, age_s) / half_life_s))
