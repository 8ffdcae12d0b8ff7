"""An upgrade in place: what ledgers of an earlier version wrote, and may still write while they run beside this one.

An earlier version writes calls to the table `calls`, which this version moves to its own. Settling and publishing is
up to this version alone: an earlier one needs a lock for each, and every ledger of this version holds both, shared.
"""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import asyncpg

from services.ledger import sql
from services.ledger.calls import Labels, NewCall
from services.ledger.sql import Storage
from shared.runtime.database import TRANSIENT_ERRORS, translate_errors
from shared.runtime.logs import get_logger

ADOPTED = 5_000
"""Calls that are moved in one transaction."""
CHECK_S = 5.0
"""Wall seconds between two checks that the locks are still held."""

LOCK_TIMEOUT_S = 600.0

_log = get_logger(__name__)


class EarlierVersions:
    """Keeps ledgers of an earlier version from settling, and takes over their calls."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._connection: Any = None

    async def lock(self, pool: asyncpg.Pool) -> None:
        """Hold the locks with a connection of their own; waits while an earlier version settles."""
        connection = await pool.acquire()
        try:
            for name in sql.EARLIER_LOCKS:
                await connection.execute(sql.HOLD_SHARED, name, timeout=LOCK_TIMEOUT_S)
        except BaseException:
            await pool.release(connection)
            raise
        self._connection = connection

    async def unlock(self) -> None:
        """Give the connection back."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with suppress(*TRANSIENT_ERRORS):
                await self._storage.pool.release(connection)

    async def keep_locked(self) -> None:
        """Take the locks again whenever their connection was lost, forever."""
        while True:
            await asyncio.sleep(CHECK_S)
            try:
                if self._connection is None:
                    await self.lock(self._storage.pool)
                await self._connection.execute("SELECT 1")
            except TRANSIENT_ERRORS as error:
                _log.warning("the locks against earlier versions were lost", error=type(error).__name__)
                await self.unlock()

    async def adopt_calls(self) -> int:
        """Move the open calls of the earlier version.

        Returns:
            Their number.

        Raises:
            DatabaseUnavailableError: what was not moved is moved later.
        """
        moved = 0
        with translate_errors():
            while count := await self._adopt():
                moved += count
        if moved:
            _log.info("calls of an earlier version of the ledger were taken over", calls=moved)
        return moved

    async def adopt_footprints(self) -> int:
        """Move some footprints of the earlier version that are published, or never will be, to this version's table.

        Returns:
            Their number; 0 if there are no more.

        Raises:
            DatabaseUnavailableError: what was not moved is moved later.
        """
        with translate_errors():
            async with self._storage.pool.acquire() as connection, connection.transaction():
                rows = await connection.fetch(sql.EARLIER_ROWS, ADOPTED)
                if not rows:
                    return 0
                dimensions = await self._storage.dimensions.ids(
                    self._storage.pool, [_settled_call(row) for row in rows]
                )
                ends = [row["finished_at"] for row in rows]
                for day in sorted({sql.day_of(one) for one in ends}):
                    await sql.add_partition(connection, day)
                chunk = await connection.fetchval(sql.ADD_CHUNK, len(rows), min(ends), max(ends))
                ids, first = [row["request_id"] for row in rows], [row["first_token_at"] for row in rows]
                await connection.execute(sql.ADOPT_FOOTPRINTS, chunk, ids, dimensions, first)
                await connection.execute(sql.MARK_PUBLISHED, chunk)
                return len(rows)

    async def _adopt(self) -> int:
        async with self._storage.pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(sql.EARLIER_CALLS, ADOPTED)
            if not rows:
                return 0
            calls = [_new_call(dict(row)) for row in rows]
            dimensions = await self._storage.dimensions.ids(self._storage.pool, calls)
            await connection.execute(sql.ADOPT_CALLS, [row["id"] for row in rows], dimensions)
            return len(rows)


def _settled_call(row: asyncpg.Record) -> NewCall:
    columns = {**row, "propensities": row["propensities_text"], "id": row["request_id"]}
    return _new_call(columns)


def _new_call(row: Mapping[str, Any]) -> NewCall:
    return NewCall(
        id=row["id"],
        request_id=None,
        labels=Labels(
            **{
                **{name: row[name] for name in Labels._fields if name in row},
                "propensities": tuple(json.loads(row["propensities"]).items()),
            }
        ),
        started_at=row["started_at"],
        first_token_at=row["first_token_at"],
        finished_at=row["finished_at"],
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
    )
