"""An optimizer as a process, with what other services publish to it and read from it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from typer.testing import CliRunner

from deploy.local.processes import Supervisor
from shared.messages import (
    CarbonIntensity,
    EndpointLoad,
    EvaluationCost,
    Footprint,
    IntensityPoint,
    LoadReport,
    Message,
    Policy,
    PoolCapacity,
    PoolLoad,
    Quality,
    QualityCount,
)
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import (
    CAPACITY,
    CARBON_INTENSITY,
    FOOTPRINTS,
    LOAD_REPORTS,
    POLICIES,
    QUALITY,
    TopicSpec,
)
from tests.support.deadlines import DEADLINE_S, until
from tests.support.fleets import fleet_toml
from tests.support.processes import start_service
from tests.support.traffic import committed
from tools.cli.main import app

M = TypeVar("M", bound=Message)

LEVELS = ("L0", "L1")
FLEET = fleet_toml(["127.0.0.1:9"], levels=LEVELS)
NOW = datetime.now(UTC)


def intensity(value: float) -> CarbonIntensity:
    hour = NOW.replace(minute=0, second=0, microsecond=0)
    history = [IntensityPoint(at=hour - timedelta(hours=48 - n), intensity_g_per_kwh=100.0 + 4 * n) for n in range(48)]
    latest = IntensityPoint(at=hour, intensity_g_per_kwh=value)
    return CarbonIntensity(zone="GB", latest=latest, history=history, source="test", published_at=datetime.now(UTC))


def footprint(number: int, level: str, *, model: str = "m") -> Footprint:
    """Of a call that was attributed 1000 J at L0 and 300 J at L1."""
    return Footprint(
        request_id=f"{level}-{number}", purpose="request", model=model, group="qa", pool="p", level=level, zone="GB",
        endpoint="e0", started_at=NOW, finished_at=NOW, processing_s=4.0 if level == "L0" else 1.0,
        completion_tokens=10, energy_j=1_000.0 if level == "L0" else 300.0, embodied_g=0.0,
    )  # fmt: skip


def quality(name: str, *, successes: dict[str, float]) -> Quality:
    counts = [
        QualityCount(group="qa", option=f"p/{level}", metric="preference", successes=won, trials=100)
        for level, won in successes.items()
    ]
    cost = EvaluationCost(generations=1, judgements=1, completion_tokens=1, processing_s=1.0)
    return Quality(
        evaluation_id=name, model="m", evaluated_at=NOW, trigger="first", counts=counts, prompts=100, abstentions=0,
        cost=cost,
    )  # fmt: skip


def load_report(*in_flight: int, arrivals: int = 2) -> LoadReport:
    endpoints = {f"e{place}": EndpointLoad(in_flight=number) for place, number in enumerate(in_flight)}
    load = PoolLoad(pool="p", arrivals=arrivals, waiting=0, endpoints=endpoints)
    return LoadReport(
        instance="router-1", service="router", at=datetime.now(UTC), interval_s=0.3, share=1.0, pools=(load,)
    )


async def _first(consumer: AIOKafkaConsumer, kind: type[M], wanted: Callable[[M], bool]) -> M:
    """The next message that is wanted."""
    async with asyncio.timeout(DEADLINE_S):
        async for record in consumer:
            found = kind.model_validate_json(record.value)
            if wanted(found):
                return found
    raise AssertionError("unreachable")


class Peers:
    """The other services."""

    def __init__(
        self, kafka: KafkaSettings, producer: AIOKafkaProducer, consumer: AIOKafkaConsumer, plans: AIOKafkaConsumer
    ) -> None:
        self.kafka, self.producer, self.consumer, self.plans = kafka, producer, consumer, plans

    async def send(self, spec: TopicSpec, key: str, *messages: Message) -> None:
        for message in messages:
            await self.producer.send(self.kafka.topic(spec), message.model_dump_json().encode(), key=key.encode())
        await self.producer.flush()

    async def until_counted(self) -> None:
        """Wait until the optimizers have counted all footprints: these change no policy any more."""
        await until(
            lambda: committed(self.kafka, "optimizer", topic=FOOTPRINTS),
            lambda found: all(offset == end for offset, end in found.values()),
        )

    async def send_evidence(self) -> None:
        """What a first policy needs: a carbon intensity, 40 footprints of each level, an evaluation of 100 prompts."""
        await self.send(CARBON_INTENSITY, "GB", intensity(292.0))
        for level in LEVELS:
            await self.send(FOOTPRINTS, level, *(footprint(n, level) for n in range(40)))
        await self.until_counted()
        await self.send(QUALITY, "e1", quality("e1", successes={"L0": 60, "L1": 40}))

    async def policy(self, wanted: Callable[[Policy], bool]) -> Policy:
        return await _first(self.consumer, Policy, wanted)

    async def plan(self, wanted: Callable[[PoolCapacity], bool]) -> PoolCapacity:
        return await _first(self.plans, PoolCapacity, wanted)

    async def versions(self) -> list[int]:
        """The versions of all policies so far."""
        (partition,) = self.consumer.assignment()
        (end,) = (await self.consumer.end_offsets([partition])).values()
        await self.consumer.seek_to_beginning(partition)
        found: list[int] = []
        async with asyncio.timeout(DEADLINE_S):
            while await self.consumer.position(partition) < end:
                found.append(Policy.model_validate_json((await self.consumer.getone()).value).version)
        return found

    @asynccontextmanager
    async def reporting(self, *in_flight: int) -> AsyncIterator[None]:
        """A router that has this many requests in flight on e0, e1, ..."""

        async def report() -> None:
            while True:
                await self.send(LOAD_REPORTS, "router-1", load_report(*in_flight))
                await asyncio.sleep(0.3)

        task = asyncio.create_task(report())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def peers(kafka: KafkaSettings) -> AsyncIterator[Peers]:
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    policies, plans = (
        AIOKafkaConsumer(kafka.topic(spec), bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest")
        for spec in (POLICIES, CAPACITY)
    )
    clients = (producer, policies, plans)
    for client in clients:
        await client.start()
    try:
        yield Peers(kafka, producer, policies, plans)
    finally:
        for client in clients:
            await client.stop()


def start_optimizer(
    supervisor: Supervisor, kafka: KafkaSettings, database: DatabaseSettings, fleet: Path, **settings: str
) -> str:
    """Start an optimizer that looks at its estimates all the time; returns the name of its process."""
    return start_service(
        "optimizer",
        supervisor,
        kafka=kafka,
        database=database,
        fleet=fleet,
        settings={"SPROUT_OPTIMIZER_ESTIMATES_INTERVAL_MIN": "0.001", **settings},
        name=f"optimizer-{time.monotonic_ns()}",
    )


async def explained(kafka: KafkaSettings, expected: Policy) -> None:
    """`sprout policy explain` finds the policy on its topic and rebuilds the program that it was solved from."""
    arguments = ["policy", "explain", "m", "--json", "--version", str(expected.version)]
    env = {"SPROUT_KAFKA_TOPIC_PREFIX": kafka.topic_prefix}
    result = await asyncio.to_thread(
        CliRunner().invoke, app, [*arguments, "--bootstrap", kafka.bootstrap_servers], env=env
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["rebuilt_g_per_request"] == pytest.approx(expected.expected_g_per_request, rel=1e-6)
    assert found["probabilities"]["qa"] == pytest.approx(expected.row("qa"))
    (limit,) = found["limits"]
    assert limit["slack"] == pytest.approx(0.0, abs=1e-4)
    assert limit["carbon_points_per_point"] > 0.0
