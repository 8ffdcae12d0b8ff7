"""Electricity Maps, API v4: `carbon-intensity/latest`, `/history` and `/forecast`.

https://app.electricitymaps.com/developer-hub/api/reference
"""

from collections.abc import Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Any

import httpx
import stamina
from pydantic import SecretStr, TypeAdapter, ValidationError

from services.carbon_feed.providers import (
    NoDataError,
    ProviderError,
    RateLimitedError,
    UnauthorisedError,
    ZoneUnknownError,
)
from services.carbon_feed.trace import Column
from shared.messages import IntensityPoint
from shared.messages.base import UtcDatetime

BASE_URL = "https://api.electricitymaps.com/v4"
FACTORS: dict[Column, str] = {"direct": "direct", "life-cycle": "lifecycle"}
TIMEOUT_S = 10.0
ATTEMPTS = 3
_TIME: TypeAdapter[datetime] = TypeAdapter(UtcDatetime)


class ElectricityMapsProvider:
    """Asks the API for one zone."""

    def __init__(
        self, zone: str, *, token: SecretStr, column: Column = "direct", with_forecast: bool = True, url: str = BASE_URL
    ) -> None:
        self._zone = zone
        self._factor = FACTORS[column]
        self._with_forecast = with_forecast
        self._client = httpx.AsyncClient(
            base_url=url, headers={"auth-token": token.get_secret_value()}, timeout=TIMEOUT_S
        )
        self.source = "electricity_maps"

    async def latest(self, now: datetime) -> IntensityPoint:
        """See `Provider`; a value from after `now` is no answer."""
        point = point_of(await self._get("latest"))
        if point is None or point.at > now:
            raise NoDataError(f"electricity_maps has no value of zone {self._zone!r} for now (carbonIntensity is null)")
        return point

    async def history(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        """See `Provider`; the API's history is the last 24 hours."""
        answer = await self._get("history")
        return tuple(point for point in points_of(answer, "history") if since <= point.at < until)

    async def forecast(self, now: datetime) -> tuple[IntensityPoint, ...]:
        """See `Provider`; empty where the token's plan has no forecast."""
        if not self._with_forecast:
            return ()
        try:
            answer = await self._get("forecast")
        except UnauthorisedError:
            self._with_forecast = False
            return ()
        return tuple(point for point in points_of(answer, "forecast") if point.at > now)

    def next_change(self, now: datetime) -> datetime | None:  # noqa: ARG002
        """Not known: ask now and then."""
        return None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _get(self, what: str) -> Mapping[str, Any]:
        """One answer of the API, for the zone that was asked for; a server's failure is tried again.

        Raises:
            ProviderError: see the subclasses.
        """
        parameters = {"zone": self._zone, "emissionFactorType": self._factor}
        try:
            async for attempt in stamina.retry_context(
                on=_is_transient, attempts=ATTEMPTS, wait_initial=0.2, wait_max=2.0, timeout=3 * TIMEOUT_S
            ):
                with attempt:
                    response = await self._client.get(f"/carbon-intensity/{what}", params=parameters)
                    if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                        response.raise_for_status()
        except httpx.HTTPStatusError as error:
            raise ProviderError(f"electricity_maps answered {error.response.status_code}; asked again later") from error
        except httpx.HTTPError as error:
            raise ProviderError(
                f"electricity_maps cannot be reached ({type(error).__name__}); asked again later"
            ) from error
        _refuse(response, self._zone)
        try:
            answer = response.json()
        except ValueError as error:
            raise ProviderError("electricity_maps answered something that is not JSON") from error
        found = answer.get("zone") if isinstance(answer, dict) else None
        if found != self._zone:
            raise ProviderError(
                f"electricity_maps was asked for zone {self._zone!r} and answered for {found!r}: not used"
            )
        return dict(answer)


def point_of(value: Mapping[str, Any]) -> IntensityPoint | None:
    """One value of an answer; null where its intensity is null.

    Raises:
        ProviderError: it is not such a value.
    """
    intensity = value.get("carbonIntensity")
    if intensity is None:
        return None
    try:
        return IntensityPoint(
            at=_TIME.validate_python(value.get("datetime")),
            intensity_g_per_kwh=intensity,
            estimated=bool(value.get("isEstimated", False)),
        )
    except ValidationError as error:
        fields = ", ".join(str(problem["loc"]) for problem in error.errors(include_input=False))
        raise ProviderError(f"electricity_maps answered a value that cannot be read ({fields})") from error


def points_of(answer: Mapping[str, Any], name: str) -> list[IntensityPoint]:
    """The values of a list in an answer, oldest first; a null is a gap.

    Raises:
        ProviderError: there is no such list, or a value cannot be read.
    """
    values = answer.get(name)
    if not isinstance(values, list):
        raise ProviderError(f"electricity_maps answered without {name!r}")
    points = [point for value in values if (point := point_of(value)) is not None]
    return sorted(points, key=lambda point: point.at)


def _is_transient(error: Exception) -> bool:
    return isinstance(error, (httpx.TransportError, httpx.HTTPStatusError))


def _refuse(response: httpx.Response, zone: str) -> None:
    match response.status_code:
        case HTTPStatus.OK:
            return
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
            raise UnauthorisedError(
                f"electricity_maps refused the token for zone {zone!r} ({response.status_code}); check "
                "SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN and the zones of its plan"
            )
        case HTTPStatus.NOT_FOUND:
            raise ZoneUnknownError(f"electricity_maps does not know zone {zone!r}; check its name in the fleet file")
        case HTTPStatus.TOO_MANY_REQUESTS:
            seconds = response.headers.get("retry-after", "")
            raise RateLimitedError(
                "electricity_maps was asked too often; raise SPROUT_CARBON_FEED_POLL_S",
                retry_after_s=float(seconds) if seconds.isdigit() else None,
            )
        case status:
            raise ProviderError(f"electricity_maps answered {status}")
