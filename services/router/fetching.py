"""How records come to the router: as soon as Kafka has them, and as they are.

FastStream looks after the consumer: its life, its errors, its listener. What it does with records is left out, because
the router does all of it itself, for every record: it sleeps between two looks, whether or not something has come, and
leads every batch through parsers, middlewares and injection, which takes longer than to begin the requests.
"""

from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Any

from aiokafka import AIOKafkaConsumer
from faststream.kafka.subscriber.usecase import BatchSubscriber

LONGEST_WAIT_MS = 250
"""Wall time that one look at the consumer may take: a stop waits for it."""

Take = Callable[[Sequence[Any]], Awaitable[None]]
"""Takes aiokafka's records; the next are fetched when it returns."""


def feed(subscriber: BatchSubscriber, take: Take) -> None:
    """Have a subscriber of batches wait for records and hand them over."""

    async def get_msg(consumer: AIOKafkaConsumer) -> tuple[Any, ...]:
        records = await consumer.getmany(timeout_ms=LONGEST_WAIT_MS, max_records=subscriber.max_records)
        return tuple(chain(*records.values()))

    async def consume_one(msg: tuple[Any, ...]) -> None:
        await take(msg)

    subscriber.get_msg = get_msg  # type: ignore[method-assign]
    subscriber.consume_one = consume_one  # type: ignore[method-assign]
