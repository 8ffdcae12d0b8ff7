"""Publishes to Kafka: footprints from PostgreSQL, each at least once (transactional outbox pattern), and curves."""

import asyncio
from collections.abc import Iterable
from datetime import timedelta

from aiokafka.errors import KafkaError

from services.ledger.footprint import footprint_message
from services.ledger.metrics import LedgerMetrics
from services.ledger.sql import MARK_PUBLISHED, PUBLICATION_LOCK, UNPUBLISHED_FOOTPRINTS, Storage
from shared.kafka.publish import Publisher
from shared.messages import EndpointCurve, Footprint
from shared.runtime.database import translate_errors
from shared.runtime.logs import get_logger

BATCH = 500

CURVE_INTERVAL = timedelta(hours=1)
"""Event time after which a curve is published although it has hardly changed."""
CURVE_CHANGE = 0.02
"""Relative change of a coefficient with which a curve is published at once."""

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
