"""Subscribing to what every process must know in full: the compacted topics."""

import asyncio
from collections.abc import Collection
from typing import Any

from aiokafka.errors import KafkaError
from faststream.kafka import KafkaBroker
from faststream.kafka.subscriber.usecase import BatchSubscriber
from faststream.middlewares import AckPolicy

from shared.kafka.dead_letters import DeadLetterPublisher, batch_decoder
from shared.runtime.settings import KafkaSettings
from shared.topics import TopicSpec

POLL_MS = 100
"""Wall milliseconds between two looks for news."""

HANDLING_S = 0.05
"""Wall seconds in which what was read last is handled."""


def subscribe_compacted(
    broker: KafkaBroker, kafka: KafkaSettings, dead_letters: DeadLetterPublisher, spec: TopicSpec, *, description: str
) -> BatchSubscriber:
    """A subscriber that reads a topic from its beginning at each start and keeps no position.

    It belongs to no consumer group: each process reads all of it, and what a handler missed comes again at the next
    start.
    """
    return broker.subscriber(
        kafka.topic(spec),
        decoder=batch_decoder(spec.message, dead_letters),
        title=spec.name,
        description=description,
        # A record's header `reply_to` names a topic that FastStream would answer to.
        no_reply=True,
        batch=True,
        batch_timeout_ms=POLL_MS,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.ACK_FIRST,
    )


async def read_to_end(subscribers: Collection[BatchSubscriber], *, within_s: float) -> bool:
    """Wait until followed topics have been read up to what they hold now.

    Returns:
        Whether that was done within `within_s` (wall).
    """
    try:
        async with asyncio.timeout(within_s):
            for subscriber in subscribers:
                while not await _at_end(subscriber.consumer):  # noqa: ASYNC110 - a position has no event
                    await asyncio.sleep(HANDLING_S)
            await asyncio.sleep(HANDLING_S)
    except TimeoutError:
        return False
    return True


async def _at_end(consumer: Any) -> bool:  # noqa: ANN401 - aiokafka has no types
    """Whether a consumer without a group has been handed all that its topic held a moment ago."""
    if consumer is None:
        return False
    try:
        partitions = consumer.assignment()
        ends = await consumer.end_offsets(partitions) if partitions else {}
        return bool(ends) and all([await consumer.position(one) >= end for one, end in ends.items()])
    except KafkaError:
        return False
