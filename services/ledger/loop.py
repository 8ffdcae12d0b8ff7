"""The loop of the ledger: settles intervals, publishes what follows from them, and removes old rows."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from services.ledger.ingest import Backlog
from services.ledger.metrics import LedgerMetrics
from services.ledger.outbox import CurvePublisher, FootprintOutbox
from services.ledger.reports import RunningCalls
from services.ledger.settings import LedgerSettings
from services.ledger.settlement import IntervalSettlement
from services.ledger.sql import Storage
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.logs import get_logger

_log = get_logger(__name__)


class AttributionLoop:
    """Settles and publishes in a loop, and removes old rows."""

    def __init__(
        self,
        backlog: Backlog,
        settlement: IntervalSettlement,
        outbox: FootprintOutbox,
        curves: CurvePublisher,
        *,
        running: RunningCalls,
        storage: Storage,
        settings: LedgerSettings,
        metrics: LedgerMetrics,
        clock: Clock,
    ) -> None:
        self._backlog = backlog
        self._settlement = settlement
        self._outbox = outbox
        self._curves = curves
        self._running = running
        self._storage = storage
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._kafka_problem = ""
        self._round_problem = ""

    def backlog_problem(self) -> str | None:
        """Readiness check: why the watermark cannot advance; None if it can."""
        return self._kafka_problem or None

    def settlement_problem(self) -> str | None:
        """Readiness check: why the last round failed; None once a round with a settlement has succeeded.

        It is not part of `DatabaseStatus`, which the next reading of a meter would clear.
        """
        return self._round_problem or None

    async def run(self, *, on_round: Callable[[], None]) -> None:
        """Settle and publish forever; waits while PostgreSQL or Kafka is unavailable.

        Args:
            on_round: called after every round, also after one that failed: then `settlement_problem` says so.
        """
        while True:
            await asyncio.sleep(self._settings.settle_interval_s)
            lag = await self._backlog.refresh()
            if lag is not None:
                self._metrics.lag_records.set(lag)
            self._kafka_problem = "Kafka does not report the offsets of the topics with calls" if lag is None else ""
            await self.run_once()
            on_round()

    async def run_once(self) -> None:
        """Settle all intervals whose calls are known, then publish their footprints, and curves that have changed.

        The watermark bounds the settlement: after an outage, intervals are settled only after the calls that queued
        up in Kafka have been read.
        """
        watermark = self._backlog.watermark
        try:
            if watermark is not None:
                curves = await self._settlement.run_once(
                    watermark,
                    limits=self._running.limits(watermark),
                    unmetered_until=watermark - timedelta(seconds=self._settings.settle_delay_s),
                )
                await self._curves.publish(curves)
            await self._outbox.publish_pending()
        except DatabaseUnavailableError as error:
            if str(error) != self._round_problem:
                _log.warning("settlement failed; the next round tries again", error=str(error))
            self._round_problem = str(error)
            return
        if watermark is None:
            return
        if self._round_problem:
            _log.info("settlement succeeded again")
        self._round_problem = ""
        self._storage.status.answered()

    async def remove_old_rows(self) -> None:
        """Remove rows beyond their retention, forever."""
        while True:
            await asyncio.sleep(self._settings.cleaning_interval_s)
            with suppress(DatabaseUnavailableError):
                await self._storage.remove_old(self._clock.now() - timedelta(days=self._settings.retention_days))

    async def finish(self) -> None:
        """Settle and publish once more before the broker stops; the rest stays in PostgreSQL for the next start."""
        try:
            async with asyncio.timeout(self._settings.stop_grace_s):
                await self.run_once()
        except TimeoutError:
            _log.warning("stopped before the last settlement was complete; the next start continues it")
