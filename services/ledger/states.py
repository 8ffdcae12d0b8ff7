"""Reads what a settlement needs from PostgreSQL: the state of every endpoint, and the carbon intensity of its calls."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial

import asyncpg

from services.ledger import sql
from services.ledger.attribution import Call, CallUse
from services.ledger.curve import CurveState
from services.ledger.endpoint import EndpointState, IdlePower, OpenCall, SettledInterval
from services.ledger.footprint import IntensitySteps
from services.ledger.meters import Reading
from services.ledger.reports import AwakeEndpoints
from services.ledger.sql import Connection, to_datetime
from shared.fleet import Pool


async def read_states(
    connection: Connection,
    pools: Mapping[str, Pool],
    limits: Mapping[str, datetime],
    *,
    awake: AwakeEndpoints,
    still_after_s: float,
) -> tuple[dict[str, EndpointState], dict[str, asyncpg.Record]]:
    """Read the state of every endpoint with readings, by name, and the rows of its open calls, by id.

    Args:
        pools: by name of the endpoints that have a meter.
        limits: time up to which each endpoint is settled; the others are left out.
        awake: which endpoints were needed.
        still_after_s: see `EndpointState`.
    """
    limited = {name: limits[name] for name in pools if name in limits}
    readings = _readings_by_endpoint(await connection.fetch(sql.READINGS, list(limited), list(limited.values())))
    names = list(readings)
    meters = {row["endpoint"]: row for row in await connection.fetch(sql.METERS, names)}
    curves = {
        row["endpoint"]: CurveState.model_validate_json(row["state"])
        for row in await connection.fetch(sql.CURVES, list(pools))
    }
    pool_idle_w = _pool_idle_w(pools, curves)
    untils = [to_datetime(readings[name][-1].at_s) for name in names]
    rows = {row["id"]: row for row in await connection.fetch(sql.OPEN_CALLS, names, untils)}
    calls: dict[str, list[OpenCall]] = defaultdict(list)
    for row in rows.values():
        calls[row["endpoint"]].append(_open_call(row))
    settled = await _read_settled_intervals(connection, readings, calls)
    states = {}
    for name in names:
        meter, pool = meters.get(name), pools[name]
        states[name] = EndpointState(
            readings=readings[name],
            calls=calls[name],
            settled=settled[name],
            metered_from_s=readings[name][0].at_s if meter is None else meter["metered_from"].timestamp(),
            idle_power_w=pool.idle_power_w,
            pool_idle_w=pool_idle_w.get(pool.name),
            learned=IdlePower()
            if meter is None
            else IdlePower(meter["idle_power_w"], meter["quiet_s"], meter["quiet_j"]),
            curve=curves.get(name, CurveState()),
            kept_awake=partial(awake.kept, pool.name, name) if pool.sleep else None,
            still_after_s=still_after_s,
        )
    return states, rows


def _pool_idle_w(pools: Mapping[str, Pool], curves: Mapping[str, CurveState]) -> dict[str, float]:
    """Median idle power of the endpoints that have learned it, by pool."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, curve in curves.items():
        estimate = curve.estimate(idle_power_w=pools[name].idle_power_w)
        if estimate is not None and estimate.identifiable:
            found[pools[name].name].append(estimate.curve.idle_w)
    return {name: statistics.median(values) for name, values in found.items()}


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
                row["idle_s"],
                row["flawed"],
            )
        )
    return found


async def read_intensity(
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
        call,
        used=CallUse(row["energy_j"], row["server_s"] or 0.0, row["steps"], row["batch_tokens"]),
        accounted=row["accounted_until"] is not None,
        partial=row["partial"],
        timed=row["server_s"] is not None or row["accounted_until"] is None,
    )
