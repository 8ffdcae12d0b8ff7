"""Every error of the gateway as OpenAI's client raises it, on real Kafka and PostgreSQL; the test is the router."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx2
import openai
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from services.gateway.keys import Limits, create_key, set_limits
from shared.messages import (
    Decision,
    ErrorDetail,
    GenerationRequest,
    GenerationResponse,
    Reply,
    ResponseChunk,
    Timing,
    Usage,
)
from shared.runtime.database import open_pool
from shared.topics import CANCELLATIONS, REPLIES, REQUESTS
from tests.support.deadlines import DEADLINE_S
from tests.support.gateway import GatewayProcess, prepare_gateways
from tests.support.router import MODEL, reading

pytestmark = pytest.mark.integration

NOW = datetime.now(UTC)
DECISION = Decision(
    source="policy", group="default", pool="p", level="L1", zone="GB", propensity=1.0, propensities={"p/L1": 1.0}
)


@pytest.fixture(scope="module")
def gateways(supervisor, kafka_server, postgres_server, tmp_path_factory) -> Iterator[GatewayProcess]:
    made = asyncio.run(
        prepare_gateways(
            supervisor,
            bootstrap_servers=kafka_server.bootstrap_servers,
            database_url=postgres_server + "gateway_errors",
            triton="127.0.0.1:1",
            folder=tmp_path_factory.mktemp("errors"),
            prefix="errors.",
        )
    )
    made.start(SPROUT_GATEWAY_SILENCE_S="1", SPROUT_GATEWAY_DEADLINE_S="5")
    yield made
    made.stop_all()


class Script:
    """A router that does what the prompt says: parts separated by blanks, as in `text error:no_endpoint`."""

    def __init__(self, gateways: GatewayProcess, producer: AIOKafkaProducer) -> None:
        self._topic = gateways.kafka.topic(REPLIES)
        self._producer = producer
        self.asked: Counter[str] = Counter()

    async def answer(self, request: GenerationRequest) -> None:
        """Publish the replies to a request."""
        assert request.messages is not None
        prompt = request.messages[-1].content
        self.asked[prompt] += 1
        for number, part in enumerate(prompt.split()):
            name, _, value = part.partition(":")
            if name == "fails-first":
                if self.asked[prompt] == 1:
                    return await self._respond(request, status="error", error=ErrorDetail(code=value, message="why"))
            elif name in ("text", "restart"):
                chunk = ResponseChunk(request_id=request.id, stream=name, sequence=number, text="Hello")
                await self._send(request, Reply(request_id=request.id, chunk=chunk, decision=DECISION))
            elif name == "error":
                await self._respond(request, status="error", error=ErrorDetail(code=value, message="why"))
            elif name == "end":
                usage = Usage(prompt_tokens=1, completion_tokens=1, source="server")
                timing = Timing(received_at=NOW, started_at=NOW, first_token_at=NOW, finished_at=NOW)
                await self._respond(
                    request, status="ok", text="Hello", finish_reason="stop", endpoint="e0", decision=DECISION,
                    usage=usage, timing=timing,
                )  # fmt: skip
        return None

    async def _respond(self, request: GenerationRequest, **fields: Any) -> None:
        response = GenerationResponse(request_id=request.id, model=MODEL, requested_at=NOW, **fields)
        await self._send(request, Reply(request_id=request.id, response=response))

    async def _send(self, request: GenerationRequest, reply: Reply) -> None:
        await self._producer.send_and_wait(
            self._topic, reply.model_dump_json().encode(), key=request.id.encode(), partition=request.reply_partition
        )


@pytest.fixture
async def script(gateways: GatewayProcess) -> AsyncIterator[Script]:
    """The router."""
    kafka = gateways.kafka
    consumer = AIOKafkaConsumer(
        kafka.topic(REQUESTS), **kafka.client_options(), group_id=None, auto_offset_reset="latest"
    )
    producer = AIOKafkaProducer(**kafka.client_options())
    await consumer.start()
    await producer.start()
    for partition in consumer.assignment():
        await consumer.position(partition)
    made = Script(gateways, producer)

    async def run() -> None:
        async for record in consumer:
            await made.answer(GenerationRequest.model_validate_json(record.value))

    task = asyncio.create_task(run())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await consumer.stop()
    await producer.stop()


@asynccontextmanager
async def client_of(gateways: GatewayProcess, number: int = 0, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    key = await gateways.create_key()
    settings = {"max_retries": 0, "timeout": DEADLINE_S, **options}
    async with openai.AsyncOpenAI(base_url=f"{gateways.urls[number]}/v1", api_key=key, **settings) as made:
        yield made


def asked(prompt: str, **changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **changes}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "kind", "status", "expected_code", "param", "retry_after"),
    [
        ("invalid_request", openai.BadRequestError, 400, "invalid_request", None, None),
        ("unknown_level", openai.BadRequestError, 400, "unknown_level", "directive", None),
        ("unknown_model", openai.NotFoundError, 404, "model_not_found", "model", None),
        ("prompt_too_large", openai.APIStatusError, 413, "context_length_exceeded", "messages", None),
        ("upstream_error", openai.InternalServerError, 502, "upstream_error", None, "2"),
        ("no_endpoint", openai.InternalServerError, 503, "no_endpoint", None, "2"),
        ("deadline_exceeded", openai.InternalServerError, 504, "deadline_exceeded", None, None),
    ],
)
async def test_an_error_of_the_router(
    gateways: GatewayProcess, script: Script, stream, code, kind, status, expected_code, param, retry_after
):
    async with client_of(gateways) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(**asked(f"error:{code}", stream=stream))
    error = caught.value
    assert type(error) is kind
    assert (error.status_code, error.code, error.param) == (status, expected_code, param)
    assert error.body["message"] == "why"
    assert error.response.headers.get("retry-after") == retry_after


async def test_what_the_gateway_refuses(gateways: GatewayProcess, script: Script):
    async with client_of(gateways) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(**asked("x" * 1_100_000))
        assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.embeddings.create(model=MODEL, input="x")
        assert (caught.value.status_code, caught.value.code) == (404, "not_found")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**asked("x", n=2))
        assert (caught.value.param, caught.value.code) == ("n", "invalid_value")
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.with_options(api_key="sk-sprout-wrong").models.list()
        assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
        limited = client.with_options(api_key=await limited_key(gateways))
        # A new minute may begin between them, but not twice.
        answers = await asyncio.gather(
            *(limited.chat.completions.create(**asked("text end")) for _ in range(3)), return_exceptions=True
        )
    refused = [one for one in answers if isinstance(one, Exception)]
    assert 1 <= len(refused) <= 2
    for error in refused:
        assert isinstance(error, openai.RateLimitError)
        assert (error.status_code, error.code) == (429, "rate_limit_exceeded")
        assert 1 <= int(error.response.headers["retry-after"]) <= 60


async def limited_key(gateways: GatewayProcess) -> str:
    """A key with one request per minute."""
    pool = await open_pool(gateways.database, schema="gateway")
    try:
        async with pool.acquire() as connection:
            key, secret = await create_key(connection, name="limited", tenant=None, now=NOW)
            await set_limits(connection, f"key/{key.id}", Limits(requests_per_minute=1))
        return secret
    finally:
        await pool.close()


async def test_an_answer_that_does_not_come_in_time(gateways: GatewayProcess, script: Script):
    async with client_of(gateways) as client, reading(gateways.kafka, CANCELLATIONS) as cancelled:
        waiting = asyncio.create_task(client.chat.completions.create(**asked("silence")))
        # The client's own patience ends first; its request is cancelled.
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=1.0).chat.completions.create(**asked("silence"))
        await cancelled.read(until=1)
        with pytest.raises(openai.InternalServerError) as caught:
            await waiting
        assert (caught.value.status_code, caught.value.code, caught.value.type) == (504, "timeout", "timeout_error")


@pytest.mark.parametrize(
    ("prompt", "code", "kind"),
    [
        ("text error:upstream_error", "upstream_error", "upstream_error"),
        ("text error:deadline_exceeded", "deadline_exceeded", "timeout_error"),
        ("text restart end", "upstream_error", "upstream_error"),  # another router begins it again
        ("text", "timeout", "timeout_error"),  # it does not go on
    ],
)
async def test_an_error_after_the_first_byte_of_a_stream(gateways: GatewayProcess, script: Script, prompt, code, kind):
    async with client_of(gateways) as client:
        stream = await client.chat.completions.create(**asked(prompt, stream=True))
        assert not (await anext(stream)).choices[0].delta.content
        assert (await anext(stream)).choices[0].delta.content == "Hello"
        with pytest.raises(openai.APIError) as caught:
            await anext(stream)
    assert not isinstance(caught.value, openai.APIStatusError)
    assert (caught.value.code, caught.value.type) == (code, kind)
    assert caught.value.message


async def test_the_client_repeats_what_passes(gateways: GatewayProcess, script: Script):
    async with client_of(gateways, max_retries=1) as client:
        answer = await client.chat.completions.create(**asked("fails-first:no_endpoint end"))
        assert answer.choices[0].message.content == "Hello"
        assert script.asked["fails-first:no_endpoint end"] == 2
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(**asked("error:invalid_request"))
        assert script.asked["error:invalid_request"] == 1


async def test_a_connection_that_is_closed(gateways: GatewayProcess, script: Script):
    gateways.start(SPROUT_GATEWAY_SILENCE_S="60")
    async with client_of(gateways, -1) as client:
        whole = asyncio.create_task(client.chat.completions.create(**asked("silence")))
        stream = await client.chat.completions.create(**asked("text", stream=True))
        await anext(stream)
        assert (await anext(stream)).choices[0].delta.content == "Hello"
        gateways.supervisor.kill(gateways.names[-1])
        with pytest.raises(openai.APIConnectionError):
            await whole
        with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError)):
            await anext(stream)
        with pytest.raises(openai.APIConnectionError):
            await client.models.list()
