"""The Triton client with both of TensorRT-LLM's contracts, on a real Triton server with stand-in models."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest

from deploy.triton.models import stand_in_llm
from shared.inference.base import (
    EndpointUnavailable,
    GenerationCancelled,
    GenerationParameters,
    InvalidRequest,
    StreamTimeouts,
)
from shared.inference.tokens import Tokenizer
from shared.inference.triton.client import TritonClient
from tests.support.deadlines import DEADLINE_S
from tests.support.router import ENDLESS_PROMPT, LONG_PROMPT, MODEL, question, write_workload
from tests.support.tokenizer import write_tokenizer
from tests.support.triton import ServingTriton, serving_triton

pytestmark = pytest.mark.integration

TEXT = "L0 says: " + "word " * 100
SINGLE = "llmapi-single"
"""As TensorRT-LLM ships its model: each answer is a single response."""
DECOUPLED = ("ensemble", "llmapi")
ALL = (*DECOUPLED, SINGLE)
ENDLESS_PROMPT_J = 1_800.0
"""Energy of an answer to `ENDLESS_PROMPT` that nothing stops."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingTriton]:
    folder = tmp_path_factory.mktemp("triton")
    workload = write_workload(folder / "w.jsonl")
    models = [
        stand_in_llm(workload, model=MODEL, name="ensemble", gpu_uuid="ensemble", idle_power_w=0.0),
        stand_in_llm(workload, model=MODEL, name="llmapi", gpu_uuid="llmapi", idle_power_w=0.0, contract="llm-api"),
        stand_in_llm(
            workload, model=MODEL, name=SINGLE, gpu_uuid=SINGLE, idle_power_w=0.0, contract="llm-api", decoupled=False
        ),
    ]
    with serving_triton(folder, models) as running:
        yield running


@pytest.fixture
async def client(request: pytest.FixtureRequest, server: ServingTriton) -> AsyncIterator[TritonClient]:
    async with TritonClient(server.address, model=request.param, clock=server.clock, name="e0") as made:
        await made.probe(timeout_s=DEADLINE_S)
        yield made


def prompt(text: str) -> str:
    return f"[INST] {text} [/INST]"


async def ask(client: TritonClient, *, text: str = question(1), streamed: bool = True, **changes):
    parameters = GenerationParameters(max_tokens=500).model_copy(update=changes)
    pieces, generation = [], None
    request = await client.prepare(prompt(text), parameters, request_id="r", timeout_s=DEADLINE_S, streamed=streamed)
    async with aclosing(client.stream(request, timeout_s=DEADLINE_S)) as chunks:
        async for chunk in chunks:
            pieces += [chunk.text] if chunk.text else []
            generation = chunk.generation or generation
    assert generation is not None
    assert "".join(pieces) == generation.text
    return pieces, generation


@pytest.mark.parametrize("client", ALL, indirect=True)
@pytest.mark.parametrize("streamed", [True, False])
async def test_an_answer_is_the_recorded_text_without_the_prompt(client, streamed):
    pieces, generation = await ask(client, streamed=streamed)
    assert generation.text == TEXT
    assert generation.finish_reason == "stop"
    assert client.contract is not None
    in_parts = client.contract.decoupled and (streamed or client.contract.name == "llm-api")
    assert (len(pieces) > 1) == in_parts


@pytest.mark.parametrize("client", ["ensemble"], indirect=True)
async def test_the_ensemble_counts_its_tokens_itself(client):
    _, generation = await ask(client, streamed=False)
    assert (generation.completion_tokens, generation.token_count_source) == (100, "server")
    assert generation.prompt_tokens is not None


@pytest.mark.parametrize("client", ["llmapi"], indirect=True)
async def test_the_parts_of_the_llm_apis_stream_are_counted_even_where_no_stream_was_requested(client):
    pieces, generation = await ask(client, streamed=False)
    assert generation.token_count_source == "stream"
    # Tokens that are due together come in one part: at most a hundred, and on a busy machine few.
    assert 1 < generation.completion_tokens <= 100
    assert generation.completion_tokens == len(pieces)
    assert generation.prompt_tokens is None


@pytest.mark.parametrize("client", ALL, indirect=True)
async def test_the_token_limit_ends_an_answer_with_finish_reason_length(client):
    _, generation = await ask(client, max_tokens=7)
    assert TEXT.startswith(generation.text)
    assert 0 < len(generation.text) < 60
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("client", ALL, indirect=True)
@pytest.mark.parametrize("stop", ["says:", "word word word"])
async def test_a_stop_sequence_that_is_spread_over_parts_ends_an_answer(client, stop):
    _, generation = await ask(client, stop=(stop, "never said"))
    assert generation.text == TEXT.partition(stop)[0]
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize("client", DECOUPLED, indirect=True)
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_stop_sequence_stops_the_server_too(client, server, streamed):
    gpu = client.contract.model
    before_j = server.energy_j(gpu)
    _, generation = await ask(client, text=ENDLESS_PROMPT, stop=("word",), streamed=streamed)
    assert generation.text == "L0 says: "
    assert await server.settled_energy_j(gpu) - before_j < ENDLESS_PROMPT_J / 2


@pytest.mark.parametrize("client", ALL, indirect=True)
async def test_a_cancelled_task_stops_the_server(client, server):
    gpu = client.contract.model
    before_j = server.energy_j(gpu)
    task = asyncio.create_task(ask(client, text=ENDLESS_PROMPT))
    await server.until_energy_above(gpu, before_j)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await server.settled_energy_j(gpu) - before_j < ENDLESS_PROMPT_J / 2


@pytest.mark.parametrize("client", ALL, indirect=True)
async def test_cancelling_a_request_ends_its_stream_with_an_error_and_stops_the_server(client, server):
    gpu = client.contract.model
    before_j = server.energy_j(gpu)
    parameters = GenerationParameters(max_tokens=500)
    request = await client.prepare(prompt(ENDLESS_PROMPT), parameters, request_id="r", timeout_s=DEADLINE_S)

    async def read() -> None:
        async with aclosing(client.stream(request, timeout_s=DEADLINE_S)) as chunks:
            async for _ in chunks:
                pass

    client.cancel(request)  # it is not running, so this has no effect
    task = asyncio.create_task(read())
    await server.until_energy_above(gpu, before_j)
    client.cancel(request)
    with pytest.raises(GenerationCancelled, match="e0: the generation was cancelled"):
        await task
    assert await server.settled_energy_j(gpu) - before_j < ENDLESS_PROMPT_J / 2
    assert (await ask(client, max_tokens=3))[1].text


@pytest.mark.parametrize("client", ["llmapi", SINGLE], indirect=True)
async def test_a_sampling_parameter_without_an_input_in_the_llm_api_is_rejected(client):
    assert client.capabilities.unsupported_sampling == ("min_tokens", "repetition_penalty")
    with pytest.raises(InvalidRequest, match=r"sampling\.repetition_penalty cannot be served"):
        await ask(client, repetition_penalty=1.1)
    assert (await ask(client, temperature=0.1, top_p=0.9, top_k=3, seed=2**63, max_tokens=3))[1].text


@pytest.mark.parametrize("client", ["llmapi", SINGLE], indirect=True)
async def test_an_error_of_the_llm_api_lets_another_endpoint_be_tried(client):
    with pytest.raises(EndpointUnavailable, match=r"e0: (the model failed|INTERNAL)") as caught:
        await ask(client, temperature=-1.0)
    assert "Error generating request" in caught.value.server_message
    assert (await ask(client, max_tokens=3))[1].text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("model", ["llmapi", SINGLE])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_tokenizer_counts_where_the_server_does_not(server, tokenizer, model, streamed):
    async with TritonClient(server.address, model=model, clock=server.clock, tokenizer=tokenizer) as client:
        pieces, generation = await ask(client, streamed=streamed)
    assert generation.token_count_source == "tokenizer"
    assert generation.completion_tokens == 102  # words: "L0", "says:", and "word" a hundred times
    assert generation.prompt_tokens == 1 + len(prompt(question(1)).split())  # with begin-of-sequence
    assert (len(pieces) > 1) == (streamed and model == "llmapi")


async def test_a_tokenizer_counts_the_text_after_a_stop_sequence_as_well(server, tokenizer):
    async with TritonClient(server.address, model=SINGLE, clock=server.clock, tokenizer=tokenizer) as client:
        _, generation = await ask(client, stop=("word word",))
    assert (generation.text, generation.completion_tokens) == ("L0 says: ", 102)


async def test_the_servers_count_takes_precedence_over_a_tokenizers(server, tokenizer):
    async with TritonClient(server.address, model="ensemble", clock=server.clock, tokenizer=tokenizer) as client:
        _, generation = await ask(client)
    assert (generation.completion_tokens, generation.token_count_source) == (100, "server")


@pytest.mark.parametrize("client", DECOUPLED, indirect=True)
async def test_a_server_that_pauses_too_long_between_parts_has_failed(client):
    parameters = GenerationParameters(max_tokens=500)
    request = await client.prepare(prompt(LONG_PROMPT), parameters, request_id="r", timeout_s=DEADLINE_S)
    timeouts = StreamTimeouts(first_s=DEADLINE_S, next_s=0.02)  # a part arrives every tenth of a second
    chunks = client.stream(request, timeout_s=DEADLINE_S, stream_timeouts=timeouts)
    received = []

    async def read() -> None:
        async for chunk in chunks:
            received.append(chunk.text)  # noqa: PERF401 - the text before the error is needed

    with pytest.raises(EndpointUnavailable, match=r"no response within 0\.02 s"):
        await read()
    assert "".join(received).startswith("L0")
