"""Publishing that does not give up while Kafka is away."""

from collections.abc import Awaitable, Callable
from typing import Final

import stamina
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError, RecordTooLargeError

from shared.runtime.logs import get_logger
from shared.topics import TopicSpec

TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError, RecordTooLargeError)
"""What Kafka will never take, however often it is sent."""

BATCH_BYTES: Final = 512
"""What a batch of one message has around it, at most."""

_log = get_logger(__name__)


def check_size(spec: TopicSpec, *parts: bytes) -> None:
    """Refuse a message that Kafka would refuse, before it is sent.

    Raises:
        MessageSizeTooLargeError: its parts (value, key, headers) are together more than the topic's limit.
    """
    size = sum(map(len, parts)) + BATCH_BYTES
    if size > spec.max_message_bytes:
        raise MessageSizeTooLargeError(f"{size} bytes; the topic {spec.name!r} takes {spec.max_message_bytes}")


async def publish_with_retry(publish: Callable[[], Awaitable[object]]) -> None:
    """Publish, again after a failure that may pass, for as long as it takes; cancellation ends the attempt.

    Raises:
        KafkaError: one of `TOO_LARGE`.
    """
    try:
        await publish()
    except KafkaError as error:
        if isinstance(error, TOO_LARGE):
            raise
        _log.warning("publishing failed, trying again", error=type(error).__name__)
    else:
        return
    async for attempt in stamina.retry_context(on=_may_pass, attempts=None, timeout=None, wait_max=5.0):
        with attempt:
            await publish()


def _may_pass(error: Exception) -> bool:
    return isinstance(error, KafkaError) and not isinstance(error, TOO_LARGE)
