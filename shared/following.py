"""Subscribing to what every process must know in full: the compacted topics."""

from faststream.kafka import KafkaBroker
from faststream.kafka.subscriber.usecase import BatchSubscriber
from faststream.middlewares import AckPolicy

from shared.dead_letters import DeadLetterOffice, batch_decoder
from shared.settings import KafkaSettings
from shared.topics import TopicSpec

POLL_MS = 100
"""Wall milliseconds between two looks for news."""


def follow(
    broker: KafkaBroker, kafka: KafkaSettings, office: DeadLetterOffice, spec: TopicSpec, *, description: str
) -> BatchSubscriber:
    """A subscriber that reads a topic from its beginning at each start and keeps no position.

    It belongs to no consumer group: each process reads all of it, and what a handler missed comes again at the next
    start.
    """
    return broker.subscriber(
        kafka.topic(spec),
        decoder=batch_decoder(spec.message, office),
        title=spec.name,
        description=description,
        batch=True,
        batch_timeout_ms=POLL_MS,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.ACK_FIRST,
    )
