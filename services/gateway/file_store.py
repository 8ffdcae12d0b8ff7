"""Files in PostgreSQL: rows of `files`, and their content in parts of `file_chunks`.

Every part is written and read by a statement of its own, so that neither a slow client nor a large file holds a
connection or memory.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Union
from uuid import uuid4

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseStatus

CHUNK_BYTES: Final = 1024 * 1024

PURPOSE: Final = "batch"
OUTPUT_PURPOSE: Final = "batch_output"

UPLOAD_S: Final = 3_600.0
"""After this time (wall) an upload that is not complete is removed."""

REMOVED_AT_ONCE: Final = 20
"""Files that one statement removes."""

_COLUMNS: Final = "id, filename, purpose, bytes, created_at, expires_at"

Executor = Union[asyncpg.Pool, "PoolConnectionProxy[asyncpg.Record]"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A complete file, without its content."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: datetime
    expires_at: datetime


class FileWriter:
    """Writes a new file; nobody sees it before it is complete.

    Attributes:
        id: of the file.
        bytes: written so far.
    """

    def __init__(self, executor: Executor) -> None:
        self.id = f"file-{uuid4().hex}"
        self.bytes = 0
        self._executor = executor
        self._buffer = bytearray()
        self._chunks = 0

    async def begin(
        self, *, owner: str, tenant: str | None, filename: str, purpose: str, created_at: datetime, until: datetime
    ) -> None:
        """Make the row.

        Args:
            until: the file is removed if it is not complete by then; event time.
        """
        await self._executor.execute(
            "INSERT INTO files (id, owner, tenant, filename, purpose, created_at, expires_at) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7)",
            self.id, owner, tenant, filename, purpose, created_at, until,
        )  # fmt: skip

    async def write(self, data: bytes) -> None:
        """Append to the file."""
        self.bytes += len(data)
        self._buffer += data
        while len(self._buffer) >= CHUNK_BYTES:
            await self._flush()

    async def complete(self, expires_at: datetime) -> None:
        """End the file.

        Args:
            expires_at: event time.
        """
        if self._buffer:
            await self._flush()
        await self._executor.execute(
            "UPDATE files SET bytes = $2, expires_at = $3 WHERE id = $1", self.id, self.bytes, expires_at
        )

    async def _flush(self) -> None:
        await self._executor.execute(
            "INSERT INTO file_chunks (file_id, number, data) VALUES ($1, $2, $3)",
            self.id, self._chunks, bytes(self._buffer[:CHUNK_BYTES]),
        )  # fmt: skip
        self._chunks += 1
        del self._buffer[:CHUNK_BYTES]


class FileStore:
    """The files of all owners."""

    def __init__(self, pool: asyncpg.Pool, status: DatabaseStatus, clock: Clock) -> None:
        """Use an open pool whose `search_path` is the gateway's schema."""
        self.pool = pool
        self.status = status
        self.clock = clock

    async def find(self, file_id: str, *, owner: str) -> StoredFile | None:
        """A file of an owner.

        Raises:
            DatabaseUnavailableError: PostgreSQL is unavailable. So do the other methods.
        """
        with self.status.watch():
            row = await self.pool.fetchrow(
                f"SELECT {_COLUMNS} FROM files "
                "WHERE id = $1 AND owner = $2 AND bytes IS NOT NULL AND expires_at > $3",
                file_id, owner, self.clock.now(),
            )  # fmt: skip
        return None if row is None else StoredFile(**row)

    async def page(
        self, *, owner: str, purpose: str | None, after: StoredFile | None, limit: int, newest_first: bool
    ) -> list[StoredFile]:
        """Files of an owner by time.

        Args:
            purpose: None: any.
            after: the last one of the page before.
        """
        order, compare = ("DESC", "<") if newest_first else ("ASC", ">")
        with self.status.watch():
            rows = await self.pool.fetch(
                f"SELECT {_COLUMNS} FROM files WHERE owner = $1 AND bytes IS NOT NULL AND expires_at > $2 "
                "AND ($3::text IS NULL OR purpose = $3) "
                f"AND ($4::timestamptz IS NULL OR (created_at, id) {compare} ($4, $5)) "
                f"ORDER BY created_at {order}, id {order} LIMIT $6",
                owner, self.clock.now(), purpose, after and after.created_at, after and after.id, limit,
            )  # fmt: skip
        return [StoredFile(**row) for row in rows]

    async def stored_bytes(self, owner: str) -> int:
        """The size of all files of an owner."""
        with self.status.watch():
            return int(
                await self.pool.fetchval("SELECT coalesce(sum(bytes), 0)::bigint FROM files WHERE owner = $1", owner)
            )

    async def content(self, file_id: str) -> AsyncIterator[bytes]:
        """The parts of a file, in order."""
        number = 0
        while (data := await self.chunk(file_id, number)) is not None:
            yield data
            number += 1

    async def chunk(self, file_id: str, number: int) -> bytes | None:
        """A part of a file, counted from 0; None after the last one."""
        with self.status.watch():
            data: bytes | None = await self.pool.fetchval(
                "SELECT data FROM file_chunks WHERE file_id = $1 AND number = $2", file_id, number
            )
        return data

    async def delete(self, file_id: str) -> None:
        """Remove a file."""
        with self.status.watch():
            await self.pool.execute("DELETE FROM files WHERE id = $1", file_id)

    async def is_in_use(self, file_id: str) -> bool:
        """Whether a batch that has not ended reads a file."""
        with self.status.watch():
            return bool(
                await self.pool.fetchval(
                    "SELECT EXISTS (SELECT FROM batches WHERE input_file_id = $1 "
                    "AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling'))",
                    file_id,
                )
            )

    async def remove_expired(self, *, retention: timedelta) -> None:
        """Remove files that have expired and that no batch reads, and batches that ended long ago.

        Args:
            retention: of batches, event time.
        """
        now, removed = self.clock.now(), REMOVED_AT_ONCE
        while removed == REMOVED_AT_ONCE:
            with self.status.watch():
                rows = await self.pool.fetch(
                    "DELETE FROM files WHERE id IN (SELECT id FROM files AS f WHERE expires_at < $1 AND NOT EXISTS "
                    "(SELECT FROM batches WHERE input_file_id = f.id "
                    "AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')) "
                    "LIMIT $2 FOR UPDATE SKIP LOCKED) RETURNING id",
                    now, REMOVED_AT_ONCE,
                )  # fmt: skip
            removed = len(rows)
        with self.status.watch():
            await self.pool.execute(
                "DELETE FROM batches WHERE created_at < $1 "
                "AND status IN ('completed', 'failed', 'expired', 'cancelled')",
                now - retention,
            )
