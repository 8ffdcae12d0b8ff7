"""Configuration of carbon_feed, from `SPROUT_CARBON_FEED_*`."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.carbon_feed.electricity_maps import BASE_URL, ElectricityMapsProvider
from services.carbon_feed.providers import Provider
from services.carbon_feed.recorded import ConstantProvider, TraceProvider
from services.carbon_feed.trace import Column, load_trace
from shared.fleet import Fleet
from shared.kafka.dead_letters import describe
from shared.runtime.settings import read_secret


class ConfigurationError(ValueError):
    """The providers do not fit the fleet; the message names the variable and the remedy."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CsvSource(_Part):
    """A recorded trace."""

    kind: Literal["csv"]
    path: Path
    column: Column = "direct"
    repeat: bool = Field(default=False, description="Play it over and over")


class ConstantSource(_Part):
    """The same intensity always."""

    kind: Literal["constant"]
    intensity_g_per_kwh: float = Field(ge=0)


class ElectricityMapsSource(_Part):
    """The API of Electricity Maps."""

    kind: Literal["electricity_maps"]
    column: Column = "direct"
    forecast: bool = True


Source = Annotated[CsvSource | ConstantSource | ElectricityMapsSource, Field(discriminator="kind")]
_CHAINS: TypeAdapter[dict[str, tuple[Source, ...]]] = TypeAdapter(dict[str, tuple[Source, ...]])


class CarbonFeedSettings(BaseSettings):
    """Which provider is asked for which zone."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_CARBON_FEED_", extra="ignore")

    providers: dict[str, tuple[Source, ...]] = Field(
        default_factory=dict,
        description='JSON, zone to a chain of providers, the first that answers is used: {"DE": [{"kind": "constant", '
        '"intensity_g_per_kwh": 380}]}',
    )
    providers_file: Path | None = Field(default=None, description="The same, as a file")
    electricity_maps_token: SecretStr = SecretStr("")
    electricity_maps_token_file: Path | None = Field(default=None, description="File that holds the token")
    electricity_maps_url: str = BASE_URL
    history_days: float = Field(default=30.0, gt=0, le=366, description="Length of the trailing window, event")
    poll_s: float = Field(default=300.0, gt=0, description="Between two questions to a live provider, wall")
    retry_s: float = Field(default=15.0, gt=0, description="After no provider answered, wall")

    @model_validator(mode="after")
    def _from_files(self) -> Self:
        if self.providers_file is not None:
            if self.providers:
                raise ValueError("give SPROUT_CARBON_FEED_PROVIDERS or SPROUT_CARBON_FEED_PROVIDERS_FILE, not both")
            try:
                self.providers = _CHAINS.validate_json(self.providers_file.read_bytes())
            except OSError as error:
                raise ValueError(f"SPROUT_CARBON_FEED_PROVIDERS_FILE cannot be read: {error}") from error
            except ValidationError as error:
                raise ValueError(
                    f"SPROUT_CARBON_FEED_PROVIDERS_FILE {self.providers_file}: {describe(error)}"
                ) from error
        if self.electricity_maps_token_file is not None:
            token = read_secret(self.electricity_maps_token_file, "SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN_FILE")
            self.electricity_maps_token = SecretStr(token)
        return self

    @property
    def window(self) -> timedelta:
        """How far back the history of a message goes."""
        return timedelta(days=self.history_days)

    def chains(self, fleet: Fleet) -> dict[str, tuple[Provider, ...]]:
        """The providers of every zone of the fleet.

        Raises:
            ConfigurationError: a zone has none, its providers do not count the same emissions, or Electricity Maps is
                to be asked without a token.
            TraceError: a recorded trace cannot be used.
        """
        lacking = [zone for zone in fleet.zones if not self.providers.get(zone)]
        if lacking:
            raise ConfigurationError(
                f"the fleet file has zones without a provider: {', '.join(lacking)}; add each to "
                f"SPROUT_CARBON_FEED_PROVIDERS (it has: {', '.join(self.providers) or 'none'})"
            )
        for zone in fleet.zones:
            if len(found := self._scopes_of(zone)) > 1:
                raise ConfigurationError(
                    f"the providers of zone {zone!r} count different emissions ({' and '.join(sorted(found))}): a "
                    "window of both compares what cannot be compared; give them the same `column`"
                )
        return {zone: tuple(self._provider(zone, source) for source in self.providers[zone]) for zone in fleet.zones}

    def _provider(self, zone: str, source: Source) -> Provider:
        match source:
            case CsvSource():
                trace = load_trace(source.path, zone=zone, column=source.column)
                return TraceProvider(trace, source.path, repeat=source.repeat, window=self.window)
            case ConstantSource():
                return ConstantProvider(source.intensity_g_per_kwh)
            case ElectricityMapsSource():
                if not self.electricity_maps_token.get_secret_value():
                    raise ConfigurationError(
                        f"zone {zone!r} is asked of Electricity Maps: set SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN"
                    )
                return ElectricityMapsProvider(
                    zone,
                    token=self.electricity_maps_token,
                    column=source.column,
                    with_forecast=source.forecast,
                    url=self.electricity_maps_url,
                )

    def scope_of(self, zone: str) -> Column:
        """Whether a zone's values count direct or life-cycle emissions; a constant counts what the others do."""
        return next(iter(self._scopes_of(zone)), "direct")

    def _scopes_of(self, zone: str) -> set[Column]:
        return {source.column for source in self.providers[zone] if not isinstance(source, ConstantSource)}
