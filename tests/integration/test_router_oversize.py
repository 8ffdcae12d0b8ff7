"""Responses that are larger than their topic allows, on real Kafka: they become errors and do not affect others."""

import asyncio
import secrets

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from shared.runtime.settings import KafkaSettings
from shared.topics import MEBIBYTE, RESPONSES, TopicSpec
from tests.support.router import page, reading, request, until_committed

pytestmark = pytest.mark.integration

NEARLY = MEBIBYTE - 700
"""Characters of metadata with which a request just fits its topic and its response does not."""

INCOMPRESSIBLE = secrets.token_urlsafe(45_000)
"""60,000 characters, of which compression leaves about 45,000 bytes."""


async def test_a_response_that_is_too_large_becomes_an_error_and_later_ones_are_published(kafka, routers, producer):
    assert RESPONSES.max_message_bytes == MEBIBYTE
    await producer.prepare({"L1": 1.0})
    router = routers.start()
    large = request(100, metadata={"n": "x" * NEARLY})
    async with reading(kafka) as answers:
        # Every partition gets a response before the large one, and one after it.
        await producer.ask(*(request(number) for number in range(60)))
        await answers.ids(f"r{number}" for number in range(60))
        await producer.ask(large)
        await answers.ids(["r100"])
        await producer.ask(*(request(number) for number in range(200, 260)))
        await answers.ids([*(f"r{number}" for number in range(60)), "r100", *(f"r{n}" for n in range(200, 260))])
        await until_committed(kafka)
        await answers.read_to_end()
        assert len(answers.records) == 121
        responses = answers.responses()
    large_one = responses.pop("r100")
    assert (large_one.status, large_one.error.code) == ("error", "upstream_error")
    assert "larger than the topic allows" in large_one.error.message
    assert large_one.usage.completion_tokens > 0
    assert {response.status for response in responses.values()} == {"ok"}
    metrics = await asyncio.to_thread(page, f"{routers.supervisor.process(router).spec.url}/metrics")
    assert 'outcome="upstream_error"' in metrics


async def test_a_topic_with_a_lower_limit_than_specified_affects_no_other_response(kafka, routers, producer):
    """Kafka rejects the batch, and every later batch of the same producer to that partition."""
    await producer.prepare({"L1": 1.0})
    await limited(kafka, RESPONSES, 40_000)
    router = routers.start()
    async with reading(kafka) as answers:
        await producer.ask(*(request(number) for number in range(60)))
        await answers.ids(f"r{number}" for number in range(60))
        await producer.ask(request(100, metadata={"n": INCOMPRESSIBLE}))
        await answers.ids(["r100"])
        await producer.ask(*(request(number) for number in range(200, 260)))
        await answers.ids(f"r{number}" for number in range(200, 260))
        await until_committed(kafka)
        await answers.read_to_end()
        assert len(answers.records) == 121
        assert answers.responses()["r100"].error.code == "upstream_error"
    assert "replacing the Kafka producer" in routers.log(router)


async def limited(kafka: KafkaSettings, spec: TopicSpec, max_message_bytes: int) -> None:
    """Lower the size limit of a topic."""
    admin = AIOKafkaAdminClient(**kafka.client_options())
    await admin.start()
    try:
        settings = spec.configuration() | {"max.message.bytes": str(max_message_bytes)}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, kafka.topic(spec), configs=settings)])
    finally:
        await admin.close()
