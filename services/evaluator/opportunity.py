"""Decides when to evaluate: when the grid is clean, by one of three rules. Pure functions.

- `low_intensity`: the carbon intensity is in the lowest fifth of the trailing week. The default: it evaluates on the
  cleanest grid (docs/decisions/0041-evaluation-that-pays-for-itself.md).
- `urgency`, the paper's text (arXiv 2403.12900, section 3.3): a local minimum of the urgency-adjusted intensity. With t
  hours since the last evaluation, the intensity k2 is adjusted to k2' = k2 · exp(−βt), β = ln 2 / 24 per hour: the more
  time has passed, the cleaner the grid appears. The evaluator runs when the grace period has passed, k2' is at most the
  mean of the trailing window, and k2' has stopped falling.
- `published`, the code that the authors published: it adjusts with exp(+βt) and compares the raw k2 with the mean.

By every rule it also runs when an evaluation is overdue.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import exp, log
from typing import Final, Literal

from pydantic import BaseModel, Field

Variant = Literal["low_intensity", "urgency", "published"]
Reason = Literal["low_intensity", "local_minimum", "overdue", "first", "requested"]

URGENCY_PER_HOUR: Final = log(2) / 24
"""β: after 24 hours without an evaluation an intensity counts half."""

PUBLISHED_URGENCY_PER_HOUR: Final = 0.029
"""β of the authors' code."""

LOW_SHARE: Final = 0.2
"""Share of the trailing week's intensities that count as low."""

LOW_WINDOW_H: Final = 168.0

LOW_GRACE_H: Final = 12.0
PAPER_GRACE_H: Final = 6.0


class OpportunityRules(BaseModel):
    """Parameters of the rule; the evaluator's settings extend this class. Hours are event time."""

    variant: Variant = "low_intensity"
    grace_h: float | None = Field(
        default=None,
        ge=0,
        description="Minimum time between two evaluations, event hours; default: 12, for the paper's rules 6",
    )
    overdue_h: float = Field(
        default=72.0,
        gt=0,
        description="Time since the last evaluation after which one runs at any carbon intensity, event hours",
    )
    urgency_per_hour: float | None = Field(
        default=None, ge=0, description="beta; default: ln 2 / 24, for the published rule 0.029"
    )

    @property
    def min_gap_h(self) -> float:
        """Minimum time between two evaluations."""
        if self.grace_h is not None:
            return self.grace_h
        return LOW_GRACE_H if self.variant == "low_intensity" else PAPER_GRACE_H

    def adjusted(self, intensity: float, elapsed_h: float) -> float:
        """k2' of an intensity, `elapsed_h` after the last evaluation; in the intensity's unit."""
        if self.variant == "low_intensity":
            return intensity
        published = self.variant == "published"
        beta = self.urgency_per_hour
        if beta is None:
            beta = PUBLISHED_URGENCY_PER_HOUR if published else URGENCY_PER_HOUR
        return intensity * exp((1.0 if published else -1.0) * beta * elapsed_h)

    @property
    def threshold_window_h(self) -> float:
        """Length of the trailing window that `threshold` takes, hours."""
        return LOW_WINDOW_H if self.variant == "low_intensity" else math.inf

    def threshold(self, intensities: Sequence[float]) -> float:
        """Intensity above which no evaluation starts: a mean, or the highest of the lowest fifth.

        Args:
            intensities: of the last `threshold_window_h` hours, this reading's among them; not empty.
        """
        if self.variant != "low_intensity":
            return sum(intensities) / len(intensities)
        return sorted(intensities)[max(0, math.ceil(LOW_SHARE * len(intensities)) - 1)]


@dataclass(frozen=True, slots=True)
class _Reading:
    at: datetime
    intensity: float
    falling: bool | None
    """Whether k2' fell or stayed level between the previous reading and this one; None: there is no previous one."""


class Opportunity:
    """Tracks the intensity of one zone for one model, one reading at a time.

    Attributes:
        last: event time of the last evaluation; None before the first.
    """

    def __init__(self, rules: OpportunityRules, *, last: datetime | None = None) -> None:
        self.rules = rules
        self.last = last
        self._reading: _Reading | None = None
        self._previous: _Reading | None = None

    def evaluated(self, at: datetime) -> None:
        """Record that an evaluation starts at an event time."""
        self.last = at

    def observe(self, at: datetime, intensity: float, *, threshold: float) -> Reason | None:
        """Process the next reading.

        A reading of the same time as the previous one replaces it. An older one is ignored. The first evaluation is
        never triggered here, but by `due`.

        Args:
            at: event time.
            intensity: k2, gCO2eq/kWh.
            threshold: upper limit of k2' (variant `published`: of k2), see `OpportunityRules.threshold`.

        Returns:
            Why to evaluate now; None: do not evaluate.
        """
        if self._reading is not None:
            if at < self._reading.at:
                return None
            if at > self._reading.at:
                self._previous = self._reading
        gradient = None if self._previous is None else self._gradient(self._previous, at, intensity)
        fell = self._previous is not None and self._previous.falling is True
        self._reading = _Reading(at, intensity, None if gradient is None else gradient <= 0)
        if self.last is None:
            return None
        elapsed_h = _hours(self.last, at)
        if elapsed_h >= self.rules.overdue_h:
            return "overdue"
        if elapsed_h <= self.rules.min_gap_h or self._compared(intensity, elapsed_h) > threshold:
            return None
        if self.rules.variant == "low_intensity":
            return "low_intensity"
        return "local_minimum" if fell and gradient is not None and gradient >= 0 else None

    def due(self, now: datetime, *, samples: int, min_samples: int) -> Reason | None:
        """Whether to evaluate regardless of the grid: for the first time, or because an evaluation is overdue.

        Nothing can be saved before quality is known, so the first evaluation does not wait for a clean grid.

        Args:
            samples: prompts that can be evaluated.
            min_samples: required for the first evaluation.
        """
        if self.last is None:
            return "first" if samples >= min_samples else None
        return "overdue" if samples > 0 and _hours(self.last, now) >= self.rules.overdue_h else None

    def adjusted(self) -> float | None:
        """k2' of the newest reading, gCO2eq/kWh; None before the first evaluation or reading."""
        if self.last is None or self._reading is None:
            return None
        return self.rules.adjusted(self._reading.intensity, _hours(self.last, self._reading.at))

    def _compared(self, intensity: float, elapsed_h: float) -> float:
        return intensity if self.rules.variant == "published" else self.rules.adjusted(intensity, elapsed_h)

    def _gradient(self, previous: _Reading, at: datetime, intensity: float) -> float:
        """Change of k2' since the previous reading.

        Both values are adjusted from the time of the previous reading. Another origin scales both alike and keeps the
        sign.
        """
        return self.rules.adjusted(intensity, _hours(previous.at, at)) - previous.intensity


def _hours(start: datetime, end: datetime) -> float:
    return (end - start).total_seconds() / 3_600
