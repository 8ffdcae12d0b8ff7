"""The optimizer as a process, on real Kafka and PostgreSQL."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from typer.testing import CliRunner

from deploy.local.processes import Supervisor, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from shared.messages import (
    CarbonIntensity,
    EvaluationCost,
    Footprint,
    GroupEvidence,
    IntensityPoint,
    Message,
    PackedArray,
    Policy,
    PromptGrouping,
    Quality,
    QualityCount,
)
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import CARBON_INTENSITY, FOOTPRINTS, POLICIES, PROMPT_GROUPS, QUALITY, TopicSpec
from tools.cli.main import app

pytestmark = pytest.mark.integration

FLEET = """
[[directives]]
level = "L0"
[[directives]]
level = "L1"
text = "Always answer briefly."
[[models]]
name = "m"
chat_template = "chatml"
[[pools]]
name = "p"
model = "m"
zone = "GB"
[[pools.endpoints]]
name = "e0"
grpc = "127.0.0.1:9"
"""
NOW = datetime.now(UTC)


def intensity(value: float) -> CarbonIntensity:
    hour = NOW.replace(minute=0, second=0, microsecond=0)
    history = [IntensityPoint(at=hour - timedelta(hours=48 - n), intensity_g_per_kwh=100.0 + 4 * n) for n in range(48)]
    latest = IntensityPoint(at=hour, intensity_g_per_kwh=value)
    return CarbonIntensity(zone="GB", latest=latest, history=history, source="test", published_at=datetime.now(UTC))


def footprint(number: int, level: str, *, model: str = "m") -> Footprint:
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


def grouping(*, learned_at: datetime) -> PromptGrouping:
    """Two groups: L0 is preferred in the first, L1 in the second."""
    counts = [
        QualityCount(group=group, option=f"p/{level}", metric="preference", successes=won, trials=100)
        for group, row in {"v.00": {"L0": 90, "L1": 10}, "v.01": {"L0": 20, "L1": 80}}.items()
        for level, won in row.items()
    ]
    return PromptGrouping(
        model="m", version="v", learned_at=learned_at, prompts=200, names=("v.00", "v.01"), features=1,
        arrays={"weights": PackedArray(dtype="<f4", shape=(0,), data="")}, traffic={"v.00": 0.5, "v.01": 0.5},
        evidence=(GroupEvidence(evaluated_at=learned_at, counts=counts),),
    )  # fmt: skip


class Peers:
    """The other services."""

    def __init__(self, kafka: KafkaSettings, producer: AIOKafkaProducer, consumer: AIOKafkaConsumer) -> None:
        self.kafka, self.producer, self.consumer = kafka, producer, consumer

    async def send(self, spec: TopicSpec, key: str, *messages: Message) -> None:
        for message in messages:
            await self.producer.send(self.kafka.topic(spec), message.model_dump_json().encode(), key=key.encode())
        await self.producer.flush()

    async def policy(self, wanted, *, within_s: float = 30.0) -> Policy:
        async with asyncio.timeout(within_s):
            async for record in self.consumer:
                found = Policy.model_validate_json(record.value)
                if wanted(found):
                    return found
        raise AssertionError("unreachable")


@asynccontextmanager
async def peers(kafka: KafkaSettings) -> AsyncIterator[Peers]:
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    consumer = AIOKafkaConsumer(
        kafka.topic(POLICIES), bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest"
    )
    await producer.start()
    await consumer.start()
    try:
        yield Peers(kafka, producer, consumer)
    finally:
        await producer.stop()
        await consumer.stop()


def start(supervisor: Supervisor, kafka: KafkaSettings, database: DatabaseSettings, fleet: Path) -> str:
    name = f"{kafka.topic_prefix}optimizer-{time.monotonic_ns()}"
    environment = ServiceEnvironment(
        bootstrap_servers=kafka.bootstrap_servers,
        topic_prefix=kafka.topic_prefix,
        database_url=database.url.get_secret_value(),
        fleet_file=fleet,
        clock={},
    )
    settings = {"SPROUT_KAFKA_GROUP_PREFIX": kafka.group_prefix, "SPROUT_OPTIMIZER_ESTIMATES_INTERVAL_MIN": "0.001"}
    (port,) = free_ports(1)
    supervisor.start(service_spec("optimizer", port=port, environment=environment, settings=settings, name=name))
    return name


async def explained(kafka: KafkaSettings, expected: Policy) -> None:
    """`sprout policy explain` finds the policy on its topic and rebuilds the program that it was solved from."""
    arguments = ["policy", "explain", "m", "--json", "--version", str(expected.version)]
    env = {"SPROUT_KAFKA_TOPIC_PREFIX": kafka.topic_prefix, "COLUMNS": "200"}
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


async def test_evidence_becomes_a_policy_and_a_restart_continues_where_it_was(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    name = start(supervisor, kafka, database, fleet)
    try:
        async with peers(kafka) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            await around.send(FOOTPRINTS, "f", footprint(0, "L0", model="unknown"))
            for level in ("L0", "L1"):
                await around.send(FOOTPRINTS, "f", *(footprint(n, level) for n in range(40)))
            cautious = await around.policy(lambda one: one.inputs.weights.get("qa") == 1.0)
            assert cautious.status == "reference"
            assert cautious.overall == cautious.row("qa") == {"p/L0": 1.0}
            assert "judged prompts" in cautious.reason or "footprints" in cautious.reason

            await around.send(QUALITY, "m", quality("e1", successes={"p/L0"[2:]: 60, "L1": 40}))
            bold = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
            assert bold.status == "optimal"
            assert bold.bounds["preference"] == pytest.approx(0.9)
            assert bold.expected_quality["preference"] == pytest.approx(0.9, abs=1e-6)
            assert bold.row("qa")["p/L1"] == pytest.approx(0.161, abs=0.02)  # 0.3 without a safety margin
            assert bold.expected_g_per_request < bold.reference_g_per_request
            assert bold.version > cautious.version
            await explained(kafka, bold)

            supervisor.kill(name)
            await around.send(FOOTPRINTS, "f", *(footprint(n, "L0") for n in range(40)))  # redelivered
            name = start(supervisor, kafka, database, fleet)
            again = await around.policy(lambda one: one.version > bold.version)
            assert again.version == bold.version + 1
            assert again.row("qa") == pytest.approx(bold.row("qa"), abs=0.01)

            await around.send(CARBON_INTENSITY, "GB", intensity(100.0))
            clean = await around.policy(lambda one: one.inputs.k0_g_per_kwh == 100.0)
            assert clean.bounds["preference"] == 1.0
            assert clean.row("qa") == {"p/L0": 1.0}
            assert clean.inputs.estimates["qa"]["p/L0"].requests == pytest.approx(40.0, rel=0.01)

            learned = grouping(learned_at=datetime.now(UTC))
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            await around.send(PROMPT_GROUPS, "m", learned)
            grouped = await around.policy(lambda one: one.group_version == "v")
            assert grouped.groups.keys() == {"v.00", "v.01"}
            assert grouped.row("v.01").get("p/L1", 0.0) > grouped.row("v.00").get("p/L1", 0.0)

            supervisor.kill(name)
            name = start(supervisor, kafka, database, fleet)
            again = await around.policy(lambda one: one.version > grouped.version)
            assert again.group_version == "v"  # it waited for the topic of prompt groups to be read
    finally:
        supervisor.stop(name)
