"""Publishing to Kafka: publishers, size limits, retries.

Services declare FastStream publishers and call `publisher.publish(message, key=...)`; `shared.kafka.producer` sends the
message.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import stamina
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError, RecordTooLargeError
from faststream.kafka import KafkaBroker

from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings
from shared.topics import TopicSpec

TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError, RecordTooLargeError)
"""Errors of a message that Kafka rejects however often it is sent."""

BATCH_OVERHEAD_BYTES: Final = 512
"""Upper limit of the bytes that Kafka's format, and compression in vain, add to a batch of one message."""

_log = get_logger(__name__)


class Publisher(Protocol):
    """The part of a FastStream publisher that services use."""

    async def publish(
        self,
        message: Any,  # noqa: ANN401 - a message, or its bytes
        /,
        *,
        key: bytes | None = None,
        headers: dict[str, str] | None = None,
        correlation_id: str | None = None,
        timestamp_ms: int | None = None,
        partition: int | None = None,
    ) -> object:
        """Publish a message; returns once Kafka has it.

        Args:
            partition: None: the key decides.
            correlation_id: sent as a header; None: FastStream draws a UUID, a system call for every message.

        Raises:
            KafkaError: it could not be published, or Kafka did not say whether it was.
        """


class BatchPublisher(Protocol):
    """The part of a FastStream publisher of batches that services use."""

    async def publish(
        self,
        *messages: Any,  # noqa: ANN401 - messages, or `KafkaPublishMessage` with a key each
        headers: dict[str, str] | None = None,
        correlation_id: str | None = None,
        partition: int | None = None,
    ) -> object:
        """Publish messages; returns once Kafka has them all.

        Args:
            partition: of several messages, which need one: all of them go there, whatever their keys, see
                `shared.kafka.producer.RecoveringProducer.send_batches`.

        Raises:
            ValueError: several messages without a partition.
            KafkaError: some could not be published, or Kafka did not say whether they were.
        """


def declare_batch_publisher(broker: KafkaBroker, kafka: KafkaSettings, spec: TopicSpec) -> BatchPublisher:
    """The FastStream publisher of batches of a topic's messages, described in the service's AsyncAPI document."""
    return broker.publisher(
        kafka.topic(spec), batch=True, schema=spec.message, title=spec.name, description=spec.description
    )


def declare_publisher(broker: KafkaBroker, kafka: KafkaSettings, spec: TopicSpec) -> Publisher:
    """The FastStream publisher of a topic's messages, described in the service's AsyncAPI document."""
    return broker.publisher(kafka.topic(spec), schema=spec.message, title=spec.name, description=spec.description)


def check_size(spec: TopicSpec, *parts: bytes) -> None:
    """Reject a message that Kafka would reject, before it is sent.

    Raises:
        MessageSizeTooLargeError: value, key and headers together exceed the limit of the topic.
    """
    size = sum(map(len, parts)) + BATCH_OVERHEAD_BYTES
    if size > spec.max_message_bytes:
        raise MessageSizeTooLargeError(f"{size} bytes; topic {spec.name!r} accepts {spec.max_message_bytes}")


async def publish_with_retry(publish: Callable[[], Awaitable[object]]) -> None:
    """Call `publish` until it succeeds; retries without a limit, at most 5 s apart. Cancellation ends it.

    Raises:
        KafkaError: one of `TOO_LARGE`, which no retry would cure.
    """
    try:
        await publish()
    except KafkaError as error:
        if isinstance(error, TOO_LARGE):
            raise
        _log.warning("publishing failed, retrying", error=type(error).__name__)
    else:
        return
    async for attempt in stamina.retry_context(on=_is_temporary, attempts=None, timeout=None, wait_max=5.0):
        with attempt:
            await publish()


def _is_temporary(error: Exception) -> bool:
    return isinstance(error, KafkaError) and not isinstance(error, TOO_LARGE)
