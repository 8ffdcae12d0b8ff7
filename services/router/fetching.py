"""How records come to the router: at once where they come one by one, together where there are many.

FastStream looks after the consumer: its life, its errors, its listener. What it does with records is left out, because
the router does all of it itself, for every record: it looks at the consumer over and over, whether or not something has
come, and leads every batch through parsers, middlewares and injection, which takes longer than to begin the requests.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Any

from aiokafka import AIOKafkaConsumer
from faststream.kafka.subscriber.usecase import BatchSubscriber

LONGEST_WAIT_MS = 250
"""Wall time that one look at the consumer may take: a stop waits for it."""

Take = Callable[[Sequence[Any]], Awaitable[None]]
"""Takes aiokafka's records; the next are fetched when it returns."""


def feed(subscriber: BatchSubscriber, take: Take, *, least_interval_s: float) -> None:
    """Have a subscriber of batches wait for records and hand them over as they are.

    Args:
        least_interval_s: wall time from one batch to the next: a batch has a price, which many records share.
    """
    taken_s = 0.0

    async def get_msg(consumer: AIOKafkaConsumer) -> tuple[Any, ...]:
        nonlocal taken_s
        if (early_s := taken_s + least_interval_s - time.monotonic()) > 0.0:
            await asyncio.sleep(early_s)
        records = await consumer.getmany(timeout_ms=LONGEST_WAIT_MS, max_records=subscriber.max_records)
        taken_s = time.monotonic()
        return tuple(chain(*records.values()))

    async def consume_one(msg: tuple[Any, ...]) -> None:
        await take(msg)

    subscriber.get_msg = get_msg  # type: ignore[method-assign]
    subscriber.consume_one = consume_one  # type: ignore[method-assign]
