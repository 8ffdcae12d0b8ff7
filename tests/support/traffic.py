"""A producer of requests, policies and intensities, and the committed offsets of a consumer group."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from shared.messages import GenerationRequest, Message, Policy
from shared.runtime.settings import KafkaSettings
from shared.topics import CARBON_INTENSITY, POLICIES, REQUESTS, TopicSpec
from tests.support.fleets import MODEL, ZONE
from tests.support.messages import intensity, policy


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
        await self.producer.send_and_wait(self.kafka.topic(spec), message.model_dump_json().encode(), key=key.encode())

    async def prepare(self, probabilities: Mapping[str, float], **changes: Any) -> Policy:
        """Publish a policy and a current carbon intensity."""
        made = policy(probabilities, **changes)
        await self.post(CARBON_INTENSITY, intensity(), ZONE)
        await self.post(POLICIES, made, MODEL)
        return made


async def committed(
    kafka: KafkaSettings, group: str = "router", *, topic: TopicSpec = REQUESTS
) -> dict[int, tuple[int, int]]:
    """Committed offset and end offset of every partition of `requests` or a lane."""
    consumer = AIOKafkaConsumer(**kafka.client_options(), group_id=kafka.group(group), enable_auto_commit=False)
    await consumer.start()
    try:
        partitions = [TopicPartition(kafka.topic(topic), number) for number in range(REQUESTS.partitions)]
        ends = await consumer.end_offsets(partitions)
        return {one.partition: (await consumer.committed(one) or 0, ends[one]) for one in partitions}
    finally:
        await consumer.stop()
