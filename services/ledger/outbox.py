"""Outbox: publishes the footprints in PostgreSQL to Kafka, each at least once (transactional outbox pattern)."""

import asyncio

from aiokafka.errors import KafkaError

from services.ledger.footprint import footprint_message
from services.ledger.metrics import LedgerMetrics
from services.ledger.sql import MARK_PUBLISHED, PUBLICATION_LOCK, UNPUBLISHED_FOOTPRINTS, Storage
from shared.kafka.publish import Publisher
from shared.messages import Footprint
from shared.runtime.database import translate_errors
from shared.runtime.logs import get_logger

BATCH = 500

_log = get_logger(__name__)


class FootprintOutbox:
    """Publishes every complete footprint that is not marked as published; the mark follows Kafka's acknowledgement."""

    def __init__(self, publisher: Publisher, *, storage: Storage, metrics: LedgerMetrics) -> None:
        self._publisher = publisher
        self._storage = storage
        self._metrics = metrics

    async def publish_pending(self) -> None:
        """Publish all unpublished footprints. What Kafka does not acknowledge stays for the next call.

        Raises:
            DatabaseUnavailableError: what was not marked as published is published again later.
        """
        with translate_errors():
            while await self._publish_batch() == BATCH:
                pass

    async def _publish_batch(self) -> int:
        async with self._storage.pool.acquire() as connection, connection.transaction():
            if not await connection.fetchval(PUBLICATION_LOCK):
                return 0
            rows = await connection.fetch(UNPUBLISHED_FOOTPRINTS, BATCH)
            footprints = [footprint_message(dict(row)) for row in rows]
            try:
                await asyncio.gather(*(self._publish(footprint) for footprint in footprints))
            except KafkaError as error:
                _log.warning("could not publish footprints; retrying later", error=type(error).__name__)
                return 0
            await connection.execute(MARK_PUBLISHED, [footprint.request_id for footprint in footprints])
        self._metrics.published.inc(len(footprints))
        return len(footprints)

    async def _publish(self, footprint: Footprint) -> None:
        await self._publisher.publish(footprint, key=footprint.request_id.encode())
