"""Divides the time between two readings of a meter, if more calls ran in it than one transaction settles.

That happens after an outage of the ledger: nobody reads the meter meanwhile. What the meter says of the whole time is
given to its parts in proportion to the work in each. So every call gets what it would get from the whole, and any
number of calls is settled with the memory of one chunk. The parts are marked: nothing is learned from their energy.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from services.ledger import sql
from services.ledger.attribution import Call, work_between
from services.ledger.endpoint import EndpointState
from services.ledger.meters import Reading, intervals_between
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Connection, to_datetime


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
