"""Publishes the saving on the meter now and then, for the gateway's page and metrics: the figures of `sprout report`.

It is computed anew each time, from the roll-ups of 28 days and what is not rolled up yet. How many rows these are
depends on the fleet, not on how many requests it answers.
"""

import asyncio
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from aiokafka.errors import KafkaError

from services.ledger.metrics import LedgerMetrics
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Storage
from shared.fleet import Fleet
from shared.kafka.publish import Publisher
from shared.messages import SavingOnMeter
from shared.metering.columns import MAX_AGE_S
from shared.metering.estimation import FleetHistory, estimate_saving, roles_of
from shared.metering.reading import WINDOW_S, read_fleet, read_grid
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError, translate_errors
from shared.runtime.logs import get_logger, where

SHORTEST_PAUSE_S: Final = 60.0
"""Wall seconds between two computations, at least."""

PAUSE_FACTOR: Final = 19.0
"""The pause is at least so many times as long as the last computation, which then takes 5 % of the time at most."""

TIMEOUT_S: Final = 120.0
"""Wall seconds that reading may take."""

_log = get_logger(__name__)


class SavingPublisher:
    """Computes and publishes the saving on the meter in a loop. Of several ledgers one does."""

    def __init__(
        self,
        publisher: Publisher,
        *,
        fleet: Fleet,
        storage: Storage,
        settings: LedgerSettings,
        clock: Clock,
        metrics: LedgerMetrics,
        is_responsible: Callable[[], bool],
    ) -> None:
        self._publisher = publisher
        self._fleet = fleet
        self._storage = storage
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._is_responsible = is_responsible

    async def run(self) -> None:
        """Publish forever, with pauses; what fails is tried again after the next one."""
        took_s = 0.0
        while True:
            event_s = self._settings.saving_interval_s / self._clock.rate
            await asyncio.sleep(max(SHORTEST_PAUSE_S, event_s, PAUSE_FACTOR * took_s))
            if not self._is_responsible():
                for gauge in (self._metrics.saved_g, self._metrics.saved_ratio, self._metrics.saving_blocks):
                    gauge.clear()  # another ledger has them
                continue
            began_s = time.monotonic()
            try:
                await self.publish()
            except (DatabaseUnavailableError, KafkaError, TimeoutError) as error:
                _log.warning("the saving on the meter is not published", error=type(error).__name__)
            except Exception as error:  # noqa: BLE001 - a defect here must not stop the attribution
                _log.error("computing the saving on the meter failed", error=type(error).__name__, where=where(error))
            took_s = time.monotonic() - began_s

    async def publish(self) -> None:
        """Compute and publish the saving of each window.

        Raises:
            DatabaseUnavailableError, KafkaError, TimeoutError: nothing, or not everything, was published.
        """
        for saving in await self.compute():
            await self._publisher.publish(saving, key=saving.window.encode())
            self._metrics.saved_g.labels(saving.window).set(_number(saving.saved_g))
            self._metrics.saved_ratio.labels(saving.window).set(_number(saving.saved_share))
            self._metrics.saving_blocks.labels(saving.window).set(saving.blocks)

    async def compute(self) -> tuple[SavingOnMeter, ...]:
        """The saving of each window.

        Raises:
            DatabaseUnavailableError: the tables could not be read.
            TimeoutError: reading took too long.
        """
        now = self._clock.now()
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        endpoints = sum(len(pool.endpoints) for pool in self._fleet.pools)
        if endpoints > self._settings.saving_max_endpoints:
            reason = (
                f"{endpoints} endpoints are more than SPROUT_LEDGER_SAVING_MAX_ENDPOINTS "
                f"({self._settings.saving_max_endpoints}): raise it, or see `sprout report`"
            )
            day = SavingOnMeter(window="day", since=midnight, at=now, reason=reason)
            return day, day.model_copy(update={"window": "28-days", "since": now - timedelta(seconds=WINDOW_S)})
        history = await self._read(midnight)
        return await asyncio.to_thread(_savings, history, midnight, now)

    async def _read(self, since: datetime) -> FleetHistory:
        with translate_errors():
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._storage.pool.acquire() as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                readings = await read_fleet(connection, since=since, until=None, fleet=self._fleet)
                first_s = since.timestamp() if readings.table is None else float(readings.table.start_s[0])
                begin = datetime.fromtimestamp(min(first_s, since.timestamp()) - MAX_AGE_S, UTC)
                return FleetHistory(self._fleet, readings, await read_grid(connection, since=begin, until=None))


def _savings(history: FleetHistory, midnight: datetime, now: datetime) -> tuple[SavingOnMeter, ...]:
    """The saving of each window; `history` is that of the longest."""
    table, roles = history.readings.table, roles_of(history.fleet, history.readings)
    last = now if table is None else datetime.fromtimestamp(float(table.start_s[-1]) + table.bin_s, UTC)
    at = max(midnight, min(last, now))
    judging = () if history.fleet is None else (pool.name for pool in history.fleet.pools if pool.model is None)
    judge_subtracted = not any(name in roles.excluded for name in judging)

    def saving(window: Literal["day", "28-days"], since: datetime) -> SavingOnMeter:
        found = estimate_saving(history, roles, since=since, until=None)
        carbon = found.carbon
        share = None if carbon is None else carbon.saved_pct
        return SavingOnMeter(
            window=window,
            since=since,
            at=at,
            saved_g=None if carbon is None else carbon.saved.value,
            saved_g_low=None if carbon is None else carbon.saved.low,
            saved_g_high=None if carbon is None else carbon.saved.high,
            saved_share=None if share is None else share.value / 100,
            saved_share_low=None if share is None else share.low / 100,
            saved_share_high=None if share is None else share.high / 100,
            without_g=None if carbon is None else carbon.without_sprout,
            judge_subtracted=judge_subtracted,
            blocks=0 if found.result is None else found.result.blocks,
            hours=found.hours,
            hours_left_out=found.hours_left_out,
            reason=found.reason,
        )

    return saving("day", midnight), saving("28-days", at - timedelta(seconds=WINDOW_S))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
