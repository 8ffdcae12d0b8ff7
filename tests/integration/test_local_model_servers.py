"""The local stack's model servers: prepared from its configuration, with a stand-in and with a real language model."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException

from deploy.local.config import StackConfig, default_state_dir
from deploy.local.model_servers import ModelServerError, PreparedModels, TritonModels
from deploy.local.processes import Supervisor
from deploy.triton.smollm2.power import available_source
from shared.batch_curve import MEASURED
from shared.fleet import load_fleet
from shared.runtime.clock import Clock
from tests.support.deadlines import until
from tests.support.triton import CounterUpdate, gpu_metric, next_update, settled

pytestmark = pytest.mark.integration

START = datetime(2023, 2, 10, tzinfo=UTC)
RATE = 20.0


def workload(folder: Path) -> Path:
    answers = {
        f"llama-2-13b-chat/{level}": {"energy_j": 60.0, "time_s": 0.5, "tokens": 10} for level in ("L0", "L1", "L2")
    }
    path = folder / "w.jsonl"
    path.write_text(json.dumps({"task": "t", "prompt": "Why?", "preferred": "L1", "responses": answers}) + "\n")
    return path


def prepared(folder: Path, clock: Clock | None = None, **changes: object) -> PreparedModels:
    config = StackConfig.model_validate(
        {"state_dir": folder, "install_dir": default_state_dir(), "workload": workload(folder), **changes}
    )
    models = TritonModels()
    models.install(config, print)
    return models.prepare(config, clock.environment() if clock else {})


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path / "logs") as running:
        yield running


def energy_j(models: PreparedModels, gpu: str) -> float:
    return gpu_metric(models.fleet.servers[0].metrics, "nv_energy_consumption", gpu)


async def ask(models: PreparedModels, text: str, *, max_tokens: int = 64, cancel_after: int | None = None):
    def tensor(name, value, kind, dtype):
        made = grpcclient.InferInput(name, [1, 1], kind)
        made.set_data_from_numpy(np.array([[value]], dtype=dtype))
        return made

    async def requests():
        yield {
            "model_name": "ensemble",
            "inputs": [
                tensor("text_input", text.encode(), "BYTES", np.object_),
                tensor("max_tokens", max_tokens, "INT32", np.int32),
                tensor("stream", True, "BOOL", np.bool_),
                tensor("temperature", 0.0, "FP32", np.float32),
                tensor("return_num_output_tokens", True, "BOOL", np.bool_),
                tensor("return_num_input_tokens", True, "BOOL", np.bool_),
            ],
        }

    parts = []
    async with grpcclient.InferenceServerClient(models.fleet.servers[0].grpc) as client:
        answers = client.stream_infer(requests())
        async for result, error in answers:
            if error is not None:
                raise error
            parts.append(
                (
                    result.as_numpy("text_output")[0].decode(),
                    int(result.as_numpy("num_output_tokens").item()),
                    int(result.as_numpy("num_input_tokens").item()),
                )
            )
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
            if len(parts) == cancel_after:
                answers.cancel()
                break
    return parts


async def unload(address: str) -> None:
    async with grpcclient.InferenceServerClient(address) as client:
        await client.unload_model("ensemble")


async def until_idle(models: PreparedModels, gpu: str, *, idle_w: float) -> None:
    """Wait until the power of a model is its idle power."""
    url = models.fleet.servers[0].metrics
    await until(
        lambda: gpu_metric(url, "nv_gpu_power_usage", gpu), lambda found: found == pytest.approx(idle_w, rel=0.01)
    )


def chatml(user: str, system: str = "") -> str:
    start = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{start}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def test_a_stand_in_is_prepared_as_the_fleet_file_describes_it(tmp_path, supervisor):
    clock = Clock.starting(START, rate=RATE)
    models = prepared(tmp_path, clock, curve="recorded", settings={"triton": {"SPROUT_TRITON_IDLE_POWER_W": "80"}})
    supervisor.start(models.processes[0])
    models.fleet.write(tmp_path / "fleet.toml")
    fleet = load_fleet(tmp_path / "fleet.toml")
    pool = fleet.pools_of("llama-2-13b-chat")[0]
    assert pool.idle_power_w == 80
    parts = asyncio.run(ask(models, "<s>[INST] Why? [/INST]"))
    assert sum(tokens for _, tokens, _ in parts) == 10
    (gpu,) = pool.endpoints[0].gpus
    asyncio.run(until_idle(models, gpu, idle_w=80))
    with pytest.raises(InferenceServerException, match="not allowed"):  # nothing sleeps in this stack
        asyncio.run(unload(models.fleet.servers[0].grpc))
    assert "stand-in for llama-2-13b-chat (recorded answers and energy of w.jsonl)" in models.description


def test_a_curve_gives_power_and_speed_and_an_unloaded_model_takes_little_power(tmp_path, supervisor):
    clock = Clock.starting(START, rate=RATE)
    models = prepared(tmp_path, clock, curve="llama-3.1-8b-h100", stretch=100, sleep=True)
    curve = MEASURED["llama-3.1-8b-h100"]
    supervisor.start(models.processes[0])
    assert models.fleet.idle_power_w == curve.idle_w
    assert "power and speed of llama-3.1-8b-h100, steps 100 times as long" in models.description
    (server,) = models.fleet.servers

    def update() -> CounterUpdate:
        return asyncio.run(next_update(lambda: energy_j(models, server.gpu), clock))

    before = update()
    parts = asyncio.run(ask(models, "<s>[INST] Why? [/INST]"))
    assert sum(tokens for _, tokens, _ in parts) == 10
    asyncio.run(until_idle(models, server.gpu, idle_w=curve.idle_w))
    least_j, most_j = update().above_idle_j(before, curve.idle_w)
    assert least_j <= 10 * 100 * curve.step_energy_j(1) <= most_j
    asyncio.run(unload(server.grpc))
    asyncio.run(until_idle(models, server.gpu, idle_w=curve.asleep_w))


def test_several_servers_start_in_parallel_each_with_its_own_meter_and_model_control(tmp_path, supervisor):
    models = prepared(tmp_path, servers=3, sleep=True)
    assert [process.name for process in models.processes] == ["triton-0", "triton-1", "triton-2"]
    for process in [supervisor.spawn(spec) for spec in models.processes]:
        process.wait_ready()
    servers = models.fleet.servers
    assert len({server.gpu for server in servers}) == 3
    for server in servers:
        assert gpu_metric(server.metrics, "nv_gpu_power_usage", server.gpu) >= 0
    assert "3 stand-ins for llama-2-13b-chat" in models.description

    async def repository(address: str) -> dict[str, str]:
        async with grpcclient.InferenceServerClient(address) as client:
            return {model.name: model.state for model in (await client.get_model_repository_index()).models}

    async def unloaded_and_loaded(address: str) -> list[bool]:
        found = []
        async with grpcclient.InferenceServerClient(address) as client:
            for act in (client.unload_model, client.load_model):
                await act("ensemble")
                found.append(await client.is_model_ready("ensemble"))
        return found

    found = [asyncio.run(repository(server.grpc)) for server in servers]
    model = {"ensemble": "READY", "ensemble-gpu": "READY"}
    assert found == [{**model, "judge": "READY"}, model, model]
    assert asyncio.run(unloaded_and_loaded(servers[2].grpc)) == [False, True]


def test_a_workload_without_the_models_answers_is_rejected_before_anything_starts(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(workload(tmp_path).read_text().replace("llama-2-13b-chat", "gpt-2"))
    with pytest.raises(ModelServerError, match=r"no answers of model 'llama-2-13b-chat' \(it has: gpt-2\)"):
        prepared(tmp_path, workload=path)


def test_a_real_language_model_answers_token_by_token_and_its_energy_has_a_label(tmp_path, supervisor):
    clock = Clock.starting(START, rate=RATE)
    models = prepared(tmp_path, clock, model="smollm2")
    supervisor.start(models.processes[0])
    assert models.fleet.servers[0].gpu == f"cpu-{available_source()}"

    parts = asyncio.run(ask(models, chatml("What is the capital of France?", "Always answer briefly.")))
    assert "Paris" in "".join(text for text, _, _ in parts)
    assert len(parts) >= 3
    assert sum(tokens for _, tokens, _ in parts) >= len(parts) - 1
    assert parts[0][2] > 10

    async def many():
        return await asyncio.gather(
            *(ask(models, chatml(f"Tell me about the number {n}."), max_tokens=24) for n in range(10))
        )

    before_j = energy_j(models, models.fleet.servers[0].gpu)
    answers = asyncio.run(many())  # more than there are slots
    assert all(sum(tokens for _, tokens, _ in parts) == 24 for parts in answers)
    after_j = energy_j(models, models.fleet.servers[0].gpu)
    assert after_j > before_j

    asyncio.run(ask(models, chatml("Tell a very long story about the sea."), max_tokens=1500, cancel_after=3))
    if available_source() == "modelled":  # RAPL includes everything else that runs on this machine
        # Uninterrupted, the answer would take energy for longer than this waits.
        asyncio.run(
            settled(lambda: energy_j(models, models.fleet.servers[0].gpu), tolerance=0.2 * (after_j - before_j))
        )
        assert "modelled from CPU time" in models.description

    with pytest.raises(Exception, match="exceeds the available context size"):
        asyncio.run(ask(models, "hello " * 3000))
