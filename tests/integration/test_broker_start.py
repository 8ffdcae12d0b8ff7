"""The start of a broker while connections to Kafka fail: every subscriber is tried again, and works afterwards."""

from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaConnectionError
from prometheus_client import CollectorRegistry

from shared.kafka.admin import create_topics
from shared.kafka.broker import build_broker
from shared.kafka.subscribe import subscribe_batches, subscribe_compacted
from shared.runtime.clock import Clock
from shared.topics import DEAD_LETTERS, FOOTPRINTS, POLICIES
from tests.support.contract import EXAMPLES
from tests.support.deadlines import until
from tests.support.router import producing

pytestmark = pytest.mark.integration

FAILING = (1, 2, 4)
"""Starts of a consumer that fail: two of the first subscriber, one of the second."""


async def test_subscribers_start_once_kafka_lets_them(kafka_settings, monkeypatch):
    kafka = kafka_settings
    await create_topics(kafka, specs=[POLICIES, FOOTPRINTS, DEAD_LETTERS])
    broker, dead_letters = build_broker(kafka, service="test", clock=Clock(), registry=CollectorRegistry())
    received: list[Any] = []

    @subscribe_compacted(broker, kafka, dead_letters, POLICIES)
    async def on_policies(messages: list[Any]) -> None:
        received.extend(messages)

    @subscribe_batches(broker, kafka, dead_letters, FOOTPRINTS, group="test", max_records=10)
    async def on_footprints(messages: list[Any]) -> None:
        received.extend(messages)

    starts = 0
    start = AIOKafkaConsumer.start

    async def failing_start(consumer: AIOKafkaConsumer) -> None:
        nonlocal starts
        starts += 1
        if starts in FAILING:
            raise KafkaConnectionError("no broker answers")
        await start(consumer)

    monkeypatch.setattr(AIOKafkaConsumer, "start", failing_start)
    await broker.start()
    try:
        assert starts == len(FAILING) + 2
        monkeypatch.undo()
        async with producing(kafka) as producer:
            for spec in (POLICIES, FOOTPRINTS):
                await producer.post(spec, EXAMPLES[spec.name], "m")
        await until(lambda: len(received) == 2)
    finally:
        await broker.stop()
