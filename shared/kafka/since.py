"""Reads topics from a time on up to their present end, beside the subscribers and without a consumer group."""

from collections.abc import AsyncGenerator, Collection
from typing import Final

from aiokafka import AIOKafkaConsumer, ConsumerRecord
from faststream.kafka import KafkaBroker

from shared.kafka.broker import note_read, unreadable_records
from shared.kafka.reading import Since
from shared.runtime.settings import KafkaSettings
from shared.topics import TopicSpec

_POLL_MS: Final = 200


class SinceReader:
    """Reads topics from a time on. What must not be unpacked is found before the broker starts, and passed by."""

    def __init__(
        self,
        broker: KafkaBroker,
        kafka: KafkaSettings,
        *specs: TopicSpec,
        how: str,
        group: str,
        committed: Collection[str],
        prefix: str,
        margin_ms: int,
    ) -> None:
        """Set up; connects to nothing.

        Args:
            how: the topics are read, see `shared.kafka.broker.Read`.
            group, committed, prefix, margin_ms: from when on they may be read after the start, see `Since`.
        """
        self._kafka = kafka
        self._topics = [kafka.topic(spec) for spec in specs]
        self._unreadable = unreadable_records(broker, kafka)
        self._unreadable.watch_since(
            Since(topics=self._topics, group=group, committed=list(committed), prefix=prefix, margin_ms=margin_ms)
        )
        for spec in specs:
            note_read(broker, spec, how)

    async def read(self, since_ms: int) -> AsyncGenerator[Collection["ConsumerRecord[bytes, bytes]"]]:
        """All records from a time on, Unix milliseconds.

        Raises:
            KafkaError: Kafka could not be read.
        """
        consumer = AIOKafkaConsumer(
            *self._topics,
            **self._kafka.client_options(),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        try:
            await consumer.start()
            partitions = consumer.assignment()
            ends = await consumer.end_offsets(partitions)
            begins = await consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
            left = {one for one, begin in begins.items() if begin is not None and begin.offset < ends[one]}
            for partition in partitions:
                if partition not in left:
                    consumer.pause(partition)
                    continue
                offset = begins[partition].offset
                for bad in self._unreadable.after(partition, offset):
                    yield await self._unreadable.read(partition, range(offset, bad.start))
                    offset = bad.stop
                consumer.seek(partition, offset)
            while left:
                for records in (await consumer.getmany(timeout_ms=_POLL_MS)).values():
                    yield records
                left = {partition for partition in left if await consumer.position(partition) < ends[partition]}
        finally:
            await consumer.stop()
