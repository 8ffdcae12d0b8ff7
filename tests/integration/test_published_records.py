"""What is on Kafka is what the AsyncAPI documents describe, also after a message that Kafka rejects."""

import random

import jsonschema
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError
from faststream.kafka import KafkaPublishMessage
from prometheus_client import CollectorRegistry

from shared.kafka.broker import build_broker
from shared.kafka.publish import declare_batch_publisher, declare_publisher
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from shared.topics import (
    DEAD_LETTERS,
    FOOTPRINTS,
    MEBIBYTE,
    POLICIES,
    REQUESTS,
    RESPONSE_CHUNKS,
    RESPONSES,
    SAMPLES,
    TOPICS,
    TopicSpec,
)
from tests.support.contract import EXAMPLES, check_record, documents
from tests.support.router import reading, request
from tests.support.traffic import timestamp_ms

pytestmark = pytest.mark.integration

TOO_LARGE = random.Random(1).randbytes(2 * MEBIBYTE)
"""More than the topics below accept, also compressed."""


def check(described, spec: TopicSpec, record) -> None:
    """Check a record against every document that has its topic."""
    for document in described.values():
        if spec.name in document["channels"]:
            check_record(document, spec, key=record.key, value=record.value, headers=record.headers)


async def test_the_records_of_every_service_are_as_described(kafka):
    described = documents()
    broker, _ = build_broker(kafka, service="test", clock=Clock(), registry=CollectorRegistry())
    publishers = {spec.name: declare_publisher(broker, kafka, spec) for spec in TOPICS if spec is not REQUESTS}
    await broker.start()
    try:
        for spec in TOPICS:
            if spec is not REQUESTS:
                await publishers[spec.name].publish(EXAMPLES[spec.name], key=b"k", timestamp_ms=timestamp_ms(spec))
    finally:
        await broker.stop()
    for spec in TOPICS:
        if spec is not REQUESTS:
            async with reading(kafka, spec) as found:
                (record,) = await found.read(until=1)
                check(described, spec, record)
                assert spec.message.model_validate_json(record.value) == EXAMPLES[spec.name]


async def test_the_records_of_a_router_are_as_described(kafka, routers, producer):
    described = documents()
    await producer.prepare({"L1": 1.0})
    routers.start(SPROUT_ROUTER_SAMPLE_SHARE="1")
    await producer.ask(request(1, stream=True))
    raw = AIOKafkaProducer(**kafka.client_options())
    await raw.start()
    try:
        await raw.send_and_wait(kafka.topic(REQUESTS), b"{broken", key=b"k")
    finally:
        await raw.stop()
    for spec in (RESPONSES, RESPONSE_CHUNKS, SAMPLES, DEAD_LETTERS):
        async with reading(kafka, spec) as found:
            for record in await found.read(until=1, settle_s=0.5):
                check(described, spec, record)
                names = {name for name, _ in record.headers}
                assert ("sprout-request" in names) == (spec in (RESPONSES, DEAD_LETTERS))
                with pytest.raises(jsonschema.ValidationError):
                    check(described, spec, type("Keyless", (), {**vars_of(record), "key": None}))


def vars_of(record) -> dict[str, object]:
    return {name: getattr(record, name) for name in ("key", "value", "headers")}


async def test_a_publisher_goes_on_after_a_message_that_kafka_rejects(kafka: KafkaSettings):
    broker, _ = build_broker(kafka, service="test", clock=Clock(), registry=CollectorRegistry())
    policies, footprints = (declare_publisher(broker, kafka, spec) for spec in (POLICIES, FOOTPRINTS))
    await broker.start()
    try:
        await policies.publish(b"small", key=b"k")
        with pytest.raises(MessageSizeTooLargeError):
            await policies.publish(TOO_LARGE, key=b"k")
        await policies.publish(b"small", key=b"k")
        await footprints.publish(b"small", key=b"k")
    finally:
        await broker.stop()
    async with reading(kafka, POLICIES) as found:
        assert [record.value for record in await found.read(until=2, settle_s=0.3)] == [b"small", b"small"]


async def test_a_batch_goes_to_one_partition_in_its_order_and_a_message_that_is_too_large_costs_no_later_one(
    kafka: KafkaSettings,
):
    broker, _ = build_broker(kafka, service="test", clock=Clock(), registry=CollectorRegistry(), batch_bytes=4_096)
    publisher = declare_batch_publisher(broker, kafka, FOOTPRINTS)
    messages = [KafkaPublishMessage(b"%04d" % number * 25, key=b"k%d" % number) for number in range(500)]
    await broker.start()
    try:
        # The topic has six partitions.
        await publisher.publish(*messages, headers={"content-type": "application/json"}, partition=8)
        with pytest.raises(MessageSizeTooLargeError):
            await publisher.publish(*messages[:2], KafkaPublishMessage(TOO_LARGE, key=b"k"), partition=1)
        await publisher.publish(*messages[:2], partition=1)
        await publisher.publish(messages[0])
    finally:
        await broker.stop()
    async with reading(kafka, FOOTPRINTS) as found:
        records = await found.read(until=503, settle_s=0.3)
    together = [record for record in records if record.partition == 2]
    assert [(one.key, one.value) for one in together[:500]] == [(one.key, one.body) for one in messages]
    assert all(dict(one.headers)["content-type"] == b"application/json" for one in together[:500])
    assert sum(record.partition == 1 for record in records) >= 2
