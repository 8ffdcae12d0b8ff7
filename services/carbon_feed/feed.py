"""Feeds one zone: asks its providers in order, publishes what is new. The only loop of the service."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.carbon_feed.providers import Provider, ProviderError, RateLimitedError
from services.carbon_feed.trace import Column
from services.carbon_feed.window import Window
from shared.clock import Clock
from shared.logs import get_logger
from shared.messages import CarbonIntensity, IntensityPoint

Publish = Callable[[CarbonIntensity], Awaitable[None]]

SHORTEST_PAUSE_S = 0.05
"""Wall seconds between two looks, however fast event time goes."""
STALE_AFTER = timedelta(hours=3)

_log = get_logger(__name__)


class FeedMetrics:
    """What Prometheus sees."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.intensity = Gauge(
            "sprout_carbon_intensity_g_per_kwh", "Latest carbon intensity", ["zone"], registry=registry
        )
        self.age = Gauge(
            "sprout_carbon_intensity_age_seconds", "Event time since the latest value's period began", ["zone"],
            registry=registry,
        )  # fmt: skip
        self.errors = Counter(
            "sprout_carbon_provider_errors", "Providers that could not answer", ["zone", "source"], registry=registry
        )
        self.published = Counter("sprout_carbon_published", "Messages published", ["zone"], registry=registry)


class ZoneFeed:
    """One zone."""

    def __init__(
        self,
        zone: str,
        providers: tuple[Provider, ...],
        *,
        scope: Column,
        clock: Clock,
        window: timedelta,
        poll_s: float,
        retry_s: float,
        metrics: FeedMetrics,
    ) -> None:
        self.zone = zone
        self._providers = providers
        self._scope: Column = scope
        self._clock = clock
        self._length = window
        self._window = Window(window)
        self._poll_s = poll_s
        self._retry_s = retry_s
        self._metrics = metrics
        self._filled_by: set[str] = set()
        self._complaint = ""

    def problem(self) -> str | None:
        """What stands against readiness."""
        if self._window.latest is None:
            return f"no carbon intensity of zone {self.zone} yet: {self._complaint or 'not asked yet'}"
        return None

    async def run(self, publish: Publish) -> None:
        """Feed for ever."""
        while True:
            pause_s = await self.turn(publish)
            await asyncio.sleep(max(SHORTEST_PAUSE_S, pause_s))

    async def turn(self, publish: Publish) -> float:
        """Ask once, publish if there is something new; returns the wall seconds until the next turn."""
        now = self._clock.now()
        failures: list[ProviderError] = []
        for provider in self._providers:
            try:
                point = await provider.latest(now)
                await self._fill(provider, point.at)
                forecast = await provider.forecast(now)
            except ProviderError as error:
                failures.append(error)
                self._metrics.errors.labels(self.zone, provider.source).inc()
                continue
            self._complain("; ".join(str(failure) for failure in failures))
            if self._window.advance(point):
                await publish(self._message(provider.source, point, forecast))
                self._metrics.published.labels(self.zone).inc()
                self._metrics.intensity.labels(self.zone).set(point.intensity_g_per_kwh)
            self._note_age(now)
            return self._until_next(provider, now)
        self._complain("; ".join(str(failure) for failure in failures))
        self._note_age(now)
        waits = [failure.retry_after_s for failure in failures if isinstance(failure, RateLimitedError)]
        return max([self._retry_s, *(wait for wait in waits if wait is not None)])

    async def close(self) -> None:
        """Close the providers."""
        for provider in self._providers:
            await provider.close()

    async def _fill(self, provider: Provider, until: datetime) -> None:
        """Fill the trailing window: the first time in full, then from the last value on."""
        latest = self._window.latest
        since = until - self._length if provider.source not in self._filled_by or latest is None else latest.at
        if since < until:
            self._window.add(await provider.history(since, until))
        self._filled_by.add(provider.source)

    def _until_next(self, provider: Provider, now: datetime) -> float:
        change = provider.next_change(now)
        return self._poll_s if change is None else self._clock.wall_seconds_until(change)

    def _message(self, source: str, point: IntensityPoint, forecast: tuple[IntensityPoint, ...]) -> CarbonIntensity:
        return CarbonIntensity(
            zone=self.zone,
            latest=point,
            history=self._window.history(),
            forecast=forecast,
            scope=self._scope,
            source=source,
            published_at=self._clock.now(),
        )

    def _note_age(self, now: datetime) -> None:
        latest = self._window.latest
        if latest is None:
            return
        age = now - latest.at
        self._metrics.age.labels(self.zone).set(age.total_seconds())
        if age > STALE_AFTER and not self._complaint:
            self._complain(f"the newest value is {age.total_seconds() / 3600:.1f} h old")

    def _complain(self, complaint: str) -> None:
        """Log what is wrong, once for as long as it stays the same."""
        if complaint and complaint != self._complaint:
            _log.warning("carbon intensity", zone=self.zone, problem=complaint)
        self._complaint = complaint
