"""Carbon: the newest intensity of every zone, and grams from joules and seconds.

Grams of a request = energy x PUE x intensity + k1 x time (arXiv 2403.12900, section 3.1).
"""

from collections.abc import Iterator, Set
from datetime import datetime
from typing import Final

from shared.messages import CarbonIntensity, IntensityPoint

JOULES_PER_KWH: Final = 3_600_000.0


class LatestIntensities:
    """The newest message of every zone, from the compacted topic `carbon-intensity`."""

    def __init__(self) -> None:
        self._by_zone: dict[str, CarbonIntensity] = {}

    def update(self, intensity: CarbonIntensity) -> bool:
        """Store a message unless a newer one of its zone is known.

        Returns:
            Whether it was stored.
        """
        known = self._by_zone.get(intensity.zone)
        if known is not None and (intensity.latest.at, intensity.published_at) <= (known.latest.at, known.published_at):
            return False
        self._by_zone[intensity.zone] = intensity
        return True

    def get(self, zone: str) -> CarbonIntensity | None:
        """The newest message of a zone."""
        return self._by_zone.get(zone)

    @property
    def zones(self) -> Set[str]:
        """Zones with at least one message."""
        return self._by_zone.keys()

    def age_s(self, zone: str, now: datetime) -> float | None:
        """Event seconds since the period of the zone's latest value started; None for an unknown zone."""
        known = self._by_zone.get(zone)
        return None if known is None else (now - known.latest.at).total_seconds()

    def fresh_g_per_kwh(self, zone: str, now: datetime, *, max_age_s: float) -> float | None:
        """The zone's latest intensity, gCO2eq/kWh; None if it is unknown or older than `max_age_s` (event time)."""
        age_s = self.age_s(zone, now)
        if age_s is None or age_s > max_age_s:
            return None
        return self._by_zone[zone].latest.intensity_g_per_kwh


def trailing_points(intensity: CarbonIntensity) -> Iterator[IntensityPoint]:
    """All values of a message, oldest first; the last one is the latest."""
    yield from (point for point in intensity.history if point.at < intensity.latest.at)
    yield intensity.latest


def operational_g(*, energy_j: float, pue: float, intensity_g_per_kwh: float) -> float:
    """gCO2eq of generating the electricity, with the site's overhead (PUE)."""
    return energy_j / JOULES_PER_KWH * pue * intensity_g_per_kwh


def embodied_g(*, seconds: float, embodied_g_per_s: float) -> float:
    """gCO2eq of making the server, for `seconds` of its time (k1 x time)."""
    return seconds * embodied_g_per_s
