"""Roll-ups: sums by hour, which the report is computed from, and which replace single calls after their retention.

Every settled chunk is added once. Intervals and rejections are added when they are removed.
"""

from datetime import datetime, timedelta

import asyncpg

from services.ledger.sql import Storage, day_of, partition_day, partition_name
from shared.runtime.database import translate_errors
from shared.runtime.logs import get_logger

_log = get_logger(__name__)

CHUNKS = 16
"""Chunks that are rolled up in one transaction."""
REMOVED = 20_000
"""Rows that are removed in one transaction."""
SPAN = timedelta(hours=1)
"""Intervals of an endpoint that are rolled up in one transaction."""
LOCK_TIMEOUT = "SET LOCAL lock_timeout = '2s'"
"""Dropping a partition waits for readers of the table, and others wait for it meanwhile."""
TIMEOUT_S = 120.0

_ROLL_UP_LOCK = "SELECT pg_try_advisory_xact_lock(hashtext('sprout.ledger.rollup'))"
_NEXT_CHUNKS = "SELECT chunk FROM chunks WHERE NOT rolled_up ORDER BY chunk LIMIT $1 FOR UPDATE SKIP LOCKED"
_HOURLY_KEY = "hour, purpose, model, grp, task, pool, level, zone, policy_version, decision_source, distribution"
_HOURLY_SUMS = (
    "calls", "prompt_tokens", "completion_tokens", "processing_s", "server_s", "energy_j", "embodied_g",
    "energy_energy", "server_server", "energy_server", "priced", "intensity", "intensity_intensity",
    "energy_intensity", "operational_g", "total_g", "total_total", "total_intensity", "unpriced_j",
)  # fmt: skip


def _add(table: str, sums: str, key: str, columns: tuple[str, ...], further: str = "") -> str:
    """An INSERT that adds sums to a table's rows."""
    changes = ", ".join(f"{name} = old.{name} + EXCLUDED.{name}" for name in columns)
    return f"INSERT INTO {table} AS old SELECT * FROM {sums} ON CONFLICT ({key}) DO UPDATE SET {changes}{further}"


_ADD_DISTRIBUTIONS = """
INSERT INTO distributions
SELECT DISTINCT distribution, propensities FROM dimensions
WHERE id IN (SELECT dimension FROM settled_calls WHERE chunk = ANY($1))
ON CONFLICT (id) DO NOTHING
"""
_ROLL_UP = (
    _ADD_DISTRIBUTIONS,
    _add(
        "hourly_calls",
        "hourly_sums($1)",
        _HOURLY_KEY,
        _HOURLY_SUMS,
        ", first_s = least(old.first_s, EXCLUDED.first_s), last_s = greatest(old.last_s, EXCLUDED.last_s)",
    ),
    _add(
        "call_starts",
        "start_sums($1)",
        "at, purpose, pool, level, decision_source",
        ("calls", "completion_tokens", "processing_s"),
    ),
    _add("histograms", "histogram_sums($1)", "hour, kind, name, in_block, bucket", ("calls",)),
    _add("hourly_evaluations", "evaluation_sums($1)", "evaluation_id, hour", ("calls", "energy_j", "total_g")),
    "UPDATE chunks SET rolled_up = true WHERE chunk = ANY($1)",
)

_OLDEST_INTERVAL = "SELECT min(started_at) FROM intervals"
_ROLL_UP_INTERVALS = (
    _add(
        "meter_sums",
        "interval_sums($1, $2)",
        "endpoint, at, pool, zone",
        ("metered_j", "attributed_j", "idle_j", "unattributed_j", "unused_j", "covered_s", "busy_s", "idle_s"),
        ", lost = old.lost OR EXCLUDED.lost",
    ),
    "DELETE FROM intervals WHERE started_at >= $1 AND started_at < $2",
)
_REMOVE_REJECTIONS = """
WITH removed AS (
    DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM {table} WHERE at < $1 LIMIT $2) RETURNING model, code, at
), added AS (
    INSERT INTO hourly_rejections AS old
    SELECT date_trunc('hour', at, 'UTC'), model, code, count(*) FROM removed GROUP BY 1, 2, 3
    ON CONFLICT (hour, model, code) DO UPDATE SET requests = old.requests + EXCLUDED.requests
)
SELECT count(*) FROM removed
"""
_REMOVE_READINGS = """
DELETE FROM readings WHERE ctid IN (
    SELECT r.ctid FROM readings AS r JOIN meters AS m USING (endpoint) WHERE r.at < least($1, m.settled_until) LIMIT $2
)
"""
_REMOVE_EARLIER_CALLS = """
DELETE FROM calls WHERE id IN (SELECT id FROM calls WHERE settled AND finished_at < $1 LIMIT $2)
"""
_REMOVE_CHUNKS = """
DELETE FROM chunks WHERE chunk IN (
    SELECT chunk FROM chunks WHERE published AND rolled_up AND last_finished_at < $1 LIMIT $2
)
"""
_REMOVE_DIMENSIONS = """
DELETE FROM dimensions WHERE id IN (
    SELECT id FROM dimensions AS d WHERE used_at < $1 AND NOT EXISTS (SELECT FROM open_calls WHERE dimension = d.id)
    LIMIT $2
)
"""
_REMOVE_ROLLUPS = {
    "hourly_calls": "hour", "call_starts": "at", "histograms": "hour", "hourly_evaluations": "hour",
    "hourly_rejections": "hour", "meter_sums": "at", "policies": "created_at", "quality": "evaluated_at",
    "prompt_groups": "learned_at", "intensity": "at",
}  # fmt: skip
"""The column of time of the tables that are kept as long as the roll-ups."""
_OLD_PARTITIONS = """
SELECT child.relname AS name FROM pg_inherits JOIN pg_class AS child ON child.oid = inhrelid
WHERE inhparent = 'settled_calls'::regclass AND child.relname < $1 ORDER BY 1
"""
_KEPT_FROM = "UPDATE removals SET kept_from = greatest(kept_from, $1)"
_PENDING = "SELECT EXISTS (SELECT FROM chunks WHERE NOT (published AND rolled_up) AND first_finished_at < $1)"


class RollUps:
    """Keeps the roll-ups, and removes what they replace."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def add_chunks(self) -> int:
        """Add all settled chunks that are not in the roll-ups yet; nothing while another ledger does.

        Returns:
            The number of chunks.

        Raises:
            DatabaseUnavailableError: the current chunks are added later.
        """
        added = 0
        with translate_errors():
            while count := await self._add_some():
                added += count
        return added

    async def _add_some(self) -> int:
        async with self._storage.pool.acquire() as connection, connection.transaction():
            if not await connection.fetchval(_ROLL_UP_LOCK):
                return 0
            chunks = [row["chunk"] for row in await connection.fetch(_NEXT_CHUNKS, CHUNKS)]
            for statement in _ROLL_UP if chunks else ():
                await connection.execute(statement, chunks, timeout=TIMEOUT_S)
            return len(chunks)

    async def remove_old(self, *, rows_before: datetime, rollups_before: datetime) -> None:
        """Remove rows beyond their retention, in transactions of bounded size; nothing while another ledger does.

        Args:
            rows_before: single calls, intervals, readings and rejections from before this time are removed; what they
                add up to stays in the roll-ups.
            rollups_before: roll-ups, policies, qualities, prompt groups and intensities from before this time.

        Raises:
            DatabaseUnavailableError: what was not removed is removed later.
        """
        with translate_errors():
            while await self._roll_up_intervals(rows_before):
                pass
            for table, key in (("rejections", "id"), ("refusals", "request_id")):
                await self._repeat(_REMOVE_REJECTIONS.format(table=table, key=key), rows_before)
            kept_from = await self._drop_partitions(rows_before)
            await self._repeat(_counted(_REMOVE_DIMENSIONS), kept_from)
            for statement in (_REMOVE_READINGS, _REMOVE_EARLIER_CALLS, _REMOVE_CHUNKS):
                await self._repeat(_counted(statement), rows_before)
            for table, column in _REMOVE_ROLLUPS.items():
                await self._repeat(
                    _counted(
                        f"DELETE FROM {table} WHERE ctid IN (SELECT ctid FROM {table} WHERE {column} < $1 LIMIT $2)"
                    ),
                    rollups_before,
                )

    async def _repeat(self, statement: str, before: datetime) -> None:
        """Run a statement until it removes less than it may."""
        removed = REMOVED
        while removed == REMOVED:
            removed = await self._storage.pool.fetchval(statement, before, REMOVED, timeout=TIMEOUT_S)

    async def _roll_up_intervals(self, before: datetime) -> bool:
        """Replace the intervals of the oldest hour; false if there is none before a time."""
        async with self._storage.pool.acquire() as connection, connection.transaction():
            if not await connection.fetchval(_ROLL_UP_LOCK):
                return False
            oldest = await connection.fetchval(_OLDEST_INTERVAL)
            if oldest is None or oldest >= before:
                return False
            for statement in _ROLL_UP_INTERVALS:
                await connection.execute(statement, oldest, min(oldest + SPAN, before), timeout=TIMEOUT_S)
            return True

    async def _drop_partitions(self, before: datetime) -> datetime:
        """Drop the partitions of days before a time, once all their calls are published and in the roll-ups.

        Returns:
            Time from which calls are kept.
        """
        pool = self._storage.pool
        day = day_of(before)
        old = [row["name"] for row in await pool.fetch(_OLD_PARTITIONS, partition_name(day))]
        if old and await pool.fetchval(_PENDING, day):
            return partition_day(old[0])
        for name in old:
            try:
                async with pool.acquire() as connection, connection.transaction():
                    await connection.execute(LOCK_TIMEOUT)
                    await connection.execute(f"ALTER TABLE settled_calls DETACH PARTITION {name}")
                    await connection.execute(f"DROP TABLE {name}")
                    await connection.execute(_KEPT_FROM, partition_day(name) + timedelta(days=1))
            except asyncpg.LockNotAvailableError:
                _log.info("a partition is in use and is dropped later", partition=name)
                return partition_day(name)
        return day


def _counted(statement: str) -> str:
    return f"WITH removed AS ({statement} RETURNING 1) SELECT count(*) FROM removed"
