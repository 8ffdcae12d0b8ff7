"""A producer of requests, policies and intensities, and the committed offsets of a consumer group."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from shared.messages import GenerationRequest, Message, Policy
from shared.runtime.settings import KafkaSettings
from shared.topics import CARBON_INTENSITY, POLICIES, REQUESTS, TopicSpec
from tests.support.fleets import MODEL, ZONE
from tests.support.messages import intensity, policy

AHEAD_MS: Final = 60_000
"""Kafka rejects records that are too old when they arrive, and takes those that are this far ahead."""


def timestamp_ms(spec: TopicSpec) -> int | None:
    """The timestamp of a test's record: one that no pause of the machine makes too old for its topic."""
    return None if spec.max_age_ms is None else int(time.time() * 1_000) + AHEAD_MS


@asynccontextmanager
async def producing(kafka: KafkaSettings, **options: Any) -> AsyncIterator["Producer"]:
    """A connected producer.

    Args:
        options: of `AIOKafkaProducer`.
    """
    producer = AIOKafkaProducer(**kafka.client_options(), linger_ms=2, **options)
    await producer.start()
    try:
        yield Producer(producer, kafka)
    finally:
        await producer.stop()


@dataclass
class Producer:
    """A producer of requests, policies and intensities."""

    producer: AIOKafkaProducer
    kafka: KafkaSettings

    async def ask(self, *requests: GenerationRequest) -> None:
        """Send requests; returns when Kafka has acknowledged all."""
        sends = [
            await self.producer.send(
                self.kafka.topic(REQUESTS), one.model_dump_json(exclude_none=True).encode(), key=(one.id or "").encode()
            )
            for one in requests
        ]
        await asyncio.gather(*sends)

    async def raw(self, value: bytes | None, **options: Any) -> Any:
        """Send any bytes as a request; returns the record's metadata."""
        return await self.producer.send_and_wait(self.kafka.topic(REQUESTS), value, **options)

    async def post(self, spec: TopicSpec, message: Message, key: str) -> None:
        """Send a message to a topic."""
        value = message.model_dump_json().encode()
        await self.producer.send_and_wait(
            self.kafka.topic(spec), value, key=key.encode(), timestamp_ms=timestamp_ms(spec)
        )

    async def prepare(self, probabilities: Mapping[str, float], **changes: Any) -> Policy:
        """Publish a policy and a current carbon intensity."""
        made = policy(probabilities, **changes)
        await self.post(CARBON_INTENSITY, intensity(), ZONE)
        await self.post(POLICIES, made, MODEL)
        return made


async def committed(
    kafka: KafkaSettings, group: str = "router", *, topic: TopicSpec = REQUESTS
) -> dict[int, tuple[int, int]]:
    """Committed offset and end offset of every partition of a topic."""
    consumer = AIOKafkaConsumer(**kafka.client_options(), group_id=kafka.group(group), enable_auto_commit=False)
    await consumer.start()
    try:
        partitions = [TopicPartition(kafka.topic(topic), number) for number in range(topic.partitions)]
        ends = await consumer.end_offsets(partitions)
        return {one.partition: (await consumer.committed(one) or 0, ends[one]) for one in partitions}
    finally:
        await consumer.stop()
