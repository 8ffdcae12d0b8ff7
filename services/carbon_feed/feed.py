"""Feeds one zone: asks its providers in order, publishes what is new. The only loop of the service."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.carbon_feed.providers import Provider, ProviderError, RateLimitedError
from services.carbon_feed.trace import Column
from services.carbon_feed.window import Window
from shared.messages import CarbonIntensity, IntensityPoint
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

Publish = Callable[[CarbonIntensity], Awaitable[None]]
Answer = TypeVar("Answer")

SHORTEST_PAUSE_S = 0.05
"""Wall seconds between two looks, however fast event time goes."""

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
            point = await self._ask(provider, provider.latest(now), failures)
            if point is None:
                continue
            if self._window.is_news(point):
                await self._tell(provider, point, now, publish, failures)
            self._complain(failures)
            self._note_age(now)
            return self._until_next(provider, now)
        self._complain(failures)
        self._note_age(now)
        waits = [failure.retry_after_s for failure in failures if isinstance(failure, RateLimitedError)]
        return max([self._retry_s, *(wait for wait in waits if wait is not None)])

    async def close(self) -> None:
        """Close the providers."""
        for provider in self._providers:
            await provider.close()

    async def _tell(
        self,
        provider: Provider,
        point: IntensityPoint,
        now: datetime,
        publish: Publish,
        failures: list[ProviderError],
    ) -> None:
        """Publish a new value; a history or forecast that cannot be had does not hold it back."""
        since = self._known_from(provider, point.at)
        history = await self._ask(provider, provider.history(since, point.at), failures) if since < point.at else ()
        forecast = await self._ask(provider, provider.forecast(now), failures)
        if history is not None:
            self._filled_by.add(provider.source)
        self._window.add(history or ())
        self._window.advance(point)
        await publish(self._message(provider.source, point, forecast or ()))
        self._metrics.published.labels(self.zone).inc()
        self._metrics.intensity.labels(self.zone).set(point.intensity_g_per_kwh)

    def _known_from(self, provider: Provider, until: datetime) -> datetime:
        """From when on history is lacking: the first time the window in full, then from the last value on."""
        latest = self._window.latest
        return until - self._length if provider.source not in self._filled_by or latest is None else latest.at

    async def _ask(self, provider: Provider, answer: Awaitable[Answer], failures: list[ProviderError]) -> Answer | None:
        """What a provider answers; null and one failure more where it cannot, even through a defect of its own."""
        try:
            return await answer
        except ProviderError as error:
            failures.append(error)
        except Exception as error:  # noqa: BLE001 - one provider's defect must not silence the others
            _log.exception("provider failed unexpectedly", zone=self.zone, source=provider.source)
            failures.append(ProviderError(f"{provider.source} failed unexpectedly ({type(error).__name__})"))
        self._metrics.errors.labels(self.zone, provider.source).inc()
        return None

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
        if latest is not None:
            self._metrics.age.labels(self.zone).set((now - latest.at).total_seconds())

    def _complain(self, failures: Sequence[ProviderError]) -> None:
        """Log what is wrong, once for as long as it stays the same."""
        complaint = "; ".join(str(failure) for failure in failures)
        if complaint and complaint != self._complaint:
            _log.warning("carbon intensity", zone=self.zone, problem=complaint)
        self._complaint = complaint
