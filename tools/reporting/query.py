"""Reads the snapshot of the ledger's tables that a report is computed from. Read-only.

The tables are defined by `services/ledger/migrations`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from shared.fleet import Fleet
from shared.messages import GroupEvidence, Policy, Quality, QualityCount
from shared.metering.arrays import Connection, array_columns, read_arrays
from shared.metering.columns import MAX_AGE_S, IntensitySeries
from shared.metering.reading import read_fleet, read_grid
from shared.metering.tables import NO_READINGS, FleetReadings
from tools.reporting.frame import NO_POLICY, NUMBER_COLUMNS, Calls, CallsBuilder, Distributions
from tools.reporting.quality import PolicyHistory

MAX_CELLS = 1_000_000
"""Most cells of the roll-ups in one report, of one purpose: about 500 MB and a minute of computation."""
MOST_ROWS = 5_000_000
"""Calls up to which those that share their id are counted."""


class NoLedgerError(RuntimeError):
    """The database has no tables of the ledger; the message names the remedy."""


class TooManyCallsError(RuntimeError):
    """The period holds more cells of calls than one report can process; the message names the remedy."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The calls of a report: started in [since, until), of one model, served in one zone; None means all."""

    since: datetime | None = None
    until: datetime | None = None
    model: str | None = None
    zone: str | None = None


@dataclass(frozen=True, slots=True)
class CallSums:
    """Settled calls of one purpose, all models: energy (J), gCO2eq, and energy without a known intensity (J)."""

    energy_j: float
    grams: float
    embodied_g: float
    unpriced_j: float


@dataclass(frozen=True, slots=True)
class IntervalSums:
    """Energy of one pool's intervals that started in one hour, J; `middle_s` is the middle of the hour.

    `idle_s` is the servers' time without calls, seconds; 0 in intervals of an earlier version.
    """

    zone: str
    pool: str
    middle_s: float
    attributed_j: float
    idle_j: float
    unattributed_j: float
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EvaluationSums:
    """Calls of one evaluation: number, energy (J), gCO2eq."""

    calls: int
    energy_j: float
    grams: float


@dataclass(frozen=True, slots=True)
class LearnedGroups:
    """A version of learned prompt groups.

    Attributes:
        prompts: number of judged prompts from which they were learned.
        counts: earlier judgments, re-aggregated by these groups.
    """

    version: str
    learned_at: datetime
    prompts: int
    counts: tuple[QualityCount, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The ledger's tables at one time.

    Attributes:
        requests: settled requests of clients.
        evaluations: settled calls of the evaluator to the models, without the judge.
        distributions: probabilities by option, indexed by `requests.distribution` and `evaluations.distribution`.
        unsettled: answered requests that are not settled yet.
        unsettled_calls: unsettled calls of every purpose, model and zone.
        rejections: requests rejected, by error code.
        metered_j: metered energy, J.
        purposes: by `request`, `evaluation`, `judge`.
        evaluator_g: gCO2eq of the evaluator's generations and of its judge, for the selected model and zone.
        grid: carbon intensity by zone.
        policies: all policies published so far; earlier ones may still be active.
        qualities: results of the evaluations in the period.
        groupings: prompt groups learned in the period, oldest first.
        evaluation_costs: by evaluation id.
        fleet: the fleet file; None if it is not known.
        shared_ids: answered requests whose id another one has.
        readings: meters, demand and latency of the whole fleet; empty if a model or zone is selected.
    """

    selection: Selection
    requests: Calls
    evaluations: Calls
    distributions: Sequence[Mapping[str, float]]
    unsettled: int
    unsettled_calls: int
    rejections: Mapping[str, int]
    metered_j: float
    purposes: Mapping[str, CallSums]
    evaluator_g: float
    intervals: Sequence[IntervalSums]
    grid: Mapping[str, IntensitySeries]
    policies: PolicyHistory
    qualities: Sequence[Quality]
    groupings: Sequence[LearnedGroups]
    evaluation_costs: Mapping[str, EvaluationSums]
    fleet: Fleet | None = None
    readings: FleetReadings = NO_READINGS
    shared_ids: int | None = 0


# Every statement names its schema, because any connection may be used. $1 is since, $2 until, then model and zone.
_PERIOD = "($1::timestamptz IS NULL OR {at} >= $1) AND ($2::timestamptz IS NULL OR {at} < $2)"
_HOURS = _PERIOD.format(at="hour").replace(">= $1", ">= date_trunc('hour', $1::timestamptz, 'UTC')")
_MODEL = "($3::text IS NULL OR model = $3)"
_ZONE = "($4::text IS NULL OR zone = $4)"

# A row for every combination of the texts, with an array of each number: a month has a hundred thousand cells.
_CALLS = f"""
SELECT model, "group", task, option, pool, zone, source, {array_columns(*NUMBER_COLUMNS)}
FROM (
    SELECT model, grp AS "group", coalesce(task, '') AS task, pool || '/' || level AS option, pool, zone,
           coalesce(decision_source, '') AS source, coalesce(policy_version, {NO_POLICY}) AS policy_version,
           distribution, calls AS count, first_s, last_s, processing_s, server_s, prompt_tokens, completion_tokens,
           energy_j, embodied_g, energy_energy, server_server, energy_server, priced, intensity, intensity_intensity,
           energy_intensity, operational_g, total_g, total_total, total_intensity
    FROM ledger.all_hourly_calls
    WHERE {_HOURS} AND {_MODEL} AND purpose = $4
) AS cells
GROUP BY model, "group", task, option, pool, zone, source
"""

_DISTRIBUTIONS = """
SELECT id, propensities::text AS propensities FROM ledger.distributions
UNION SELECT distribution, propensities::text FROM ledger.dimensions
"""

_UNSETTLED = f"""
SELECT count(*) FILTER (WHERE purpose = 'request' AND {_MODEL}) AS unsettled, count(*) AS unsettled_calls
FROM (
    SELECT purpose, model, zone, started_at FROM ledger.open_calls JOIN ledger.dimensions AS d ON d.id = dimension
    UNION ALL SELECT purpose, model, zone, started_at FROM ledger.calls WHERE NOT settled
) AS calls
WHERE {_PERIOD.format(at="started_at")} AND {_ZONE}
"""

# Only calls whose rows are kept; a request whose id is its key shares it with nobody.
_SHARED_IDS = f"""
SELECT coalesce(sum(requests), 0)::bigint FROM (
    SELECT count(*) AS requests FROM ledger.settled_calls JOIN ledger.dimensions AS d ON d.id = dimension
    WHERE request_id IS NOT NULL AND purpose = 'request' AND {_PERIOD.format(at="started_at")} AND {_MODEL} AND {_ZONE}
    GROUP BY request_id HAVING count(*) > 1
) AS shared
"""

_KEPT_ROWS = """
SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class
WHERE oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'ledger.settled_calls'::regclass)
"""

_REJECTIONS = f"""
SELECT code, sum(requests)::bigint AS requests FROM (
    SELECT code, count(*) AS requests FROM ledger.rejections WHERE {_PERIOD.format(at="at")} AND {_MODEL} GROUP BY code
    UNION ALL
    SELECT code, count(*) FROM ledger.refusals WHERE {_PERIOD.format(at="at")} AND {_MODEL} GROUP BY code
    UNION ALL
    SELECT code, sum(requests) FROM ledger.hourly_rejections WHERE {_HOURS} AND {_MODEL} GROUP BY code
) AS found GROUP BY code ORDER BY code
"""

# Of all models and of the selected one.
_PURPOSES = f"""
SELECT purpose, sum(energy_j) AS energy_j, sum(total_g) AS grams, sum(embodied_g) AS embodied_g,
       sum(unpriced_j) AS unpriced_j, coalesce(sum(total_g) FILTER (WHERE {_MODEL}), 0) AS selected_g
FROM ledger.all_hourly_calls WHERE {_HOURS} AND {_ZONE} GROUP BY purpose
"""

_INTERVALS = f"""
SELECT zone, pool, extract(epoch FROM date_trunc('hour', at, 'UTC'))::float8 + 1800 AS middle_s,
       sum(attributed_j)::float8 AS attributed_j, sum(idle_j)::float8 AS idle_j,
       sum(unattributed_j)::float8 AS unattributed_j, sum(idle_s)::float8 AS idle_s
FROM (
    SELECT zone, pool, started_at AS at, attributed_j, idle_j, unattributed_j, coalesce(idle_s, 0) AS idle_s
    FROM ledger.intervals
    UNION ALL
    SELECT zone, pool, at, attributed_j, idle_j, unattributed_j, idle_s FROM ledger.meter_sums
) AS intervals
WHERE {_PERIOD.format(at="at")} AND ($3::text IS NULL OR zone = $3)
GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""

# Metered energy comes from the raw readings, independently of the intervals. A counter that decreased was reset and
# counts from 0. Readings have a limited retention: older intervals, and those that were rolled up, use `metered_j`.
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
     + (SELECT coalesce(sum(metered_j), 0) FROM ledger.meter_sums
        WHERE {_PERIOD.format(at="at")} AND ($3::text IS NULL OR zone = $3))::float8
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
SELECT evaluation_id, sum(calls)::bigint AS calls, sum(energy_j) AS energy_j, sum(total_g) AS grams
FROM ledger.all_hourly_evaluations WHERE {_HOURS} GROUP BY evaluation_id
"""


async def read_snapshot(
    connection: Connection, selection: Selection, fleet: Fleet | None = None, *, stretch: float = 1.0
) -> Snapshot:
    """Read all tables in one transaction, so that all figures of a report are consistent.

    Raises:
        NoLedgerError: the ledger has not created its tables here.
        TooManyCallsError: the period is too long for one report.
        asyncpg.PostgresError: the database rejected a statement.
    """
    if await connection.fetchval("SELECT to_regclass('ledger.all_hourly_calls')") is None:
        raise NoLedgerError(
            "this database has no tables of the ledger, or those of an earlier version: start the ledger on it first"
        )
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        return await _read(connection, selection, fleet, stretch)


async def _read(connection: Connection, selection: Selection, fleet: Fleet | None, stretch: float) -> Snapshot:
    since, until, model, zone = selection.since, selection.until, selection.model, selection.zone
    distributions = Distributions()
    texts = {row["id"]: row["propensities"] for row in await connection.fetch(_DISTRIBUTIONS)}

    def index(key: UUID) -> int:
        return distributions.index(key, texts.get(key))

    requests = await _read_calls(connection, selection, "request", index)
    evaluations = await _read_calls(connection, selection, "evaluation", index)
    (calls,) = await connection.fetch(_UNSETTLED, since, until, model, zone)
    # A rejected request has no zone: rejections are counted for all zones.
    rejections = await connection.fetch(_REJECTIONS, since, until, model)
    purposes = await connection.fetch(_PURPOSES, since, until, model, zone)
    intervals = await connection.fetch(_INTERVALS, since, until, zone)
    policies = await connection.fetch(_POLICIES, until, model)
    qualities = await connection.fetch(_QUALITY, since, until, model)
    groupings = await connection.fetch(_GROUPINGS, since, until, model)
    costs = await connection.fetch(_EVALUATION_COSTS, since, None)
    shared_ids = None
    if await connection.fetchval(_KEPT_ROWS) <= MOST_ROWS:
        shared_ids = await connection.fetchval(_SHARED_IDS, since, until, model, zone)
    readings = NO_READINGS
    if model is None and zone is None:
        readings = await read_fleet(connection, since=since, until=until, fleet=fleet, stretch=stretch)
    return Snapshot(
        selection=selection,
        requests=requests,
        evaluations=evaluations,
        distributions=distributions.all,
        unsettled=calls["unsettled"],
        unsettled_calls=calls["unsettled_calls"],
        shared_ids=shared_ids,
        rejections={row["code"]: row["requests"] for row in rejections},
        metered_j=await connection.fetchval(_METERED, since, until, zone),
        purposes={
            row["purpose"]: CallSums(row["energy_j"], row["grams"], row["embodied_g"], row["unpriced_j"])
            for row in purposes
        },
        evaluator_g=sum((row["selected_g"] for row in purposes if row["purpose"] != "request"), 0.0),
        intervals=[IntervalSums(**row) for row in intervals],
        grid=await _grid(connection, selection, readings, requests, evaluations),
        policies=PolicyHistory.of(Policy.model_validate_json(row["policy"]) for row in policies),
        qualities=[Quality.model_validate_json(row["quality"]) for row in qualities],
        groupings=[_learned_groups(row) for row in groupings],
        evaluation_costs={
            row["evaluation_id"]: EvaluationSums(row["calls"], row["energy_j"], row["grams"]) for row in costs
        },
        fleet=fleet,
        readings=readings,
    )


def _learned_groups(row: asyncpg.Record) -> LearnedGroups:
    grouping = json.loads(row["grouping"])
    evidence = [GroupEvidence.model_validate(one) for one in grouping["evidence"]]
    counts = tuple(count for one in evidence for count in one.counts)
    return LearnedGroups(row["version"], row["learned_at"], grouping["prompts"], counts)


async def _read_calls(
    connection: Connection, selection: Selection, purpose: str, index: Callable[[UUID], int]
) -> Calls:
    """Calls of one purpose, of all zones: the reference may run in another zone than the selected.

    Args:
        index: of a distribution, by its id.

    Raises:
        TooManyCallsError: there are more cells than one report can process.
    """
    cells = CallsBuilder()
    async for row in read_arrays(connection, _CALLS, selection.since, selection.until, selection.model, purpose):
        ids = row["distribution"].tolist()
        number = {one: index(one) for one in dict.fromkeys(ids)}
        cells.add({**row, "distribution": [number[one] for one in ids]})
        if len(cells) > MAX_CELLS:
            raise TooManyCallsError(
                f"the period has more than {MAX_CELLS:,} combinations of hour, prompt group, option and policy, "
                "the most that one report can process: narrow it with --since and --until, or choose a --model"
            )
    return cells.build()


async def _grid(
    connection: Connection, selection: Selection, readings: FleetReadings, *tables: Calls
) -> Mapping[str, IntensitySeries]:
    """Carbon intensity by zone, from `MAX_AGE_S` before the first call or reading."""
    starts = [float(calls.first_s.min()) for calls in tables if len(calls)]
    if selection.since is not None:
        starts = [selection.since.timestamp()]
    if readings.table is not None:
        starts.append(float(readings.table.start_s[0]))
    if not starts:
        return {}
    first_s = min(starts)
    first = datetime.fromtimestamp(first_s - MAX_AGE_S, tz=UTC)
    return await read_grid(connection, since=first, until=selection.until)
