"""The carbon intensity of a zone as a step function of time."""

import math
from bisect import bisect_right
from collections.abc import Iterable


class IntensitySteps:
    """Each value holds from its instant until the next one, and for `max_age_s` at the most."""

    def __init__(self, points: Iterable[tuple[float, float]], *, max_age_s: float) -> None:
        """Put points in order.

        Args:
            points: (seconds since the Unix epoch, gCO2eq/kWh), in any order.
        """
        ordered = sorted(dict(points).items())
        self._at_s = [at_s for at_s, _ in ordered]
        self._values = [value for _, value in ordered]
        self._max_age_s = max_age_s

    def mean(self, started_s: float, finished_s: float) -> float | None:
        """Mean in force over a span, weighted by time; at an instant where the span has no length.

        None where for some of the span no value was known or the value was older than `max_age_s`: missing is missing.
        """
        index = bisect_right(self._at_s, started_s) - 1
        if index < 0:
            return None
        parts: list[float] = []
        position_s = started_s
        while True:
            next_s = self._at_s[index + 1] if index + 1 < len(self._at_s) else math.inf
            until_s = min(next_s, finished_s)
            if max(until_s, position_s) - self._at_s[index] > self._max_age_s:
                return None
            if finished_s <= started_s:
                return self._values[index]
            parts.append(self._values[index] * (until_s - position_s))
            if until_s >= finished_s:
                return math.fsum(parts) / (finished_s - started_s)
            position_s = until_s
            index += 1
