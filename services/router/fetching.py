"""How records come to the router: at once where they come one by one, together where there are many."""

import asyncio
import time
from itertools import chain
from typing import Any

from aiokafka import AIOKafkaConsumer
from faststream.kafka.subscriber.usecase import BatchSubscriber

LONGEST_WAIT_MS = 250
"""Wall time that one look at the consumer may take: a stop waits for it."""


def wait_for_records(subscriber: BatchSubscriber, *, least_interval_s: float) -> None:
    """Have a subscriber of batches wait for records.

    FastStream's own looks, sleeps as long as it has looked, and looks again, whether or not records have come by then:
    with looks as short as a request calls for, that costs it a millisecond, and an idle router a twentieth of a core.

    Args:
        least_interval_s: wall time from one batch to the next: a batch has a price, which many records share.
    """
    taken_s = 0.0

    async def get_msg(consumer: AIOKafkaConsumer) -> tuple[Any, ...]:
        nonlocal taken_s
        await asyncio.sleep(max(0.0, taken_s + least_interval_s - time.monotonic()))
        records = await consumer.getmany(timeout_ms=LONGEST_WAIT_MS, max_records=subscriber.max_records)
        taken_s = time.monotonic()
        return tuple(chain(*records.values()))

    subscriber.get_msg = get_msg  # type: ignore[method-assign]
