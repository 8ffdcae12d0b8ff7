"""Chunks: what one transaction settles of an endpoint. Reads them from PostgreSQL, and divides intervals for them.

A chunk is the endpoint's state, and the intensity of its calls. If more calls ran between two readings of a meter than
one transaction settles, the time between them is divided. That happens after an outage of the ledger: nobody reads the
meter meanwhile. What the meter says of the whole time is given to its parts in proportion to the work in each. So every
call gets what it would get from the whole, and any number of calls is settled with the memory of one chunk. The parts
are marked: nothing is learned from their energy.
"""

import asyncio
import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

import asyncpg

from services.ledger import sql
from services.ledger.attribution import Call, CallUse, work_between
from services.ledger.curve import CurveState
from services.ledger.endpoint import EndpointState, IdlePower, OpenCall, SettledInterval
from services.ledger.footprint import IntensitySteps
from services.ledger.meters import Reading, intervals_between
from services.ledger.reports import AwakeEndpoints
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Connection, to_datetime
from shared.pools import Pool

CHUNK_INTERVALS = 60
"""Most intervals of a chunk: a call that is as long as all of them has a share of each."""
MOST_READINGS = 2_000
"""Most readings of single GPUs that are read at once."""
LATE_SPAN = timedelta(days=1)
"""Late calls get what intervals up to this long before left unattributed."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one transaction settles of an endpoint.

    Attributes:
        state: the endpoint's; its readings end where the chunk ends.
        rows: of its open calls, by id.
        divisible: too many calls ran between its two readings; the interval is to be divided first.
    """

    state: EndpointState
    rows: Mapping[str, asyncpg.Record]
    divisible: bool = False


async def read_chunk(
    connection: Connection,
    pool: Pool,
    endpoint: str,
    limit: datetime,
    *,
    calls: int,
    awake: AwakeEndpoints,
    still_after_s: float,
    divisible: bool = True,
) -> Chunk | None:
    """Read what is to be settled next of an endpoint; None without a reading.

    Args:
        pool: the endpoint's.
        limit: time up to which it can be settled.
        calls: most calls that start within the chunk, unless more start at one moment.
        awake: which endpoints were needed.
        still_after_s: see `EndpointState`.
        divisible: whether an interval with more calls is to be divided; otherwise it is a chunk, whatever its size.
    """
    readings = await _readings(connection, endpoint, limit)
    if not readings:
        return None
    state = await _endpoint_state(connection, pool, endpoint, readings, awake=awake, still_after_s=still_after_s)
    if len(readings) > 1:
        end = await connection.fetchval(sql.CHUNK_END, endpoint, to_datetime(readings[0].at_s), calls)
        within = [one for one in readings if end is None or to_datetime(one.at_s) <= end]
        if len(within) < 2:
            # A call that starts with the second reading takes no part in the interval.
            if divisible and end is not None and to_datetime(readings[0].at_s) < end < to_datetime(readings[1].at_s):
                return Chunk(replace(state, readings=readings[:2]), {}, divisible=True)
            within = readings[:2]
        state = replace(state, readings=within)
    first, last = to_datetime(state.readings[0].at_s), to_datetime(state.readings[-1].at_s)
    rows = {row["id"]: row for row in await connection.fetch(sql.OPEN_CALLS, endpoint, last, first, calls)}
    opened = [_open_call(row) for row in rows.values()]
    settled_until_s = state.readings[0].at_s
    late = [one for one in opened if one.is_late(settled_until_s)]
    if late:
        removed = await connection.fetch(sql.REMOVE_DUPLICATES, endpoint, first)
        rows = {name: row for name, row in rows.items() if name not in {one["id"] for one in removed}}
        opened = [_open_call(row) for row in rows.values()]
        late = [one for one in opened if one.is_late(settled_until_s)]
    settled, settled_from_s = await _settled_intervals(connection, endpoint, settled_until_s, late)
    return Chunk(replace(state, calls=opened, settled=settled, settled_from_s=settled_from_s), rows)


async def _readings(connection: Connection, endpoint: str, limit: datetime) -> list[Reading]:
    """The readings from the end of the last settled interval up to a limit, at most those of a chunk."""
    found: list[Reading] = []
    rows = await connection.fetch(sql.READINGS, endpoint, limit, MOST_READINGS)
    for row in rows:
        at_s = row["at"].timestamp()
        if found and found[-1].at_s == at_s:
            before = found.pop()
            energy_j = {**before.energy_j, row["gpu"]: row["energy_j"]}
            found.append(
                Reading(at_s, energy_j, before.divided or row["divided"], before.restarted or row["restarted"])
            )
        else:
            found.append(Reading(at_s, {row["gpu"]: row["energy_j"]}, row["divided"], row["restarted"]))
    if len(rows) == MOST_READINGS:
        found.pop()  # it may lack a GPU
    return found[: CHUNK_INTERVALS + 1]


async def _endpoint_state(
    connection: Connection,
    pool: Pool,
    endpoint: str,
    readings: Sequence[Reading],
    *,
    awake: AwakeEndpoints,
    still_after_s: float,
) -> EndpointState:
    """The state without calls."""
    meter = await connection.fetchrow(sql.METER, endpoint)
    names = [one.name for one in pool.endpoints]
    curves = {
        row["endpoint"]: CurveState.model_validate_json(row["state"])
        for row in await connection.fetch(sql.CURVES, names)
    }
    return EndpointState(
        readings=readings,
        calls=(),
        metered_from_s=readings[0].at_s if meter is None else meter["metered_from"].timestamp(),
        idle_power_w=pool.idle_power_w,
        pool_idle_w=_pool_idle_w(curves) if pool.idle_power_w is None else None,
        learned=IdlePower() if meter is None else IdlePower(meter["idle_power_w"], meter["quiet_s"], meter["quiet_j"]),
        curve=curves.get(endpoint, CurveState()),
        kept_awake=partial(awake.kept, pool.name, endpoint) if pool.sleep else None,
        still_after_s=still_after_s,
    )


def _pool_idle_w(curves: Mapping[str, CurveState]) -> float | None:
    """Median idle power of the pool's endpoints that have learned it."""
    estimates = [curve.estimate(idle_power_w=None) for curve in curves.values()]
    found = [one.curve.idle_w for one in estimates if one is not None and one.identifiable]
    return statistics.median(found) if found else None


async def _settled_intervals(
    connection: Connection, endpoint: str, settled_until_s: float, late: Sequence[OpenCall]
) -> tuple[list[SettledInterval], float]:
    """The settled intervals in which late calls ran, and the time from which they are all there."""
    if not late:
        return [], settled_until_s
    since_s = max(min(one.call.started_s for one in late), settled_until_s - LATE_SPAN.total_seconds())
    rows = await connection.fetch(sql.SETTLED_INTERVALS, endpoint, to_datetime(since_s), to_datetime(settled_until_s))
    return [
        SettledInterval(
            row["started_at"].timestamp(),
            row["finished_at"].timestamp(),
            row["attributed_j"],
            row["unattributed_j"],
            row["idle_s"],
            row["flawed"],
        )
        for row in rows
    ], since_s


async def read_intensity(
    connection: Connection, calls: Sequence[asyncpg.Record], *, max_age_s: float
) -> dict[str, IntensitySteps]:
    """The intensity of every zone of some calls, while they ran."""
    zones = {row["zone"] for row in calls}
    since = to_datetime(min(row["started_s"] for row in calls) - max_age_s)
    until = to_datetime(max(row["finished_s"] for row in calls))
    points: dict[str, list[tuple[float, float]]] = {zone: [] for zone in zones}
    for row in await connection.fetch(sql.INTENSITY, list(zones), since, until):
        points[row["zone"]].append((row["at"].timestamp(), row["intensity_g_per_kwh"]))
    return {zone: IntensitySteps(found, max_age_s=max_age_s) for zone, found in points.items()}


def _open_call(row: asyncpg.Record) -> OpenCall:
    call = Call(
        row["id"],
        row["started_s"],
        row["first_token_s"],
        row["finished_s"],
        row["prompt_tokens"] or 0,
        row["completion_tokens"],
    )
    if row["accounted_until"] is None:
        return OpenCall(call)
    return OpenCall(
        call,
        used=CallUse(row["energy_j"] or 0.0, row["server_s"] or 0.0, row["steps"] or 0.0, row["batch_tokens"] or 0.0),
        accounted=True,
        partial=row["partial"],
        timed=row["server_s"] is not None,
    )


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an interval.

    Attributes:
        until_s: its end, seconds since the Unix epoch.
        work, running_s: of its calls, see `attribution.work_between`.
    """

    until_s: float
    work: float
    running_s: float


async def divide(connection: Connection, endpoint: str, state: EndpointState, settings: LedgerSettings) -> int:
    """Divide the interval between the two readings of a state by computed readings.

    Returns:
        The number of parts.
    """
    before, after = state.readings
    parts = [part async for part in _parts(connection, endpoint, state, settings)]
    readings = divided_readings(before, after, parts, idle_power_w=state.attribution_idle_w() or 0.0)
    rows = [(to_datetime(one.at_s), gpu, energy_j, one.restarted)
            for one in readings for gpu, energy_j in one.energy_j.items()]  # fmt: skip
    if rows:
        await connection.execute(sql.ADD_DIVIDED, endpoint, *(list(column) for column in zip(*rows, strict=True)))
    return len(parts)


async def _parts(
    connection: Connection, endpoint: str, state: EndpointState, settings: LedgerSettings
) -> AsyncIterator[Part]:
    """The parts in order of time: each ends at the start of a call, after `chunk_calls` other starts."""
    since_s, until_s = state.readings[0].at_s, state.readings[1].at_s
    curve, speed = state.attribution_curve(), state.curve.speed
    running: list[Call] = []
    starting = 0

    async def close(end_s: float) -> Part:
        work, running_s = await asyncio.to_thread(
            work_between, running, since_s, end_s,
            prefill_weight=settings.prefill_weight, curve=curve, speed=speed,
        )  # fmt: skip
        return Part(end_s, work, running_s)

    rows = connection.cursor(
        sql.CALLS_BY_START, endpoint, to_datetime(until_s), to_datetime(since_s), prefetch=settings.chunk_calls
    )
    async for row in rows:
        call = Call("", row["started_s"], row["first_s"], row["finished_s"], row["prompt_tokens"],
                    row["completion_tokens"])  # fmt: skip
        if starting >= settings.chunk_calls and since_s < call.started_s < until_s:
            yield await close(call.started_s)
            since_s = call.started_s
            running = [one for one in running if one.finished_s > since_s]
            starting = 0
        running.append(call)
        starting += call.started_s > since_s
    yield await close(until_s)


def divided_readings(before: Reading, after: Reading, parts: Sequence[Part], *, idle_power_w: float) -> list[Reading]:
    """The readings at the ends of all parts but the last.

    Idle energy is divided by time; the rest by work, or by running time or time where there is none.
    """
    (whole,) = intervals_between([before, after])
    if not whole.metered_j > 0:
        shares = [0.0] * len(parts)
    else:
        idle = min(1.0, idle_power_w * whole.length_s / whole.metered_j)
        work = next(
            (found for found in ([one.work for one in parts], [one.running_s for one in parts]) if sum(found) > 0),
            [0.0] * len(parts),
        )
        total = sum(work)
        shares, done = [], 0.0
        for part, used in zip(parts, work, strict=True):
            done += used
            time = (part.until_s - before.at_s) / whole.length_s
            shares.append(idle * time + (1.0 - idle) * (done / total if total > 0 else time))
    return [
        Reading(
            part.until_s,
            {gpu: _between(before.energy_j.get(gpu), energy_j, share) for gpu, energy_j in after.energy_j.items()},
            divided=True,
            restarted=whole.restarted,
        )
        for part, share in zip(parts[:-1], shares, strict=False)
    ]


def _between(before_j: float | None, after_j: float, share: float) -> float:
    """A counter after a share of an interval's energy; from 0 if it was reset, constant if it was not known before."""
    if before_j is None:
        return after_j
    since_j = 0.0 if after_j < before_j else before_j
    return min(after_j, since_j + (after_j - since_j) * share)
