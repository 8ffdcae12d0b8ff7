"""Settlement: finalises intervals.

To settle an interval means to attribute its energy finally: the attribution, the calls' energy and the footprints of
calls that ended are written to PostgreSQL in one transaction, and are not recomputed. An interval is settled when the
calls that ran in it are known (`services.ledger.reports`; docs/decisions/0006).

A transaction settles a chunk of one endpoint, with a bounded number of calls. Several ledgers settle different
endpoints at once; a lock in PostgreSQL keeps them from the same one (docs/decisions/0030).
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial

import asyncpg

from services.ledger import sql
from services.ledger.chunks import Chunk, divide, read_chunk, read_intensity
from services.ledger.endpoint import DAY_S, CallResult, EndpointSettlement, EndpointState, settle_endpoint
from services.ledger.footprint import IntensitySteps, footprint_grams
from services.ledger.metrics import LedgerMetrics
from services.ledger.reports import AwakeEndpoints
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Connection, Row, Storage, execute_rows, to_datetime, to_iso
from shared.fleet import Fleet
from shared.messages import EndpointCurve
from shared.pools import Pool
from shared.runtime.clock import Clock
from shared.runtime.database import translate_errors
from shared.runtime.logs import get_logger

Footprint = tuple[str, float, float | None, float | None, float | None, float, bool]
"""Of a settled call: id, energy, server time, intensity, operational and embodied grams, partial."""

ENDPOINTS_AT_ONCE = 2
"""While PostgreSQL works for one endpoint, the ledger computes for another."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """What one transaction did.

    Attributes:
        calls: number of calls that were settled.
        more: there may be more to settle for this endpoint.
        curve: the endpoint's curve; None if nothing is known of it.
    """

    calls: int = 0
    more: bool = False
    curve: EndpointCurve | None = None


class IntervalSettlement:
    """Settles the intervals of all endpoints of the fleet that have a meter."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        settings: LedgerSettings,
        storage: Storage,
        metrics: LedgerMetrics,
        awake: AwakeEndpoints,
        clock: Clock,
    ) -> None:
        """Nothing is settled yet.

        Args:
            awake: which endpoints were needed.
        """
        self._pools: dict[str, Pool] = {
            endpoint.name: pool for pool in fleet.pools for endpoint in pool.endpoints if endpoint.metrics is not None
        }
        self._settings = settings
        self._storage = storage
        self._metrics = metrics
        self._awake = awake
        self._still_after_s = settings.meter_stall_s * clock.rate
        self._problems: dict[str, str] = {}
        self._days: set[datetime] = set()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoints that have a meter."""
        return tuple(self._pools)

    def meter_problem(self) -> str | None:
        """Readiness check: which meters are broken; None if none is."""
        found = [f"the energy counter of endpoint {name} {problem}" for name, problem in self._problems.items()]
        return "; ".join(found) or None

    async def run_once(
        self, watermark: datetime, *, limits: Mapping[str, datetime], on_chunk: Callable[[], None] = lambda: None
    ) -> tuple[EndpointCurve, ...]:
        """Settle all intervals whose calls are known, chunk by chunk, of `ENDPOINTS_AT_ONCE` endpoints at once.

        Args:
            watermark: time up to which every published call is in PostgreSQL.
            limits: time up to which each endpoint is settled; the others are not.
            on_chunk: called after each chunk.

        Returns:
            The learned curves of the endpoints that this ledger settled.

        Raises:
            DatabaseUnavailableError: a chunk was not written.
        """
        curves = {}
        waiting = (endpoint for endpoint in self._pools if endpoint in limits)

        async def settle_next() -> None:
            for endpoint in waiting:
                progress = Progress(more=True)
                while progress.more:
                    progress = await self.settle_chunk(endpoint, limits[endpoint], watermark=watermark)
                    on_chunk()
                    if progress.curve is not None:
                        curves[endpoint] = progress.curve

        workers = (settle_next() for _ in range(ENDPOINTS_AT_ONCE))
        for failed in await asyncio.gather(*workers, return_exceptions=True):
            if failed is not None:
                raise failed
        return tuple(curves.values())

    async def settle_chunk(self, endpoint: str, limit: datetime, *, watermark: datetime) -> Progress:
        """Settle the next chunk of an endpoint in one transaction; nothing if another ledger does.

        Raises:
            DatabaseUnavailableError: nothing was written.
        """
        pool, settings = self._pools[endpoint], self._settings
        with translate_errors():
            async with self._storage.pool.acquire() as connection, connection.transaction():
                if not await connection.fetchval(sql.ENDPOINT_LOCK, endpoint):
                    return Progress()
                await connection.execute(sql.ERASURE_LOCK)
                read = partial(
                    read_chunk,
                    connection,
                    pool,
                    endpoint,
                    limit,
                    calls=settings.chunk_calls,
                    awake=self._awake,
                    still_after_s=self._still_after_s,
                )
                chunk = await read()
                if chunk is not None and chunk.divisible:
                    if await divide(connection, endpoint, chunk.state, settings) > 1:
                        return Progress(more=True)
                    chunk = await read(divisible=False)
                if chunk is None:
                    return Progress()
                result = await asyncio.to_thread(settle_endpoint, chunk.state, settings)
                finished, days = sum(one.finished for one in result.calls), set[datetime]()
                if result.intervals or finished:
                    await self._write(connection, endpoint, chunk, result)
                    days = await self._write_calls(connection, pool, chunk, result)
        self._days |= days
        self._report_endpoint(endpoint, result)
        self._metrics.settled_age_s.labels(endpoint).set(watermark.timestamp() - result.settled_until_s)
        if result.calls:
            self._metrics.chunk_calls.observe(len(result.calls))
        return Progress(
            calls=finished,
            more=bool(finished or result.intervals),
            curve=self._curve(endpoint, chunk.state, result),
        )

    async def _write(self, connection: Connection, endpoint: str, chunk: Chunk, result: EndpointSettlement) -> None:
        """Write everything but the calls."""
        pool, until = self._pools[endpoint], to_iso(result.settled_until_s)
        intervals: list[Row] = [
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
                "calls": one.calls.size,
                "idle_s": one.idle_s,
                "stalled": one.interval.started_s in result.stalled,
            }
            for one in result.intervals
        ]
        reallocated = [{"endpoint": endpoint, "started_at": to_iso(start)} for start, _ in result.reallocated_j]
        reallocated_time = [
            {"endpoint": endpoint, "started_at": to_iso(start), "idle_s": idle_s}
            for start, idle_s in result.reallocated_s
        ]
        meter = {
            "endpoint": endpoint,
            "metered_from": to_iso(chunk.state.metered_from_s),
            "settled_until": until,
            "idle_power_w": result.learned.power_w,
            "quiet_s": result.learned.idle_s,
            "quiet_j": result.learned.idle_j,
        }
        await execute_rows(connection, sql.ADD_INTERVALS, intervals)
        await execute_rows(connection, sql.REALLOCATE, reallocated)
        await execute_rows(connection, sql.REALLOCATE_TIME, reallocated_time)
        await execute_rows(connection, sql.PUT_METERS, [meter])
        await execute_rows(
            connection, sql.PUT_CURVES, [{"endpoint": endpoint, "state": result.curve.model_dump(mode="json")}]
        )

    async def _write_calls(
        self, connection: Connection, pool: Pool, chunk: Chunk, result: EndpointSettlement
    ) -> set[datetime]:
        """Move the finished calls to the settled ones, and note what the others have got so far.

        Returns:
            The days whose partitions exist.
        """
        going_on = [one for one in result.calls if not one.finished]
        if going_on:
            columns = zip(
                *(
                    (one.id, one.used.energy_j, one.server_s, one.used.steps, one.used.batch_tokens, one.partial)
                    for one in going_on
                ),
                strict=True,
            )
            await connection.execute(sql.UPDATE_CALLS, *map(list, columns), to_datetime(result.settled_until_s))
        unmetered = [one.id for one in result.calls if one.finished and not one.metered]
        if unmetered:
            await connection.execute(sql.REMOVE_CALLS, unmetered)
        done = [one for one in result.calls if one.finished and one.metered]
        if not done:
            return set()
        rows = [chunk.rows[one.id] for one in done]
        ends = [row["finished_s"] for row in rows]
        days = {to_datetime(DAY_S * number) for number in {one // DAY_S for one in ends}}
        for day in sorted(days - self._days):
            await sql.add_partition(connection, day)
        number = await connection.fetchval(sql.ADD_CHUNK, len(done), to_datetime(min(ends)), to_datetime(max(ends)))
        steps = await read_intensity(connection, rows, max_age_s=self._settings.max_intensity_age_s)
        footprints = [_footprint(one, row, pool, steps) for one, row in zip(done, rows, strict=True)]
        await connection.execute(sql.MOVE_CALLS, number, *map(list, zip(*footprints, strict=True)))
        self._count(done, rows, footprints)
        return days

    def _count(
        self, calls: Sequence[CallResult], rows: Sequence[asyncpg.Record], footprints: Sequence[Footprint]
    ) -> None:
        """Add settled calls to the metrics."""
        partial = sum(one.partial for one in calls)
        self._metrics.calls.labels("partial").inc(partial)
        self._metrics.calls.labels("complete").inc(len(calls) - partial)
        grams: dict[tuple[str, str, str], float] = defaultdict(float)
        for row, (_, _, _, _, operational_g, embodied_g, _) in zip(rows, footprints, strict=True):
            if operational_g is not None:
                grams[row["purpose"], row["pool"], row["level"]] += operational_g + embodied_g
        for labels, total in grams.items():
            self._metrics.grams.labels(*labels).inc(total)

    def _report_endpoint(self, endpoint: str, result: EndpointSettlement) -> None:
        """Update metrics and log."""
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
        if result.intervals:
            self._report_meter(endpoint, result)
        metrics.reallocated_joules.labels(endpoint).inc(sum(joules for _, joules in result.reallocated_j))
        late = sum(one.late for one in result.calls)
        if late:
            metrics.late_calls.inc(late)
            _log.warning("calls arrived after their intervals were settled", endpoint=endpoint, calls=late)
        self._metrics.calls.labels("unmetered").inc(sum(one.finished and not one.metered for one in result.calls))

    def _curve(self, endpoint: str, state: EndpointState, result: EndpointSettlement) -> EndpointCurve | None:
        """The message of an endpoint whose curve is known at all."""
        estimate = replace(state, curve=result.curve).estimate()
        if estimate is None:
            return None
        self._metrics.curve_identifiable.labels(endpoint).set(estimate.identifiable)
        coefficients = asdict(estimate.curve)
        del coefficients["asleep_w"]
        for name, value in coefficients.items():
            self._metrics.curve.labels(endpoint, name).set(value)
        return EndpointCurve(
            endpoint=endpoint,
            pool=self._pools[endpoint].name,
            at=to_datetime(result.settled_until_s),
            **coefficients,
            standard_errors=dict(estimate.standard_errors),
            identifiable=estimate.identifiable,
            reason=estimate.reason,
            intervals=estimate.intervals,
            mean_batch=estimate.mean_batch,
            mean_prompt_tokens=estimate.mean_prompt_tokens,
        )

    def _report_meter(self, endpoint: str, result: EndpointSettlement) -> None:
        """Say in readiness, metric and log whether the endpoint's meter works."""
        last = result.intervals[-1].interval
        problem = ""
        if last.started_s in result.stalled:
            problem = "stands still while tokens are generated; calls in this time are partial"
        elif last.restarted:
            problem = "was reset; calls in this time are partial"
        self._metrics.stalls.labels(endpoint).inc(len(result.stalled))
        before = self._problems.pop(endpoint, "")
        if problem:
            self._problems[endpoint] = problem
        if "stands still" in problem and problem != before:
            _log.warning("energy counter stands still while tokens are generated", endpoint=endpoint)
        elif "stands still" in before and not problem:
            _log.info("energy counter moves again", endpoint=endpoint)


def _footprint(call: CallResult, row: asyncpg.Record, pool: Pool, steps: Mapping[str, IntensitySteps]) -> Footprint:
    """The computed columns of a settled call, in the order in which `sql.MOVE_CALLS` takes them."""
    started_s, finished_s = row["started_s"], row["finished_s"]
    intensity = steps[row["zone"]].mean(started_s, finished_s)
    grams = footprint_grams(
        energy_j=call.used.energy_j,
        # Unknown in calls that an earlier version has partly settled: these are charged for all of their time.
        server_s=max(0.0, finished_s - started_s) if call.server_s is None else call.server_s,
        pool=pool,
        intensity_g_per_kwh=intensity,
    )
    return (
        call.id, call.used.energy_j, call.server_s, intensity, grams["operational_g"],
        grams["embodied_g"] or 0.0, call.partial
    )  # fmt: skip
