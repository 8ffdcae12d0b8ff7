"""What the evaluator last heard of each zone's carbon intensity."""

from collections.abc import Iterator
from datetime import datetime

from shared.messages import CarbonIntensity, IntensityPoint


class Grid:
    """The newest intensity message of every zone."""

    def __init__(self, *, max_age_s: float) -> None:
        """Begin without any.

        Args:
            max_age_s: event seconds after which an intensity is stale.
        """
        self._max_age_s = max_age_s
        self._newest: dict[str, CarbonIntensity] = {}

    def learn(self, intensity: CarbonIntensity) -> bool:
        """Take a message unless a later one of its zone is known; returns whether it was taken."""
        known = self._newest.get(intensity.zone)
        if known is not None and (intensity.latest.at, intensity.published_at) <= (known.latest.at, known.published_at):
            return False
        self._newest[intensity.zone] = intensity
        return True

    def fresh(self, zone: str, now: datetime) -> float | None:
        """The intensity of a zone, gCO2eq/kWh; null where none is known that is recent enough."""
        known = self._newest.get(zone)
        if known is None or (now - known.latest.at).total_seconds() > self._max_age_s:
            return None
        return known.latest.intensity_g_per_kwh

    def in_force(self, now: datetime) -> dict[str, float]:
        """Every fresh intensity, gCO2eq/kWh by zone."""
        return {zone: value for zone in self._newest if (value := self.fresh(zone, now)) is not None}


def readings(intensity: CarbonIntensity) -> Iterator[IntensityPoint]:
    """A message's values, oldest first; the last is the latest."""
    yield from (point for point in intensity.history if point.at < intensity.latest.at)
    yield intensity.latest


def trailing_mean(intensity: CarbonIntensity) -> float:
    """Mean of the trailing window with the latest value, gCO2eq/kWh."""
    values = [point.intensity_g_per_kwh for point in readings(intensity)]
    return sum(values) / len(values)
