"""The API of Electricity Maps, v4: `carbon-intensity/latest`, `/history` and `/forecast`.

https://app.electricitymaps.com/developer-hub/api/reference
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, Self

import httpx
import stamina
from pydantic import SecretStr, TypeAdapter, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.carbon_feed.providers.base import (
    ConfigurationError,
    NoDataError,
    Provider,
    ProviderError,
    RateLimitedError,
    Scope,
    Source,
    UnauthorisedError,
    ZoneUnknownError,
)
from shared.messages import IntensityPoint, UtcDatetime
from shared.runtime.settings import read_secret

BASE_URL = "https://api.electricitymaps.com/v4"
EMISSION_FACTORS: dict[Scope, str] = {"direct": "direct", "life-cycle": "lifecycle"}
TIMEOUT_S = 10.0
ATTEMPTS = 3
_TIME: TypeAdapter[datetime] = TypeAdapter(UtcDatetime)


class ElectricityMapsSettings(BaseSettings):
    """Access to the API, from `SPROUT_CARBON_FEED_ELECTRICITY_MAPS_*`."""

    model_config = SettingsConfigDict(
        env_prefix="SPROUT_CARBON_FEED_ELECTRICITY_MAPS_", extra="ignore", env_ignore_empty=True
    )

    token: SecretStr = SecretStr("")
    token_file: Path | None = None
    url: str = BASE_URL

    @model_validator(mode="after")
    def _read_token(self) -> Self:
        if self.token_file is not None:
            self.token = SecretStr(read_secret(self.token_file, "SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN_FILE"))
        return self


class ElectricityMapsSource(Source):
    """The API of Electricity Maps."""

    kind: Literal["electricity_maps"]
    column: Scope = "direct"
    forecast: bool = True

    @property
    def scope(self) -> Scope | None:
        """As the column says."""
        return self.column

    def open(self, zone: str, *, window: timedelta) -> "ElectricityMapsProvider":  # noqa: ARG002
        """Create the provider, with the token of the environment."""
        settings = ElectricityMapsSettings()
        if not settings.token.get_secret_value():
            raise ConfigurationError(
                f"zone {zone!r} uses Electricity Maps: set SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN or _TOKEN_FILE"
            )
        return ElectricityMapsProvider(
            zone, token=settings.token, column=self.column, with_forecast=self.forecast, url=settings.url
        )


class ElectricityMapsProvider(Provider):
    """Queries the API for one zone."""

    def __init__(
        self, zone: str, *, token: SecretStr, column: Scope = "direct", with_forecast: bool = True, url: str = BASE_URL
    ) -> None:
        self._zone = zone
        self._factor = EMISSION_FACTORS[column]
        self._with_forecast = with_forecast
        self._client = httpx.AsyncClient(
            base_url=url, headers={"auth-token": token.get_secret_value()}, timeout=TIMEOUT_S
        )
        self.source = "electricity_maps"

    async def latest(self, now: datetime) -> IntensityPoint:
        """The API's latest value; one from after `now` is rejected."""
        point = point_of(await self._get("latest"))
        if point is None or point.at > now:
            raise NoDataError(f"electricity_maps has no value of zone {self._zone!r} for now (carbonIntensity is null)")
        return point

    async def history(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        """Values of the last 24 hours, which is all that the API has."""
        answer = await self._get("history")
        return tuple(point for point in points_of(answer, "history") if since <= point.at < until)

    async def forecast(self, now: datetime) -> tuple[IntensityPoint, ...]:
        """The API's forecast; empty if the token's plan does not include it."""
        if not self._with_forecast:
            return ()
        try:
            answer = await self._get("forecast")
        except UnauthorisedError:
            self._with_forecast = False
            return ()
        return tuple(point for point in points_of(answer, "forecast") if point.at > now)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _get(self, what: str) -> Mapping[str, Any]:
        """Query the API; retries after a server error.

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
            raise ProviderError(
                f"electricity_maps answered {error.response.status_code}; will be asked again later"
            ) from error
        except httpx.HTTPError as error:
            raise ProviderError(
                f"electricity_maps cannot be reached ({type(error).__name__}); will be asked again later"
            ) from error
        _check_status(response, self._zone)
        try:
            answer = response.json()
        except ValueError as error:
            raise ProviderError("electricity_maps answered with something that is not JSON") from error
        found = answer.get("zone") if isinstance(answer, dict) else None
        if found != self._zone:
            raise ProviderError(
                f"electricity_maps was asked for zone {self._zone!r} but answered for {found!r}: ignored"
            )
        return dict(answer)


def point_of(value: Mapping[str, Any]) -> IntensityPoint | None:
    """Parse one value of an answer; `None` if its intensity is null.

    Raises:
        ProviderError: the value is invalid.
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
        raise ProviderError(f"electricity_maps answered with an invalid value ({fields})") from error


def points_of(answer: Mapping[str, Any], name: str) -> list[IntensityPoint]:
    """Parse a list of values in an answer, oldest first; values of null are left out.

    Raises:
        ProviderError: there is no such list, or a value is invalid.
    """
    values = answer.get(name)
    if not isinstance(values, list):
        raise ProviderError(f"electricity_maps answered without {name!r}")
    points = [point for value in values if (point := point_of(value)) is not None]
    return sorted(points, key=lambda point: point.at)


def _is_transient(error: Exception) -> bool:
    return isinstance(error, (httpx.TransportError, httpx.HTTPStatusError))


def _check_status(response: httpx.Response, zone: str) -> None:
    match response.status_code:
        case HTTPStatus.OK:
            return
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
            raise UnauthorisedError(
                f"electricity_maps rejected the token for zone {zone!r} ({response.status_code}); check "
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
