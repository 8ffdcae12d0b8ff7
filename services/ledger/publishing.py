"""Publishes footprints from the books, each at least once."""

import asyncio
from collections.abc import Awaitable, Callable

from aiokafka.errors import KafkaError

from services.ledger.metrics import LedgerMetrics
from services.ledger.rows import footprint_of
from services.ledger.storage import Storage
from shared.messages import Footprint
from shared.runtime.logs import get_logger

BATCH = 500

_LOCK = "SELECT pg_try_advisory_xact_lock(hashtext('sprout.ledger.publication'))"
_UNPUBLISHED = "SELECT * FROM footprints WHERE NOT published AND NOT partial ORDER BY finished_at LIMIT $1"
_PUBLISHED = "UPDATE footprints SET published = true WHERE request_id = ANY($1)"

_log = get_logger(__name__)


class Publishing:
    """Publishes what is not marked as published; the mark follows Kafka's acknowledgement."""

    def __init__(
        self, publish: Callable[[Footprint], Awaitable[None]], *, storage: Storage, metrics: LedgerMetrics
    ) -> None:
        self._publish = publish
        self._storage = storage
        self._metrics = metrics

    async def turn(self) -> None:
        """Publish all there is; what Kafka does not take stays for the next turn.

        Raises:
            asyncpg.PostgresError, OSError: PostgreSQL is away.
        """
        while await self._batch() == BATCH:
            pass

    async def _batch(self) -> int:
        async with self._storage.pool.acquire() as connection, connection.transaction():
            if not await connection.fetchval(_LOCK):
                return 0
            rows = await connection.fetch(_UNPUBLISHED, BATCH)
            footprints = [footprint_of(dict(row)) for row in rows]
            try:
                await asyncio.gather(*(self._publish(footprint) for footprint in footprints))
            except KafkaError as error:
                _log.warning("footprints wait for Kafka", error=type(error).__name__)
                return 0
            await connection.execute(_PUBLISHED, [footprint.request_id for footprint in footprints])
        self._metrics.published.inc(len(footprints))
        return len(footprints)
