"""The ledger's SQL: every statement, and writing rows in bulk and idempotently.

Rows are passed as one JSON array per statement. Column names that say `quiet` are deployed; they mean "without calls".
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import asyncpg

from shared.runtime.database import DatabaseStatus

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Row = dict[str, Any]
"""Column name to value; times as ISO 8601 text."""

KEYS: Mapping[str, tuple[str, ...]] = {
    "calls": ("id",),
    "refusals": ("request_id",),
    "intensity": ("zone", "at"),
    "policies": ("model", "version", "created_at"),
    "quality": ("evaluation_id",),
    "prompt_groups": ("model", "version", "learned_at"),
}
"""Primary keys of the tables that messages are written to."""

# Meters
READINGS_LOCK = "SELECT pg_advisory_xact_lock(hashtext('sprout.ledger.readings'))"
ADD_READINGS = """
INSERT INTO readings (endpoint, at, gpu, energy_j)
SELECT new.endpoint, $2, new.gpu, new.energy_j
FROM jsonb_populate_recordset(NULL::readings, $1) AS new
WHERE NOT EXISTS (SELECT FROM readings AS old WHERE old.endpoint = new.endpoint AND old.at > $3)
"""

# Settlement: $1 lists endpoints, $2 the time up to which each can be settled.
SETTLEMENT_LOCK = "SELECT pg_try_advisory_xact_lock(hashtext('sprout.ledger.settlement'))"
READINGS = """
SELECT r.endpoint, r.at, r.gpu, r.energy_j
FROM unnest($1::text[], $2::timestamptz[]) AS e (endpoint, until)
LEFT JOIN meters AS m USING (endpoint)
CROSS JOIN LATERAL (
    SELECT * FROM readings
    WHERE readings.endpoint = e.endpoint AND at >= coalesce(m.settled_until, '-infinity') AND at <= e.until
) AS r
ORDER BY r.endpoint, r.at
"""
METERS = "SELECT * FROM meters WHERE endpoint = ANY($1)"
CURVES = "SELECT endpoint, state FROM curves WHERE endpoint = ANY($1)"
OPEN_CALLS = """
SELECT c.*
FROM unnest($1::text[], $2::timestamptz[]) AS e (endpoint, until)
CROSS JOIN LATERAL (
    SELECT id, purpose, endpoint, zone, pool, level, started_at, first_token_at, finished_at, prompt_tokens,
           completion_tokens, energy_j, server_s, steps, batch_tokens, accounted_until, partial
    FROM calls WHERE calls.endpoint = e.endpoint AND NOT settled AND started_at <= e.until
) AS c
"""
SETTLED_INTERVALS = """
SELECT i.endpoint, i.started_at, i.finished_at, i.attributed_j, i.unattributed_j, coalesce(i.idle_s, 0) AS idle_s,
       i.restarted OR coalesce(i.stalled, false) AS flawed
FROM unnest($1::text[], $2::timestamptz[], $3::timestamptz[]) AS e (endpoint, since, until)
CROSS JOIN LATERAL (
    SELECT * FROM intervals
    WHERE intervals.endpoint = e.endpoint AND finished_at >= e.since AND started_at <= e.until
) AS i
"""
INTENSITY = "SELECT zone, at, intensity_g_per_kwh FROM intensity WHERE zone = ANY($1) AND at >= $2 AND at <= $3"
ADD_INTERVALS = """
INSERT INTO intervals SELECT * FROM jsonb_populate_recordset(NULL::intervals, $1)
"""
REALLOCATE = """
UPDATE intervals SET attributed_j = intervals.attributed_j + intervals.unattributed_j, unattributed_j = 0
FROM jsonb_populate_recordset(NULL::intervals, $1) AS late
WHERE intervals.endpoint = late.endpoint AND intervals.started_at = late.started_at
"""
REALLOCATE_TIME = """
UPDATE intervals SET idle_s = greatest(0, intervals.idle_s - late.idle_s)
FROM jsonb_populate_recordset(NULL::intervals, $1) AS late
WHERE intervals.endpoint = late.endpoint AND intervals.started_at = late.started_at
"""
UPDATE_CALLS = """
UPDATE calls SET energy_j = new.energy_j, server_s = new.server_s, steps = new.steps, batch_tokens = new.batch_tokens,
                 accounted_until = new.accounted_until, partial = new.partial, settled = new.settled
FROM jsonb_populate_recordset(NULL::calls, $1) AS new
WHERE calls.id = new.id
"""
PUT_METERS = """
INSERT INTO meters SELECT * FROM jsonb_populate_recordset(NULL::meters, $1)
ON CONFLICT (endpoint) DO UPDATE SET settled_until = EXCLUDED.settled_until, idle_power_w = EXCLUDED.idle_power_w,
    quiet_s = EXCLUDED.quiet_s, quiet_j = EXCLUDED.quiet_j
"""
PUT_CURVES = """
INSERT INTO curves SELECT * FROM jsonb_populate_recordset(NULL::curves, $1)
ON CONFLICT (endpoint) DO UPDATE SET state = EXCLUDED.state
"""
ADD_FOOTPRINTS = """
INSERT INTO footprints (
    request_id, purpose, evaluation_id, model, grp, task, tenant, pool, level, zone, endpoint, policy_version,
    decision_source, propensity, propensities, started_at, finished_at, processing_s, server_s, prompt_tokens,
    completion_tokens, energy_j, intensity_g_per_kwh, operational_g, embodied_g, total_g, partial
)
SELECT c.id, c.purpose, c.evaluation_id, c.model, c.grp, c.task, c.tenant, c.pool, c.level, c.zone, c.endpoint,
       c.policy_version, c.decision_source, c.propensity, c.propensities, c.started_at, c.finished_at,
       f.processing_s, f.server_s, c.prompt_tokens, c.completion_tokens, f.energy_j, f.intensity_g_per_kwh,
       f.operational_g, f.embodied_g, f.total_g, f.partial
FROM jsonb_populate_recordset(NULL::footprints, $1) AS f JOIN calls AS c ON c.id = f.request_id
ON CONFLICT (request_id) DO NOTHING
"""
SETTLE_UNMETERED = """
WITH closed AS (
    UPDATE calls SET settled = true WHERE NOT settled AND finished_at <= $2 AND endpoint <> ALL($1) RETURNING 1
)
SELECT count(*) FROM closed
"""
UNSETTLED_CALLS = "SELECT count(*) FROM calls WHERE NOT settled"

# Outbox
PUBLICATION_LOCK = "SELECT pg_try_advisory_xact_lock(hashtext('sprout.ledger.publication'))"
UNPUBLISHED_FOOTPRINTS = "SELECT * FROM footprints WHERE NOT published AND NOT partial ORDER BY finished_at LIMIT $1"
MARK_PUBLISHED = "UPDATE footprints SET published = true WHERE request_id = ANY($1)"

# Retention
REMOVE_OLD = (
    """
    DELETE FROM readings USING meters
    WHERE readings.endpoint = meters.endpoint AND readings.at < least($1, meters.settled_until)
    """,
    "DELETE FROM calls WHERE settled AND finished_at < $1",
)


class Storage:
    """The ledger's connection pool with its status, and the writes of single tables.

    Every write raises `DatabaseUnavailableError` while PostgreSQL is unavailable.
    """

    def __init__(self) -> None:
        self.status = DatabaseStatus()
        self._pool: asyncpg.Pool | None = None

    def attach(self, pool: asyncpg.Pool) -> None:
        """Set the pool; the search path of its connections is the ledger's schema."""
        self._pool = pool

    @property
    def pool(self) -> asyncpg.Pool:
        """The pool.

        Raises:
            RuntimeError: no pool is attached yet.
        """
        if self._pool is None:
            raise RuntimeError("Storage.attach(pool) must be called first")
        return self._pool

    async def add(self, table: str, rows: Sequence[Row]) -> None:
        """Add the rows whose keys are new, in one statement."""
        await self._write(table, rows, "NOTHING")

    async def put(self, table: str, rows: Sequence[Row]) -> None:
        """Add rows, or replace those with the same key; of several rows with one key the last one wins."""
        if not rows:
            return
        columns = [name for name in rows[0] if name not in KEYS[table]]
        changes = ", ".join(f"{name} = EXCLUDED.{name}" for name in columns)
        differs = " OR ".join(f"old.{name} IS DISTINCT FROM EXCLUDED.{name}" for name in columns)
        latest = {tuple(row[name] for name in KEYS[table]): row for row in rows}
        await self._write(table, list(latest.values()), f"UPDATE SET {changes} WHERE {differs}")

    async def add_readings(
        self, counters: Mapping[str, Mapping[str, float]], *, at: datetime, spacing: timedelta
    ) -> None:
        """Add one reading of each endpoint.

        Several ledgers read the same meters. A reading less than `spacing` after another one is skipped; this keeps the
        order of readings from different processes unambiguous.

        Args:
            counters: joules by endpoint and GPU.
        """
        rows = [
            {"endpoint": endpoint, "gpu": gpu, "energy_j": energy_j}
            for endpoint, by_gpu in counters.items()
            for gpu, energy_j in by_gpu.items()
        ]
        with self.status.watch():
            async with self.pool.acquire() as connection, connection.transaction():
                await connection.execute(READINGS_LOCK)
                await connection.execute(ADD_READINGS, json.dumps(rows), at, at - spacing)

    async def remove_old(self, before: datetime) -> None:
        """Remove raw readings and settled calls from before a time; footprints and intervals stay."""
        with self.status.watch():
            for statement in REMOVE_OLD:
                await self.pool.execute(statement, before)

    async def _write(self, table: str, rows: Sequence[Row], on_conflict: str) -> None:
        if rows:
            with self.status.watch():
                await self.pool.execute(_insert(table, list(rows[0]), on_conflict), json.dumps(rows))


async def execute_rows(connection: Connection, statement: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Run a statement over many rows, passed as one JSON array; does nothing without rows."""
    if rows:
        await connection.execute(statement, json.dumps(rows))


def to_datetime(seconds: float) -> datetime:
    """Seconds since the Unix epoch as a UTC time; exact to the microsecond."""
    return datetime.fromtimestamp(seconds, UTC)


def to_iso(seconds: float) -> str:
    """Seconds since the Unix epoch as ISO 8601 text, UTC."""
    return to_datetime(seconds).isoformat()


def _insert(table: str, columns: Sequence[str], on_conflict: str) -> str:
    """An INSERT of many rows from one JSON array; names come from this code, never from messages."""
    names = ", ".join(columns)
    key = ", ".join(KEYS[table])
    return (
        f"INSERT INTO {table} AS old ({names}) SELECT {names} FROM jsonb_populate_recordset(NULL::{table}, $1) "
        f"ON CONFLICT ({key}) DO {on_conflict}"
    )
