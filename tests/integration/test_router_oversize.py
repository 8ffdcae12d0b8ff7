"""Answers that are larger than their topic allows, on real Kafka: they are told apart, and spoil nothing for others."""

import asyncio

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from shared.runtime.settings import KafkaSettings
from shared.topics import MEBIBYTE, RESPONSES, TopicSpec
from tests.support.router import committed, page, reading, request

pytestmark = pytest.mark.integration

NEARLY = MEBIBYTE - 700
"""Characters of metadata with which a request just fits its topic, and its answer does not."""


async def test_an_answer_that_is_too_large_becomes_an_error_and_those_behind_it_go_out(kafka, routers, producer):
    assert RESPONSES.max_message_bytes == MEBIBYTE
    await producer.prepare({"L1": 1.0})
    router = routers.start()
    large = request(100, metadata={"n": "x" * NEARLY})
    async with reading(kafka) as answers:
        # Every partition has had an answer of this router, and has one again after the large one.
        await producer.ask(*(request(number) for number in range(60)))
        await answers.ids(f"r{number}" for number in range(60))
        await producer.ask(large)
        await answers.ids(["r100"])
        await producer.ask(*(request(number) for number in range(200, 260)))
        await answers.ids([*(f"r{number}" for number in range(60)), "r100", *(f"r{n}" for n in range(200, 260))])
        await answers.read(until=121, settle_s=1.0)
        assert len(answers.records) == 121
        responses = answers.responses()
    refused = responses.pop("r100")
    assert (refused.status, refused.error.code) == ("error", "upstream_error")
    assert "larger than the topic allows" in refused.error.message
    assert refused.usage.completion_tokens > 0
    assert {response.status for response in responses.values()} == {"ok"}
    metrics = await asyncio.to_thread(page, f"{routers.supervisor.process(router).spec.url}/metrics")
    assert 'outcome="upstream_error"' in metrics
    assert all(offset == end for offset, end in (await committed(kafka)).values())


async def test_a_topic_that_takes_less_than_it_was_made_for_stops_no_others(kafka, routers, producer):
    """Kafka itself refuses the batch, and from then on all that the same producer sends to that partition."""
    await producer.prepare({"L1": 1.0})
    await limited(kafka, RESPONSES, 50_000)
    router = routers.start()
    async with reading(kafka) as answers:
        await producer.ask(*(request(number) for number in range(60)))
        await answers.ids(f"r{number}" for number in range(60))
        await producer.ask(request(100, metadata={"n": "x" * 60_000}))
        await answers.ids(["r100"])
        await producer.ask(*(request(number) for number in range(200, 260)))
        await answers.ids(f"r{number}" for number in range(200, 260))
        await answers.read(until=121, settle_s=1.0)
        assert len(answers.records) == 121
        assert answers.responses()["r100"].error.code == "upstream_error"
    assert "replacing the Kafka producer" in routers.log(router)
    await asyncio.sleep(0.5)
    assert all(offset == end for offset, end in (await committed(kafka)).values())


async def limited(kafka: KafkaSettings, spec: TopicSpec, max_message_bytes: int) -> None:
    """Have a topic take less."""
    admin = AIOKafkaAdminClient(**kafka.client_options())
    await admin.start()
    try:
        settings = spec.configuration() | {"max.message.bytes": str(max_message_bytes)}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, kafka.topic(spec), configs=settings)])
    finally:
        await admin.close()
