"""Batches in PostgreSQL: their states, leases and results."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import asyncpg

from services.gateway.batch_lines import Result
from services.gateway.batch_state import ACTIVE, Event, Status, following
from services.gateway.file_store import OUTPUT_PURPOSE, FileWriter
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseStatus

PREFETCHED_RESULTS: Final = 20
"""Results in memory while files are written: each can be a few MiB."""

_IS_ACTIVE: Final = "status IN (" + ", ".join(f"'{status}'" for status in sorted(ACTIVE)) + ")"
"""A literal condition, so that PostgreSQL uses the partial index."""

_TIMES: Final[dict[Status, str]] = {status: f"{status}_at" for status in Status if status is not Status.VALIDATING}
"""Column with the time of the change to a state."""

_COLUMNS: Final = (
    "id, owner, key_id, tenant, endpoint, input_file_id, completion_window, metadata, output_expires_s, status, "
    "problem, total, completed, failed, output_file_id, error_file_id, created_at, expires_at, in_progress_at, "
    "finalizing_at, completed_at, failed_at, expired_at, cancelling_at, cancelled_at"
)


class LeaseLostError(Exception):
    """Another gateway works on the batch, or its state has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A row of `batches`, without its lease.

    Attributes:
        owner: tenant or key, see `files.owner_of`.
        key_id: of the API key that made it.
        metadata: JSON of an object, or None.
        output_expires_s: how long its files are kept, event seconds; None: as all.
        problem: JSON of the errors because of which it failed, or None.
        total, completed, failed: lines.
        expires_at: end of the completion window, event time.
    """

    id: str
    owner: str
    key_id: str
    tenant: str | None
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: str | None
    output_expires_s: int | None
    status: Status
    created_at: datetime
    expires_at: datetime
    problem: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: datetime | None = None
    finalizing_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    expired_at: datetime | None = None
    cancelling_at: datetime | None = None
    cancelled_at: datetime | None = None


class BatchStore:
    """The batches of all owners; works on some of them as their holder."""

    def __init__(
        self, pool: asyncpg.Pool, status: DatabaseStatus, clock: Clock, *, retention_days: float, lease_s: float
    ) -> None:
        """Use an open pool whose `search_path` is the gateway's schema.

        Args:
            retention_days: of output files, event time.
            lease_s: how long a batch waits for a gateway that died, wall.
        """
        self.status = status
        self.clock = clock
        self._pool = pool
        self._retention = timedelta(days=retention_days)
        self._lease_s = lease_s
        self._holder = uuid4().hex

    async def create(
        self,
        *,
        owner: str,
        key_id: str,
        tenant: str | None,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        window: timedelta,
        metadata: dict[str, str] | None,
        output_expires_s: int | None,
    ) -> Batch:
        """A new batch.

        Args:
            window: the time for it, event time.

        Raises:
            DatabaseUnavailableError: PostgreSQL is unavailable. So do the other methods.
        """
        now = self.clock.now()
        batch = Batch(
            id=f"batch_{uuid4().hex}",
            owner=owner,
            key_id=key_id,
            tenant=tenant,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            metadata=None if metadata is None else json.dumps(metadata),
            output_expires_s=output_expires_s,
            status=Status.VALIDATING,
            created_at=now,
            expires_at=now + window,
        )
        with self.status.watch():
            await self._pool.execute(
                "INSERT INTO batches (id, owner, key_id, tenant, endpoint, input_file_id, completion_window, metadata, "
                "output_expires_s, status, created_at, expires_at) "
                "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
                batch.id, owner, key_id, tenant, endpoint, input_file_id, completion_window, batch.metadata,
                output_expires_s, batch.status, now, batch.expires_at,
            )  # fmt: skip
        return batch

    async def find(self, batch_id: str, *, owner: str) -> Batch | None:
        """A batch of an owner."""
        with self.status.watch():
            row = await self._pool.fetchrow(
                f"SELECT {_COLUMNS} FROM batches WHERE id = $1 AND owner = $2", batch_id, owner
            )
        return None if row is None else _batch(row)

    async def page(self, *, owner: str, after: Batch | None, limit: int) -> list[Batch]:
        """Batches of an owner, the newest first.

        Args:
            after: the last one of the page before.
        """
        with self.status.watch():
            rows = await self._pool.fetch(
                f"SELECT {_COLUMNS} FROM batches WHERE owner = $1 "
                "AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3)) "
                "ORDER BY created_at DESC, id DESC LIMIT $4",
                owner, after and after.created_at, after and after.id, limit,
            )  # fmt: skip
        return [_batch(row) for row in rows]

    async def cancel(self, batch: Batch) -> Batch | None:
        """Cancel a batch; None if it is too late."""
        return await self._move(batch, Event.CANCEL)

    async def claim(self, *, except_ids: Collection[str]) -> Batch | None:
        """Take the lease of a batch that no other gateway works on: of the owner with the fewest running batches.

        Args:
            except_ids: batches that this gateway works on already.
        """
        with self.status.watch():
            row = await self._pool.fetchrow(
                "WITH running AS (SELECT owner, count(*) AS batches FROM batches "
                f"WHERE {_IS_ACTIVE} AND holder IS NOT NULL AND lease_until >= now() GROUP BY owner) "
                "UPDATE batches SET holder = $1, lease_until = now() + make_interval(secs => $2) WHERE id = ("
                "SELECT one.id FROM batches AS one LEFT JOIN running USING (owner) "
                f"WHERE one.{_IS_ACTIVE} AND one.id <> ALL($3) "
                "AND (one.holder IS NULL OR one.holder = $1 OR one.lease_until < now()) "
                f"AND (one.status = '{Status.CANCELLING}' OR one.deferred_until_wall IS NULL "
                "OR one.deferred_until_wall < now()) "
                "ORDER BY coalesce(running.batches, 0), one.created_at LIMIT 1 FOR UPDATE OF one SKIP LOCKED) "
                f"RETURNING {_COLUMNS}",
                self._holder, self._lease_s, list(except_ids),
            )  # fmt: skip
        return None if row is None else _batch(row)

    async def defer(self, batch_id: str, seconds: float) -> None:
        """Release a lease, so that the batch is not taken again for a while (wall), unless it is cancelled."""
        with self.status.watch():
            await self._pool.execute(
                "UPDATE batches SET holder = NULL, deferred_until_wall = now() + make_interval(secs => $3) "
                "WHERE id = $1 AND holder = $2",
                batch_id, self._holder, seconds,
            )  # fmt: skip

    async def renew(self, batch_id: str) -> Batch:
        """Renew a lease.

        Raises:
            LeaseLostError: another gateway works on the batch, or it is gone.
        """
        with self.status.watch():
            row = await self._pool.fetchrow(
                "UPDATE batches SET lease_until = now() + make_interval(secs => $3) WHERE id = $1 AND holder = $2 "
                f"RETURNING {_COLUMNS}",
                batch_id, self._holder, self._lease_s,
            )  # fmt: skip
        if row is None:
            raise LeaseLostError
        return _batch(row)

    async def release(self, batch_id: str) -> None:
        """Release a lease, so that another gateway continues at once."""
        with self.status.watch():
            await self._pool.execute(
                "UPDATE batches SET holder = NULL WHERE id = $1 AND holder = $2", batch_id, self._holder
            )

    async def move(self, batch: Batch, event: Event, *, total: int = 0, problem: str | None = None) -> Batch:
        """Change the state of a batch that this gateway holds.

        Args:
            total: number of its lines, when they are counted.
            problem: JSON of the errors, when it is rejected.

        Raises:
            LeaseLostError: another gateway works on it, or its state has changed.
        """
        moved = await self._move(batch, event, total=total, problem=problem, held=True)
        if moved is None:
            raise LeaseLostError
        return moved

    async def finished_lines(self, batch_id: str) -> set[int]:
        """The numbers of the lines that have a result."""
        with self.status.watch():
            rows = await self._pool.fetch("SELECT line FROM batch_results WHERE batch_id = $1", batch_id)
        return {row["line"] for row in rows}

    async def add_results(self, batch_id: str, results: Sequence[Result]) -> None:
        """Store results; a line that has one keeps it."""
        with self.status.watch():
            await self._pool.execute(
                "WITH added AS (INSERT INTO batch_results (batch_id, line, outcome, document) "
                "SELECT $1, * FROM unnest($2::integer[], $3::text[], $4::text[]) "
                "ON CONFLICT DO NOTHING RETURNING outcome), "
                "sums AS (SELECT count(*) FILTER (WHERE outcome = 'completed') AS completed, "
                "count(*) FILTER (WHERE outcome <> 'completed') AS failed FROM added) "
                "UPDATE batches SET completed = batches.completed + sums.completed, "
                "failed = batches.failed + sums.failed FROM sums WHERE id = $1",
                batch_id,
                [one.number for one in results],
                [one.outcome for one in results],
                [one.document for one in results],
            )

    async def write_files(self, batch: Batch) -> Batch:
        """Write the output file and the error file from the results, and end the batch: all of it or nothing.

        Raises:
            LeaseLostError: another gateway works on the batch.
        """
        now = self.clock.now()
        kept = self._retention if batch.output_expires_s is None else timedelta(seconds=batch.output_expires_s)
        until = now + min(kept, self._retention)
        unfinished = False
        with self.status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                writers: dict[str, FileWriter] = {}
                rows = connection.cursor(
                    "SELECT outcome, document FROM batch_results WHERE batch_id = $1 ORDER BY line",
                    batch.id, prefetch=PREFETCHED_RESULTS,
                )  # fmt: skip
                async for outcome, document in rows:
                    unfinished = unfinished or outcome == "unfinished"
                    kind = "output" if outcome == "completed" else "error"
                    if kind not in writers:
                        writers[kind] = FileWriter(connection)
                        await writers[kind].begin(
                            owner=batch.owner, tenant=batch.tenant, filename=f"{batch.id}_{kind}.jsonl",
                            purpose=OUTPUT_PURPOSE, created_at=now, until=until,
                        )  # fmt: skip
                    await writers[kind].write(document.encode() + b"\n")
                for writer in writers.values():
                    await writer.complete(until)
                await connection.execute("DELETE FROM batch_results WHERE batch_id = $1", batch.id)
                status = following(batch.status, Event.WRITTEN_LATE if unfinished else Event.WRITTEN)
                if status is None:
                    raise LeaseLostError
                names = {kind: writer.id for kind, writer in writers.items()}
                row = await connection.fetchrow(
                    f"UPDATE batches SET status = $4, {_TIMES[status]} = $5, output_file_id = $6, error_file_id = $7, "
                    "total = greatest(total, completed + failed), holder = NULL "
                    f"WHERE id = $1 AND status = $2 AND holder = $3 RETURNING {_COLUMNS}",
                    batch.id, batch.status, self._holder, status, now, names.get("output"), names.get("error"),
                )  # fmt: skip
                if row is None:
                    raise LeaseLostError
        return _batch(row)

    async def _move(
        self, batch: Batch, event: Event, *, total: int = 0, problem: str | None = None, held: bool = False
    ) -> Batch | None:
        status = following(batch.status, event)
        if status is None:
            return None
        column = _TIMES[status]
        with self.status.watch():
            row = await self._pool.fetchrow(
                f"UPDATE batches SET status = $3, {column} = coalesce({column}, $4), total = greatest(total, $5), "
                "problem = coalesce($6, problem) WHERE id = $1 AND status = $2 AND (NOT $7 OR holder = $8) "
                f"RETURNING {_COLUMNS}",
                batch.id, batch.status, status, self.clock.now(), total, problem, held, self._holder,
            )  # fmt: skip
        return None if row is None else _batch(row)


def _batch(row: Any) -> Batch:  # noqa: ANN401 - a row of asyncpg
    return Batch(**{**row, "status": Status(row["status"])})
