"""Settlement: finalises intervals, and the loop that does so.

To settle an interval means to attribute its energy finally: the attribution, the calls' energy and the footprints of
calls that ended are written to PostgreSQL in one transaction, and are not recomputed. An interval is settled when it
is `settle_delay_s` older than the watermark, that is when the calls that ran in it should be known
(docs/decisions/0006).
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

import asyncpg

from services.ledger import sql
from services.ledger.attribution import (
    Call,
    EndpointSettlement,
    EndpointState,
    IdlePower,
    OpenCall,
    SettledInterval,
    settle_endpoint,
)
from services.ledger.footprint import IntensitySteps, footprint_row
from services.ledger.ingest import Backlog
from services.ledger.meters import Reading
from services.ledger.metrics import LedgerMetrics
from services.ledger.outbox import FootprintOutbox
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Connection, Row, Storage, execute_rows, to_datetime, to_iso
from shared.fleet import Fleet, Pool
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError, translate_errors
from shared.runtime.logs import get_logger

_log = get_logger(__name__)


class IntervalSettlement:
    """Settles the intervals of all endpoints of the fleet that have a meter."""

    def __init__(self, fleet: Fleet, *, settings: LedgerSettings, storage: Storage, metrics: LedgerMetrics) -> None:
        self._pools: dict[str, Pool] = {
            endpoint.name: pool for pool in fleet.pools for endpoint in pool.endpoints if endpoint.metrics is not None
        }
        self._settings = settings
        self._storage = storage
        self._metrics = metrics

    async def run_once(self, watermark: datetime) -> bool:
        """Settle all intervals that end by the watermark, in one transaction.

        Returns:
            False if another ledger holds the lock.

        Raises:
            DatabaseUnavailableError: nothing was written.
        """
        with translate_errors():
            async with self._storage.pool.acquire() as connection, connection.transaction():
                if not await connection.fetchval(sql.SETTLEMENT_LOCK):
                    return False
                states, rows = await _read_states(connection, self._pools, watermark)
                results = await asyncio.to_thread(
                    lambda: {endpoint: settle_endpoint(one, self._settings) for endpoint, one in states.items()}
                )
                await self._write(connection, states, results)
                footprints = await self._footprints(connection, results, rows)
                await execute_rows(connection, sql.ADD_FOOTPRINTS, footprints)
                unmetered: int = await connection.fetchval(sql.SETTLE_UNMETERED, list(self._pools), watermark)
                unsettled: int = await connection.fetchval(sql.UNSETTLED_CALLS)
        for endpoint, result in results.items():
            unmetered += self._report_endpoint(endpoint, result)
            self._metrics.settled_age_s.labels(endpoint).set(watermark.timestamp() - result.settled_until_s)
        for footprint in footprints:
            row = rows[footprint["request_id"]]
            self._metrics.calls.labels("partial" if footprint["partial"] else "complete").inc()
            if footprint["total_g"] is not None:
                self._metrics.grams.labels(row["purpose"], row["pool"], row["level"]).inc(footprint["total_g"])
        self._metrics.calls.labels("unmetered").inc(unmetered)
        self._metrics.unsettled_calls.set(unsettled)
        return True

    async def _write(
        self, connection: Connection, states: Mapping[str, EndpointState], results: Mapping[str, EndpointSettlement]
    ) -> None:
        intervals: list[Row] = []
        reallocated: list[Row] = []
        calls: list[Row] = []
        meters: list[Row] = []
        for endpoint, result in results.items():
            pool = self._pools[endpoint]
            until = to_iso(result.settled_until_s)
            intervals += [
                {
                    "endpoint": endpoint,
                    "started_at": to_iso(one.interval.started_s),
                    "finished_at": to_iso(one.interval.finished_s),
                    "zone": pool.zone,
                    "pool": pool.name,
                    "metered_j": one.interval.metered_j,
                    "attributed_j": one.attributed_j,
                    "idle_j": one.idle_j,
                    "unattributed_j": one.unattributed_j,
                    "restarted": one.interval.restarted,
                    "calls": len(one.shares_j),
                }
                for one in result.intervals
            ]
            reallocated += [{"endpoint": endpoint, "started_at": to_iso(start)} for start, _ in result.reallocated_j]
            calls += [
                {
                    "id": one.id,
                    "energy_j": one.energy_j,
                    "accounted_until": until,
                    "partial": one.partial,
                    "settled": one.finished,
                }
                for one in result.calls
            ]
            meters.append(
                {
                    "endpoint": endpoint,
                    "metered_from": to_iso(states[endpoint].metered_from_s),
                    "settled_until": until,
                    "idle_power_w": result.learned.power_w,
                    "quiet_s": result.learned.idle_s,
                    "quiet_j": result.learned.idle_j,
                }
            )
        await execute_rows(connection, sql.ADD_INTERVALS, intervals)
        await execute_rows(connection, sql.REALLOCATE, reallocated)
        await execute_rows(connection, sql.UPDATE_CALLS, calls)
        await execute_rows(connection, sql.PUT_METERS, meters)

    async def _footprints(
        self, connection: Connection, results: Mapping[str, EndpointSettlement], rows: Mapping[str, asyncpg.Record]
    ) -> list[Row]:
        """The computed columns of the footprints of all calls that are finished and metered."""
        done = [one for result in results.values() for one in result.calls if one.finished and one.metered]
        if not done:
            return []
        max_age_s = self._settings.max_intensity_age_s
        steps = await _read_intensity(connection, [rows[one.id] for one in done], max_age_s=max_age_s)
        return [
            footprint_row(
                request_id=one.id,
                started_s=rows[one.id]["started_at"].timestamp(),
                finished_s=rows[one.id]["finished_at"].timestamp(),
                energy_j=one.energy_j,
                partial=one.partial,
                pool=self._pools[rows[one.id]["endpoint"]],
                intensity=steps[rows[one.id]["zone"]],
            )
            for one in done
        ]

    def _report_endpoint(self, endpoint: str, result: EndpointSettlement) -> int:
        """Update metrics and log; returns the number of finished calls without a footprint."""
        metrics = self._metrics
        for one in result.intervals:
            for part, joules in (
                ("metered", one.interval.metered_j),
                ("attributed", one.attributed_j),
                ("idle", one.idle_j),
                ("unattributed", one.unattributed_j),
            ):
                metrics.joules.labels(endpoint, part).inc(joules)
            if one.interval.restarted:
                metrics.restarts.labels(endpoint).inc()
                _log.warning(
                    "energy counter was reset; the energy between the last reading and the reset is lost",
                    endpoint=endpoint,
                    between=f"{to_iso(one.interval.started_s)} and {to_iso(one.interval.finished_s)}",
                )
        metrics.reallocated_joules.labels(endpoint).inc(sum(joules for _, joules in result.reallocated_j))
        late = sum(one.late for one in result.calls)
        if late:
            metrics.late_calls.inc(late)
            _log.warning("calls arrived after their intervals were settled", endpoint=endpoint, calls=late)
        return sum(one.finished and not one.metered for one in result.calls)


class AttributionLoop:
    """Settles and publishes in a loop, and removes old rows."""

    def __init__(
        self,
        backlog: Backlog,
        settlement: IntervalSettlement,
        outbox: FootprintOutbox,
        *,
        storage: Storage,
        settings: LedgerSettings,
        metrics: LedgerMetrics,
        clock: Clock,
    ) -> None:
        self._backlog = backlog
        self._settlement = settlement
        self._outbox = outbox
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
        """Settle all intervals that are old enough, then publish their footprints.

        The watermark bounds the settlement: after an outage, intervals are settled only after the calls that queued
        up in Kafka have been read.
        """
        watermark = self._backlog.watermark
        try:
            if watermark is not None:
                await self._settlement.run_once(watermark - timedelta(seconds=self._settings.settle_delay_s))
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


async def _read_states(
    connection: Connection, pools: Mapping[str, Pool], watermark: datetime
) -> tuple[dict[str, EndpointState], dict[str, asyncpg.Record]]:
    """Read the state of every endpoint with readings, by name, and the rows of its open calls, by id."""
    readings = _readings_by_endpoint(await connection.fetch(sql.READINGS, list(pools), watermark))
    names = list(readings)
    meters = {row["endpoint"]: row for row in await connection.fetch(sql.METERS, names)}
    untils = [to_datetime(readings[name][-1].at_s) for name in names]
    rows = {row["id"]: row for row in await connection.fetch(sql.OPEN_CALLS, names, untils)}
    calls: dict[str, list[OpenCall]] = defaultdict(list)
    for row in rows.values():
        calls[row["endpoint"]].append(_open_call(row))
    settled = await _read_settled_intervals(connection, readings, calls)
    states = {}
    for name in names:
        meter = meters.get(name)
        states[name] = EndpointState(
            readings=readings[name],
            calls=calls[name],
            settled=settled[name],
            metered_from_s=readings[name][0].at_s if meter is None else meter["metered_from"].timestamp(),
            idle_power_w=pools[name].idle_power_w,
            learned=IdlePower()
            if meter is None
            else IdlePower(meter["idle_power_w"], meter["quiet_s"], meter["quiet_j"]),
        )
    return states, rows


async def _read_settled_intervals(
    connection: Connection, readings: Mapping[str, Sequence[Reading]], calls: Mapping[str, Sequence[OpenCall]]
) -> dict[str, list[SettledInterval]]:
    """The settled intervals in which late calls ran, by endpoint."""
    found: dict[str, list[SettledInterval]] = defaultdict(list)
    since: dict[str, float] = {}
    for name, opened in calls.items():
        starts = [one.call.started_s for one in opened if one.is_late(readings[name][0].at_s)]
        if starts:
            since[name] = min(starts)
    if not since:
        return found
    sinces = [to_datetime(since_s) for since_s in since.values()]
    ends = [to_datetime(readings[name][0].at_s) for name in since]
    for row in await connection.fetch(sql.SETTLED_INTERVALS, list(since), sinces, ends):
        found[row["endpoint"]].append(
            SettledInterval(
                row["started_at"].timestamp(),
                row["finished_at"].timestamp(),
                row["attributed_j"],
                row["unattributed_j"],
            )
        )
    return found


async def _read_intensity(
    connection: Connection, calls: Sequence[asyncpg.Record], *, max_age_s: float
) -> dict[str, IntensitySteps]:
    """The intensity of every zone of some calls, while they ran."""
    zones = {row["zone"] for row in calls}
    since = to_datetime(min(row["started_at"] for row in calls).timestamp() - max_age_s)
    until = max(row["finished_at"] for row in calls)
    points: dict[str, list[tuple[float, float]]] = {zone: [] for zone in zones}
    for row in await connection.fetch(sql.INTENSITY, list(zones), since, until):
        points[row["zone"]].append((row["at"].timestamp(), row["intensity_g_per_kwh"]))
    return {zone: IntensitySteps(found, max_age_s=max_age_s) for zone, found in points.items()}


def _readings_by_endpoint(rows: Sequence[asyncpg.Record]) -> dict[str, list[Reading]]:
    """Readings by endpoint, from rows ordered by endpoint and time."""
    grouped: dict[str, dict[datetime, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        grouped[row["endpoint"]][row["at"]][row["gpu"]] = row["energy_j"]
    return {
        endpoint: [Reading(at.timestamp(), energy_j) for at, energy_j in by_time.items()]
        for endpoint, by_time in grouped.items()
    }


def _open_call(row: asyncpg.Record) -> OpenCall:
    first = row["first_token_at"]
    call = Call(
        id=row["id"],
        started_s=row["started_at"].timestamp(),
        first_token_s=None if first is None else first.timestamp(),
        finished_s=row["finished_at"].timestamp(),
        prompt_tokens=row["prompt_tokens"] or 0,
        completion_tokens=row["completion_tokens"],
    )
    return OpenCall(
        call, energy_j=row["energy_j"], accounted=row["accounted_until"] is not None, partial=row["partial"]
    )
