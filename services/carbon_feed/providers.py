"""Where carbon intensity comes from: one small interface, and the errors that every provider may raise."""

from datetime import datetime
from typing import Protocol

from shared.messages import IntensityPoint


class ProviderError(RuntimeError):
    """A provider could not answer; the message says why and what to do. The next one of the chain is asked."""


class ZoneUnknownError(ProviderError):
    """The provider does not know the zone."""


class NoDataError(ProviderError):
    """The provider knows the zone, and has no value for it now. Missing is missing: never 0."""


class UnauthorisedError(ProviderError):
    """The token is missing, wrong, or not for this zone."""


class RateLimitedError(ProviderError):
    """Asked too often.

    Attributes:
        retry_after_s: wall seconds to wait, where the provider says.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Provider(Protocol):
    """Tells the intensity of one zone. All times are event time; nothing later than `now` is ever looked at."""

    @property
    def source(self) -> str:
        """The provider's name, for a file with the file's."""
        ...

    async def latest(self, now: datetime) -> IntensityPoint:
        """The newest value whose period began at or before `now`.

        Raises:
            ProviderError: there is none.
        """
        ...

    async def history(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        """Values of periods that began in [since, until), oldest first; gaps stay gaps.

        Raises:
            ProviderError: they cannot be told.
        """
        ...

    async def forecast(self, now: datetime) -> tuple[IntensityPoint, ...]:
        """What is expected after `now`, oldest first; empty where the provider gives none.

        Raises:
            ProviderError: it cannot be told.
        """
        ...

    def next_change(self, now: datetime) -> datetime | None:
        """When the next value begins, where the provider knows; null: ask now and then."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...
