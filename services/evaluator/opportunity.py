"""When the evaluator spends energy: at a local minimum of the urgency-adjusted carbon intensity.

With t hours since the last evaluation, the intensity k2 is weighed as k2' = k2 · exp(−βt), β = ln 2 / 24 per hour: the
longer ago the last evaluation, the cleaner the grid appears. The evaluator runs when the grace period has passed, k2'
is not above the threshold, and k2' has stopped falling; in any case when an evaluation is overdue (paper, section 3.3).

The code that the authors published weighs with exp(+βt) and compares the raw k2 with the threshold: that is variant
`published`.
"""

from dataclasses import dataclass
from datetime import datetime
from math import exp, log
from typing import Final, Literal

Variant = Literal["urgency", "published"]
Trigger = Literal["local_minimum", "overdue", "first", "requested"]

URGENCY_PER_HOUR: Final = log(2) / 24
"""β: after a day without an evaluation an intensity counts half."""

PUBLISHED_URGENCY_PER_HOUR: Final = 0.029
"""β as the authors' code has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpportunityRules:
    """When it is time; hours of event time.

    Attributes:
        grace_h: no evaluation for so long after the last one.
        overdue_h: an evaluation in any case after so long.
        urgency_per_hour: β.
    """

    variant: Variant = "urgency"
    grace_h: float = 6.0
    overdue_h: float = 72.0
    urgency_per_hour: float = URGENCY_PER_HOUR

    def adjusted(self, intensity: float, elapsed_h: float) -> float:
        """k2' of an intensity, `elapsed_h` after the last evaluation; in the intensity's unit."""
        sign = 1.0 if self.variant == "published" else -1.0
        return intensity * exp(sign * self.urgency_per_hour * elapsed_h)


@dataclass(frozen=True, slots=True)
class _Reading:
    at: datetime
    intensity: float
    falling: bool | None
    """Whether k2' had last fallen, or was level, before this reading; null: not known."""


class Opportunity:
    """Follows the intensity of one zone for one model, one reading at a time.

    Attributes:
        last: event time of the last evaluation; null before the first.
    """

    def __init__(self, rules: OpportunityRules, *, last: datetime | None = None) -> None:
        self.rules = rules
        self.last = last
        self._reading: _Reading | None = None
        self._before: _Reading | None = None

    def evaluated(self, at: datetime) -> None:
        """An evaluation was decided on at an event time."""
        self.last = at

    def observe(self, at: datetime, intensity: float, *, threshold: float) -> Trigger | None:
        """Take the next reading; returns why it is time for an evaluation, null if it is not.

        A reading as old as the one before revises it; an older one says nothing new. Before the first evaluation there
        is never a reason here: see `due`.

        Args:
            at: event time.
            intensity: k2, gCO2eq/kWh.
            threshold: what k2' (variant `published`: k2) must not exceed; the mean of the trailing window.
        """
        if self._reading is not None:
            if at < self._reading.at:
                return None
            if at > self._reading.at:
                self._before = self._reading
        gradient = None if self._before is None else self._gradient(self._before, at, intensity)
        fell = self._before is not None and self._before.falling is True
        self._reading = _Reading(at, intensity, None if gradient is None else gradient <= 0)
        if self.last is None:
            return None
        elapsed_h = _hours(self.last, at)
        if elapsed_h >= self.rules.overdue_h:
            return "overdue"
        if elapsed_h <= self.rules.grace_h or self._compared(intensity, elapsed_h) > threshold:
            return None
        return "local_minimum" if fell and gradient is not None and gradient >= 0 else None

    def due(self, now: datetime, *, samples: int, min_samples: int) -> Trigger | None:
        """Whether it is time whatever the grid does: for the very first evaluation, or because one is overdue.

        Quality must be known before anything can be saved, so the first does not wait for a clean grid.

        Args:
            samples: prompts that could be evaluated.
            min_samples: fewer tell too little for a first evaluation.
        """
        if self.last is None:
            return "first" if samples >= min_samples else None
        return "overdue" if samples > 0 and _hours(self.last, now) >= self.rules.overdue_h else None

    def adjusted(self) -> float | None:
        """k2' of the newest reading, gCO2eq/kWh; null before the first evaluation or reading."""
        if self.last is None or self._reading is None:
            return None
        return self.rules.adjusted(self._reading.intensity, _hours(self.last, self._reading.at))

    def _compared(self, intensity: float, elapsed_h: float) -> float:
        return intensity if self.rules.variant == "published" else self.rules.adjusted(intensity, elapsed_h)

    def _gradient(self, before: _Reading, at: datetime, intensity: float) -> float:
        """How k2' changed since the reading before.

        Both are weighed from the reading before: another origin would scale both alike and leave the sign as it is.
        """
        return self.rules.adjusted(intensity, _hours(before.at, at)) - before.intensity


def _hours(start: datetime, end: datetime) -> float:
    return (end - start).total_seconds() / 3_600
