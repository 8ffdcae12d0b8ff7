"""Partitions and offsets of topics, queried from a broker."""

from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from shared.runtime.settings import KafkaSettings


async def existing_partitions(kafka: KafkaSettings, topics: list[str]) -> list[TopicPartition]:
    """All partitions of the topics that exist.

    Raises:
        KafkaError: the broker cannot be reached.
    """
    admin = AIOKafkaAdminClient(**kafka.client_options(), request_timeout_ms=5_000)
    try:
        await admin.start()
        existing = sorted(set(await admin.list_topics()) & set(topics))
        found = await admin.describe_topics(existing) if existing else []
    finally:
        await admin.close()
    return [TopicPartition(one["topic"], entry["partition"]) for one in found for entry in one["partitions"]]


async def offsets_by_topic(kafka: KafkaSettings, topics: list[str]) -> dict[str, dict[int, tuple[int, int]]]:
    """First and next offset, by topic and partition; topics that do not exist are left out.

    Raises:
        KafkaError: the broker cannot be reached.
    """
    partitions = await existing_partitions(kafka, topics)
    consumer: Any = AIOKafkaConsumer(**kafka.client_options(), enable_auto_commit=False)
    try:
        await consumer.start()
        first = await consumer.beginning_offsets(partitions)
        following = await consumer.end_offsets(partitions)
    finally:
        await consumer.stop()
    offsets: dict[str, dict[int, tuple[int, int]]] = {}
    for one in partitions:
        offsets.setdefault(one.topic, {})[one.partition] = (first[one], following[one])
    return offsets
