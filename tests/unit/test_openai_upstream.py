"""Errors of OpenAI-compatible servers, spoken by a stand-in for the server; the real one is in tests/integration."""

import asyncio
import json

import httpx
import pytest

from services.ledger.meters import parse_meters
from shared.inference.base import (
    DeadlineExceeded,
    EndpointUnavailable,
    GenerationError,
    GenerationParameters,
    InvalidRequest,
    StreamTimeouts,
    generate,
)
from shared.inference.openai import OpenAIClient
from shared.runtime.clock import Clock


def client(answer) -> OpenAIClient:
    return OpenAIClient(
        "http://server", model="m", clock=Clock(), name="e", transport=httpx.MockTransport(answer), api_key="secret"
    )


async def ask(answer):
    return await generate(client(answer), "prompt", GenerationParameters(), request_id="r", timeout_s=5.0)


def events(*documents) -> httpx.Response:
    lines = [f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in documents]
    return httpx.Response(200, text=": a comment\n\n" + "".join(lines))


@pytest.mark.parametrize(
    ("response", "error", "text"),
    [
        (httpx.Response(400, json={"error": {"message": "too long"}}), InvalidRequest, "status 400"),
        (httpx.Response(503, text="overloaded"), EndpointUnavailable, "status 503"),
        (httpx.Response(404, json={"message": "no model"}), EndpointUnavailable, "status 404"),
        (events({"error": {"message": "out of memory"}}), EndpointUnavailable, "an error in the stream"),
        (events("nonsense"), EndpointUnavailable, "not in OpenAI's format"),
        (events([1]), EndpointUnavailable, "not in OpenAI's format"),
        (events("[DONE]"), EndpointUnavailable, "without an answer"),
    ],
)
async def test_each_failure_is_named_without_the_prompt(response, error, text):
    with pytest.raises(error, match=text) as caught:
        await ask(lambda request: response)
    assert "prompt" not in caught.value.for_requester


async def test_an_unreachable_server_is_unavailable():
    def refuse(request):
        raise httpx.ConnectError("refused")

    with pytest.raises(EndpointUnavailable, match="ConnectError"):
        await ask(refuse)


async def test_the_key_is_sent_and_without_usage_the_parts_are_counted():
    seen = []

    def answer(request):
        seen.append((request.headers["authorization"], json.loads(request.content)))
        part = {"choices": [{"text": "a", "finish_reason": None}]}
        return events(part, part, {"choices": [{"text": "", "finish_reason": "length"}]}, "[DONE]")

    found = await ask(answer)
    assert (found.text, found.completion_tokens, found.token_count_source) == ("aa", 2, "stream")
    assert (found.finish_reason, found.prompt_tokens) == ("length", None)
    assert seen[0][0] == "Bearer secret"
    assert seen[0][1]["stream_options"] == {"include_usage": True}


async def test_a_silent_server_is_left_in_time():
    async def never(request):
        await asyncio.Event().wait()

    for timeout_s, timeouts, error in (
        (60.0, StreamTimeouts(0.05, 0.05), EndpointUnavailable),
        (0.05, None, DeadlineExceeded),
    ):
        one = client(never)
        request = await one.prepare("x", GenerationParameters(), request_id="r", timeout_s=timeout_s)
        with pytest.raises(error) as caught:
            async for _ in one.stream(request, timeout_s=timeout_s, stream_timeouts=timeouts):
                pass
        assert isinstance(caught.value, GenerationError)


def test_the_energy_of_dcgms_exporter_is_read_in_joules():
    found = parse_meters(
        'DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-1",device="nvidia0"} 2500000\n'
        'DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-1"} 99.5\n'
    )
    assert found.energy_j == {"GPU-1": 2_500.0}
    assert found.power_w == {"GPU-1": 99.5}
