"""The local Kafka and PostgreSQL have the properties that the services need."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError
from click.testing import Result
from typer.testing import CliRunner

from shared.kafka.admin import create_topics, plan_topics, read_topics
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import DEAD_LETTERS, POLICIES, QUALITY, REQUESTS, TOPICS, TopicSpec
from tests.support.deadlines import DEADLINE_S, until
from tools.cli.main import app

pytestmark = pytest.mark.integration


async def test_every_declared_topic_exists_and_a_second_creation_changes_nothing(kafka):
    again = await create_topics(kafka)
    assert {one.topic for one in again} == {kafka.topic(spec) for spec in TOPICS}
    assert not any(one.created for one in again)
    assert not any(one.changed or one.drift for one in again)
    assert await plan_topics(kafka) == []


async def test_existing_topics_are_changed_as_far_as_nothing_is_lost_and_the_rest_is_reported(kafka, monkeypatch):
    def sprout(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["topics", *arguments, "--bootstrap", kafka.bootstrap_servers])

    async def differ(expected: set[tuple[str, str, str]]) -> None:
        """Wait for these differences: the broker learns of a change after the controller."""
        found: set[tuple[str, str, str]] = set()
        try:
            async with asyncio.timeout(DEADLINE_S):
                while found != expected:
                    plan = await plan_topics(kafka)
                    found = {(one.topic.removeprefix(kafka.topic_prefix), one.setting, one.how) for one in plan}
        except TimeoutError:
            raise AssertionError(found) from None

    monkeypatch.setenv("SPROUT_KAFKA_TOPIC_PREFIX", kafka.topic_prefix)
    overrides = {"requests": {"partitions": 14, "retention_h": 200}, "samples": {"partitions": 2, "retention_h": 1}}
    monkeypatch.setenv("SPROUT_TOPICS_OVERRIDES", json.dumps(overrides))
    # As an earlier release had it, with a value that an operator has set.
    earlier = {**QUALITY.configuration(), "cleanup.policy": "compact", "segment.bytes": "2000000"}
    await configure(kafka, QUALITY, earlier)
    # Segments get shorter with the retention, so that records really go.
    harmless = {
        ("requests", "partitions", "apply"),
        ("requests", "retention.ms", "apply"),
        ("samples", "segment.ms", "apply"),
    }
    harmful = {("samples", "retention.ms", "loses"), ("quality", "cleanup.policy", "loses")}
    impossible = {("samples", "partitions", "manual")}
    await differ(harmless | harmful | impossible)
    planned = await asyncio.to_thread(sprout, "plan")
    assert planned.exit_code == 1
    assert "requests: partitions 12 -> 14" in planned.output
    created = await asyncio.to_thread(sprout, "create")
    assert created.exit_code == 0, created.output
    await differ(harmful | impossible)
    await asyncio.to_thread(sprout, "create", "--allow-loss")
    await differ(impossible)
    async with administering(kafka) as admin:
        topic = kafka.topic(QUALITY)
        found = (await read_topics(admin, [topic]))[topic]
    assert found.overridden["segment.bytes"] == "2000000"
    assert (found.configuration["retention.ms"], found.configuration["cleanup.policy"]) == ("31536000000", "delete")


@asynccontextmanager
async def administering(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def configure(kafka: KafkaSettings, spec: TopicSpec, values: dict[str, str]) -> None:
    """Set these values on a topic, and no others."""
    async with administering(kafka) as admin:
        (answer,) = await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, kafka.topic(spec), values)])
        assert [code for code, *_ in answer.resources] == [0], answer


@pytest.mark.parametrize("spec", [POLICIES, DEAD_LETTERS], ids=lambda spec: spec.name)
async def test_a_topic_has_its_declared_configuration(kafka, spec):
    resource = ConfigResource(ConfigResourceType.TOPIC, kafka.topic(spec), dict.fromkeys(spec.configuration(), ""))
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    try:
        # The broker learns of a new topic after the controller.
        (answer,) = await until(lambda: admin.describe_configs([resource]), lambda found: found[0].resources[0][0] == 0)
    finally:
        await admin.close()
    assert {entry[0]: entry[1] for entry in answer.resources[0][4]} == spec.configuration()


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
        async with asyncio.timeout(DEADLINE_S):
            while len(values) < count:
                batches = await consumer.getmany(timeout_ms=500, max_records=count - len(values))
                values += [record.value for records in batches.values() for record in records]
        await consumer.commit()
    finally:
        await consumer.stop()
    return values
