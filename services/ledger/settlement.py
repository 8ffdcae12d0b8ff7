"""Settlement: finalises intervals.

To settle an interval means to attribute its energy finally: the attribution, the calls' energy and the footprints of
calls that ended are written to PostgreSQL in one transaction, and are not recomputed. An interval is settled when the
calls that ran in it are known (`services.ledger.reports`; docs/decisions/0006).
"""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime

import asyncpg

from services.ledger import sql
from services.ledger.endpoint import EndpointSettlement, EndpointState, settle_endpoint
from services.ledger.footprint import footprint_row
from services.ledger.metrics import LedgerMetrics
from services.ledger.reports import AwakeEndpoints
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Connection, Row, Storage, execute_rows, to_datetime, to_iso
from services.ledger.states import read_intensity, read_states
from shared.fleet import Fleet, Pool
from shared.messages import EndpointCurve
from shared.runtime.clock import Clock
from shared.runtime.database import translate_errors
from shared.runtime.logs import get_logger

_log = get_logger(__name__)


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

    def meter_problem(self) -> str | None:
        """Readiness check: which meters are broken; None if none is."""
        found = [f"the energy counter of endpoint {name} {problem}" for name, problem in self._problems.items()]
        return "; ".join(found) or None

    async def run_once(
        self, watermark: datetime, *, limits: Mapping[str, datetime], unmetered_until: datetime
    ) -> tuple[EndpointCurve, ...]:
        """Settle all intervals whose calls are known, in one transaction.

        Args:
            watermark: time up to which every published call is in PostgreSQL.
            limits: time up to which each endpoint is settled; the others are not.
            unmetered_until: time up to which calls on endpoints without a meter are finished.

        Returns:
            The learned curves of the endpoints; nothing if another ledger holds the lock.

        Raises:
            DatabaseUnavailableError: nothing was written.
        """
        with translate_errors():
            async with self._storage.pool.acquire() as connection, connection.transaction():
                if not await connection.fetchval(sql.SETTLEMENT_LOCK):
                    return ()
                states, rows = await read_states(
                    connection, self._pools, limits, awake=self._awake, still_after_s=self._still_after_s
                )
                results = await asyncio.to_thread(
                    lambda: {endpoint: settle_endpoint(one, self._settings) for endpoint, one in states.items()}
                )
                await self._write(connection, states, results)
                footprints = await self._footprints(connection, results, rows)
                await execute_rows(connection, sql.ADD_FOOTPRINTS, footprints)
                unmetered: int = await connection.fetchval(sql.SETTLE_UNMETERED, list(self._pools), unmetered_until)
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
        return self._curves(states, results)

    async def _write(
        self, connection: Connection, states: Mapping[str, EndpointState], results: Mapping[str, EndpointSettlement]
    ) -> None:
        intervals: list[Row] = []
        reallocated: list[Row] = []
        calls: list[Row] = []
        meters: list[Row] = []
        curves: list[Row] = []
        reallocated_time: list[Row] = []
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
                    "calls": len(one.uses),
                    "idle_s": one.idle_s,
                    "stalled": one.interval.started_s in result.stalled,
                }
                for one in result.intervals
            ]
            reallocated += [{"endpoint": endpoint, "started_at": to_iso(start)} for start, _ in result.reallocated_j]
            reallocated_time += [
                {"endpoint": endpoint, "started_at": to_iso(start), "idle_s": idle_s}
                for start, idle_s in result.reallocated_s
            ]
            calls += [
                {
                    "id": one.id,
                    "energy_j": one.used.energy_j,
                    "server_s": one.server_s,
                    "steps": one.used.steps,
                    "batch_tokens": one.used.batch_tokens,
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
            curves.append({"endpoint": endpoint, "state": result.curve.model_dump(mode="json")})
        await execute_rows(connection, sql.ADD_INTERVALS, intervals)
        await execute_rows(connection, sql.REALLOCATE, reallocated)
        await execute_rows(connection, sql.REALLOCATE_TIME, reallocated_time)
        await execute_rows(connection, sql.UPDATE_CALLS, calls)
        await execute_rows(connection, sql.PUT_METERS, meters)
        await execute_rows(connection, sql.PUT_CURVES, curves)

    async def _footprints(
        self, connection: Connection, results: Mapping[str, EndpointSettlement], rows: Mapping[str, asyncpg.Record]
    ) -> list[Row]:
        """The computed columns of the footprints of all calls that are finished and metered."""
        done = [one for result in results.values() for one in result.calls if one.finished and one.metered]
        if not done:
            return []
        max_age_s = self._settings.max_intensity_age_s
        steps = await read_intensity(connection, [rows[one.id] for one in done], max_age_s=max_age_s)
        return [
            footprint_row(
                request_id=one.id,
                started_s=rows[one.id]["started_at"].timestamp(),
                finished_s=rows[one.id]["finished_at"].timestamp(),
                energy_j=one.used.energy_j,
                server_s=one.server_s,
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
        if result.intervals:
            self._report_meter(endpoint, result)
        metrics.reallocated_joules.labels(endpoint).inc(sum(joules for _, joules in result.reallocated_j))
        late = sum(one.late for one in result.calls)
        if late:
            metrics.late_calls.inc(late)
            _log.warning("calls arrived after their intervals were settled", endpoint=endpoint, calls=late)
        return sum(one.finished and not one.metered for one in result.calls)

    def _curves(
        self, states: Mapping[str, EndpointState], results: Mapping[str, EndpointSettlement]
    ) -> tuple[EndpointCurve, ...]:
        """The messages of all endpoints whose curve is known at all."""
        found = []
        for endpoint, result in results.items():
            estimate = replace(states[endpoint], curve=result.curve).estimate()
            if estimate is None:
                continue
            self._metrics.curve_identifiable.labels(endpoint).set(estimate.identifiable)
            coefficients = asdict(estimate.curve)
            del coefficients["asleep_w"]
            for name, value in coefficients.items():
                self._metrics.curve.labels(endpoint, name).set(value)
            found.append(
                EndpointCurve(
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
            )
        return tuple(found)

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
