"""The stand-in models in a real Triton server, asked by a real gRPC client, in event time ten times as fast as ours."""

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException

from deploy.local.config import default_state_dir
from deploy.local.processes import ProcessSpec, Supervisor
from deploy.local.triton import TritonInstallation, free_triton_ports, install, metrics_url, ready_probe
from deploy.triton.models import stand_in_judge, stand_in_llm
from deploy.triton.repository import write_repository
from deploy.triton.server import TritonPorts
from deploy.triton.stand_in.batching import BatchRules
from deploy.triton.stand_in.judge import JudgeRules
from shared.runtime.clock import Clock
from tests.support.triton import LEVELS, model_processes, text_of, write_entries

pytestmark = pytest.mark.integration

RATE = 10.0
IDLE_W = 50.0
SYSTEM = {"L0": "", "L1": "Always answer briefly.", "L2": "Always answer very briefly."}


@pytest.fixture(scope="session")
def triton() -> TritonInstallation:
    return install(default_state_dir(), say=print)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workload") / "w.jsonl"
    return write_entries(path)


@dataclass(frozen=True)
class Running:
    ports: TritonPorts
    clock: Clock
    pid: int
    log: Path

    def energy_j(self, gpu: str) -> float:
        return self.metric("nv_energy_consumption", gpu)

    def metric(self, name: str, gpu: str) -> float:
        with urllib.request.urlopen(metrics_url(self.ports), timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        (value,) = (line.rpartition(" ")[2] for line in lines if line.startswith(f'{name}{{gpu_uuid="{gpu}"}}'))
        return float(value)


@pytest.fixture(scope="module")
def server(triton: TritonInstallation, workload: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("triton")
    write_repository(
        folder / "models",
        [
            stand_in_llm(workload, model="m", idle_power_w=IDLE_W),
            stand_in_llm(
                workload, model="m", name="narrow", gpu_uuid="narrow", batch=BatchRules(slots=2, slowdown=0.5)
            ),
            stand_in_judge(workload, rules=JudgeRules(position_bias=0.0)),
        ],
    )
    ports = free_triton_ports()
    clock = Clock.starting(datetime(2023, 2, 10, tzinfo=UTC), rate=RATE)
    supervisor = Supervisor(folder / "logs")
    process = supervisor.start(
        ProcessSpec(
            name="triton",
            command=tuple(triton.command(folder / "models", ports)),
            environment=triton.environment(clock.environment()),
            ready=ready_probe(ports),
        )
    )
    try:
        yield Running(ports, clock, process.pid, process.log)
    finally:
        supervisor.stop_all()


@pytest.fixture
async def client(server: Running) -> AsyncIterator[grpcclient.InferenceServerClient]:
    async with grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports.grpc}") as connected:
        yield connected


@dataclass(frozen=True)
class Part:
    text: str
    tokens: int
    input_tokens: int
    log_probs: tuple[int, ...]
    final: bool
    at: float


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
                time.monotonic(),
            )
        )
        if parts[-1].final:
            break
    return parts


def rendered(question: str, system: str = "") -> str:
    return f"<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{question} [/INST]" if system else f"<s>[INST] {question} [/INST]"


def question(number: int, level: str = "L0") -> str:
    return rendered(f"Question number {number}?", SYSTEM[level])


async def test_a_streamed_answer_comes_in_parts_that_make_up_the_recorded_text(client):
    parts = await ask(client, question(1))
    assert "".join(part.text for part in parts) == text_of(1, "L0")
    assert sum(part.tokens for part in parts) == 100
    assert len(parts) > 10
    assert [part.final for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[0].input_tokens == round(len(question(1)) / 4)
    assert parts[-1].log_probs == (1, 1, 100)  # of all tokens so far


async def test_its_parts_come_at_the_recorded_pace_in_event_time(client):
    began = time.monotonic()
    parts = await ask(client, question(2))
    assert (parts[-1].at - began) * RATE == pytest.approx(2.0, abs=0.6)
    middle = next(part for index, part in enumerate(parts) if sum(one.tokens for one in parts[: index + 1]) >= 50)
    assert (middle.at - began) * RATE == pytest.approx(1.0, abs=0.5)


async def test_an_answer_that_is_not_streamed_comes_whole_with_the_prompt_unless_it_is_excluded(client):
    (alone,) = await ask(client, question(3, "L2"), stream=False)
    (echoed,) = await ask(client, question(3, "L2"), stream=False, exclude=False)
    assert (alone.text, alone.tokens, alone.final) == (text_of(3, "L2"), 10, True)
    assert echoed.text == question(3, "L2") + text_of(3, "L2")
    assert echoed.tokens == 10 + alone.input_tokens
    assert echoed.log_probs == (1, 1, 10)


@pytest.mark.parametrize("level", LEVELS)
async def test_the_directive_in_the_prompt_decides_the_answer(client, level):
    parts = await ask(client, question(4, level))
    assert "".join(part.text for part in parts) == text_of(4, level)
    assert sum(part.tokens for part in parts) == LEVELS[level][0]


async def test_an_unknown_prompt_gets_an_answer_that_admits_to_be_made_up(client):
    parts = await ask(client, rendered("What did nobody ever ask?"))
    assert "made up by a stand-in model" in "".join(part.text for part in parts)
    assert sum(part.tokens for part in parts) == 100


async def test_token_limit_and_stop_words_end_an_answer(client):
    assert sum(part.tokens for part in await ask(client, question(5), max_tokens=7)) == 7
    (part,) = await ask(client, question(5), stream=False, stop=["word "])
    assert part.text == "Answer 5 at L0: word "


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("hello", {"max_tokens": -4}, "'max_tokens' must lie between 1"),
        ("   ", {}, "'text_input' is empty"),
        (None, {}, "text_input"),
    ],
)
async def test_a_bad_request_gets_an_error_that_names_the_tensor_and_the_server_lives_on(client, text, changes, said):
    with pytest.raises(InferenceServerException, match=said):
        await ask(client, text, **changes)
    assert await ask(client, question(6, "L2"))


async def test_the_counter_shows_idle_power_and_the_energy_of_answers_before_their_end_is_seen(client, server):
    gpu = "stand-in-m"
    before_j, before_s = server.energy_j(gpu), server.clock.now_s()
    await asyncio.gather(*(ask(client, question(number, level)) for number in range(8) for level in LEVELS))
    after_j, after_s = server.energy_j(gpu), server.clock.now_s()
    used_j = after_j - before_j - IDLE_W * (after_s - before_s)
    assert used_j == pytest.approx(8 * 6.0 * 140, abs=IDLE_W * 1.0)  # the two readings are 50 ms of ours old at most
    await asyncio.sleep(0.3)
    assert server.metric("nv_gpu_power_usage", gpu) == pytest.approx(IDLE_W, rel=0.01)


async def test_every_model_has_counters_of_its_own(client, server):
    narrow_j = server.energy_j("narrow")
    judge_j = server.energy_j("stand-in-judge")
    now_s = server.clock.now_s()
    await ask(client, question(7))
    assert server.energy_j("stand-in-judge") == judge_j
    assert server.energy_j("narrow") - narrow_j == pytest.approx(55.0 * (server.clock.now_s() - now_s), abs=55.0)


async def test_concurrent_answers_share_the_slots_and_slow_each_other_down(client):
    async def timed(count: int) -> float:
        began = time.monotonic()
        await asyncio.gather(*(ask(client, question(number), model="narrow", stream=False) for number in range(count)))
        return (time.monotonic() - began) * RATE

    assert await timed(1) == pytest.approx(2.0, abs=0.6)
    assert await timed(2) == pytest.approx(3.0, abs=0.8)  # 2 s x (1 + 0.5)
    assert await timed(4) == pytest.approx(6.0, abs=1.2)  # two after two


async def test_a_client_that_leaves_stops_the_energy_of_its_answer(client, server):
    long = rendered("Question number 8?")
    gpu = "narrow"
    await asyncio.sleep(0.2)
    before_j, before_s = server.energy_j(gpu), server.clock.now_s()
    blocked = [asyncio.create_task(ask(client, long, model="narrow")) for _ in range(6)]
    await asyncio.sleep(0.15)
    for task in blocked:
        task.cancel()
    await asyncio.gather(*blocked, return_exceptions=True)
    await asyncio.sleep(1.5)
    used_j = server.energy_j(gpu) - before_j - 55.0 * (server.clock.now_s() - before_s)
    assert used_j < 0.7 * 6 * 600.0


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


def test_it_listens_on_loopback_alone(server):
    listening = {
        (one.laddr.ip.removeprefix("::ffff:"), one.laddr.port)
        for member in (psutil.Process(server.pid), *model_processes(server.pid))
        for one in member.net_connections(kind="inet")
        if one.status == psutil.CONN_LISTEN
    }
    assert {ip for ip, _ in listening} == {"127.0.0.1"}
    assert {port for _, port in listening} >= {server.ports.grpc, server.ports.http, server.ports.metrics}


def test_its_log_names_the_broken_line_and_no_prompt(server):
    log = server.log.read_text()
    assert "line 31: not JSON" in log
    assert "Question number" not in log
