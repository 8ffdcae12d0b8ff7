"""Providers that ask nobody: a recorded trace, and a constant."""

from datetime import datetime, timedelta
from pathlib import Path

from services.carbon_feed.providers import NoDataError
from services.carbon_feed.trace import Trace
from shared.messages import IntensityPoint

HOUR = timedelta(hours=1)


class TraceProvider:
    """Replays a trace in event time; the future is never looked at, a gap stays a gap."""

    def __init__(self, trace: Trace, path: Path, *, repeat: bool, window: timedelta) -> None:
        """Take a trace.

        Args:
            repeat: play its days over and over, for a stack that lives in real time.
            window: how far back history will be asked for.
        """
        self._recorded = trace
        self._trace = trace
        self._repeat = repeat
        self._window = window
        self._until: datetime | None = None
        self.source = f"csv:{path.name}" + (" (repeated)" if repeat else "")

    async def latest(self, now: datetime) -> IntensityPoint:
        """See `Provider`."""
        point = self._at(now).at(now)
        if point is None:
            raise NoDataError(f"{self.source} begins at {self._recorded.begin:%Y-%m-%d %H:%M}, after event time")
        return point

    async def history(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        """See `Provider`."""
        return self._at(until).between(since, until)

    async def forecast(self, now: datetime) -> tuple[IntensityPoint, ...]:  # noqa: ARG002
        """A recording knows no forecast; its future would be cheating."""
        return ()

    def next_change(self, now: datetime) -> datetime | None:
        """See `Provider`; after the end of the trace nothing changes, and the last value ages."""
        return self._at(now).after(now) or now + HOUR

    async def close(self) -> None:
        """Nothing to let go of."""

    def _at(self, now: datetime) -> Trace:
        if self._repeat and (self._until is None or now >= self._until):
            self._trace = self._recorded.repeated(now, before=self._window)
            self._until = now + timedelta(hours=12)
        return self._trace


class ConstantProvider:
    """The same intensity every hour, for a site whose power does not come from a grid, and for tests."""

    def __init__(self, intensity_g_per_kwh: float) -> None:
        self._value = intensity_g_per_kwh
        self.source = "constant"

    async def latest(self, now: datetime) -> IntensityPoint:
        """See `Provider`."""
        return IntensityPoint(at=_hour_of(now), intensity_g_per_kwh=self._value)

    async def history(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        """See `Provider`."""
        first = _hour_of(since) if _hour_of(since) == since else _hour_of(since) + HOUR
        hours = range(max(0, -((first - until) // HOUR)))
        return tuple(IntensityPoint(at=first + HOUR * hour, intensity_g_per_kwh=self._value) for hour in hours)

    async def forecast(self, now: datetime) -> tuple[IntensityPoint, ...]:  # noqa: ARG002
        """See `Provider`."""
        return ()

    def next_change(self, now: datetime) -> datetime | None:
        """See `Provider`."""
        return _hour_of(now) + HOUR

    async def close(self) -> None:
        """Nothing to let go of."""


def _hour_of(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)
