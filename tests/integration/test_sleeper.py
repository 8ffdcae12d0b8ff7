"""The process that puts endpoints to sleep, on real Kafka and two real Triton servers."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from tritonclient.grpc.aio import InferenceServerClient

from deploy.local.config import StackConfig, default_state_dir
from deploy.local.model_servers import PreparedModels, TritonModels
from deploy.local.processes import Supervisor, free_ports
from deploy.local.services import ServiceEnvironment, sleeper_spec
from deploy.local.sleeper import DRAIN_WALL_S
from shared.messages import EndpointLoad, LoadReport, PoolCapacity, PoolLoad
from shared.runtime.settings import KafkaSettings
from shared.topics import CAPACITY, LOAD_REPORTS
from tests.support.deadlines import until

pytestmark = pytest.mark.integration

POOL = "local-13b"
FIRST, SECOND = f"{POOL}-0", f"{POOL}-1"
SLEEPER = "sleeper"


@pytest.fixture(scope="module")
def models(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreparedModels]:
    folder = tmp_path_factory.mktemp("models")
    config = StackConfig(state_dir=folder, install_dir=default_state_dir(), servers=2, sleep=True)
    servers = TritonModels()
    servers.install(config, print)
    prepared = servers.prepare(config, {})
    prepared.fleet.write(folder / "fleet.toml")
    for process in [supervisor.spawn(spec) for spec in prepared.processes]:
        process.wait_ready()
    yield prepared
    for spec in prepared.processes:
        supervisor.stop(spec.name)


@dataclass
class Sleeper:
    """The process, and the messages that it reads."""

    supervisor: Supervisor
    kafka: KafkaSettings
    producer: AIOKafkaProducer
    fleet: Path
    busy: dict[str, int]
    """Calls in flight by endpoint, as reported twice a second."""
    reported_at: datetime
    """Time of the last report."""

    def start(self, *, bootstrap_servers: str | None = None) -> None:
        environment = ServiceEnvironment(
            bootstrap_servers=bootstrap_servers or self.kafka.bootstrap_servers,
            topic_prefix=self.kafka.topic_prefix,
            database_url="",
            fleet_file=self.fleet,
            clock={},
        )
        self.supervisor.start(sleeper_spec(environment))

    async def needs(self, *awake: str, valid_s: float = 600.0) -> None:
        """Publish a capacity message."""
        now = datetime.now(UTC)
        message = PoolCapacity(
            pool=POOL,
            at=now,
            valid_until=now + timedelta(seconds=valid_s),
            requests_per_s=1.0,
            in_flight=0,
            endpoints=2,
            endpoints_needed=len(awake),
            awake=awake,
            reason="test",
        )
        await self.producer.send_and_wait(
            self.kafka.topic(CAPACITY), message.model_dump_json().encode(), key=POOL.encode()
        )

    async def report(self) -> None:
        """Publish load reports until cancelled."""
        while True:
            endpoints = {name: EndpointLoad(in_flight=self.busy.get(name, 0)) for name in (FIRST, SECOND)}
            message = LoadReport(
                instance="router-a",
                service="router",
                at=datetime.now(UTC),
                interval_s=0.5,
                share=1.0,
                pools=(PoolLoad(pool=POOL, arrivals=0, waiting=0, endpoints=endpoints),),
            )
            await self.producer.send_and_wait(self.kafka.topic(LOAD_REPORTS), message.model_dump_json().encode())
            self.reported_at = message.at
            await asyncio.sleep(0.5)

    def log(self) -> list[dict[str, Any]]:
        """The lines of the process's log, of all its starts."""
        text = self.supervisor.process(SLEEPER).log.read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def failures(self, endpoint: str) -> list[dict[str, Any]]:
        """Failed calls of an endpoint."""
        return [line for line in self.log() if line["event"] == "triton_failed" and line["endpoint"] == endpoint]

    @property
    def alive(self) -> bool:
        return self.supervisor.process(SLEEPER).alive


@asynccontextmanager
async def sleeping(supervisor: Supervisor, kafka: KafkaSettings, models: PreparedModels) -> AsyncIterator[Sleeper]:
    await load_all(models)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    await producer.start()
    fleet = models.fleet.config.state_dir / "fleet.toml"
    sleeper = Sleeper(supervisor, kafka, producer, fleet, {}, datetime.now(UTC))
    reporting = asyncio.create_task(sleeper.report())
    try:
        yield sleeper
    finally:
        reporting.cancel()
        await producer.stop()
        if SLEEPER in supervisor.names:
            supervisor.stop(SLEEPER)


async def loaded(models: PreparedModels) -> list[bool]:
    """Whether the model is loaded, by server. The last server is asked first."""
    found = []
    for server in reversed(models.fleet.servers):
        async with InferenceServerClient(server.grpc) as client:
            found.append(await client.is_model_ready("ensemble"))
    return found[::-1]


async def until_loaded(models: PreparedModels, *wanted: bool) -> None:
    """Wait until the model is loaded on the wanted servers."""
    await until(lambda: loaded(models), lambda found: found == list(wanted))


async def load_all(models: PreparedModels) -> None:
    """Load the model where an earlier test has left it unloaded."""
    for server in models.fleet.servers:
        async with InferenceServerClient(server.grpc) as client:
            if not await client.is_model_ready("ensemble"):
                await client.load_model("ensemble")


async def test_an_endpoint_sleeps_while_it_is_not_needed_and_is_awake_again_at_once(supervisor, kafka, models):
    async with sleeping(supervisor, kafka, models) as sleeper:
        sleeper.start()
        began = time.monotonic()
        await sleeper.needs(FIRST)
        await until_loaded(models, True, False)
        assert time.monotonic() - began >= DRAIN_WALL_S
        async with InferenceServerClient(models.fleet.judge.grpc) as client:
            assert await client.is_model_ready("judge")
        await sleeper.needs(FIRST, SECOND)
        await until_loaded(models, True, True)

        # The other one: it is awake before the first sleeps.
        await sleeper.needs(SECOND)
        await until_loaded(models, False, True)
        await sleeper.needs(FIRST)

        def awake(found: list[bool]) -> bool:
            assert any(found)  # The second was asked first: once it sleeps, the first is awake.
            return found == [True, False]

        await until(lambda: loaded(models), awake)
        # A call may be late on a busy machine, which is no failure of the server.
        errors = [line["error"] for name in (FIRST, SECOND) for line in sleeper.failures(name)]
        assert set(errors) <= {"Deadline Exceeded"}


async def test_an_endpoint_with_work_in_flight_is_not_put_to_sleep(supervisor, kafka, models):
    async with sleeping(supervisor, kafka, models) as sleeper:
        sleeper.busy[SECOND] = 3
        sleeper.start()
        await sleeper.needs(FIRST)
        released = datetime.now(UTC)

        def reported(found: list[bool]) -> bool:
            """Whether reports were published long after those that could have put it to sleep."""
            assert found == [True, True]
            return sleeper.reported_at > released + timedelta(seconds=3 * DRAIN_WALL_S)

        await until(lambda: loaded(models), reported)
        sleeper.busy.clear()
        await until_loaded(models, True, False)


async def test_an_outdated_capacity_message_wakes_every_endpoint(supervisor, kafka, models):
    async with sleeping(supervisor, kafka, models) as sleeper:
        sleeper.start()
        await sleeper.needs(FIRST)
        await until_loaded(models, True, False)
        await sleeper.needs(FIRST, valid_s=1.0)
        await until_loaded(models, True, True)


async def test_what_it_has_put_to_sleep_is_awake_after_its_end(supervisor, kafka, models):
    async with sleeping(supervisor, kafka, models) as sleeper:
        sleeper.start()
        await sleeper.needs(FIRST)
        await until_loaded(models, True, False)
        process = supervisor.process(SLEEPER)
        supervisor.stop(SLEEPER)
        assert not process.alive
        await until_loaded(models, True, True)


async def test_a_killed_one_finds_the_sleeping_endpoint_again(supervisor, kafka, models):
    async with sleeping(supervisor, kafka, models) as sleeper:
        sleeper.start()
        await sleeper.needs(FIRST)
        await until_loaded(models, True, False)
        supervisor.kill(SLEEPER)
        await sleeper.needs(FIRST, SECOND)
        sleeper.start()
        await until_loaded(models, True, True)


async def test_a_server_that_is_away_stops_nothing(supervisor, kafka, models):
    async with sleeping(supervisor, kafka, models) as sleeper:
        sleeper.start()
        await sleeper.needs(FIRST)
        await until_loaded(models, True, False)
        earlier = len(sleeper.failures(SECOND))
        supervisor.kill("triton-1")
        await sleeper.needs(FIRST, SECOND)
        # It tries again, less and less often.
        failures = await until(lambda: sleeper.failures(SECOND)[earlier:], lambda found: len(found) >= 4)
        assert [line["retry_s"] for line in failures[:4]] == [0.5, 1.0, 2.0, 4.0]
        assert sleeper.alive
        # It comes back with every model loaded.
        supervisor.respawn("triton-1").wait_ready()
        await sleeper.needs(FIRST)
        await until_loaded(models, True, False)
        await sleeper.needs(FIRST, SECOND)
        await until_loaded(models, True, True)


async def test_it_waits_for_kafka(supervisor, kafka, models):
    async with sleeping(supervisor, kafka, models) as sleeper:
        sleeper.start(bootstrap_servers=f"127.0.0.1:{free_ports(1)[0]}")
        await until(lambda: sum(line["event"] == "kafka_unavailable" for line in sleeper.log()) >= 3)
        assert sleeper.alive
        assert await loaded(models) == [True, True]
