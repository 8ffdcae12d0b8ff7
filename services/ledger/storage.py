"""What other services told and what meters showed, written to PostgreSQL in bulk and idempotently."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeAlias

import asyncpg

from services.ledger.rows import Row
from shared.runtime.database import TRANSIENT_ERRORS
from shared.runtime.logs import get_logger

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

AWAY_ERRORS = (*TRANSIENT_ERRORS, TimeoutError)
"""PostgreSQL is away, or does not answer in time."""

KEYS: Mapping[str, tuple[str, ...]] = {
    "calls": ("id",),
    "refusals": ("request_id",),
    "intensity": ("zone", "at"),
    "policies": ("model", "version", "created_at"),
    "quality": ("evaluation_id",),
    "prompt_groups": ("model", "version", "learned_at"),
}

_ADD_READINGS = """
INSERT INTO readings (endpoint, at, gpu, energy_j)
SELECT new.endpoint, $2, new.gpu, new.energy_j
FROM jsonb_populate_recordset(NULL::readings, $1) AS new
WHERE NOT EXISTS (SELECT FROM readings AS old WHERE old.endpoint = new.endpoint AND old.at > $3)
"""
_CLEAN = (
    """
    DELETE FROM readings USING meters
    WHERE readings.endpoint = meters.endpoint AND readings.at < least($1, meters.settled_until)
    """,
    "DELETE FROM calls WHERE settled AND finished_at < $1",
)

_log = get_logger(__name__)


class Storage:
    """The ledger's tables, and whether they can be reached."""

    def __init__(self) -> None:
        self._pool: asyncpg.Pool | None = None
        self._away = ""

    def attach(self, pool: asyncpg.Pool) -> None:
        """The pool to use; its connections' search path is the ledger's schema."""
        self._pool = pool

    @property
    def pool(self) -> asyncpg.Pool:
        """The pool.

        Raises:
            RuntimeError: none is attached yet.
        """
        if self._pool is None:
            raise RuntimeError("Storage.attach(pool) must be called first")
        return self._pool

    def problem(self) -> str | None:
        """What stands against readiness."""
        if self._pool is None:
            return "not connected yet"
        return self._away or None

    def note(self, error: BaseException | None) -> None:
        """Remember whether PostgreSQL answered; logs when that changed."""
        away = "" if error is None else f"PostgreSQL does not answer ({type(error).__name__})"
        if away and not self._away:
            _log.warning("waiting for PostgreSQL", error=type(error).__name__)
        elif self._away and not away:
            _log.info("PostgreSQL is back")
        self._away = away

    async def add(self, table: str, rows: Sequence[Row]) -> None:
        """Add rows that are not there yet, in one statement."""
        await self._write(table, rows, "NOTHING")

    async def put(self, table: str, rows: Sequence[Row]) -> None:
        """Add rows, or replace those with the same key; of several with one key the last one counts."""
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
        """Add the counters of endpoints, by GPU.

        Where several ledgers run, they read the same meters: a reading that comes less than `spacing` after another one
        is left out, so that two of them are never in doubt about their order.
        """
        rows = [
            {"endpoint": endpoint, "gpu": gpu, "energy_j": energy_j}
            for endpoint, by_gpu in counters.items()
            for gpu, energy_j in by_gpu.items()
        ]
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(hashtext('sprout.ledger.readings'))")
            await connection.execute(_ADD_READINGS, json.dumps(rows), at, at - spacing)

    async def clean(self, before: datetime) -> None:
        """Remove raw readings and settled calls from before an instant; footprints and intervals stay."""
        for statement in _CLEAN:
            await self.pool.execute(statement, before)

    async def _write(self, table: str, rows: Sequence[Row], on_conflict: str) -> None:
        if rows:
            await self.pool.execute(insert_statement(table, list(rows[0]), on_conflict), json.dumps(rows))


def insert_statement(table: str, columns: Sequence[str], on_conflict: str) -> str:
    """An INSERT of many rows, given as one JSON array; names come from the code, never from messages."""
    names = ", ".join(columns)
    key = ", ".join(KEYS[table])
    return (
        f"INSERT INTO {table} AS old ({names}) SELECT {names} FROM jsonb_populate_recordset(NULL::{table}, $1) "
        f"ON CONFLICT ({key}) DO {on_conflict}"
    )


async def execute_rows(connection: Connection, statement: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Run a statement over many rows, given as one JSON array."""
    if rows:
        await connection.execute(statement, json.dumps(rows))
