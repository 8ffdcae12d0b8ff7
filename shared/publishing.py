"""Publishing that does not give up while Kafka is away."""

from collections.abc import Awaitable, Callable

import stamina
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError, RecordTooLargeError

from shared.logs import get_logger

TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError, RecordTooLargeError)
"""What Kafka will never take, however often it is sent."""

_log = get_logger(__name__)


async def insist(publish: Callable[[], Awaitable[object]]) -> None:
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
