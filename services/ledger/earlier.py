"""An upgrade in place: what ledgers of an earlier version wrote, and may still write while they run beside this one.

An earlier version writes calls to the table `calls`, which this version moves to its own. Settling and publishing is
up to this version alone: an earlier one needs a lock for each, and every ledger of this version holds both, shared.
"""

import asyncio
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

    async def _adopt(self) -> int:
        async with self._storage.pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(sql.EARLIER_CALLS, ADOPTED)
            if not rows:
                return 0
            calls = [_new_call(row) for row in rows]
            dimensions = await self._storage.dimensions.ids(self._storage.pool, calls)
            await connection.execute(sql.ADOPT_CALLS, [row["id"] for row in rows], dimensions)
            return len(rows)


def _new_call(row: asyncpg.Record) -> NewCall:
    return NewCall(
        id=row["id"],
        request_id=None,
        labels=Labels(**{name: row[name] for name in Labels._fields}),
        started_at=row["started_at"],
        first_token_at=row["first_token_at"],
        finished_at=row["finished_at"],
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
    )
