"""`sprout send` and `sprout topics` on real Kafka, with a stand-in for the router and the ledger."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from typer.testing import CliRunner

from shared.messages import (
    Decision,
    Footprint,
    GenerationRequest,
    GenerationResponse,
    Message,
    ResponseChunk,
    Timing,
    Usage,
)
from shared.runtime.settings import KafkaSettings
from shared.topics import FOOTPRINTS, REQUESTS, RESPONSE_CHUNKS, RESPONSES, TopicSpec
from tests.support.traffic import timestamp_ms
from tools.cli.main import app

pytestmark = pytest.mark.integration

NOON = datetime(2023, 2, 10, 12, tzinfo=UTC)
PIECES = ("Light ", "scatters.")


@pytest.fixture
def environment(kafka: KafkaSettings, tmp_path, monkeypatch) -> KafkaSettings:
    monkeypatch.setenv("SPROUT_KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers)
    monkeypatch.setenv("SPROUT_KAFKA_TOPIC_PREFIX", kafka.topic_prefix)
    monkeypatch.setenv("SPROUT_LOCAL_STATE", str(tmp_path))
    return kafka


def answer(request: GenerationRequest, *, failed: bool = False) -> GenerationResponse:
    if failed:
        return GenerationResponse.model_validate(
            {
                "request_id": request.id,
                "model": "m",
                "status": "error",
                "requested_at": NOON,
                "error": {"code": "unknown_model", "message": "there is no model 'm'; there is llama"},
            }
        )
    return GenerationResponse(
        request_id=request.id or "",
        model="m",
        status="ok",
        text="".join(PIECES),
        finish_reason="stop",
        decision=Decision(source="policy", group="default", pool="p", level="L1", zone="GB", propensity=0.5),
        endpoint="e",
        usage=Usage(completion_tokens=2, source="server"),
        timing=Timing(received_at=NOON, started_at=NOON, finished_at=NOON),
        requested_at=NOON,
    )


def footprint(request: GenerationRequest) -> Footprint:
    return Footprint(
        request_id=request.id or "",
        purpose="request",
        model="m",
        group="default",
        pool="p",
        level="L1",
        zone="GB",
        endpoint="e",
        started_at=NOON,
        finished_at=NOON,
        processing_s=1.0,
        completion_tokens=2,
        energy_j=120.0,
        intensity_g_per_kwh=300.0,
        operational_g=0.01,
        embodied_g=0.0,
        total_g=0.01,
    )


@asynccontextmanager
async def answering(
    kafka: KafkaSettings, *, failed: bool = False, metered: bool = True, attempts: int = 1
) -> AsyncIterator[list[bytes]]:
    """Answers every request in the background; yields the requests.

    Args:
        attempts: of streaming an answer; all but the last end without a final chunk.
    """
    consumer = AIOKafkaConsumer(
        kafka.topic(REQUESTS), bootstrap_servers=kafka.bootstrap_servers, group_id=None, auto_offset_reset="earliest"
    )
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    await consumer.start()
    await producer.start()
    seen: list[bytes] = []

    async def post(spec: TopicSpec, message: Message, key: bytes) -> None:
        value = message.model_dump_json().encode()
        await producer.send_and_wait(kafka.topic(spec), value, key=key, timestamp_ms=timestamp_ms(spec))

    async def serve() -> None:
        async for record in consumer:
            seen.append(record.value)
            request = GenerationRequest.model_validate_json(record.value)
            if request.stream:
                for attempt in range(attempts):
                    pieces = PIECES if attempt == attempts - 1 else PIECES[:1]
                    for number, piece in enumerate(pieces):
                        chunk = ResponseChunk(
                            request_id=request.id or "", stream=f"s{attempt}", sequence=number, text=piece
                        )
                        await post(RESPONSE_CHUNKS, chunk, record.key)
            await post(RESPONSES, answer(request, failed=failed), record.key)
            if metered and not failed:
                await post(FOOTPRINTS, footprint(request), record.key)

    task = asyncio.create_task(serve())
    try:
        yield seen
    finally:
        task.cancel()
        await consumer.stop()
        await producer.stop()


async def sprout(*arguments: str):
    return await asyncio.to_thread(CliRunner().invoke, app, list(arguments))


async def test_a_prompt_is_published_and_its_answer_printed_with_directive_tokens_and_carbon(environment):
    async with answering(environment) as requests:
        result = await sprout("send", "Why is the sky blue?", "--task", "science", "--max-tokens", "64")
    assert result.exit_code == 0, result.output
    assert "Light scatters." in result.stdout
    assert "directive L1 (drawn from the policy) · 2 tokens · 0.01 gCO2eq (120 J at 300 g/kWh)" in result.stdout
    (sent,) = (GenerationRequest.model_validate_json(value) for value in requests)
    assert (sent.prompt, sent.task, sent.sampling.max_tokens, sent.stream) == (
        "Why is the sky blue?",
        "science",
        64,
        False,
    )


async def test_a_streamed_answer_is_printed_once(environment):
    async with answering(environment):
        result = await sprout("send", "Why?", "--stream")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Light scatters.") == 1


async def test_a_restarted_answer_is_marked(environment):
    async with answering(environment, attempts=2):
        result = await sprout("send", "Why?", "--stream")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("another router restarted the answer") == 1


async def test_a_system_message_and_a_forced_level_are_sent(environment):
    async with answering(environment) as requests:
        await sprout("send", "Why?", "--system", "You are a pirate.", "--directive", "L2", "--footprint-wait", "0")
    (sent,) = (GenerationRequest.model_validate_json(value) for value in requests)
    assert sent.prompt is None
    assert [(turn.role, turn.content) for turn in sent.conversation()] == [
        ("system", "You are a pirate."),
        ("user", "Why?"),
    ]
    assert sent.directive == "L2"


async def test_json_has_the_published_response_and_footprint(environment):
    async with answering(environment):
        result = await sprout("send", "Why?", "--json")
    document = json.loads(result.stdout)
    assert document["response"]["decision"]["level"] == "L1"
    assert document["footprint"]["energy_j"] == 120.0


async def test_a_missing_footprint_is_reported(environment):
    async with answering(environment, metered=False):
        result = await sprout("send", "Why?", "--footprint-wait", "0.3")
    assert result.exit_code == 0
    assert "footprint not available yet" in result.stdout


async def test_a_failed_request_prints_its_code_and_reason_and_exits_with_1(environment):
    async with answering(environment, failed=True):
        result = await sprout("send", "Why?")
    assert result.exit_code == 1
    assert "unknown_model: there is no model 'm'" in result.stderr


async def test_no_answer_in_time_exits_with_4_and_a_remedy(environment):
    result = await sprout("send", "Why?", "--timeout", "0.5")
    assert result.exit_code == 4
    assert "within 0.5 s" in result.stderr
    assert "sprout status" in result.stderr


async def test_an_invalid_level_is_rejected_before_sending(environment):
    result = await sprout("send", "Why?", "--directive", "brief")
    assert result.exit_code == 1
    assert "directive" in result.stderr


async def test_a_prompt_larger_than_the_topic_accepts_is_rejected_with_both_sizes(environment):
    result = await sprout("send", "x" * 5_000_000)
    assert result.exit_code == 1
    assert "5000" in result.stderr
    assert "at most 1048576" in result.stderr


async def test_an_address_where_no_kafka_answers_exits_with_3(environment):
    result = await sprout("send", "Why?", "--bootstrap", "127.0.0.1:1")
    assert result.exit_code == 3
    assert "no Kafka answers at 127.0.0.1:1" in result.stderr


async def test_topics_are_created_listed_and_described(environment, kafka_settings):
    created = await sprout("topics", "create")
    assert created.exit_code == 0, created.output
    assert f"exists  {environment.topic(REQUESTS)}, 12 partitions" in created.stdout
    listed = await sprout("topics", "list")
    assert listed.exit_code == 0
    assert environment.topic(FOOTPRINTS) in listed.stdout
    described = await sprout("topics", "describe", "requests")
    assert described.exit_code == 0, described.output
    assert "Most tokens" not in described.stdout  # the message's own fields, not those of its parts
    assert "Copied into the response" in described.stdout


async def test_an_unknown_topic_is_rejected_with_the_declared_ones(environment):
    result = await sprout("topics", "describe", "gossip")
    assert result.exit_code == 1
    assert "responses" in result.stderr
