"""One settlement of all endpoints, in one transaction: reads what is open, has `settlement` decide, writes that."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import asyncpg

from services.ledger import statements
from services.ledger.attribution import Call
from services.ledger.footprint import grams_of
from services.ledger.idle import IdlePower
from services.ledger.intensity import IntensitySteps
from services.ledger.metering import Reading
from services.ledger.metrics import LedgerMetrics
from services.ledger.rows import Row
from services.ledger.settlement import (
    CallOutcome,
    EndpointBooks,
    OpenCall,
    Rules,
    SettledInterval,
    Settlement,
    is_late,
    settle,
)
from services.ledger.storage import Connection, Storage, execute_rows
from shared.fleet import Fleet, Pool
from shared.runtime.logs import get_logger

_log = get_logger(__name__)


class Settler:
    """Settles all endpoints of the fleet that are metered."""

    def __init__(
        self, fleet: Fleet, *, storage: Storage, metrics: LedgerMetrics, rules: Rules, max_intensity_age_s: float
    ) -> None:
        self._pools: dict[str, Pool] = {
            endpoint.name: pool for pool in fleet.pools for endpoint in pool.endpoints if endpoint.metrics is not None
        }
        self._storage = storage
        self._metrics = metrics
        self._rules = rules
        self._max_age_s = max_intensity_age_s

    async def turn(self, horizon: datetime) -> bool:
        """Settle everything up to an instant; false where another ledger is at it.

        Raises:
            asyncpg.PostgresError, OSError: PostgreSQL is away; nothing was written.
        """
        async with self._storage.pool.acquire() as connection, connection.transaction():
            if not await connection.fetchval(statements.LOCK):
                return False
            books, rows = await self._read(connection, horizon)
            results = await asyncio.to_thread(
                lambda: {endpoint: settle(one, self._rules) for endpoint, one in books.items()}
            )
            await self._write(connection, books, results)
            footprints = await self._footprints(connection, results, rows)
            await execute_rows(connection, statements.ADD_FOOTPRINTS, footprints)
            unmetered: int = await connection.fetchval(statements.CLOSE_UNMETERED, list(self._pools), horizon)
            unsettled: int = await connection.fetchval(statements.UNSETTLED)
        self._count(results, footprints, rows, unmetered)
        self._metrics.unsettled_calls.set(unsettled)
        for endpoint, result in results.items():
            self._metrics.settled_age_s.labels(endpoint).set(horizon.timestamp() - result.settled_until_s)
        return True

    async def _read(
        self, connection: Connection, horizon: datetime
    ) -> tuple[dict[str, EndpointBooks], dict[str, asyncpg.Record]]:
        """What is open, by endpoint, and the rows of the open calls, by id."""
        readings = _readings_of(await connection.fetch(statements.READINGS, list(self._pools), horizon))
        names = list(readings)
        meters = {row["endpoint"]: row for row in await connection.fetch(statements.METERS, names)}
        untils = [moment_of(readings[name][-1].at_s) for name in names]
        rows = {row["id"]: row for row in await connection.fetch(statements.CALLS, names, untils)}
        calls: dict[str, list[OpenCall]] = defaultdict(list)
        for row in rows.values():
            calls[row["endpoint"]].append(_open_call(row))
        settled = await self._settled(connection, readings, calls)
        books = {}
        for name in names:
            meter = meters.get(name)
            books[name] = EndpointBooks(
                readings=readings[name],
                calls=calls[name],
                settled=settled[name],
                metered_from_s=readings[name][0].at_s if meter is None else meter["metered_from"].timestamp(),
                idle_power_w=self._pools[name].idle_power_w,
                learned=IdlePower()
                if meter is None
                else IdlePower(meter["idle_power_w"], meter["quiet_s"], meter["quiet_j"]),
            )
        return books, rows

    async def _settled(
        self, connection: Connection, readings: Mapping[str, Sequence[Reading]], calls: Mapping[str, Sequence[OpenCall]]
    ) -> dict[str, list[SettledInterval]]:
        """The settled intervals that late calls touch."""
        found: dict[str, list[SettledInterval]] = defaultdict(list)
        late: dict[str, float] = {}
        for name, opened in calls.items():
            starts = [one.call.started_s for one in opened if is_late(one, readings[name][0].at_s)]
            if starts:
                late[name] = min(starts)
        if not late:
            return found
        sinces = [moment_of(since_s) for since_s in late.values()]
        ends = [moment_of(readings[name][0].at_s) for name in late]
        for row in await connection.fetch(statements.SETTLED, list(late), sinces, ends):
            found[row["endpoint"]].append(
                SettledInterval(
                    row["started_at"].timestamp(),
                    row["finished_at"].timestamp(),
                    row["attributed_j"],
                    row["unattributed_j"],
                )
            )
        return found

    async def _write(
        self, connection: Connection, books: Mapping[str, EndpointBooks], results: Mapping[str, Settlement]
    ) -> None:
        intervals: list[Row] = []
        recovered: list[Row] = []
        calls: list[Row] = []
        meters: list[Row] = []
        for endpoint, result in results.items():
            pool = self._pools[endpoint]
            until = text_of(result.settled_until_s)
            intervals += [
                {
                    "endpoint": endpoint,
                    "started_at": text_of(one.interval.started_s),
                    "finished_at": text_of(one.interval.finished_s),
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
            recovered += [{"endpoint": endpoint, "started_at": text_of(start_s)} for start_s, _ in result.taken_j]
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
                    "metered_from": text_of(books[endpoint].metered_from_s),
                    "settled_until": until,
                    "idle_power_w": result.learned.power_w,
                    "quiet_s": result.learned.quiet_s,
                    "quiet_j": result.learned.quiet_j,
                }
            )
        await execute_rows(connection, statements.ADD_INTERVALS, intervals)
        await execute_rows(connection, statements.RECOVER, recovered)
        await execute_rows(connection, statements.UPDATE_CALLS, calls)
        await execute_rows(connection, statements.PUT_METERS, meters)

    async def _footprints(
        self, connection: Connection, results: Mapping[str, Settlement], rows: Mapping[str, asyncpg.Record]
    ) -> list[Row]:
        """The calculated columns of the footprints of all calls that are finished and metered."""
        done = [one for result in results.values() for one in result.calls if one.finished and one.metered]
        if not done:
            return []
        steps = await self._intensity(connection, [rows[one.id] for one in done])
        return [self._footprint(one, rows[one.id], steps) for one in done]

    def _footprint(self, outcome: CallOutcome, row: asyncpg.Record, steps: Mapping[str, IntensitySteps]) -> Row:
        pool = self._pools[row["endpoint"]]
        started_s, finished_s = row["started_at"].timestamp(), row["finished_at"].timestamp()
        processing_s = max(0.0, finished_s - started_s)
        intensity = steps[row["zone"]].mean(started_s, finished_s)
        grams = grams_of(
            energy_j=outcome.energy_j,
            processing_s=processing_s,
            pue=pool.pue,
            intensity_g_per_kwh=intensity,
            embodied_g_per_s=pool.embodied_g_per_s,
        )
        return {
            "request_id": outcome.id,
            "processing_s": processing_s,
            "energy_j": outcome.energy_j,
            "intensity_g_per_kwh": intensity,
            "operational_g": grams.operational_g,
            "embodied_g": grams.embodied_g,
            "total_g": grams.total_g,
            "partial": outcome.partial,
        }

    async def _intensity(self, connection: Connection, rows: Sequence[asyncpg.Record]) -> dict[str, IntensitySteps]:
        """The intensity of every zone of some calls, while they ran."""
        zones = {row["zone"] for row in rows}
        since = moment_of(min(row["started_at"] for row in rows).timestamp() - self._max_age_s)
        until = max(row["finished_at"] for row in rows)
        points: dict[str, list[tuple[float, float]]] = {zone: [] for zone in zones}
        for row in await connection.fetch(statements.INTENSITY, list(zones), since, until):
            points[row["zone"]].append((row["at"].timestamp(), row["intensity_g_per_kwh"]))
        return {zone: IntensitySteps(found, max_age_s=self._max_age_s) for zone, found in points.items()}

    def _count(
        self,
        results: Mapping[str, Settlement],
        footprints: Sequence[Row],
        rows: Mapping[str, asyncpg.Record],
        unmetered: int,
    ) -> None:
        metrics = self._metrics
        for endpoint, result in results.items():
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
                        "an energy counter began anew; what it counted between the last reading and that is lost",
                        endpoint=endpoint,
                        between=f"{text_of(one.interval.started_s)} and {text_of(one.interval.finished_s)}",
                    )
            metrics.recovered_joules.labels(endpoint).inc(sum(joules for _, joules in result.taken_j))
            late = sum(one.late for one in result.calls)
            if late:
                metrics.late_calls.inc(late)
                _log.warning("calls came after their intervals were settled", endpoint=endpoint, calls=late)
            unmetered += sum(one.finished and not one.metered for one in result.calls)
        for footprint in footprints:
            row = rows[footprint["request_id"]]
            metrics.calls.labels("partial" if footprint["partial"] else "complete").inc()
            if footprint["total_g"] is not None:
                metrics.grams.labels(row["purpose"], row["pool"], row["level"]).inc(footprint["total_g"])
        metrics.calls.labels("unmetered").inc(unmetered)


def moment_of(seconds: float) -> datetime:
    """Seconds since the Unix epoch as an instant, UTC; exact to the microsecond."""
    return datetime.fromtimestamp(seconds, UTC)


def text_of(seconds: float) -> str:
    """The same as ISO 8601."""
    return moment_of(seconds).isoformat()


def _readings_of(rows: Sequence[asyncpg.Record]) -> dict[str, list[Reading]]:
    """Readings by endpoint, from rows in order of endpoint and time."""
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
