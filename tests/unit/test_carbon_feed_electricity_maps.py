"""Electricity Maps v4, against answers of the shape that its documentation shows."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest
import respx
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from services.carbon_feed.feed import FeedMetrics, ZoneFeed
from services.carbon_feed.providers.base import (
    NoDataError,
    ProviderError,
    RateLimitedError,
    UnauthorisedError,
    ZoneUnknownError,
)
from services.carbon_feed.providers.constant import ConstantProvider
from services.carbon_feed.providers.electricity_maps import (
    BASE_URL,
    ElectricityMapsProvider,
    ElectricityMapsSource,
)
from shared.runtime.clock import ManualClock

NOW = datetime(2024, 2, 1, 12, 20, tzinfo=UTC)
LATEST = {
    "zone": "DE",
    "carbonIntensity": 302,
    "datetime": "2024-02-01T12:00:00.000Z",
    "updatedAt": "2024-02-01T12:10:01.000Z",
    "emissionFactorType": "direct",
    "isEstimated": True,
    "estimationMethod": "TIME_SLICER_AVERAGE",
}


@pytest.fixture
async def provider():
    found = ElectricityMapsProvider("DE", token=SecretStr("secret-token"))
    yield found
    await found.close()


@pytest.fixture
def api():
    with respx.mock(base_url=BASE_URL) as mock:
        yield mock


async def test_the_latest_value_is_asked_for_with_token_and_factor(api, provider):
    route = api.get("/carbon-intensity/latest").respond(json=LATEST)
    point = await provider.latest(NOW)
    assert (point.intensity_g_per_kwh, point.at.hour, point.estimated) == (302, 12, True)
    request = route.calls.last.request
    assert request.headers["auth-token"] == "secret-token"
    assert dict(request.url.params) == {"zone": "DE", "emissionFactorType": "direct"}


async def test_history_and_forecast_are_ordered_and_null_is_a_gap(api, provider):
    values = [
        {"zone": "DE", "carbonIntensity": value, "datetime": f"2024-02-01T{hour:02}:00:00.000Z"}
        for hour, value in ((11, 310), (9, 290), (10, None), (13, 330))
    ]
    api.get("/carbon-intensity/history").respond(json={"zone": "DE", "history": values})
    api.get("/carbon-intensity/forecast").respond(json={"zone": "DE", "forecast": values})
    history = await provider.history(NOW - timedelta(days=1), NOW)
    assert [point.intensity_g_per_kwh for point in history] == [290, 310]
    assert [point.intensity_g_per_kwh for point in await provider.forecast(NOW)] == [330]


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (httpx.Response(200, json={**LATEST, "zone": "FR"}), ProviderError, "answered for 'FR'"),
        (httpx.Response(200, json={**LATEST, "carbonIntensity": None}), NoDataError, "null"),
        (httpx.Response(200, json={**LATEST, "carbonIntensity": "much"}), ProviderError, "invalid value"),
        (httpx.Response(200, text="<html>"), ProviderError, "not JSON"),
        (httpx.Response(401, json={"error": "Invalid auth-token"}), UnauthorisedError, "check SPROUT_CARBON_FEED"),
        (httpx.Response(404, json={"error": "no such zone"}), ZoneUnknownError, "does not know zone 'DE'"),
        (httpx.Response(429, headers={"retry-after": "90"}), RateLimitedError, "too often"),
    ],
)
async def test_each_failure_has_its_own_error(api, provider, response, error, message):
    api.get("/carbon-intensity/latest").mock(return_value=response)
    with pytest.raises(error, match=message) as caught:
        await provider.latest(NOW)
    assert "secret-token" not in str(caught.value)
    if isinstance(caught.value, RateLimitedError):
        assert caught.value.retry_after_s == 90


async def test_a_server_error_is_retried(api, provider):
    route = api.get("/carbon-intensity/latest").mock(
        side_effect=[httpx.Response(502), httpx.ConnectTimeout("late"), httpx.Response(200, json=LATEST)]
    )
    assert (await provider.latest(NOW)).intensity_g_per_kwh == 302
    assert route.call_count == 3


async def test_the_next_provider_answers_instead_and_only_new_values_are_published(api, provider):
    api.get("/carbon-intensity/latest").respond(404)
    clock = ManualClock(NOW)
    feed = ZoneFeed(
        "DE",
        (provider, ConstantProvider(380.0)),
        scope="direct",
        clock=clock,
        window=timedelta(days=2),
        poll_s=1,
        retry_s=1,
        metrics=FeedMetrics(CollectorRegistry()),
    )
    published = []

    async def publish(message):
        published.append(message)

    assert "not asked yet" in feed.problem()
    await feed.poll(publish)
    await feed.poll(publish)
    assert feed.problem() is None
    clock.advance(timedelta(hours=1))
    await feed.poll(publish)
    assert [message.source for message in published] == ["constant", "constant"]
    assert [message.latest.at.hour for message in published] == [12, 13]
    assert len(published[0].history) == 48
    assert published[1].history[-1].at.hour == 12


async def test_token_and_address_come_from_the_environment(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("mounted\n")
    monkeypatch.setenv("SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("SPROUT_CARBON_FEED_ELECTRICITY_MAPS_URL", "http://proxy.example")
    source = ElectricityMapsSource(kind="electricity_maps", forecast=False)
    provider = source.open("DE", window=timedelta(days=1))
    with respx.mock(base_url="http://proxy.example") as mock:
        route = mock.get("/carbon-intensity/latest").respond(json=LATEST)
        await provider.latest(NOW)
    assert route.calls.last.request.headers["auth-token"] == "mounted"
    assert await provider.forecast(NOW) == ()
    await provider.close()
