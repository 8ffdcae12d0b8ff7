"""The interface of a carbon intensity provider, its configuration, and the errors that providers raise."""

from abc import ABC, abstractmethod
from datetime import datetime, timedelta
from typing import Literal

from pydantic import BaseModel, ConfigDict

from shared.messages import IntensityPoint

Scope = Literal["direct", "life-cycle"]
"""Emissions that an intensity includes: of generating the electricity, or of the power plants' whole life cycle."""


class ConfigurationError(ValueError):
    """A provider cannot be used as configured; the message names the variable and the remedy."""


class ProviderError(RuntimeError):
    """A provider has no answer; the message says why and what to do. The next provider of the chain is asked."""


class ZoneUnknownError(ProviderError):
    """The provider does not know the zone."""


class NoDataError(ProviderError):
    """The provider knows the zone but has no value for the present. A missing value is never reported as 0."""


class UnauthorisedError(ProviderError):
    """The token is missing, invalid, or not valid for the zone."""


class RateLimitedError(ProviderError):
    """The provider was asked too often.

    Attributes:
        retry_after_s: wall seconds to wait, if the provider says so.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Provider(ABC):
    """Carbon intensity of one zone. All times are event time; a provider never returns values from after `now`.

    Attributes:
        source: name of the provider, for a recorded trace with its file.
    """

    source: str

    @abstractmethod
    async def latest(self, now: datetime) -> IntensityPoint:
        """The newest value whose period began at or before `now`.

        Raises:
            ProviderError: there is none.
        """

    @abstractmethod
    async def history(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        """Values of the periods that began in [since, until), oldest first; may have gaps.

        Raises:
            ProviderError: they are not available.
        """

    async def forecast(self, now: datetime) -> tuple[IntensityPoint, ...]:  # noqa: ARG002
        """Expected values after `now`, oldest first; empty if the provider has no forecast.

        Raises:
            ProviderError: it is not available.
        """
        return ()

    def next_change(self, now: datetime) -> datetime | None:  # noqa: ARG002
        """When the next value begins; `None` if the provider does not know: it is polled."""
        return None

    async def close(self) -> None:  # noqa: B027 - most providers hold no connection
        """Close connections."""


class Source(BaseModel, ABC):
    """One entry of a zone's chain in the configuration; the field `kind` of a subclass identifies it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    @abstractmethod
    def scope(self) -> Scope | None:
        """Emissions that the values include; `None`: the same as those of the other entries."""

    @abstractmethod
    def open(self, zone: str, *, window: timedelta) -> Provider:
        """Create the provider of a zone; connects to nothing.

        Args:
            zone: as the fleet file names it.
            window: length of the history that will be asked for, event time.

        Raises:
            ConfigurationError: it cannot be used as configured.
        """
