"""Our client and both of TensorRT-LLM's contracts, on a real Triton server with stand-in models."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from urllib.request import urlopen

import pytest

from deploy.local.config import default_state_dir
from deploy.local.processes import ProcessSpec, Supervisor
from deploy.local.triton import free_triton_ports, install, metrics_url, ready_probe
from deploy.triton.models import stand_in_llm
from deploy.triton.repository import write_repository
from deploy.triton.server import TritonPorts
from shared.inference.base import EndpointUnavailable, GenerationParameters, InvalidRequest, StreamTimeouts
from shared.inference.tokens import Tokenizer
from shared.inference.triton.client import TritonClient
from shared.runtime.clock import Clock
from tests.support.router import LONG_PROMPT, MODEL, question, write_workload
from tests.support.tokenizer import write_tokenizer

pytestmark = pytest.mark.integration

TEXT = "L0 says: " + "word " * 100
WHOLE = "llmapi-whole"
"""As TensorRT-LLM ships its model: it answers in one piece."""
DECOUPLED = ("ensemble", "llmapi")
ALL = (*DECOUPLED, WHOLE)


@dataclass(frozen=True)
class Running:
    ports: TritonPorts
    clock: Clock

    def energy_j(self, gpu: str) -> float:
        with urlopen(metrics_url(self.ports), timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(f'nv_energy_consumption{{gpu_uuid="{gpu}"}}')
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("triton")
    installation = install(default_state_dir(), say=print)
    workload = write_workload(folder / "w.jsonl")
    models = [
        stand_in_llm(workload, model=MODEL, name="ensemble", gpu_uuid="ensemble", idle_power_w=0.0),
        stand_in_llm(workload, model=MODEL, name="llmapi", gpu_uuid="llmapi", idle_power_w=0.0, contract="llm-api"),
        stand_in_llm(
            workload, model=MODEL, name=WHOLE, gpu_uuid=WHOLE, idle_power_w=0.0, contract="llm-api", decoupled=False
        ),
    ]
    write_repository(folder / "models", models)
    ports, clock = free_triton_ports(), Clock()
    supervisor = Supervisor(folder / "logs")
    supervisor.start(
        ProcessSpec(
            name="triton",
            command=tuple(installation.command(folder / "models", ports)),
            environment=installation.environment(clock.environment()),
            ready=ready_probe(ports),
        )
    )
    try:
        yield Running(ports, clock)
    finally:
        supervisor.stop_all()


@pytest.fixture
async def client(request: pytest.FixtureRequest, server: Running) -> AsyncIterator[TritonClient]:
    address = f"127.0.0.1:{server.ports.grpc}"
    async with TritonClient(address, model=request.param, clock=server.clock, name="e0") as made:
        await made.probe(timeout_s=5)
        yield made


def prompt(text: str) -> str:
    return f"[INST] {text} [/INST]"


async def ask(client: TritonClient, *, text: str = question(1), streamed: bool = True, **wanted):
    parameters = GenerationParameters(**{"max_tokens": 500, **wanted})
    pieces, generation = [], None
    chunks = client.stream(prompt(text), parameters, request_id="r", timeout_s=20, streamed=streamed)
    async with aclosing(chunks):
        async for chunk in chunks:
            pieces.append(chunk.text)
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
    in_parts = client.contract.decoupled and (streamed or client.contract.dialect == "llm-api")
    assert (len(pieces) > 10) == in_parts


@pytest.mark.parametrize("client", ["ensemble"], indirect=True)
async def test_the_ensemble_counts_its_tokens_itself(client):
    _, generation = await ask(client, streamed=False)
    assert (generation.completion_tokens, generation.token_count_source) == (100, "server")
    assert generation.prompt_tokens is not None


@pytest.mark.parametrize("client", ["llmapi"], indirect=True)
async def test_the_parts_of_the_llm_apis_stream_are_counted_even_where_nobody_reads_along(client):
    _, generation = await ask(client, streamed=False)
    assert generation.token_count_source == "stream"
    assert 50 <= generation.completion_tokens <= 100  # tokens that are due together come in one part
    assert generation.prompt_tokens is None


@pytest.mark.parametrize("client", ALL, indirect=True)
async def test_the_token_limit_ends_an_answer_and_is_named_as_its_reason(client):
    _, generation = await ask(client, max_tokens=7)
    assert TEXT.startswith(generation.text)
    assert 0 < len(generation.text) < 60
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("client", ALL, indirect=True)
@pytest.mark.parametrize("stop", ["says:", "word word word"])
async def test_a_stop_sequence_ends_an_answer_though_it_is_spread_over_parts(client, stop):
    _, generation = await ask(client, stop=(stop, "never said"))
    assert generation.text == TEXT.partition(stop)[0]
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize("client", DECOUPLED, indirect=True)
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_stop_sequence_stops_the_server_too(client, server, streamed):
    """Four seconds and 240 J, if nobody stopped it."""
    gpu = client.contract.model
    before_j, began = server.energy_j(gpu), time.monotonic()
    _, generation = await ask(client, text=LONG_PROMPT, stop=("word",), streamed=streamed)
    assert generation.text == "L0 says: "
    assert time.monotonic() - began < 2.0
    await asyncio.sleep(0.5)
    after_j = server.energy_j(gpu)
    assert after_j - before_j < 120.0
    await asyncio.sleep(0.3)
    assert server.energy_j(gpu) == pytest.approx(after_j, abs=1.0)


@pytest.mark.parametrize("client", ALL, indirect=True)
async def test_a_client_that_gives_up_stops_the_server(client, server):
    gpu = client.contract.model
    before_j = server.energy_j(gpu)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await ask(client, text=LONG_PROMPT)
    await asyncio.sleep(0.5)
    after_j = server.energy_j(gpu)
    assert after_j - before_j < 120.0
    await asyncio.sleep(0.3)
    assert server.energy_j(gpu) == pytest.approx(after_j, abs=1.0)


@pytest.mark.parametrize("client", ["llmapi", WHOLE], indirect=True)
async def test_a_sampling_parameter_that_the_llm_api_has_no_input_for_is_refused(client):
    assert client.contract.unserved == ("min_tokens", "repetition_penalty")
    with pytest.raises(InvalidRequest, match=r"sampling\.repetition_penalty cannot be served"):
        await ask(client, repetition_penalty=1.1)
    assert (await ask(client, temperature=0.1, top_p=0.9, top_k=3, seed=2**63, max_tokens=3))[1].text


@pytest.mark.parametrize("client", ["llmapi", WHOLE], indirect=True)
async def test_the_llm_apis_errors_have_one_status_and_so_another_endpoint_is_tried(client):
    with pytest.raises(EndpointUnavailable, match="e0: INTERNAL") as caught:
        await ask(client, temperature=-1.0)
    assert "Error generating request" in caught.value.said
    assert (await ask(client, max_tokens=3))[1].text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("model", ["llmapi", WHOLE])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_tokenizer_counts_where_the_server_does_not(server, tokenizer, model, streamed):
    address = f"127.0.0.1:{server.ports.grpc}"
    async with TritonClient(address, model=model, clock=server.clock, tokenizer=tokenizer) as client:
        pieces, generation = await ask(client, streamed=streamed)
    assert generation.token_count_source == "tokenizer"
    assert generation.completion_tokens == 102  # words: "L0", "says:", and "word" a hundred times
    assert generation.prompt_tokens == 1 + len(prompt(question(1)).split())  # with begin-of-sequence
    assert (len(pieces) > 10) == (streamed and model == "llmapi")


async def test_a_tokenizer_counts_what_the_server_generated_not_only_what_is_kept(server, tokenizer):
    address = f"127.0.0.1:{server.ports.grpc}"
    async with TritonClient(address, model=WHOLE, clock=server.clock, tokenizer=tokenizer) as client:
        _, generation = await ask(client, stop=("word word",))
    assert (generation.text, generation.completion_tokens) == ("L0 says: ", 102)


async def test_a_server_that_counts_is_believed_rather_than_a_tokenizer(server, tokenizer):
    address = f"127.0.0.1:{server.ports.grpc}"
    async with TritonClient(address, model="ensemble", clock=server.clock, tokenizer=tokenizer) as client:
        _, generation = await ask(client)
    assert (generation.completion_tokens, generation.token_count_source) == (100, "server")


@pytest.mark.parametrize("client", DECOUPLED, indirect=True)
async def test_a_server_that_falls_silent_in_the_middle_has_failed(client):
    chunks = client.stream(
        prompt(LONG_PROMPT),
        GenerationParameters(max_tokens=500),
        request_id="r",
        timeout_s=20,
        stream_timeouts=StreamTimeouts(first_s=5.0, next_s=0.02),  # its parts come every tenth of a second
    )
    heard = []

    async def listen() -> None:
        async for chunk in chunks:
            heard.append(chunk.text)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(EndpointUnavailable, match=r"nothing was heard within 0\.02 s"):
        await listen()
    assert "".join(heard).startswith("L0")
