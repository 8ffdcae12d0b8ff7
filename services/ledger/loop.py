"""The loop of the ledger: settles intervals, publishes what follows from them, and removes old rows."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta

from services.ledger.earlier import EarlierVersions
from services.ledger.ingest import Backlog
from services.ledger.metrics import LedgerMetrics
from services.ledger.outbox import CurvePublisher, FootprintOutbox
from services.ledger.reports import RunningCalls
from services.ledger.rollup import RollUps
from services.ledger.settings import LedgerSettings
from services.ledger.settlement import IntervalSettlement
from services.ledger.sql import Storage
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.logs import get_logger

COUNT_INTERVAL_S = 10.0
"""Wall seconds between two counts of the calls that are not settled."""

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
        earlier: EarlierVersions,
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
        self._earlier = earlier
        self._rollups = RollUps(storage)
        self._kafka_problem = ""
        self._age_problem = ""
        self._problems: dict[str, str] = {}
        self._count_due_s = 0.0
        self._on_progress: Callable[[], None] = lambda: None

    def backlog_problem(self) -> str | None:
        """Readiness check: why the watermark cannot advance; None if it can."""
        return self._kafka_problem or None

    def settlement_problem(self) -> str | None:
        """Readiness check: why the last settlement or publication failed; None once it has succeeded.

        It is not part of `DatabaseStatus`, which the next reading of a meter would clear.
        """
        return "; ".join(f"{work}: {problem}" for work, problem in self._problems.items()) or None

    def age_problem(self) -> str | None:
        """Readiness check: how old the oldest call that is not settled is; None if it is not too old."""
        return self._age_problem or None

    async def run(self, *, on_round: Callable[[], None]) -> None:
        """Settle forever; waits while PostgreSQL or Kafka is unavailable.

        Args:
            on_round: called after every chunk and round, also after one that failed: then `settlement_problem` says so.
        """
        self._on_progress = on_round
        while True:
            await asyncio.sleep(self._settings.settle_interval_s)
            lag = await self._backlog.refresh()
            if lag is not None:
                self._metrics.lag_records.set(lag)
            self._kafka_problem = "Kafka does not report the offsets of the topics with calls" if lag is None else ""
            await self.settle()
            on_round()

    async def run_publishing(self) -> None:
        """Publish footprints forever, beside the settlement."""
        while True:
            await asyncio.sleep(self._settings.publish_interval_s)
            await self.publish()

    async def run_once(self) -> None:
        """Settle, publish and roll up all that can be."""
        await self.settle()
        await self.publish()
        await self.roll_up()

    async def settle(self) -> None:
        """Settle all intervals whose calls are known, and publish curves that have changed.

        The watermark bounds the settlement: after an outage, intervals are settled only after the calls that queued
        up in Kafka have been read.
        """
        watermark = self._backlog.watermark
        with self._reporting("settlement"):
            await self._earlier.adopt_calls()
            if watermark is not None:
                curves = await self._settlement.run_once(
                    watermark, limits=self._running.limits(watermark), on_chunk=self._on_progress
                )
                await self._curves.publish(curves)
            await self._count_unsettled(watermark)

    async def publish(self) -> None:
        """Publish all footprints that are not published yet."""
        with self._reporting("publication"):
            await self._outbox.publish_pending()

    @contextmanager
    def _reporting(self, work: str) -> Iterator[None]:
        """Log when a kind of work begins to fail, or succeeds again, and update readiness."""
        before = self._problems.get(work, "")
        try:
            yield
        except DatabaseUnavailableError as error:
            self._problems[work] = str(error)
            if str(error) != before:
                _log.warning("the database did not answer; the next round tries again", work=work, error=str(error))
            return
        self._problems.pop(work, None)
        if before:
            _log.info("works again", work=work)
        self._storage.status.answered()

    async def _count_unsettled(self, watermark: datetime | None) -> None:
        """Count the open calls now and then, and close those on endpoints without a meter."""
        if time.monotonic() < self._count_due_s:
            return
        self._count_due_s = time.monotonic() + COUNT_INTERVAL_S
        now_s = self._clock.now_s()
        calls, oldest_s = 0, now_s
        for endpoint, count, oldest in await self._storage.unsettled():
            calls += count
            oldest_s = min(oldest_s, oldest.timestamp())
            if watermark is not None and endpoint not in self._settlement.endpoints:
                until = watermark - timedelta(seconds=self._settings.settle_delay_s)
                removed = await self._storage.remove_unmetered(endpoint, until)
                self._metrics.calls.labels("unmetered").inc(removed)
        self._metrics.unsettled_calls.set(calls)
        self._metrics.unsettled_age_s.set(now_s - oldest_s)
        age_s = (now_s - oldest_s) / self._clock.rate
        self._age_problem = ""
        if age_s > self._settings.backlog_age_s:
            self._age_problem = f"{calls:,} calls are not settled, the oldest ended {age_s:,.0f} s ago"

    async def run_rolling_up(self) -> None:
        """Keep the roll-ups, forever, beside the settlement."""
        while True:
            await asyncio.sleep(self._settings.settle_interval_s)
            await self.roll_up()

    async def roll_up(self) -> None:
        """Add what was settled to the roll-ups, and some of what an earlier version had settled."""
        with self._reporting("roll-up"):
            await self._rollups.add_chunks()
            while await self._earlier.adopt_footprints():
                await self._rollups.add_chunks()

    async def remove_old_rows(self) -> None:
        """Remove rows beyond their retention, forever."""
        while True:
            await asyncio.sleep(self._settings.cleaning_interval_s)
            now = self._backlog.watermark
            if now is None:
                continue  # calls that ended long ago may still have to be read
            with suppress(DatabaseUnavailableError):
                await self._rollups.remove_old(
                    rows_before=now - timedelta(days=self._settings.retention_days),
                    rollups_before=now - timedelta(days=self._settings.rollup_days),
                )

    async def finish(self) -> None:
        """Settle and publish once more before the broker stops; the rest stays in PostgreSQL for the next start."""
        try:
            async with asyncio.timeout(self._settings.stop_grace_s):
                await self.run_once()
        except TimeoutError:
            _log.warning("stopped before the last settlement was complete; the next start continues it")
