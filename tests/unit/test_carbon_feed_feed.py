"""The feed of one zone: publishes what is available, whichever provider fails."""

from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry

from services.carbon_feed.feed import FeedMetrics, ZoneFeed
from services.carbon_feed.providers.base import (
    ConfigurationError,
    NoDataError,
    Provider,
    ProviderError,
    RateLimitedError,
)
from services.carbon_feed.providers.constant import ConstantProvider
from services.carbon_feed.settings import CarbonFeedSettings
from shared.fleet import Directive, Fleet, Model
from shared.messages import CarbonIntensity, IntensityPoint
from shared.pools import Endpoint, Pool
from shared.runtime.clock import ManualClock

NOW = datetime(2024, 2, 1, 12, 20, tzinfo=UTC)
HOUR = timedelta(hours=1)
FLEET = Fleet(
    directives=(Directive(level="L0"),),
    models=(Model(name="m", chat_template="chatml"),),
    pools=(Pool(name="p", model="m", zone="DE", endpoints=(Endpoint(name="e", grpc="localhost:1"),)),),
)


class Faulty(ConstantProvider):
    """A constant provider with faults."""

    def __init__(self, **faults: Exception) -> None:
        super().__init__(100.0)
        self.source = "faulty"
        self.faults = faults
        self.asked: list[str] = []

    def _answer(self, name: str) -> None:
        self.asked.append(name)
        if name in self.faults:
            raise self.faults[name]

    async def latest(self, now: datetime) -> IntensityPoint:
        self._answer("latest")
        return await super().latest(now)

    async def history(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        self._answer("history")
        return await super().history(since, until)

    async def forecast(self, now: datetime) -> tuple[IntensityPoint, ...]:
        self._answer("forecast")
        return await super().forecast(now)


class Fixture:
    """A feed, and the messages that it published."""

    def __init__(self, *providers: Provider) -> None:
        self.clock = ManualClock(NOW)
        self.registry = CollectorRegistry()
        self.published: list[CarbonIntensity] = []
        self.feed = ZoneFeed(
            "DE", providers, scope="direct", clock=self.clock, window=timedelta(days=1), poll_s=60, retry_s=15,
            metrics=FeedMetrics(self.registry),
        )  # fmt: skip

    async def poll(self) -> float:
        async def publish(message: CarbonIntensity) -> None:
            self.published.append(message)

        return await self.feed.poll(publish)

    def errors(self, source: str) -> float | None:
        return self.registry.get_sample_value("sprout_carbon_provider_errors_total", {"zone": "DE", "source": source})


@pytest.mark.parametrize("fault", [NoDataError("null"), KeyError("carbonIntensity")])
async def test_after_any_failure_the_next_provider_is_asked(fault: Exception) -> None:
    fixture = Fixture(Faulty(latest=fault), ConstantProvider(380.0))
    await fixture.poll()
    assert [message.source for message in fixture.published] == ["constant"]
    assert fixture.errors("faulty") == 1


async def test_a_value_is_published_even_without_history_and_forecast() -> None:
    provider = Faulty(history=ProviderError("no history"), forecast=ValueError("defect"))
    fixture = Fixture(provider)
    await fixture.poll()
    (message,) = fixture.published
    assert message.latest.intensity_g_per_kwh == 100.0
    assert (message.history, message.forecast) == ((), ())
    provider.faults.clear()
    fixture.clock.advance(HOUR)
    await fixture.poll()
    assert len(fixture.published[1].history) == 24  # asked for again, in full


async def test_between_two_values_only_the_latest_is_asked_for() -> None:
    provider = Faulty()
    fixture = Fixture(provider)
    for _ in range(3):
        await fixture.poll()
    assert provider.asked == ["latest", "history", "forecast", "latest", "latest"]
    assert len(fixture.published) == 1


async def test_what_was_published_before_is_continued_unless_it_cannot_be_compared() -> None:
    def earlier(at: datetime, **changes: object) -> CarbonIntensity:
        latest = IntensityPoint(at=at, intensity_g_per_kwh=90.0)
        history = [IntensityPoint(at=at - n * HOUR, intensity_g_per_kwh=80.0 + n) for n in range(30, 0, -1)]
        message = CarbonIntensity(zone="DE", latest=latest, history=history, source="x", published_at=at)
        return message.model_copy(update=changes)

    provider = Faulty(history=NoDataError("no history"))
    fixture = Fixture(provider)
    before = NOW.replace(minute=0) - HOUR
    for useless in (
        earlier(before, zone="FR"),
        earlier(before, scope="life-cycle"),
        earlier(NOW + HOUR),  # from a replay
    ):
        fixture.feed.restore(useless)
        assert fixture.feed.problem() is not None
    fixture.feed.restore(earlier(before))
    assert fixture.feed.problem() is None
    await fixture.poll()
    (message,) = fixture.published
    assert [point.intensity_g_per_kwh for point in message.history] == [
        *(float(80 + n) for n in range(23, 0, -1)),
        90.0,
    ]
    fixture.feed.restore(message)
    await fixture.poll()
    assert len(fixture.published) == 1


async def test_without_an_answer_it_is_not_ready_says_why_and_waits_as_long_as_the_provider_says() -> None:
    fixture = Fixture(Faulty(latest=RateLimitedError("asked too often", retry_after_s=90.0)))
    assert await fixture.poll() == 90.0
    assert "asked too often" in (fixture.feed.problem() or "")
    assert fixture.published == []


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        ({}, "zones without a provider: DE.*it has: none"),
        ({"FR": [{"kind": "constant", "intensity_g_per_kwh": 50}]}, "zones without a provider: DE.*it has: FR"),
        ({"DE": [{"kind": "electricity_maps"}]}, "set SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN"),
        (
            {"DE": [{"kind": "csv", "path": "a.csv"}, {"kind": "csv", "path": "b.csv", "column": "life-cycle"}]},
            "include different emissions",
        ),
    ],
)
def test_providers_that_do_not_fit_the_fleet_are_rejected_with_the_remedy(
    providers: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN", raising=False)
    settings = CarbonFeedSettings.model_validate({"providers": providers})
    with pytest.raises(ConfigurationError, match=message):
        settings.chains(FLEET)
