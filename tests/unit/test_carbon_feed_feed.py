"""One zone's feed: what is known is told, whatever a provider cannot answer."""

from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry

from services.carbon_feed.feed import FeedMetrics, ZoneFeed
from services.carbon_feed.providers import NoDataError, Provider, ProviderError, RateLimitedError
from services.carbon_feed.recorded import ConstantProvider
from services.carbon_feed.settings import CarbonFeedSettings, ConfigurationError
from shared.fleet import Directive, Endpoint, Fleet, Model, Pool
from shared.messages import CarbonIntensity, IntensityPoint
from shared.runtime.clock import ManualClock

NOW = datetime(2024, 2, 1, 12, 20, tzinfo=UTC)
HOUR = timedelta(hours=1)
FLEET = Fleet(
    directives=(Directive(level="L0"),),
    models=(Model(name="m", chat_template="chatml"),),
    pools=(Pool(name="p", model="m", zone="DE", endpoints=(Endpoint(name="e", grpc="localhost:1"),)),),
)


class Faulty(ConstantProvider):
    """A constant that fails where it is told to."""

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


class Desk:
    """A feed, and what it published."""

    def __init__(self, *providers: Provider) -> None:
        self.clock = ManualClock(NOW)
        self.registry = CollectorRegistry()
        self.published: list[CarbonIntensity] = []
        self.feed = ZoneFeed(
            "DE", providers, scope="direct", clock=self.clock, window=timedelta(days=1), poll_s=60, retry_s=15,
            metrics=FeedMetrics(self.registry),
        )  # fmt: skip

    async def turn(self) -> float:
        async def publish(message: CarbonIntensity) -> None:
            self.published.append(message)

        return await self.feed.turn(publish)

    def errors(self, source: str) -> float | None:
        return self.registry.get_sample_value("sprout_carbon_provider_errors_total", {"zone": "DE", "source": source})


@pytest.mark.parametrize("fault", [NoDataError("null"), KeyError("carbonIntensity")])
async def test_whatever_a_provider_fails_with_the_next_one_is_asked(fault: Exception) -> None:
    desk = Desk(Faulty(latest=fault), ConstantProvider(380.0))
    await desk.turn()
    assert [message.source for message in desk.published] == ["constant"]
    assert desk.errors("faulty") == 1


async def test_a_value_is_told_without_the_history_and_the_forecast_that_cannot_be_had() -> None:
    provider = Faulty(history=ProviderError("no history"), forecast=ValueError("defect"))
    desk = Desk(provider)
    await desk.turn()
    (message,) = desk.published
    assert message.latest.intensity_g_per_kwh == 100.0
    assert (message.history, message.forecast) == ((), ())
    provider.faults.clear()
    desk.clock.advance(HOUR)
    await desk.turn()
    assert len(desk.published[1].history) == 24  # asked for again, in full


async def test_between_two_values_nothing_but_the_latest_is_asked_for() -> None:
    provider = Faulty()
    desk = Desk(provider)
    for _ in range(3):
        await desk.turn()
    assert provider.asked == ["latest", "history", "forecast", "latest", "latest"]
    assert len(desk.published) == 1


async def test_with_no_answer_it_is_not_ready_says_why_and_waits_as_long_as_told() -> None:
    desk = Desk(Faulty(latest=RateLimitedError("asked too often", retry_after_s=90.0)))
    assert await desk.turn() == 90.0
    assert "asked too often" in (desk.feed.problem() or "")
    assert desk.published == []


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        ({}, "zones without a provider: DE.*it has: none"),
        ({"FR": [{"kind": "constant", "intensity_g_per_kwh": 50}]}, "zones without a provider: DE.*it has: FR"),
        ({"DE": [{"kind": "electricity_maps"}]}, "set SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN"),
        (
            {"DE": [{"kind": "csv", "path": "a.csv"}, {"kind": "csv", "path": "b.csv", "column": "life-cycle"}]},
            "count different emissions",
        ),
    ],
)
def test_providers_that_do_not_fit_the_fleet_are_refused_with_the_remedy(providers: object, message: str) -> None:
    settings = CarbonFeedSettings.model_validate({"providers": providers})
    with pytest.raises(ConfigurationError, match=message):
        settings.chains(FLEET)
