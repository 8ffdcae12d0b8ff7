"""The fallback broker: good enough for Sprout's own clients, in a process of its own."""

import asyncio

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from prometheus_client import CollectorRegistry

from deploy.local.mock_broker import mock_broker_spec
from deploy.local.processes import Supervisor
from shared.kafka.broker import build_broker, wait_for_kafka
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from shared.topics import REQUESTS, TOPICS

pytestmark = pytest.mark.integration


@pytest.fixture
def in_memory(tmp_path):
    running = Supervisor(tmp_path / "logs")
    try:
        spec, address_file = mock_broker_spec(tmp_path, topics=[f"sprout.{topic.name}" for topic in TOPICS])
        running.start(spec)
        yield KafkaSettings(bootstrap_servers=address_file.read_text(), connect_timeout_s=10)
    finally:
        running.stop_all()


async def test_it_listens_on_loopback_and_has_every_topic_from_the_start(in_memory):
    assert in_memory.bootstrap_servers.startswith("127.0.0.1:")
    await wait_for_kafka(in_memory, [in_memory.topic(spec) for spec in TOPICS])


async def test_a_service_s_broker_produces_consumes_and_commits_on_it(in_memory):
    broker, _ = build_broker(in_memory, service="test", clock=Clock(), registry=CollectorRegistry())
    received: set[bytes] = set()
    everything = asyncio.Event()

    @broker.subscriber(in_memory.topic(REQUESTS), group_id=in_memory.group("test"), auto_offset_reset="earliest")
    async def handle(message: bytes) -> None:
        received.add(message)
        if len(received) == 300:
            everything.set()

    async with broker:
        await broker.start()
        for number in range(300):
            await broker.publish(b"m%d" % number, topic=in_memory.topic(REQUESTS), key=b"%d" % number)
        await asyncio.wait_for(everything.wait(), 20)
    assert received == {b"m%d" % number for number in range(300)}
    assert await _committed(in_memory) == 300


async def _committed(kafka: KafkaSettings) -> int:
    """Records that the group `test` has acknowledged, over all partitions; asked without joining it."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=kafka.group("test"), enable_auto_commit=False
    )
    await consumer.start()
    try:
        partitions = [TopicPartition(kafka.topic(REQUESTS), number) for number in range(4)]
        consumer.assign(partitions)
        return sum([await consumer.committed(partition) or 0 for partition in partitions])
    finally:
        await consumer.stop()
