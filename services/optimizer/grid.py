"""The newest carbon intensity of every zone."""

from datetime import datetime, timedelta

from services.optimizer.bounds import InForce, TrailingRange, in_force, trailing_range
from shared.messages import CarbonIntensity


class Grid:
    """What is known of the zones."""

    def __init__(self, *, max_age: timedelta, window: timedelta, min_hours: int) -> None:
        """Begin without any; what the arguments mean is in `bounds`."""
        self._max_age = max_age
        self._window = window
        self._min_hours = min_hours
        self._zones: dict[str, CarbonIntensity] = {}

    def learn(self, intensity: CarbonIntensity) -> bool:
        """Take an intensity unless a later one of its zone is known; returns whether it was taken."""
        known = self._zones.get(intensity.zone)
        if known is not None and (intensity.latest.at, intensity.published_at) <= (known.latest.at, known.published_at):
            return False
        self._zones[intensity.zone] = intensity
        return True

    def in_force(self, zones: set[str], now: datetime) -> dict[str, InForce]:
        """The intensity to count each zone with; a zone is left out where nothing can stand for it."""
        found: dict[str, InForce] = {}
        for zone in sorted(zones & self._zones.keys()):
            value = in_force(self._zones[zone], now, max_age=self._max_age)
            if value is not None:
                found[zone] = value
        return found

    def range(self, zone: str) -> TrailingRange:
        """k0_min and k0_max of a known zone.

        Raises:
            KeyError: nothing is known of the zone.
        """
        return trailing_range(self._zones[zone], window=self._window, min_hours=self._min_hours)

    def age_s(self, zone: str, now: datetime) -> float | None:
        """Event seconds since the period of a zone's latest value began; null when none is known."""
        known = self._zones.get(zone)
        return None if known is None else (now - known.latest.at).total_seconds()
