"""A constant carbon intensity: for a site with its own power supply, as the last of a chain, and for tests."""

from datetime import datetime, timedelta
from typing import Literal

from pydantic import Field

from services.carbon_feed.providers.base import Provider, Scope, Source
from shared.messages import IntensityPoint

HOUR = timedelta(hours=1)


class ConstantSource(Source):
    """The same intensity always."""

    kind: Literal["constant"]
    intensity_g_per_kwh: float = Field(ge=0)

    @property
    def scope(self) -> Scope | None:
        """Not known for a number."""
        return None

    def open(self, zone: str, *, window: timedelta) -> "ConstantProvider":  # noqa: ARG002
        """Create the provider."""
        return ConstantProvider(self.intensity_g_per_kwh)


class ConstantProvider(Provider):
    """One value an hour, always the same."""

    def __init__(self, intensity_g_per_kwh: float) -> None:
        self._value = intensity_g_per_kwh
        self.source = "constant"

    async def latest(self, now: datetime) -> IntensityPoint:
        """The value of the current hour."""
        return IntensityPoint(at=_hour_of(now), intensity_g_per_kwh=self._value)

    async def history(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        """The values of the hours that began in [since, until)."""
        first = _hour_of(since) if _hour_of(since) == since else _hour_of(since) + HOUR
        hours = range(max(0, -((first - until) // HOUR)))
        return tuple(IntensityPoint(at=first + HOUR * hour, intensity_g_per_kwh=self._value) for hour in hours)

    def next_change(self, now: datetime) -> datetime | None:
        """The next full hour."""
        return _hour_of(now) + HOUR


def _hour_of(at: datetime) -> datetime:
    return at.replace(minute=0, second=0, microsecond=0)
