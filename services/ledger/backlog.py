"""Up to which instant everything that was published is in the books: the offsets of the whole consumer group tell."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from shared.runtime.clock import Clock

Offsets = Mapping[TopicPartition, int]


class CaughtUp:
    """Compares what is committed with where the topics ended earlier; a commit follows the write to PostgreSQL."""

    def __init__(self) -> None:
        self.until: datetime | None = None
        """Everything that was published by then is in the books; null while that is not known."""
        self._pending: tuple[datetime, Offsets] | None = None

    def observe(self, now: datetime, ends: Offsets, committed: Offsets) -> None:
        """Take in the ends of all partitions at an event time, and what had been committed afterwards."""
        if _reached(ends, committed):
            self.until, self._pending = now, None
        elif self._pending is None:
            self._pending = (now, ends)
        elif _reached(self._pending[1], committed):
            self.until, self._pending = self._pending[0], (now, ends)


class Backlog:
    """Watches the topics with calls, whichever ledger of the group reads them."""

    def __init__(self, consumers: Sequence[Callable[[], Any]], topics: Sequence[str], *, clock: Clock) -> None:
        """Nothing is known yet.

        Args:
            consumers: of each topic, once it has started; aiokafka has no types.
        """
        self._consumers = consumers
        self._topics = topics
        self._clock = clock
        self._caught_up = CaughtUp()

    @property
    def read_until(self) -> datetime | None:
        """Everything that was published by then is in the books."""
        return self._caught_up.until

    async def look(self) -> int | None:
        """Ask Kafka; returns how many records wait, or null where it does not tell."""
        now = self._clock.now()
        ends: dict[TopicPartition, int] = {}
        committed: dict[TopicPartition, int] = {}
        try:
            for consumer_of, topic in zip(self._consumers, self._topics, strict=True):
                consumer = consumer_of()
                numbers = consumer.partitions_for_topic(topic) if consumer is not None else None
                if not numbers:
                    return None
                partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
                ends |= await consumer.end_offsets(partitions)
                begins = await consumer.beginning_offsets(partitions)
                for partition in partitions:
                    committed[partition] = max(await consumer.committed(partition) or 0, begins[partition])
        except KafkaError:
            return None
        self._caught_up.observe(now, ends, committed)
        return sum(max(0, end - committed[partition]) for partition, end in ends.items())


def _reached(ends: Offsets, committed: Offsets) -> bool:
    return all(committed.get(partition, 0) >= end for partition, end in ends.items())
