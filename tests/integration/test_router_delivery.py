"""Two thousand requests through real Kafka, router processes and a real Triton server: each gets exactly one response.

Counts and durations are printed; `pytest -s` shows them.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy.local.processes import Supervisor
from shared.messages import GenerationResponse
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from shared.topics import CARBON_INTENSITY, POLICIES
from tests.support.router import (
    LEVELS,
    Producer,
    RouterProcess,
    TritonServer,
    fleet_toml,
    intensity,
    policy,
    producing,
    reading,
    request,
    start_triton,
    until_committed,
)

pytestmark = pytest.mark.integration

COUNT = 2_000
START = datetime(2024, 2, 8, tzinfo=UTC)
RATE = 20.0
"""Event seconds per wall second: recorded answers take 0.1 to 1 event seconds."""


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock.starting(START, rate=RATE)


@pytest.fixture(scope="module")
def triton(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory, clock: Clock) -> Iterator[TritonServer]:
    server = start_triton(supervisor, tmp_path_factory.mktemp("triton"), name="delivery-triton", clock=clock)
    yield server
    supervisor.stop(server.name)


@pytest.fixture
def routers(
    supervisor: Supervisor, kafka: KafkaSettings, triton: TritonServer, tmp_path: Path, clock: Clock
) -> Iterator[RouterProcess]:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(fleet_toml([triton.address]))
    running = RouterProcess(supervisor, kafka, fleet, clock)
    # Under load requests wait for others: the deadline must not fail them.
    running.settings["SPROUT_ROUTER_DEFAULT_DEADLINE_WALL_S"] = "600"
    yield running
    for name in [name for name in supervisor.names if name.startswith(kafka.topic_prefix)]:
        supervisor.stop(name)


@pytest.fixture
async def producer(kafka: KafkaSettings, clock: Clock) -> AsyncIterator[Producer]:
    async with producing(kafka) as made:
        await made.post(CARBON_INTENSITY, intensity(clock.now()), "GB")
        await made.post(POLICIES, policy({"L0": 0.2, "L1": 0.5, "L2": 0.3}, now=clock.now(), valid_s=86_400.0), "m")
        yield made


def ids() -> list[str]:
    return [f"r{number}" for number in range(COUNT)]


def check(response: GenerationResponse) -> None:
    assert response.status == "ok", response.error
    assert response.decision is not None
    assert response.usage is not None
    assert response.decision.source == "policy"
    assert response.usage.completion_tokens == LEVELS[response.decision.level][0]


async def test_every_request_is_answered_exactly_once(kafka, routers, producer):
    routers.start()
    began = time.monotonic()
    await producer.ask(*(request(number) for number in range(COUNT)))
    async with reading(kafka) as answers:
        await answers.ids(ids())
        took_s = time.monotonic() - began
        await until_committed(kafka)
        await answers.read_to_end()
    counts = Counter(record.key.decode() for record in answers.records)
    assert counts == Counter(ids())
    for response in answers.responses().values():
        check(response)
    print(f"{COUNT} requests answered once each in {took_s:.1f} s: {COUNT / took_s:.0f} requests/s")


async def test_killed_routers_lose_no_request_and_answer_none_twice(kafka, routers, producer):
    running = [routers.start(), routers.start()]
    began = time.monotonic()
    await producer.ask(*(request(number) for number in range(COUNT)))
    before = []
    async with reading(kafka) as answers:
        for kill in range(3):
            await answers.read(until=COUNT * (kill + 1) // 5)
            routers.supervisor.kill(running.pop(0))
            before.append(len(answers.records))
            running.append(await asyncio.to_thread(routers.start))
        await answers.ids(ids())
        took_s = time.monotonic() - began
        await until_committed(kafka)
        await answers.read_to_end()
    assert before[0] < COUNT
    assert Counter(record.key.decode() for record in answers.records) == Counter(ids())
    for response in answers.responses().values():
        check(response)
    print(f"{COUNT} requests, routers killed after {before} answers: answered once each within {took_s:.1f} s")
