"""The local Kafka and PostgreSQL have the properties that the services need."""

import asyncio

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from shared.kafka.admin import create_topics
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import DEAD_LETTERS, POLICIES, REQUESTS, TOPICS

pytestmark = pytest.mark.integration


async def test_every_declared_topic_exists_and_a_second_creation_changes_nothing(kafka):
    again = await create_topics(kafka)
    assert {one.topic for one in again} == {kafka.topic(spec) for spec in TOPICS}
    assert not any(one.created for one in again)
    assert all(not one.note for one in again)


@pytest.mark.parametrize("spec", [POLICIES, DEAD_LETTERS], ids=lambda spec: spec.name)
async def test_a_topic_has_its_declared_configuration(kafka, spec):
    resource = ConfigResource(ConfigResourceType.TOPIC, kafka.topic(spec), dict.fromkeys(spec.configuration(), ""))
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        async with asyncio.timeout(10):
            while True:
                (answer,) = await admin.describe_configs([resource])
                code, _, _, _, entries = answer.resources[0]
                if code == 0:
                    break
                await asyncio.sleep(0.1)  # the broker learns of a new topic after the controller
    finally:
        await admin.close()
    assert {entry[0]: entry[1] for entry in entries} == spec.configuration()


async def test_a_group_consumes_records_and_resumes_after_its_committed_offset(kafka):
    topic = kafka.topic(REQUESTS)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, enable_idempotence=True, acks="all")
    await producer.start()
    try:
        await asyncio.gather(*[producer.send_and_wait(topic, b"v%d" % n, key=b"k%d" % n) for n in range(200)])
    finally:
        await producer.stop()
    first = await _consume(kafka, topic, 120)
    second = await _consume(kafka, topic, 80)
    assert sorted(first + second) == sorted(b"v%d" % n for n in range(200))


async def test_topics_are_not_created_automatically(kafka):
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, request_timeout_ms=1_500)
    await producer.start()
    try:
        with pytest.raises((KafkaError, TimeoutError)):
            await asyncio.wait_for(producer.send_and_wait(kafka.topic_prefix + "nobody-declared", b"x"), 3)
    finally:
        await producer.stop()
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        assert kafka.topic_prefix + "nobody-declared" not in await admin.list_topics()
    finally:
        await admin.close()


async def test_a_dead_letter_may_have_several_megabytes(kafka):
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, max_request_size=8 * 1024 * 1024)
    await producer.start()
    try:
        kept = await producer.send_and_wait(kafka.topic(DEAD_LETTERS), b"x" * (6 * 1024 * 1024))
    finally:
        await producer.stop()
    assert kept.offset == 0


async def test_every_test_has_its_own_empty_database(database: DatabaseSettings):
    connection = await asyncpg.connect(database.url.get_secret_value())
    try:
        assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
        assert (await connection.fetchval("SHOW server_version")).startswith("18.")
        assert await connection.fetchval("SHOW listen_addresses") == "127.0.0.1"
    finally:
        await connection.close()


async def _consume(kafka: KafkaSettings, topic: str, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=kafka.group("reader"),
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        max_poll_records=count,
    )
    await consumer.start()
    values: list[bytes] = []
    try:
        async with asyncio.timeout(20):
            while len(values) < count:
                batches = await consumer.getmany(timeout_ms=500, max_records=count - len(values))
                values += [record.value for records in batches.values() for record in records]
        await consumer.commit()
    finally:
        await consumer.stop()
    return values
