"""Publishes to Kafka: footprints from PostgreSQL, each at least once (transactional outbox pattern), and curves."""

from collections.abc import Iterable
from datetime import timedelta

from aiokafka.errors import KafkaError
from faststream.kafka import KafkaPublishMessage

from services.ledger import sql
from services.ledger.footprint import Row, footprint_head, footprint_json
from services.ledger.metrics import LedgerMetrics
from services.ledger.sql import Connection, Storage
from shared.kafka.publish import BatchPublisher, Publisher
from shared.messages import EndpointCurve
from shared.runtime.database import translate_errors
from shared.runtime.logs import get_logger

EARLIER_BATCH = 500
CACHED_HEADS = 20_000

CURVE_INTERVAL = timedelta(hours=1)
"""Event time after which a curve is published although it has hardly changed."""
CURVE_CHANGE = 0.02
"""Relative change of a coefficient with which a curve is published at once."""

_log = get_logger(__name__)


class FootprintOutbox:
    """Publishes the complete footprints of every settled chunk, and marks the chunk once Kafka has acknowledged them.

    Several ledgers publish different chunks at once.
    """

    def __init__(self, publisher: BatchPublisher, *, storage: Storage, metrics: LedgerMetrics) -> None:
        self._publisher = publisher
        self._storage = storage
        self._metrics = metrics
        self._heads: dict[int, bytes] = {}

    async def publish_pending(self) -> None:
        """Publish all unpublished footprints. What Kafka does not acknowledge stays for the next call.

        Raises:
            DatabaseUnavailableError: what was not marked as published is published again later.
        """
        with translate_errors():
            while await self._publish_chunk():
                pass
            while await self._publish_earlier() == EARLIER_BATCH:
                pass
            self._metrics.unpublished_chunks.set(await self._storage.pool.fetchval(sql.UNPUBLISHED))

    async def _publish_chunk(self) -> bool:
        """Publish a chunk; false if there is none, or Kafka did not take it."""
        async with self._storage.pool.acquire() as connection, connection.transaction():
            await connection.execute(sql.ERASURE_LOCK)
            chunk = await connection.fetchrow(sql.NEXT_CHUNK)
            if chunk is None:
                return False
            rows = await connection.fetch(sql.CHUNK_CALLS, *chunk)
            await self._read_heads(connection, {row["dimension"] for row in rows})
            known = [(row, self._heads[row["dimension"]]) for row in rows]
            if not await self._publish(known, partition=chunk["chunk"]):
                return False
            await connection.execute(sql.MARK_PUBLISHED, chunk["chunk"])
        self._metrics.published.inc(len(rows))
        return True

    async def _publish_earlier(self) -> int:
        """Publish footprints that an earlier version of the ledger computed."""
        async with self._storage.pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(sql.EARLIER_FOOTPRINTS, EARLIER_BATCH)
            known = [({**row, "request_id": None}, footprint_head(dict(row))) for row in rows]
            if not await self._publish(known, partition=0):
                return 0
            await connection.execute(sql.MARK_EARLIER_PUBLISHED, [row["id"] for row in rows])
        self._metrics.published.inc(len(rows))
        return len(rows)

    async def _read_heads(self, connection: Connection, dimensions: set[int]) -> None:
        """Make sure that the beginnings of the messages are known."""
        if len(self._heads) > CACHED_HEADS:
            self._heads.clear()
        new = dimensions - self._heads.keys()
        if new:
            self._heads |= {
                row["id"]: footprint_head(dict(row)) for row in await connection.fetch(sql.DIMENSIONS, list(new))
            }

    async def _publish(self, footprints: Iterable[tuple[Row, bytes]], *, partition: int) -> bool:
        """Publish footprints, each with the beginning of its message; false if Kafka did not take them all.

        Args:
            partition: of them all, modulo the number of the topic's partitions. What is published again goes to the
                same one.
        """
        messages = [
            KafkaPublishMessage(footprint_json(head, row), key=(row["request_id"] or row["id"]).encode())
            for row, head in footprints
        ]
        if not messages:
            return True
        try:
            await self._publisher.publish(
                *messages,
                headers={"content-type": "application/json"},
                partition=partition if len(messages) > 1 else None,  # a single message goes by its key
            )
        except KafkaError as error:
            _log.warning("could not publish footprints; retrying later", error=type(error).__name__)
            return False
        return True


class CurvePublisher:
    """Publishes learned curves on a compacted topic, when they have changed or are an hour old."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._published: dict[str, EndpointCurve] = {}

    async def publish(self, curves: Iterable[EndpointCurve]) -> None:
        """Publish those that differ from what was published last; what Kafka does not acknowledge is tried again."""
        for curve in curves:
            before = self._published.get(curve.endpoint)
            if before is not None and not _differs(before, curve):
                continue
            try:
                await self._publisher.publish(curve, key=curve.endpoint.encode())
            except KafkaError as error:
                _log.warning("could not publish a curve; retrying later", error=type(error).__name__)
                return
            if before is None or before.reason != curve.reason:
                _log.info("power curve", endpoint=curve.endpoint, identifiable=curve.identifiable, reason=curve.reason)
            self._published[curve.endpoint] = curve


def _differs(before: EndpointCurve, curve: EndpointCurve) -> bool:
    """Whether a curve is to be published again."""
    if before.identifiable != curve.identifiable or curve.at - before.at >= CURVE_INTERVAL:
        return True
    names = ("idle_w", "step_j", "token_j", "step_s", "token_s", "prompt_token_j", "prompt_token_s")
    return curve.identifiable and any(
        abs(getattr(curve, name) - getattr(before, name)) > CURVE_CHANGE * getattr(before, name) for name in names
    )
