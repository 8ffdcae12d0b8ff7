"""Configuration of carbon_feed, from `SPROUT_CARBON_FEED_*`."""

from datetime import timedelta
from pathlib import Path
from typing import Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.carbon_feed.providers import AnySource
from services.carbon_feed.providers.base import ConfigurationError, Provider, Scope
from shared.fleet import Fleet
from shared.kafka.records import describe

_CHAINS: TypeAdapter[dict[str, tuple[AnySource, ...]]] = TypeAdapter(dict[str, tuple[AnySource, ...]])


class CarbonFeedSettings(BaseSettings):
    """The chain of providers of every zone, and how often they are asked."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_CARBON_FEED_", extra="ignore")

    providers: dict[str, tuple[AnySource, ...]] = Field(
        default_factory=dict,
        description="JSON: by zone, a chain of providers, of which the first that answers is used: "
        '{"DE": [{"kind": "constant", "intensity_g_per_kwh": 380}]}',
    )
    providers_file: Path | None = Field(default=None, description="The same, in a file")
    history_days: float = Field(default=30.0, gt=0, le=366, description="Length of the trailing window, event")
    poll_s: float = Field(default=300.0, gt=0, description="Between two requests to a live provider, wall")
    retry_s: float = Field(default=15.0, gt=0, description="Before the next attempt if no provider answered, wall")

    @model_validator(mode="after")
    def _read_file(self) -> Self:
        if self.providers_file is None:
            return self
        if self.providers:
            raise ValueError("give SPROUT_CARBON_FEED_PROVIDERS or SPROUT_CARBON_FEED_PROVIDERS_FILE, not both")
        try:
            self.providers = _CHAINS.validate_json(self.providers_file.read_bytes())
        except OSError as error:
            raise ValueError(f"SPROUT_CARBON_FEED_PROVIDERS_FILE cannot be read: {error}") from error
        except ValidationError as error:
            raise ValueError(f"SPROUT_CARBON_FEED_PROVIDERS_FILE {self.providers_file}: {describe(error)}") from error
        return self

    @property
    def window(self) -> timedelta:
        """Length of the history in a message, event time."""
        return timedelta(days=self.history_days)

    def chains(self, fleet: Fleet) -> dict[str, tuple[Provider, ...]]:
        """The providers of every zone of the fleet.

        Raises:
            ConfigurationError: a zone has no provider, its providers do not include the same emissions, or one cannot
                be used as configured.
        """
        missing = [zone for zone in fleet.zones if not self.providers.get(zone)]
        if missing:
            raise ConfigurationError(
                f"the fleet file has zones without a provider: {', '.join(missing)}; add each to "
                f"SPROUT_CARBON_FEED_PROVIDERS (it has: {', '.join(self.providers) or 'none'})"
            )
        for zone in fleet.zones:
            if len(scopes := self._scopes_of(zone)) > 1:
                raise ConfigurationError(
                    f"the providers of zone {zone!r} include different emissions ({' and '.join(sorted(scopes))}): "
                    "their values cannot be compared; give them the same `column`"
                )
        return {
            zone: tuple(source.open(zone, window=self.window) for source in self.providers[zone])
            for zone in fleet.zones
        }

    def scope_of(self, zone: str) -> Scope:
        """Emissions that the values of a zone include."""
        return next(iter(self._scopes_of(zone)), "direct")

    def _scopes_of(self, zone: str) -> set[Scope]:
        return {source.scope for source in self.providers[zone] if source.scope is not None}
