"""The stand-in models in a real Triton server, with a gRPC client and a clock that is ten times as fast."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import psutil
import pytest
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException

from deploy.triton.models import stand_in_judge, stand_in_llm
from deploy.triton.stand_in.batching import RecordedRules
from deploy.triton.stand_in.judge import JudgeRules
from shared.runtime.clock import Clock
from tests.support.deadlines import until
from tests.support.triton import LEVELS, ServingTriton, model_processes, serving_triton, text_of, write_entries

pytestmark = pytest.mark.integration

IDLE_W = 50.0
SYSTEM = {"L0": "", "L1": "Always answer briefly.", "L2": "Always answer very briefly."}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingTriton]:
    folder = tmp_path_factory.mktemp("triton")
    workload = write_entries(folder / "w.jsonl")
    narrow = RecordedRules(slots=2, slowdown=0.5)
    models = [
        stand_in_llm(workload, model="m", idle_power_w=IDLE_W),
        stand_in_llm(workload, model="m", name="narrow", gpu_uuid="narrow", batch=narrow, idle_power_w=0.0),
        stand_in_judge(workload, rules=JudgeRules(position_bias=0.0)),
    ]
    clock = Clock.starting(datetime(2023, 2, 10, tzinfo=UTC), rate=10.0)
    with serving_triton(folder, models, clock=clock) as running:
        yield running


@pytest.fixture
async def client(server: ServingTriton) -> AsyncIterator[grpcclient.InferenceServerClient]:
    async with grpcclient.InferenceServerClient(server.address) as connected:
        yield connected


@dataclass(frozen=True)
class Part:
    text: str
    tokens: int
    input_tokens: int
    log_probs: tuple[int, ...]
    final: bool


def tensor(name: str, value: object, kind: str) -> grpcclient.InferInput:
    types = {"BYTES": np.object_, "INT32": np.int32, "BOOL": np.bool_}
    array = np.array([value] if isinstance(value, list) else [[value]], dtype=types[kind])
    made = grpcclient.InferInput(name, array.shape, kind)
    made.set_data_from_numpy(array)
    return made


def inputs(text: str | None, *, max_tokens: int = 500, stream: bool = True, exclude: bool = True, stop=()) -> list:
    return [
        *([tensor("text_input", text.encode(), "BYTES")] if text is not None else []),
        tensor("max_tokens", max_tokens, "INT32"),
        tensor("stream", stream, "BOOL"),
        tensor("exclude_input_in_output", exclude, "BOOL"),
        *([tensor("stop_words", [word.encode() for word in stop], "BYTES")] if stop else []),
        *(
            tensor(name, True, "BOOL")
            for name in ("return_num_input_tokens", "return_num_output_tokens", "return_log_probs")
        ),
    ]


async def ask(client, text, *, model="ensemble", **changes) -> list[Part]:
    async def requests():
        yield {"model_name": model, "inputs": inputs(text, **changes), "enable_empty_final_response": True}

    parts: list[Part] = []
    async for result, error in client.stream_infer(requests()):
        if error is not None:
            raise error
        response = result.get_response()
        parts.append(
            Part(
                result.as_numpy("text_output")[0].decode(),
                int(result.as_numpy("num_output_tokens").item()),
                int(result.as_numpy("num_input_tokens").item()),
                result.as_numpy("output_log_probs").shape,
                response.parameters["triton_final_response"].bool_param,
            )
        )
        if parts[-1].final:
            break
    return parts


def rendered(question: str, system: str = "") -> str:
    return f"<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{question} [/INST]" if system else f"<s>[INST] {question} [/INST]"


def question(number: int, level: str = "L0") -> str:
    return rendered(f"Question number {number}?", SYSTEM[level])


async def test_a_streamed_answer_arrives_in_parts_that_make_up_the_recorded_text(client):
    parts = await ask(client, question(1))
    assert "".join(part.text for part in parts) == text_of(1, "L0")
    assert sum(part.tokens for part in parts) == 100
    assert len(parts) > 1
    assert [part.final for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[0].input_tokens == round(len(question(1)) / 4)
    assert parts[-1].log_probs == (1, 1, 100)  # of all tokens so far


async def test_an_answer_is_not_faster_than_recorded(client, server):
    began_s = server.clock.now_s()
    await ask(client, question(2))
    assert server.clock.now_s() - began_s >= 2.0


async def test_an_answer_that_is_not_streamed_is_one_response_with_the_prompt_unless_it_is_excluded(client):
    (plain,) = await ask(client, question(3, "L2"), stream=False)
    (echoed,) = await ask(client, question(3, "L2"), stream=False, exclude=False)
    assert (plain.text, plain.tokens, plain.final) == (text_of(3, "L2"), 10, True)
    assert echoed.text == question(3, "L2") + text_of(3, "L2")
    assert echoed.tokens == 10 + plain.input_tokens
    assert echoed.log_probs == (1, 1, 10)


@pytest.mark.parametrize("level", LEVELS)
async def test_the_directive_in_the_prompt_decides_the_answer(client, level):
    parts = await ask(client, question(4, level))
    assert "".join(part.text for part in parts) == text_of(4, level)
    assert sum(part.tokens for part in parts) == LEVELS[level][0]


async def test_an_unknown_prompt_gets_a_made_up_answer_that_says_so(client):
    parts = await ask(client, rendered("What did nobody ever ask?"))
    assert "made up by a stand-in model" in "".join(part.text for part in parts)
    assert sum(part.tokens for part in parts) == 100


async def test_token_limit_and_stop_words_end_an_answer(client):
    assert sum(part.tokens for part in await ask(client, question(5), max_tokens=7)) == 7
    (part,) = await ask(client, question(5), stream=False, stop=["word "])
    assert part.text == "Answer 5 at L0: word "


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("hello", {"max_tokens": -4}, "'max_tokens' must lie between 1"),
        ("   ", {}, "'text_input' is empty"),
        (None, {}, "text_input"),
    ],
)
async def test_an_invalid_request_gets_an_error_that_names_the_tensor(client, text, changes, message):
    with pytest.raises(InferenceServerException, match=message):
        await ask(client, text, **changes)
    assert await ask(client, question(6, "L2"))


async def test_the_counter_includes_the_energy_of_answers_before_their_end_is_seen(client, server):
    before_j = server.energy_j("narrow")
    await asyncio.gather(*(ask(client, question(n, level), model="narrow") for n in range(8) for level in LEVELS))
    assert server.energy_j("narrow") - before_j == pytest.approx(8 * 6.0 * 140)


async def test_a_model_without_requests_takes_its_idle_power(server):
    gpu = "stand-in-m"
    before_j = server.energy_j(gpu)
    await server.until_energy_above(gpu, before_j + 10 * IDLE_W)  # ten seconds of event time
    idle_w = pytest.approx(IDLE_W, rel=0.01)
    await until(lambda: server.metric("nv_gpu_power_usage", gpu), lambda found_w: found_w == idle_w)


async def test_every_model_has_its_own_counters(client, server):
    gpus = ("narrow", "stand-in-judge")
    before_j = [server.energy_j(gpu) for gpu in gpus]
    await ask(client, question(7))
    assert [server.energy_j(gpu) for gpu in gpus] == before_j


async def test_concurrent_answers_share_the_slots_and_slow_each_other_down(client, server):
    async def timed(count: int) -> float:
        began_s = server.clock.now_s()
        await asyncio.gather(*(ask(client, question(n), model="narrow", stream=False) for n in range(count)))
        return server.clock.now_s() - began_s

    assert await timed(2) >= 3.0  # 2 s x (1 + 0.5)
    assert await timed(4) >= 6.0  # two after two


async def test_cancelled_requests_stop_taking_energy(client, server):
    gpu = "narrow"
    before_j = await server.settled_energy_j(gpu)
    count = 100  # they take fifteen seconds
    blocked = [asyncio.create_task(ask(client, question(8), model=gpu)) for _ in range(count)]
    await server.until_energy_above(gpu, before_j)
    for task in blocked:
        task.cancel()
    await asyncio.gather(*blocked, return_exceptions=True)
    assert await server.settled_energy_j(gpu) - before_j < 0.7 * count * 600.0


async def test_the_judge_names_the_preferred_answer(client, server):
    for number, order in ((9, "L0 L1 L2"), (10, "L2 L0 L1"), (11, "L1 L2 L0")):
        levels = order.split()
        answers = "".join(
            f"[Answer {letter}]\n{text_of(number, level)}\n\n" for letter, level in zip("ABC", levels, strict=True)
        )
        prompt = (
            f"[Question]\nQuestion number {number}?\n\n[Reference]\nnone\n\n{answers}"
            "Which answer is best? Reply with one letter only.\n"
        )
        before_j = server.energy_j("stand-in-judge")
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        parts = await ask(client, text, model="judge", max_tokens=1)
        assert [part.text for part in parts] == ["ABC"[levels.index(("L0", "L1", "L2")[number % 3])]]
        assert server.energy_j("stand-in-judge") - before_j > 30.0


def test_it_listens_only_on_loopback(server):
    listening = {
        (one.laddr.ip.removeprefix("::ffff:"), one.laddr.port)
        for member in (psutil.Process(server.pid), *model_processes(server.pid))
        for one in member.net_connections(kind="inet")
        if one.status == psutil.CONN_LISTEN
    }
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    assert {port for _, port in listening} >= {server.ports.grpc, server.ports.http, server.ports.metrics}


def test_its_log_names_the_broken_line_and_quotes_no_prompt(server):
    log = server.log.read_text()
    assert "line 31: not JSON" in log
    assert "Question number" not in log
