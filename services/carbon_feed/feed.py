"""The feed of one zone: polls its providers in order and publishes new values with their history.

The topic is the feed's memory: what was published before, by this process or another, is read back before anything is
published, so that a restart keeps the trailing window even if the providers offer a shorter one.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.carbon_feed.providers.base import Provider, ProviderError, RateLimitedError, Scope
from shared.messages import CarbonIntensity, IntensityPoint
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

Publish = Callable[[CarbonIntensity], Awaitable[None]]
T = TypeVar("T")

MIN_PAUSE_S = 0.05
"""Shortest time between two polls, wall, however fast event time runs."""

_log = get_logger(__name__)


class FeedMetrics:
    """Prometheus metrics of all feeds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.intensity = Gauge(
            "sprout_carbon_intensity_g_per_kwh", "Latest carbon intensity", ["zone"], registry=registry
        )
        self.age = Gauge(
            "sprout_carbon_intensity_age_seconds",
            "Event time since the period of the latest value began",
            ["zone"],
            registry=registry,
        )
        self.errors = Counter(
            "sprout_carbon_provider_errors", "Requests that a provider failed", ["zone", "source"], registry=registry
        )
        self.published = Counter("sprout_carbon_published", "Messages published", ["zone"], registry=registry)


class Window:
    """The trailing window of a zone: its values, by time; may have gaps.

    Attributes:
        latest: the newest value; `None` before the first one.
    """

    def __init__(self, length: timedelta) -> None:
        self._length = length
        self._points: dict[datetime, IntensityPoint] = {}
        self.latest: IntensityPoint | None = None

    def add(self, points: Iterable[IntensityPoint]) -> None:
        """Add past values; a corrected value replaces the earlier one of the same time."""
        self._points.update((point.at, point) for point in points)

    def is_new(self, point: IntensityPoint) -> bool:
        """Whether a value is newer than the latest one, or corrects it."""
        return self.latest is None or (point.at >= self.latest.at and point != self.latest)

    def advance(self, point: IntensityPoint) -> None:
        """Set the latest value, and remove values that are older than the window."""
        self.latest = point
        self._points[point.at] = point
        oldest = point.at - self._length
        self._points = {at: kept for at, kept in self._points.items() if at >= oldest}

    def history(self) -> tuple[IntensityPoint, ...]:
        """All values before the latest one, oldest first."""
        if self.latest is None:
            return ()
        return tuple(self._points[at] for at in sorted(self._points) if at < self.latest.at)


class ZoneFeed:
    """Polls the providers of one zone."""

    def __init__(
        self,
        zone: str,
        providers: tuple[Provider, ...],
        *,
        scope: Scope,
        clock: Clock,
        window: timedelta,
        poll_s: float,
        retry_s: float,
        metrics: FeedMetrics,
    ) -> None:
        """Set up; sends no request yet.

        Args:
            providers: asked in this order, until one answers.
            scope: emissions that the values include.
            window: length of the history in a message, event time.
            poll_s: between two requests to a provider that does not know when its next value begins, wall.
            retry_s: before the next attempt if no provider answered, wall.
        """
        self.zone = zone
        self._providers = providers
        self._scope: Scope = scope
        self._clock = clock
        self._window_length = window
        self._window = Window(window)
        self._poll_s = poll_s
        self._retry_s = retry_s
        self._metrics = metrics
        self._filled_by: set[str] = set()
        self._failures = ""

    def restore(self, message: CarbonIntensity) -> None:
        """Continue from a message that was published before; one that is no newer than the latest value is ignored.

        Emissions of another scope cannot be compared. A value of the future comes from a replay.
        """
        is_comparable = message.zone == self.zone and message.scope == self._scope
        if is_comparable and message.latest.at <= self._clock.now() and self._window.is_new(message.latest):
            self._window.add(message.history)
            self._window.advance(message.latest)
            self._metrics.intensity.labels(self.zone).set(message.latest.intensity_g_per_kwh)

    def problem(self) -> str | None:
        """The readiness check: no value is known, neither asked for nor read back."""
        if self._window.latest is None:
            return f"no carbon intensity of zone {self.zone} yet: {self._failures or 'not asked yet'}"
        return None

    async def run(self, publish: Publish) -> None:
        """Poll forever."""
        while True:
            pause_s = await self.poll(publish)
            await asyncio.sleep(max(MIN_PAUSE_S, pause_s))

    async def poll(self, publish: Publish) -> float:
        """Ask the providers once, and publish a new value.

        Returns:
            Wall seconds until the next poll.
        """
        now = self._clock.now()
        failures: list[ProviderError] = []
        for provider in self._providers:
            point = await self._ask(provider, provider.latest(now), failures)
            if point is None:
                continue
            if self._window.is_new(point):
                await self._publish(provider, point, now, publish, failures)
            self._finish(failures, now)
            change = provider.next_change(now)
            return self._poll_s if change is None else self._clock.wall_seconds_until(change)
        self._finish(failures, now)
        waits = [failure.retry_after_s for failure in failures if isinstance(failure, RateLimitedError)]
        return max([self._retry_s, *(wait for wait in waits if wait is not None)])

    async def close(self) -> None:
        """Close the providers."""
        for provider in self._providers:
            await provider.close()

    async def _publish(
        self,
        provider: Provider,
        point: IntensityPoint,
        now: datetime,
        publish: Publish,
        failures: list[ProviderError],
    ) -> None:
        """Publish a new value; does so even if its history or forecast is not available."""
        since = self._missing_since(provider, point.at)
        history = await self._ask(provider, provider.history(since, point.at), failures) if since < point.at else ()
        forecast = await self._ask(provider, provider.forecast(now), failures)
        if history is not None:
            self._filled_by.add(provider.source)
        self._window.add(history or ())
        self._window.advance(point)
        await publish(
            CarbonIntensity(
                zone=self.zone,
                latest=point,
                history=self._window.history(),
                forecast=forecast or (),
                scope=self._scope,
                source=provider.source,
                published_at=self._clock.now(),
            )
        )
        self._metrics.published.labels(self.zone).inc()
        self._metrics.intensity.labels(self.zone).set(point.intensity_g_per_kwh)

    def _missing_since(self, provider: Provider, until: datetime) -> datetime:
        """Start of the history to ask for: the whole window the first time, later from the latest value on."""
        latest = self._window.latest
        return until - self._window_length if provider.source not in self._filled_by or latest is None else latest.at

    async def _ask(self, provider: Provider, answer: Awaitable[T], failures: list[ProviderError]) -> T | None:
        """A provider's answer; `None`, and one more of `failures`, if it has none or fails unexpectedly."""
        try:
            return await answer
        except ProviderError as error:
            failures.append(error)
        except Exception as error:  # noqa: BLE001 - a defect of one provider must not stop the others
            _log.exception("provider failed unexpectedly", zone=self.zone, source=provider.source)
            failures.append(ProviderError(f"{provider.source} failed unexpectedly ({type(error).__name__})"))
        self._metrics.errors.labels(self.zone, provider.source).inc()
        return None

    def _finish(self, failures: Sequence[ProviderError], now: datetime) -> None:
        """Update the age of the latest value, and log failures unless they are the same as before."""
        latest = self._window.latest
        if latest is not None:
            self._metrics.age.labels(self.zone).set((now - latest.at).total_seconds())
        described = "; ".join(str(failure) for failure in failures)
        if described and described != self._failures:
            _log.warning("carbon intensity not available", zone=self.zone, problem=described)
        self._failures = described
