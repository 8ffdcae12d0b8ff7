"""Reads a snapshot of the ledger's tables for a report. Only reads; the tables are those of the ledger's migrations."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime

import asyncpg
import numpy as np
from asyncpg.pool import PoolConnectionProxy

from shared.messages import GroupEvidence, Policy, Quality
from tools.reporting.books import Books, CallSums, EvaluationSums, IntervalSums, Regrouping, Selection
from tools.reporting.calls import Calls
from tools.reporting.columns import CallColumns, Rows
from tools.reporting.grams import MAX_AGE_S, IntensitySeries
from tools.reporting.policies import PolicyBook

MOST_CALLS = 2_000_000
"""Calls that one report takes in: about 600 MB and a minute of arithmetic."""
_CHUNK = 20_000


Connection = asyncpg.Connection | PoolConnectionProxy


class NoBooksError(RuntimeError):
    """The database has no tables of the ledger; the message says what to do."""


class TooManyCallsError(RuntimeError):
    """The period holds more calls than one report takes in; the message says what to do."""


# Every statement names its schema: the connection may be anybody's. $1 is since, $2 until, then model and zone.
_PERIOD = "($1::timestamptz IS NULL OR {at} >= $1) AND ($2::timestamptz IS NULL OR {at} < $2)"
_MODEL = "($3::text IS NULL OR model = $3)"
_ZONE = "($4::text IS NULL OR zone = $4)"

_FOOTPRINTS = f"""
SELECT purpose, model, grp, task, pool, level, zone, decision_source, policy_version,
       propensities::text AS propensities,
       extract(epoch FROM started_at)::float8 AS started_s, processing_s::float8 AS processing_s,
       coalesce(prompt_tokens, 0) AS prompt_tokens, completion_tokens, energy_j::float8 AS energy_j,
       intensity_g_per_kwh::float8 AS intensity_g_per_kwh, operational_g::float8 AS operational_g,
       embodied_g::float8 AS embodied_g
FROM ledger.footprints
WHERE purpose IN ('request', 'evaluation') AND {_PERIOD.format(at="started_at")} AND {_MODEL}
ORDER BY started_at, request_id
"""

_COUNTED = f"""
SELECT count(*) FROM ledger.footprints
WHERE purpose IN ('request', 'evaluation') AND {_PERIOD.format(at="started_at")} AND {_MODEL}
"""

_CALLS = f"""
SELECT count(*) FILTER (WHERE purpose = 'request' AND {_MODEL}) AS unsettled, count(*) AS unsettled_calls
FROM ledger.calls WHERE NOT settled AND {_PERIOD.format(at="started_at")} AND {_ZONE}
"""

_REFUSALS = f"""
SELECT code, count(DISTINCT request_id) AS requests FROM ledger.refusals
WHERE {_PERIOD.format(at="at")} AND {_MODEL} GROUP BY code ORDER BY code
"""

_PURPOSES = f"""
SELECT purpose, sum(energy_j)::float8 AS energy_j, coalesce(sum(total_g), 0)::float8 AS grams,
       coalesce(sum(embodied_g), 0)::float8 AS embodied_g,
       coalesce(sum(energy_j) FILTER (WHERE total_g IS NULL), 0)::float8 AS unpriced_j
FROM ledger.footprints WHERE {_PERIOD.format(at="started_at")} AND ($3::text IS NULL OR zone = $3) GROUP BY purpose
"""

_INTERVALS = f"""
SELECT zone, pool, extract(epoch FROM date_trunc('hour', started_at, 'UTC'))::float8 + 1800 AS middle_s,
       sum(attributed_j)::float8 AS attributed_j, sum(idle_j)::float8 AS idle_j,
       sum(unattributed_j)::float8 AS unattributed_j
FROM ledger.intervals WHERE {_PERIOD.format(at="started_at")} AND ($3::text IS NULL OR zone = $3)
GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""

# Straight from the counters, whatever the intervals say: a counter that fell was restarted, and counts from 0. Readings
# are not kept for ever: of intervals older than an endpoint's first one only their own note of the meter is left.
_METERED = f"""
WITH span AS (
    SELECT endpoint, min(started_at) AS first, max(finished_at) AS last FROM ledger.intervals
    WHERE {_PERIOD.format(at="started_at")} AND ($3::text IS NULL OR zone = $3) GROUP BY endpoint
), steps AS (
    SELECT energy_j, lag(energy_j) OVER (PARTITION BY endpoint, gpu ORDER BY at) AS before
    FROM ledger.readings JOIN span USING (endpoint) WHERE at BETWEEN first AND last
), kept AS (
    SELECT endpoint, (SELECT min(at) FROM ledger.readings WHERE readings.endpoint = span.endpoint) AS since FROM span
)
SELECT (SELECT coalesce(sum(CASE WHEN energy_j >= before THEN energy_j - before ELSE energy_j END), 0) FROM steps
        WHERE before IS NOT NULL)::float8
     + (SELECT coalesce(sum(metered_j), 0) FROM ledger.intervals JOIN kept USING (endpoint)
        WHERE {_PERIOD.format(at="started_at")} AND ($3::text IS NULL OR zone = $3)
          AND (since IS NULL OR started_at < since))::float8
"""

_INTENSITY = f"""
SELECT zone, extract(epoch FROM at)::float8 AS at_s, intensity_g_per_kwh::float8 AS g_per_kwh, estimated
FROM ledger.intensity WHERE {_PERIOD.format(at="at")} ORDER BY zone, at
"""

_POLICIES = """
SELECT policy::text AS policy FROM ledger.policies
WHERE ($1::timestamptz IS NULL OR created_at < $1) AND ($2::text IS NULL OR model = $2) ORDER BY model, version
"""

_QUALITY = f"""
SELECT quality::text AS quality FROM ledger.quality
WHERE {_PERIOD.format(at="evaluated_at")} AND {_MODEL} ORDER BY evaluated_at, evaluation_id
"""

_GROUPINGS = f"""
SELECT version, learned_at, grouping::text AS grouping FROM ledger.prompt_groups
WHERE {_PERIOD.format(at="learned_at")} AND {_MODEL} ORDER BY learned_at, version
"""

_EVALUATION_COSTS = f"""
SELECT evaluation_id, count(*) AS calls, sum(energy_j)::float8 AS energy_j,
       coalesce(sum(total_g), 0)::float8 AS grams
FROM ledger.footprints
WHERE purpose <> 'request' AND evaluation_id IS NOT NULL AND {_PERIOD.format(at="started_at")} GROUP BY evaluation_id
"""


async def read_books(connection: Connection, selection: Selection) -> Books:
    """One snapshot of the books; nothing in the report can contradict another part of it.

    Raises:
        NoBooksError: the ledger has never set up its tables here.
        TooManyCallsError: the period is too long for one report.
        asyncpg.PostgresError: the database refused.
    """
    if await connection.fetchval("SELECT to_regclass('ledger.footprints')") is None:
        raise NoBooksError("this database has no tables of the ledger: start the ledger on it first")
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        return await _read(connection, selection)


async def _read(connection: Connection, selection: Selection) -> Books:
    since, until, model, zone = selection.since, selection.until, selection.model, selection.zone
    counted = await connection.fetchval(_COUNTED, since, until, model)
    if counted > MOST_CALLS:
        raise TooManyCallsError(
            f"the period holds {counted:,} calls and one report takes in {MOST_CALLS:,}: "
            "narrow it with --since and --until"
        )
    rows = Rows()
    requests, evaluations = await _footprints(connection, selection, rows)
    (calls,) = await connection.fetch(_CALLS, since, until, model, zone)
    # Nothing is refused in a zone: refusals are told whatever the zone.
    refusals = await connection.fetch(_REFUSALS, since, until, model)
    purposes = await connection.fetch(_PURPOSES, since, until, zone)
    intervals = await connection.fetch(_INTERVALS, since, until, zone)
    policies = await connection.fetch(_POLICIES, until, model)
    qualities = await connection.fetch(_QUALITY, since, until, model)
    groupings = await connection.fetch(_GROUPINGS, since, until, model)
    costs = await connection.fetch(_EVALUATION_COSTS, since, None)
    return Books(
        selection=selection,
        requests=requests,
        evaluations=evaluations,
        rows=rows.rows,
        unsettled=calls["unsettled"],
        unsettled_calls=calls["unsettled_calls"],
        refusals={row["code"]: row["requests"] for row in refusals},
        metered_j=await connection.fetchval(_METERED, since, until, zone),
        purposes={
            row["purpose"]: CallSums(row["energy_j"], row["grams"], row["embodied_g"], row["unpriced_j"])
            for row in purposes
        },
        intervals=[IntervalSums(**row) for row in intervals],
        grid=await _grid(connection, selection, requests, evaluations),
        policies=PolicyBook.of(Policy.model_validate_json(row["policy"]) for row in policies),
        qualities=[Quality.model_validate_json(row["quality"]) for row in qualities],
        groupings=[_regrouping(row) for row in groupings],
        evaluation_costs={
            row["evaluation_id"]: EvaluationSums(row["calls"], row["energy_j"], row["grams"]) for row in costs
        },
    )


def _regrouping(row: asyncpg.Record) -> Regrouping:
    grouping = json.loads(row["grouping"])
    evidence = [GroupEvidence.model_validate(one) for one in grouping["evidence"]]
    counts = tuple(count for one in evidence for count in one.counts)
    return Regrouping(row["version"], row["learned_at"], grouping["prompts"], counts)


async def _footprints(connection: Connection, selection: Selection, rows: Rows) -> tuple[Calls, Calls]:
    """Requests, and the evaluator's calls; a zone does not narrow them: the reference may lie in another."""
    columns = {"request": CallColumns(rows), "evaluation": CallColumns(rows)}
    cursor = connection.cursor(_FOOTPRINTS, selection.since, selection.until, selection.model, prefetch=_CHUNK)
    async for record in cursor:
        columns[record["purpose"]].add(record)
    return columns["request"].calls(), columns["evaluation"].calls()


async def _grid(connection: Connection, selection: Selection, *books: Calls) -> Mapping[str, IntensitySeries]:
    """Intensity by zone, from a little before the period on."""
    starts = [calls.started_s for calls in books if len(calls)]
    if selection.since is None and not starts:
        return {}
    first_s = selection.since.timestamp() if selection.since else min(float(started.min()) for started in starts)
    first = datetime.fromtimestamp(first_s - MAX_AGE_S, tz=UTC)
    points = await connection.fetch(_INTENSITY, first, selection.until)
    by_zone: dict[str, list[asyncpg.Record]] = {}
    for point in points:
        by_zone.setdefault(point["zone"], []).append(point)
    return {
        zone: IntensitySeries(
            at_s=np.array([point["at_s"] for point in series], dtype=float),
            g_per_kwh=np.array([point["g_per_kwh"] for point in series], dtype=float),
            estimated=np.array([point["estimated"] for point in series], dtype=bool),
        )
        for zone, series in by_zone.items()
    }
