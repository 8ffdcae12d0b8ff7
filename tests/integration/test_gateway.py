"""The gateway with OpenAI's client, on real Kafka, PostgreSQL, routers and a Triton server with the stand-in model."""

import json
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from shared.runtime.settings import KafkaSettings
from tests.support.deadlines import REPLY_S
from tests.support.gateway import GatewayProcess
from tests.support.router import ENDLESS_PROMPT, LEVELS, LONG_PROMPT, MODEL, question, reading

pytestmark = pytest.mark.integration


@pytest.fixture
def kafka(gateways: GatewayProcess) -> KafkaSettings:
    return gateways.kafka


@pytest.fixture
async def client(gateways: GatewayProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client, with a key of its own."""
    key = await gateways.create_key()
    async with openai.AsyncOpenAI(base_url=f"{gateways.urls[0]}/v1", api_key=key, max_retries=0) as made:
        yield made


def asked(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


async def test_a_chat_completion_says_what_sprout_did(client: openai.AsyncOpenAI):
    answered = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=asked(question(1)), extra_headers={"x-sprout-task": "qa"},
        metadata={"sprout_reference": "Canberra"},
    )  # fmt: skip
    assert "Canberra" not in answered.text + str(answered.headers)
    completion = answered.parse()
    assert completion.choices[0].message.content == "L1 says: " + "word " * LEVELS["L1"][0]
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.completion_tokens == LEVELS["L1"][0]
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + LEVELS["L1"][0]
    sprout = completion.usage.sprout
    assert (sprout["level"], sprout["group"], sprout["decision"], sprout["policy_version"]) == ("L1", "qa", "policy", 1)
    assert answered.headers["x-sprout-level"] == "L1"
    assert answered.headers["x-sprout-group"] == "qa"


async def test_a_stream_has_the_same_text_and_its_usage(client: openai.AsyncOpenAI):
    stream = await client.chat.completions.create(
        model=MODEL, messages=asked(LONG_PROMPT), stream=True, stream_options={"include_usage": True}
    )
    events = [event async for event in stream]
    pieces = [piece for event in events if event.choices and (piece := event.choices[0].delta.content)]
    assert "".join(pieces) == "L1 says: " + "word " * 40
    assert len(pieces) > 1
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    assert events[-1].usage.completion_tokens == 40
    assert events[-1].usage.sprout["level"] == "L1"


async def test_completions_models_and_a_forced_level(client: openai.AsyncOpenAI):
    completion = await client.completions.create(
        model=MODEL, prompt=question(3), extra_headers={"x-sprout-directive": "L2"}
    )
    assert completion.choices[0].text.startswith("L2 says: ")
    assert completion.usage.sprout["decision"] == "forced"
    stream = await client.completions.create(model=MODEL, prompt=question(3), stream=True)
    assert "".join([event.choices[0].text async for event in stream if event.choices]).startswith("L1 says: ")
    assert [model.id async for model in await client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    [
        ({"model": "unknown"}, 404, "model", "model_not_found"),
        ({"n": 2}, 400, "n", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "unsupported_parameter"),
        ({"temperature": 9}, 400, "temperature", "invalid_value"),
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, 400, None, "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            ...,
            ...,
        ),
        ({"extra_body": {"surprise": 1}}, 400, "surprise", "unknown_parameter"),
        ({"extra_headers": {"x-sprout-directive": "L9"}}, 400, "directive", "unknown_level"),
        ({"messages": asked("x" * 2_000_000)}, 413, ..., ...),
    ],
)
async def test_what_cannot_be_honoured_is_an_error_in_openais_format(client, changes, status, param, code):
    with pytest.raises(openai.APIStatusError) as caught:
        await client.chat.completions.create(**({"model": MODEL, "messages": asked(question(1))} | changes))
    assert caught.value.status_code == status
    error = caught.value.response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert param is ... or error["param"] == param
    assert code is ... or error["code"] == code


async def test_without_a_valid_key_nothing_is_answered(client: openai.AsyncOpenAI):
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="sk-sprout-wrong").models.list()
    async with httpx.AsyncClient(timeout=REPLY_S) as bare:
        answer = await bare.get(f"{client.base_url}models")
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["error"]["code"] == "missing_api_key"


async def test_a_client_that_leaves_ends_its_generation(client: openai.AsyncOpenAI, kafka: KafkaSettings):
    async with reading(kafka) as answers:
        stream = await client.chat.completions.create(model=MODEL, messages=asked(ENDLESS_PROMPT), stream=True)
        async for event in stream:
            if event.choices and event.choices[0].delta.content:
                break
        await stream.close()
        await answers.ids([event.id])
        response = answers.responses()[event.id]
    assert response.finish_reason == "cancelled"
    # What was generated until then is in the answer, so that its energy is attributed.
    assert 0 < response.usage.completion_tokens < 300


async def test_the_stream_is_server_sent_events_that_end_with_done(client: openai.AsyncOpenAI):
    headers = {"authorization": f"Bearer {client.api_key}"}
    body = {"model": MODEL, "messages": asked(question(4)), "stream": True}
    async with (
        httpx.AsyncClient(timeout=REPLY_S) as bare,
        bare.stream("POST", f"{client.base_url}chat/completions", json=body, headers=headers) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-sprout-level"] == "L1"
        lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    first = json.loads(lines[0].removeprefix("data: "))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
