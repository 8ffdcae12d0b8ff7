"""The ledger's SQL: every statement, and writing rows in bulk and idempotently.

Rows are passed as one JSON array per statement. Column names that say `quiet` are deployed; they mean "without calls".
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import asyncpg

from services.ledger.calls import Dimensions, NewCall, columns_of
from shared.runtime.database import DatabaseStatus

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Row = dict[str, Any]
"""Column name to value; times as ISO 8601 text."""

KEYS: Mapping[str, tuple[str, ...]] = {
    "rejections": ("id",),
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
LATER_READINGS = "SELECT endpoint, max(at) FROM readings WHERE endpoint = ANY($1::text[]) AND at > $2 GROUP BY endpoint"

SERVER_SETTINGS: Mapping[str, str] = {"plan_cache_mode": "force_custom_plan", "jit": "off"}
"""Tables grow from nothing to millions of rows within a connection's life: no plan may be kept."""

# Intake. Columns as arrays, which asyncpg sends in binary. A call that another version of the ledger booked under its
# request id is the same call if it started at the same time.
ADD_CALLS = """
INSERT INTO open_calls (id, request_id, dimension, endpoint, started_at, first_token_at, finished_at, prompt_tokens,
                        completion_tokens)
SELECT new.* FROM unnest($1::text[], $2::text[], $3::int[], $4::text[], $5::timestamptz[], $6::timestamptz[],
                         $7::timestamptz[], $8::int[], $9::int[])
    AS new (id, request_id, dimension, endpoint, started_at, first_token_at, finished_at, prompt_tokens,
            completion_tokens)
WHERE NOT EXISTS (SELECT FROM settled_calls AS old WHERE old.id = new.id)
  AND NOT EXISTS (SELECT FROM calls AS old
                  WHERE old.id = coalesce(new.request_id, new.id) AND old.started_at = new.started_at)
  AND new.finished_at >= (SELECT kept_from FROM removals)
ON CONFLICT (id) DO NOTHING
"""

# Calls of an earlier version. Its propensities as JSON text; the key is the request id.
EARLIER_CALLS = """
SELECT id, purpose, evaluation_id, model, grp, task, tenant, pool, level, zone, endpoint, policy_version,
       decision_source, propensity, propensities::text AS propensities, started_at, first_token_at, finished_at,
       prompt_tokens, completion_tokens
FROM calls WHERE NOT settled ORDER BY endpoint, started_at LIMIT $1 FOR UPDATE
"""
# A call that this version has already is left out: the earlier one read its message again.
ADOPT_CALLS = """
WITH moved AS (
    UPDATE calls SET settled = true FROM unnest($1::text[], $2::int[]) AS new (id, dimension)
    WHERE calls.id = new.id RETURNING calls.*, new.dimension
)
INSERT INTO open_calls (id, dimension, endpoint, started_at, first_token_at, finished_at, prompt_tokens,
                        completion_tokens, energy_j, server_s, steps, batch_tokens, accounted_until, partial)
SELECT id, dimension, endpoint, started_at, first_token_at, finished_at, prompt_tokens, completion_tokens,
       energy_j, server_s, steps, batch_tokens, accounted_until, partial
FROM moved
WHERE NOT EXISTS (SELECT FROM open_calls AS own WHERE own.endpoint = moved.endpoint
                  AND own.started_at = moved.started_at AND own.request_id = moved.id)
ON CONFLICT (id) DO NOTHING
"""

# Footprints of an earlier version: published ones and partial ones, which are not published, are moved as they are.
EARLIER_ROWS = """
SELECT f.*, f.propensities::text AS propensities_text, c.first_token_at
FROM (SELECT * FROM footprints WHERE published OR partial ORDER BY finished_at LIMIT $1 FOR UPDATE SKIP LOCKED) AS f
LEFT JOIN calls AS c ON c.id = f.request_id
"""
ADOPT_FOOTPRINTS = """
WITH moved AS (
    DELETE FROM footprints AS f USING unnest($2::text[], $3::int[], $4::timestamptz[]) AS new (id, dimension, first)
    WHERE f.request_id = new.id RETURNING f.*, new.dimension, new.first
)
INSERT INTO settled_calls
SELECT request_id, NULL, $1, dimension, started_at, first, finished_at, prompt_tokens, completion_tokens, energy_j,
       server_s, intensity_g_per_kwh, operational_g, embodied_g, partial
FROM moved
"""
MARK_PUBLISHED = "UPDATE chunks SET published = true WHERE chunk = $1"

# Settlement of one endpoint; $1 is its name.
# Ledgers of earlier versions take the first lock for all endpoints; this version only keeps them from it.
EARLIER_LOCKS = ("sprout.ledger.settlement", "sprout.ledger.publication")
HOLD_SHARED = "SELECT pg_advisory_lock_shared(hashtext($1))"
ENDPOINT_LOCK = "SELECT pg_try_advisory_xact_lock(hashtext('sprout.ledger.endpoint'), hashtext($1))"
# `sprout erase` takes it exclusively, so that no id changes in the middle of a transaction.
ERASURE_LOCK = "SELECT pg_advisory_xact_lock_shared(hashtext('sprout.ledger.erasure'))"
READINGS = """
SELECT at, gpu, energy_j, coalesce(divided, false) AS divided, coalesce(restarted, false) AS restarted
FROM readings
WHERE endpoint = $1 AND at >= coalesce((SELECT settled_until FROM meters WHERE endpoint = $1), '-infinity')
  AND at <= $2
ORDER BY at LIMIT $3
"""
METER = "SELECT * FROM meters WHERE endpoint = $1"
CURVES = "SELECT endpoint, state FROM curves WHERE endpoint = ANY($1)"
# The start of the open call after $3 others and after those that started by $2; null if there are not so many.
CHUNK_END = """
SELECT started_at FROM open_calls WHERE endpoint = $1 AND started_at > $2 ORDER BY started_at OFFSET $3 LIMIT 1
"""
# All calls of the chunk that ends at $2 and begins at $3, and at most $4 late ones, which had ended before it.
# Times in seconds: exact to the microsecond, and cheaper to read than timestamps.
OPEN_CALLS = """
SELECT o.id, date_part('epoch', o.started_at) AS started_s, date_part('epoch', o.first_token_at) AS first_token_s,
       date_part('epoch', o.finished_at) AS finished_s, o.prompt_tokens, o.completion_tokens,
       o.energy_j, o.server_s, o.steps, o.batch_tokens, o.accounted_until, o.partial,
       d.zone, d.purpose, d.pool, d.level
FROM (
    (SELECT * FROM open_calls WHERE endpoint = $1 AND started_at <= $2 AND finished_at > $3)
    UNION ALL
    (SELECT * FROM open_calls WHERE endpoint = $1 AND started_at <= $2 AND finished_at <= $3
     ORDER BY started_at LIMIT $4)
) AS o JOIN dimensions AS d ON d.id = o.dimension
"""
# A message that was read again while its call was being settled.
REMOVE_DUPLICATES = """
DELETE FROM open_calls AS o
WHERE endpoint = $1 AND finished_at <= $2 AND accounted_until IS NULL
  AND EXISTS (SELECT FROM settled_calls AS old WHERE old.id = o.id)
RETURNING id
"""
# All that a division of an interval needs of the calls that started by $2.
CALLS_BY_START = """
SELECT date_part('epoch', started_at) AS started_s, date_part('epoch', first_token_at) AS first_s,
       date_part('epoch', finished_at) AS finished_s, coalesce(prompt_tokens, 0) AS prompt_tokens,
       completion_tokens
FROM open_calls WHERE endpoint = $1 AND started_at <= $2 AND finished_at >= $3 ORDER BY started_at
"""
ADD_DIVIDED = """
INSERT INTO readings (endpoint, at, gpu, energy_j, divided, restarted)
SELECT $1, new.at, new.gpu, new.energy_j, true, new.restarted
FROM unnest($2::timestamptz[], $3::text[], $4::float8[], $5::bool[]) AS new (at, gpu, energy_j, restarted)
ON CONFLICT (endpoint, gpu, at) DO NOTHING
"""
SETTLED_INTERVALS = """
SELECT started_at, finished_at, attributed_j, unattributed_j, coalesce(idle_s, 0) AS idle_s,
       restarted OR coalesce(stalled, false) AS flawed
FROM intervals WHERE endpoint = $1 AND finished_at >= $2 AND started_at <= $3
"""
INTENSITY = """
SELECT zone, at, intensity_g_per_kwh FROM intensity WHERE zone = ANY($1) AND at >= $2 AND at <= $3
"""
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
PUT_METERS = """
INSERT INTO meters SELECT * FROM jsonb_populate_recordset(NULL::meters, $1)
ON CONFLICT (endpoint) DO UPDATE SET settled_until = EXCLUDED.settled_until, idle_power_w = EXCLUDED.idle_power_w,
    quiet_s = EXCLUDED.quiet_s, quiet_j = EXCLUDED.quiet_j
"""
PUT_CURVES = """
INSERT INTO curves SELECT * FROM jsonb_populate_recordset(NULL::curves, $1)
ON CONFLICT (endpoint) DO UPDATE SET state = EXCLUDED.state
"""
# Calls that continue after the last settled interval.
UPDATE_CALLS = """
UPDATE open_calls AS o
SET energy_j = new.energy_j, server_s = new.server_s, steps = new.steps, batch_tokens = new.batch_tokens,
    partial = new.partial, accounted_until = $7
FROM unnest($1::text[], $2::float8[], $3::float8[], $4::float8[], $5::float8[], $6::bool[])
    AS new (id, energy_j, server_s, steps, batch_tokens, partial)
WHERE o.id = new.id
"""
REMOVE_CALLS = "DELETE FROM open_calls WHERE id = ANY($1)"
ADD_CHUNK = """
INSERT INTO chunks (calls, first_finished_at, last_finished_at) VALUES ($1, $2, $3) RETURNING chunk
"""
MOVE_CALLS = """
WITH done AS (
    DELETE FROM open_calls AS o
    USING unnest($2::text[], $3::float8[], $4::float8[], $5::float8[], $6::float8[], $7::float8[], $8::bool[])
        AS new (id, energy_j, server_s, intensity_g_per_kwh, operational_g, embodied_g, partial)
    WHERE o.id = new.id
    RETURNING o.id, o.request_id, $1::bigint, o.dimension, o.started_at, o.first_token_at, o.finished_at,
              o.prompt_tokens, o.completion_tokens, new.energy_j, new.server_s, new.intensity_g_per_kwh,
              new.operational_g, new.embodied_g, new.partial
)
INSERT INTO settled_calls SELECT * FROM done
WHERE NOT EXISTS (SELECT FROM settled_calls AS old WHERE old.id = done.id)
"""
REMOVE_UNMETERED = """
WITH closed AS (
    DELETE FROM open_calls WHERE id IN (
        SELECT id FROM open_calls WHERE endpoint = $1 AND finished_at <= $2 LIMIT $3
    ) RETURNING 1
)
SELECT count(*) FROM closed
"""
UNSETTLED = """
SELECT endpoint, count(*) AS calls, min(finished_at) AS oldest FROM open_calls GROUP BY endpoint
"""

# Partitions of settled_calls
PARTITION_LOCK = "SELECT pg_advisory_xact_lock(hashtext('sprout.ledger.partition'))"
# Not `to_regclass`: in a transaction that waited for the lock it may not see yet what another one has committed.
HAS_PARTITION = """
SELECT EXISTS (SELECT FROM pg_inherits JOIN pg_class AS child ON child.oid = inhrelid
               WHERE inhparent = 'settled_calls'::regclass AND child.relname = $1)
"""

# Outbox
NEXT_CHUNK = """
SELECT chunk, first_finished_at, last_finished_at FROM chunks WHERE NOT published ORDER BY chunk
LIMIT 1 FOR UPDATE SKIP LOCKED
"""
CHUNK_CALLS = """
SELECT id, request_id, dimension, started_at, finished_at, prompt_tokens, completion_tokens, energy_j, server_s,
       intensity_g_per_kwh, operational_g, embodied_g
FROM settled_calls
WHERE chunk = $1 AND finished_at >= $2 AND finished_at <= $3 AND NOT partial
"""
DIMENSIONS = "SELECT *, propensities::text AS distribution FROM dimensions WHERE id = ANY($1)"
EARLIER_FOOTPRINTS = """
SELECT *, propensities::text AS distribution, request_id AS id, NULL AS finish_reason FROM footprints
WHERE NOT published AND NOT partial ORDER BY finished_at LIMIT $1 FOR UPDATE SKIP LOCKED
"""
MARK_EARLIER_PUBLISHED = "UPDATE footprints SET published = true WHERE request_id = ANY($1)"
UNPUBLISHED = "SELECT count(*) FROM chunks WHERE NOT published"

REMOVED_AT_ONCE = 10_000
"""Rows that one statement removes."""


class Storage:
    """The ledger's connection pool with its status, and the writes of single tables.

    Every write raises `DatabaseUnavailableError` while PostgreSQL is unavailable.
    """

    def __init__(self) -> None:
        self.status = DatabaseStatus()
        self._pool: asyncpg.Pool | None = None
        self.dimensions = Dimensions()

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

    async def add_calls(self, calls: Sequence[NewCall]) -> None:
        """Add the calls whose keys are new."""
        if not calls:
            return
        with self.status.watch():
            dimensions = await self.dimensions.ids(self.pool, calls)
            await self.pool.execute(ADD_CALLS, *columns_of(calls, dimensions))

    async def add_readings(
        self, counters: Mapping[str, Mapping[str, float]], *, at: datetime, spacing: timedelta
    ) -> dict[str, datetime]:
        """Add one reading of each endpoint.

        Several ledgers read the same meters. A reading less than `spacing` after another one, or before it, is skipped;
        this keeps the order of readings from different processes unambiguous.

        Args:
            counters: joules by endpoint and GPU.

        Returns:
            By endpoint, the time of a reading more than `spacing` later than `at`: a clock was set back.
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
                later = await connection.fetch(LATER_READINGS, list(counters), at + spacing)
                return {row["endpoint"]: row["max"] for row in later}

    async def unsettled(self) -> list[tuple[str, int, datetime]]:
        """The open calls by endpoint: number, and end of the oldest."""
        with self.status.watch():
            return [tuple(row) for row in await self.pool.fetch(UNSETTLED)]

    async def remove_unmetered(self, endpoint: str, until: datetime) -> int:
        """Remove the open calls of an endpoint without a meter that ended by a time; returns their number."""
        removed = 0
        with self.status.watch():
            while count := await self.pool.fetchval(REMOVE_UNMETERED, endpoint, until, REMOVED_AT_ONCE):
                removed += count
        return removed

    async def _write(self, table: str, rows: Sequence[Row], on_conflict: str) -> None:
        if rows:
            with self.status.watch():
                await self.pool.execute(_insert(table, list(rows[0]), on_conflict), json.dumps(rows))


async def execute_rows(connection: Connection, statement: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Run a statement over many rows, passed as one JSON array; does nothing without rows."""
    if rows:
        await connection.execute(statement, json.dumps(rows))


async def add_partition(connection: Connection, day: datetime) -> None:
    """Create the partition of `settled_calls` for a day, if there is none yet.

    Args:
        day: its first moment, UTC.
    """
    name = partition_name(day)
    if await connection.fetchval(HAS_PARTITION, name):
        return
    await connection.execute(PARTITION_LOCK)
    if await connection.fetchval(HAS_PARTITION, name):
        return
    # Attaching locks less than creating a partition: others continue to read and write.
    await connection.execute(f"CREATE TABLE {name} (LIKE settled_calls INCLUDING ALL)")
    following = day + timedelta(days=1)
    await connection.execute(
        f"ALTER TABLE settled_calls ATTACH PARTITION {name} "
        f"FOR VALUES FROM ('{day.isoformat()}') TO ('{following.isoformat()}')"
    )


def day_of(at: datetime) -> datetime:
    """The first moment of a time's day, UTC."""
    return at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def partition_name(day: datetime) -> str:
    """The table with the settled calls that ended on a day."""
    return f"settled_calls_{day:%Y%m%d}"


def partition_day(name: str) -> datetime:
    """The day of a partition."""
    return datetime.strptime(name, "settled_calls_%Y%m%d").replace(tzinfo=UTC)


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
