"""Closes the books, over and over: settles what is old enough, publishes it, and removes what is too old."""

import asyncio
from collections.abc import Callable
from datetime import timedelta

from services.ledger.backlog import Backlog
from services.ledger.metrics import LedgerMetrics
from services.ledger.publishing import Publishing
from services.ledger.settings import LedgerSettings
from services.ledger.settling import Settler
from services.ledger.storage import AWAY_ERRORS, Storage
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

_log = get_logger(__name__)


class Bookkeeping:
    """What the ledger does beside taking in messages."""

    def __init__(
        self,
        backlog: Backlog,
        settler: Settler,
        publishing: Publishing,
        *,
        storage: Storage,
        settings: LedgerSettings,
        metrics: LedgerMetrics,
        clock: Clock,
    ) -> None:
        self._backlog = backlog
        self._settler = settler
        self._publishing = publishing
        self._storage = storage
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._kafka_problem = ""

    def problem(self) -> str | None:
        """What stands against readiness."""
        return self._kafka_problem or None

    async def settle_forever(self, *, on_round: Callable[[], None]) -> None:
        """Settle and publish, over and over; waits while PostgreSQL, Kafka or messages are away.

        Args:
            on_round: told whenever it has looked, and settled what there was.
        """
        while True:
            await asyncio.sleep(self._settings.settle_interval_s)
            waiting = await self._backlog.look()
            if waiting is not None:
                self._metrics.lag_records.set(waiting)
            self._kafka_problem = "Kafka does not tell what is still to be read" if waiting is None else ""
            await self.close_books()
            on_round()

    async def close_books(self) -> None:
        """One settlement of what is old enough, then its publication.

        Old enough is what lies `settle_delay_s` before the instant up to which all messages are in the books: after an
        outage, nothing is settled before the calls that piled up in Kafka have been read.
        """
        read_until = self._backlog.read_until
        try:
            if read_until is not None:
                await self._settler.turn(read_until - timedelta(seconds=self._settings.settle_delay_s))
                self._storage.note(None)
            await self._publishing.turn()
        except AWAY_ERRORS as error:
            self._storage.note(error)

    async def clean_forever(self) -> None:
        """Remove old rows, now and then."""
        while True:
            await asyncio.sleep(self._settings.cleaning_interval_s)
            try:
                await self._storage.clean(self._clock.now() - timedelta(days=self._settings.retention_days))
            except AWAY_ERRORS as error:
                self._storage.note(error)

    async def finish(self) -> None:
        """Settle and publish what can be, before the broker stops; the rest is in PostgreSQL for the next start."""
        try:
            async with asyncio.timeout(self._settings.stop_grace_s):
                await self.close_books()
        except TimeoutError:
            _log.warning("stopped before the last settlement was done; it follows at the next start")
