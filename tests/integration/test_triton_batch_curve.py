"""A stand-in with a batch curve in a real Triton server: power, speed, and sleep; its clock is ten times as fast."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException

from deploy.triton.models import stand_in_judge, stand_in_llm
from deploy.triton.stand_in.batching import CurveRules
from shared.batch_curve import MEASURED
from shared.runtime.clock import Clock
from tests.support.deadlines import until
from tests.support.triton import CounterUpdate, ServingTriton, next_update, serving_triton

pytestmark = pytest.mark.integration

CURVE = MEASURED["qwen3-14b-h100"]
GPU = "gpu-0"
LONG_TOKENS = 6_000
SHORT_TOKENS = 10
LENGTHS = {"long": LONG_TOKENS, "short": SHORT_TOKENS, "medium": 3_000}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingTriton]:
    folder = tmp_path_factory.mktemp("triton")
    workload = folder / "w.jsonl"
    lines = [
        {
            "task": "test",
            "prompt": prompt,
            "preferred": None,
            "responses": {"m/L0": {"text": f"{prompt} answer", "tokens": tokens, "energy_j": 1.0, "time_s": 1.0}},
        }
        for prompt, tokens in LENGTHS.items()
    ]
    workload.write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = [
        stand_in_llm(workload, model="m", gpu_uuid=GPU, batch=CurveRules(curve=CURVE)),
        stand_in_judge(workload),
    ]
    clock = Clock.starting(datetime(2023, 2, 10, tzinfo=UTC), rate=10.0)
    with serving_triton(folder, models, clock=clock) as running:
        yield running


@pytest.fixture
async def client(server: ServingTriton) -> AsyncIterator[grpcclient.InferenceServerClient]:
    async with grpcclient.InferenceServerClient(server.address) as connected:
        if not await connected.is_model_ready("ensemble"):
            await connected.load_model("ensemble")
        yield connected


def tensor(name: str, value: object, kind: str, dtype: type) -> grpcclient.InferInput:
    made = grpcclient.InferInput(name, [1, 1], kind)
    made.set_data_from_numpy(np.array([[value]], dtype=dtype))
    return made


async def ask(client: grpcclient.InferenceServerClient, prompt: str) -> str:
    async def requests():
        inputs = [
            tensor("text_input", f"<s>[INST] {prompt} [/INST]".encode(), "BYTES", np.object_),
            tensor("max_tokens", LONG_TOKENS, "INT32", np.int32),
            tensor("exclude_input_in_output", True, "BOOL", np.bool_),
        ]
        yield {"model_name": "ensemble", "inputs": inputs}

    async for result, error in client.stream_infer(requests()):
        if error is not None:
            raise error
        return result.as_numpy("text_output")[0].decode()
    raise AssertionError("no response")


async def update(server: ServingTriton) -> CounterUpdate:
    """The next update of the counter."""
    return await next_update(lambda: server.energy_j(GPU), server.clock)


async def check_power_without_work(server: ServingTriton, expected_w: float) -> None:
    """Check the power by the counter between two of its updates that are 20 s of event time apart, or more."""
    await update(server)  # this interval may begin before a change of the model's state
    began = ended = await update(server)
    while ended.earliest_s - began.latest_s < 20.0:
        ended = await update(server)
    least_w, most_w = ended.power_w(began)
    assert least_w <= expected_w <= most_w


async def updates_during(server: ServingTriton, tasks: Sequence["asyncio.Task[str]"]) -> list[CounterUpdate]:
    """Updates of the counter, from the time when all tasks run to the end of the first."""
    found: list[CounterUpdate] = []
    while True:
        one = await update(server)
        await asyncio.sleep(0.2)  # an answer that had ended at the update arrives
        if any(task.done() for task in tasks):
            return found
        found.append(one)


@asynccontextmanager
async def observed(server: ServingTriton) -> AsyncIterator[list[float]]:
    """Reads the counter all the time; the readings must not fall, nor grow faster than two sequences can explain."""
    energies: list[float] = []

    async def read() -> None:
        while True:
            energies.append(server.energy_j(GPU))
            await asyncio.sleep(0.1)

    began_s = server.clock.now_s()
    task = asyncio.create_task(read())
    try:
        yield energies
    finally:
        task.cancel()
    length_s = server.clock.now_s() - began_s
    assert energies == sorted(energies)
    assert energies[-1] - energies[0] <= CURVE.power_w(2) * (length_s + 2.0)


async def until_steps_are_metered(server: ServingTriton) -> None:
    """Wait until the counter has more than idle energy: the requests sent before are running."""
    began_s, began_j = server.clock.now_s(), server.energy_j(GPU)
    await until(lambda: server.energy_j(GPU) - began_j > 300.0 + CURVE.idle_w * (server.clock.now_s() - began_s))


async def until_unloaded(client: grpcclient.InferenceServerClient) -> None:
    await until(
        client.get_model_repository_index,
        lambda index: any(one.name == "ensemble" and one.reason == "unloaded" for one in index.models),
    )


@pytest.mark.parametrize("size", [8, 32])
async def test_power_and_tokens_per_second_of_a_batch_are_the_curves(client, server, size):
    before = await update(server)
    answers = [asyncio.create_task(ask(client, "long")) for _ in range(size)]
    await until_steps_are_metered(server)
    first, *_, last = await updates_during(server, answers)
    least_w, most_w = last.power_w(first)
    assert 0.98 * least_w <= CURVE.power_w(size) <= 1.02 * most_w
    await asyncio.gather(*answers)
    await update(server)  # it may have been due before the end
    after = await update(server)
    # All steps, each at its energy; with the power that is the time that they took.
    steps_j = LONG_TOKENS * CURVE.step_energy_j(size)
    least_j, most_j = after.above_idle_j(before, CURVE.idle_w)
    assert 0.98 * least_j <= steps_j <= 1.02 * most_j


async def test_an_unload_lets_running_answers_finish_and_takes_no_new_ones(client, server):
    async with observed(server):
        running = [asyncio.create_task(ask(client, "medium")) for _ in range(2)]
        await until_steps_are_metered(server)
        await client.unload_model("ensemble")
        assert not await client.is_model_ready("ensemble")
        assert await client.is_server_ready()
        with pytest.raises(InferenceServerException, match="unknown model: 'ensemble' has no available versions"):
            await ask(client, "short")
        assert await asyncio.gather(*running) == ["medium answer"] * 2
        await until_unloaded(client)
        assert await client.is_server_ready()
        with pytest.raises(InferenceServerException, match="unknown model"):
            await ask(client, "short")


async def test_an_unloaded_model_takes_its_asleep_power_and_serves_again_when_it_is_loaded(client, server):
    async with observed(server):
        await check_power_without_work(server, CURVE.idle_w)
        await client.unload_model("ensemble")
        await until_unloaded(client)
        await check_power_without_work(server, CURVE.asleep_w)
        # The gauge is the mean of the last second, and changes once a second.
        asleep = pytest.approx(CURVE.asleep_w, rel=0.1)
        await until(lambda: server.metric("nv_gpu_power_usage", GPU), lambda found_w: found_w == asleep)
        await client.load_model("ensemble")
        assert await client.is_model_ready("ensemble")
        assert await ask(client, "short") == "short answer"
        await check_power_without_work(server, CURVE.idle_w)


async def test_a_model_that_is_loaded_again_before_its_answers_end_takes_its_idle_power_once(client, server):
    async with observed(server):
        running = asyncio.create_task(ask(client, "long"))
        await until_steps_are_metered(server)
        await client.unload_model("ensemble")
        await client.load_model("ensemble")
        assert await ask(client, "short") == "short answer"
        assert not running.done()
        assert await running == "long answer"
        await check_power_without_work(server, CURVE.idle_w)


async def test_the_companion_takes_no_requests(client, server):
    with pytest.raises(InferenceServerException):
        await client.infer("ensemble-gpu", [])
    assert server.energy_j(GPU) > 0
