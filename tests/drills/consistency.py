"""What the services of a drill published and stored, and its checks: nothing is lost, doubled or wrong in sum."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Final

import asyncpg

from shared.messages import CarbonIntensity, Footprint, Policy, Quality

SUM_TOLERANCE: Final = 1e-5
"""Of the joules of an endpoint, relative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BookedCall:
    """A call that the ledger has settled.

    Attributes:
        id: its record, or its own id where it has none.
    """

    id: str
    endpoint: str
    started_at: datetime
    finished_at: datetime
    completion_tokens: int
    energy_j: float
    partial: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BookedInterval:
    """The time between two readings of an endpoint's meter, as the ledger has settled it."""

    endpoint: str
    started_at: datetime
    finished_at: datetime
    metered_j: float
    attributed_j: float
    idle_j: float
    unattributed_j: float
    restarted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """What the services have stored.

    Attributes:
        unsettled: number of calls that the ledger has not settled yet.
        unpublished: number of sets of footprints, and of evaluations, that are still to be published.
        running: number of evaluations that are not finished.
        evaluations: ids of the finished ones.
    """

    calls: Sequence[BookedCall]
    intervals: Sequence[BookedInterval]
    unsettled: int
    unpublished: int
    running: int
    evaluations: Collection[str]


async def read_tables(url: str) -> Tables:
    """Read the tables of the ledger and the evaluator: the only place that knows them.

    Raises:
        OSError, asyncpg.PostgresError: PostgreSQL does not answer.
    """
    connection = await asyncpg.connect(url, timeout=10.0)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            calls = await connection.fetch(
                "SELECT c.id, d.endpoint, started_at, finished_at, completion_tokens, energy_j, partial "
                "FROM ledger.settled_calls AS c JOIN ledger.dimensions AS d ON d.id = c.dimension"
            )
            intervals = await connection.fetch(
                "SELECT endpoint, started_at, finished_at, metered_j, attributed_j, idle_j, unattributed_j, restarted "
                "FROM ledger.intervals ORDER BY endpoint, started_at"
            )
            unsettled = await connection.fetchval("SELECT count(*) FROM ledger.open_calls")
            chunks = await connection.fetchval("SELECT count(*) FROM ledger.chunks WHERE NOT published")
            evaluations = await connection.fetch("SELECT evaluation_id, status, published FROM evaluator.evaluations")
    finally:
        await connection.close()
    finished = [row for row in evaluations if row["status"] == "finished"]
    return Tables(
        calls=[BookedCall(**row) for row in calls],
        intervals=[BookedInterval(**row) for row in intervals],
        unsettled=unsettled,
        unpublished=chunks + sum(not row["published"] for row in finished),
        running=sum(row["status"] == "running" for row in evaluations),
        evaluations=[row["evaluation_id"] for row in finished],
    )


def footprint_problems(
    footprints: Sequence[Footprint], calls: Sequence[BookedCall], *, answered: set[str]
) -> list[str]:
    """Footprints that are lost, differ from the ledger or are unexpected.

    The ledger publishes at least once: one that ends between the acknowledgement of Kafka and its mark publishes the
    same message again, which readers skip. Only messages that differ are a problem.

    Args:
        footprints: of the topic.
        calls: of the ledger.
        answered: records of the requests with an answer of a model server.
    """
    published = Counter(one.record or one.request_id for one in footprints)
    versions = Counter(name for name, _ in {(one.record or one.request_id, one.energy_j) for one in footprints})
    booked = Counter(one.id for one in calls)
    partial = {one.id for one in calls if one.partial}
    complete = booked.keys() - partial
    return _described(
        [
            (answered - booked.keys(), "answered requests unknown to the ledger"),
            ([name for name, times in booked.items() if times > 1], "calls booked twice"),
            (complete - published.keys(), "complete footprints not published"),
            (published.keys() & partial, "partial footprints published"),
            (published.keys() - booked.keys(), "footprints published that the ledger does not have"),
            ([name for name, times in versions.items() if times > 1], "footprints published with different values"),
        ]
    )


def sum_problems(calls: Sequence[BookedCall], intervals: Sequence[BookedInterval]) -> list[str]:
    """Joules that do not add up, gaps between intervals, and calls that should be partial.

    Args:
        intervals: in order of endpoint and time.
    """
    problems = []
    by_endpoint: dict[str, list[BookedInterval]] = defaultdict(list)
    for interval in intervals:
        by_endpoint[interval.endpoint].append(interval)
    for endpoint, own in by_endpoint.items():
        metered = math.fsum(one.metered_j for one in own)
        attributed = math.fsum(one.attributed_j for one in own)
        parts = attributed + math.fsum(one.idle_j + one.unattributed_j for one in own)
        booked = math.fsum(one.energy_j for one in calls if one.endpoint == endpoint)
        for what, found, wanted in (("parts", parts, metered), ("calls", booked, attributed)):
            if abs(found - wanted) > SUM_TOLERANCE * max(metered, 1.0):
                problems.append(f"{endpoint}: the joules of the {what} are {found:.3f}, not {wanted:.3f}")
        if gaps := sum(later.started_at != earlier.finished_at for earlier, later in pairwise(own)):
            problems.append(f"{endpoint}: {gaps} gaps between intervals")
    unmarked = [one.id for one in calls if not one.partial and _touches(one, by_endpoint[one.endpoint])]
    zero = [one.id for one in calls if not one.partial and one.completion_tokens and one.energy_j <= 0.0]
    return problems + _described(
        [
            (unmarked, "calls not partial although their meter was restarted"),
            (zero, "calls with tokens and 0 J that are not partial"),
        ]
    )


def policy_problems(policies: Sequence[Policy], *, now: datetime) -> list[str]:
    """Versions that do not increase, and a newest policy that is not valid; in the order of the topic."""
    by_model: dict[str, list[Policy]] = defaultdict(list)
    for one in policies:
        by_model[one.model].append(one)
    problems = [] if policies else ["no policy was published"]
    for model, own in by_model.items():
        wrong = [later.version for earlier, later in pairwise(own) if later.version <= earlier.version]
        problems += _described([(wrong, f"policies of {model} whose version does not increase")])
        if own[-1].valid_until <= now:
            problems.append(f"the newest policy of {model} has expired")
    return problems


def evaluation_problems(qualities: Sequence[Quality], finished: Collection[str]) -> list[str]:
    """Evaluations that are lost, or published twice."""
    published = Counter(one.evaluation_id for one in qualities)
    return _described(
        [
            (set(finished) - published.keys(), "finished evaluations not published"),
            (published.keys() - set(finished), "evaluations published that are not finished"),
            ([name for name, times in published.items() if times > 1], "evaluations published twice"),
        ]
    )


def intensity_problems(messages: Sequence[CarbonIntensity], *, window: timedelta) -> list[str]:
    """Intensities that are older than the one before, or lack values that the one before had; in the topic's order."""
    by_zone: dict[str, list[CarbonIntensity]] = defaultdict(list)
    for one in messages:
        by_zone[one.zone].append(one)
    problems = [] if messages else ["no carbon intensity was published"]
    for zone, own in by_zone.items():
        older, twice, forgot = 0, 0, 0
        for earlier, later in pairwise(own):
            older += later.latest.at < earlier.latest.at
            twice += later.latest == earlier.latest
            forgot += bool(_missing(_values(earlier), _values(later), since=later.latest.at - window))
        counts = ((older, "older than the one before"), (twice, "published twice"), (forgot, "with a shorter window"))
        problems += [f"{number} carbon intensities of {zone} {what}" for number, what in counts if number]
    return problems


def _touches(call: BookedCall, intervals: Iterable[BookedInterval]) -> bool:
    """Whether a call ran while its meter was restarted."""
    return any(
        one.restarted and call.started_at < one.finished_at and call.finished_at > one.started_at for one in intervals
    )


def _values(message: CarbonIntensity) -> Mapping[datetime, float]:
    return {one.at: one.intensity_g_per_kwh for one in (*message.history, message.latest)}


def _missing(earlier: Mapping[datetime, float], later: Mapping[datetime, float], *, since: datetime) -> set[datetime]:
    return {at for at in earlier if at >= since and at not in later}


def _described(checks: Iterable[tuple[Collection[object], str]]) -> list[str]:
    """The checks that found something, with the number and the first few."""
    return [
        f"{len(found)} {what} ({', '.join(sorted(map(str, found))[:3])}{', ...' if len(found) > 3 else ''})"
        for found, what in checks
        if found
    ]
