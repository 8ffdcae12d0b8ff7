"""What the router's tests share: a fleet, requests, policies, and a router as a process of its own."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from deploy.local.paths import default_state_dir
from deploy.local.ports import free_ports
from deploy.local.processes import ProcessSpec, Supervisor
from deploy.local.services import Surroundings, service_spec
from deploy.local.triton import free_triton_ports, install, ready_probe
from deploy.triton.contract import ContractName
from deploy.triton.models import stand_in_llm
from deploy.triton.repository import write_repository
from shared.clock import Clock
from shared.messages import (
    CarbonIntensity,
    GenerationRequest,
    GenerationResponse,
    IntensityPoint,
    Message,
    Policy,
    PolicyInputs,
)
from shared.settings import KafkaSettings
from shared.topics import CARBON_INTENSITY, POLICIES, REQUESTS, RESPONSES, TopicSpec

MODEL = "m"
ZONE = "GB"
LEVELS = {"L0": (100, 1.0), "L1": (30, 0.3), "L2": (10, 0.1)}
"""Tokens and seconds of the recorded answers."""
DIRECTIVES = {"L1": "Always answer briefly.", "L2": "Always answer very briefly."}
LONG_PROMPT = "A question that takes long."
"""Its answers take four seconds at every level."""


def fleet_toml(endpoints: Sequence[str], *, template: str = "llama-2", triton_model: str = "ensemble") -> str:
    """A fleet of one model and one pool `p` with endpoints `e0`, `e1`, ..."""
    lines = ["[[directives]]", 'level = "L0"']
    for level, text in DIRECTIVES.items():
        lines += ["[[directives]]", f'level = "{level}"', f'text = "{text}"']
    lines += ["[[models]]", f'name = "{MODEL}"', f'chat_template = "{template}"']
    lines += ["[[pools]]", 'name = "p"', f'model = "{MODEL}"', f'zone = "{ZONE}"', f'triton_model = "{triton_model}"']
    for number, address in enumerate(endpoints):
        lines += ["[[pools.endpoints]]", f'name = "e{number}"', f'grpc = "{address}"']
    return "\n".join(lines) + "\n"


def write_workload(path: Path, *, prompts: int = 40) -> Path:
    """Recorded answers of `MODEL` to "Question number N?" and to `LONG_PROMPT`."""

    def entry(prompt: str, times: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
        return {
            "task": "test",
            "prompt": prompt,
            "preferred": "L0",
            "responses": {
                f"{MODEL}/{level}": {
                    "text": f"{level} says: " + "word " * tokens,
                    "tokens": tokens,
                    "energy_j": tokens * 6.0,
                    "time_s": time_s,
                }
                for level, (tokens, time_s) in times.items()
            },
        }

    lines = [entry(question(number), LEVELS) for number in range(prompts)]
    lines.append(entry(LONG_PROMPT, dict.fromkeys(LEVELS, (40, 4.0))))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def question(number: int) -> str:
    return f"Question number {number}?"


def request(number: int, **changes: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"id": f"r{number}", "prompt": question(number % 40), **changes})


def policy(
    row: Mapping[str, float], *, version: int = 1, now: datetime | None = None, valid_s: float = 3_600.0, **changes: Any
) -> Policy:
    """A policy of one row, by level."""
    now = now or datetime.now(UTC)
    options = {f"p/{level}": probability for level, probability in row.items()}
    inputs = PolicyInputs(
        solved_for=now,
        intensity_g_per_kwh={ZONE: 300.0},
        k0_zone=ZONE,
        k0_g_per_kwh=300.0,
        k0_min_g_per_kwh=100.0,
        k0_max_g_per_kwh=400.0,
        xi={"preference": 0.1},
        weights={"default": 1.0},
        estimates={},
        holdout=0.0,
    )
    values: dict[str, Any] = {
        "model": MODEL,
        "version": version,
        "created_at": now,
        "valid_until": now + timedelta(seconds=valid_s),
        "status": "optimal",
        "reason": "test",
        "reference": "p/L0",
        "groups": {},
        "overall": options,
        "bounds": {},
        "expected_quality": {},
        "expected_g_per_request": 1.0,
        "reference_g_per_request": 2.0,
        "inputs": inputs,
    }
    return Policy.model_validate(values | changes)


def intensity(at: datetime | None = None, zone: str = ZONE) -> CarbonIntensity:
    at = at or datetime.now(UTC)
    return CarbonIntensity(
        zone=zone, latest=IntensityPoint(at=at, intensity_g_per_kwh=300.0), source="test", published_at=at
    )


@dataclass(frozen=True)
class TritonServer:
    """A real Triton with the stand-in model."""

    supervisor: Supervisor
    name: str
    address: str


def start_triton(
    supervisor: Supervisor, folder: Path, *, name: str, clock: Clock | None = None, contract: ContractName = "ensemble"
) -> TritonServer:
    """Start one; needs its environment, which is made once."""
    installation = install(default_state_dir(), say=print)
    workload = write_workload(folder / "w.jsonl")
    write_repository(folder / "models", [stand_in_llm(workload, model=MODEL, contract=contract)])
    ports = free_triton_ports()
    supervisor.start(
        ProcessSpec(
            name=name,
            command=tuple(installation.command(folder / "models", ports)),
            environment=installation.environment((clock or Clock()).environment()),
            ready=ready_probe(ports),
        )
    )
    return TritonServer(supervisor, name, f"127.0.0.1:{ports.grpc}")


@dataclass
class Answers:
    """All that came on a topic, read from its start."""

    consumer: AIOKafkaConsumer
    records: list[Any] = field(default_factory=list)

    async def read(self, *, until: int | None = None, timeout_s: float = 60.0, settle_s: float = 0.0) -> list[Any]:
        """Read until there are so many records, and then whatever comes within `settle_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while until is None or len(self.records) < until:
            if loop.time() > deadline:
                raise AssertionError(f"{len(self.records)} records after {timeout_s} s, wanted {until}")
            if not await self._poll(200) and until is None:
                break
        if settle_s:
            await asyncio.sleep(settle_s)
            while await self._poll(300):
                pass
        return self.records

    async def ids(self, wanted: Iterable[str], *, timeout_s: float = 60.0) -> Counter[str]:
        """Read until every wanted request id was answered; how often each was."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        missing = set(wanted)
        seen: Counter[str] = Counter(record.key.decode() for record in self.records)
        while missing - set(seen):
            if loop.time() > deadline:
                raise AssertionError(f"{len(missing - set(seen))} requests without an answer after {timeout_s} s")
            for record in await self._poll(200):
                seen[record.key.decode()] += 1
        return seen

    def responses(self) -> dict[str, GenerationResponse]:
        found = (GenerationResponse.model_validate_json(record.value) for record in self.records)
        return {response.request_id: response for response in found}

    async def _poll(self, timeout_ms: int) -> list[Any]:
        batches = await self.consumer.getmany(timeout_ms=timeout_ms)
        fresh = [record for batch in batches.values() for record in batch]
        self.records += fresh
        return fresh


@asynccontextmanager
async def reading(kafka: KafkaSettings, spec: TopicSpec = RESPONSES) -> AsyncIterator[Answers]:
    consumer = AIOKafkaConsumer(
        kafka.topic(spec), **kafka.client_options(), group_id=None, auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        yield Answers(consumer)
    finally:
        await consumer.stop()


@asynccontextmanager
async def producing(kafka: KafkaSettings) -> AsyncIterator["Producer"]:
    producer = AIOKafkaProducer(**kafka.client_options(), linger_ms=2)
    await producer.start()
    try:
        yield Producer(producer, kafka)
    finally:
        await producer.stop()


@dataclass
class Producer:
    """A producer of requests, policies and intensities."""

    producer: AIOKafkaProducer
    kafka: KafkaSettings

    async def ask(self, *requests: GenerationRequest) -> None:
        sends = [
            await self.producer.send(
                self.kafka.topic(REQUESTS), one.model_dump_json(exclude_none=True).encode(), key=(one.id or "").encode()
            )
            for one in requests
        ]
        await asyncio.gather(*sends)

    async def raw(self, value: bytes | None, **options: Any) -> Any:
        return await self.producer.send_and_wait(self.kafka.topic(REQUESTS), value, **options)

    async def post(self, spec: TopicSpec, message: Message, key: str) -> None:
        await self.producer.send_and_wait(self.kafka.topic(spec), message.model_dump_json().encode(), key=key.encode())

    async def prepare(self, row: Mapping[str, float], **changes: Any) -> Policy:
        """Put a policy and a fresh intensity in force."""
        made = policy(row, **changes)
        await self.post(CARBON_INTENSITY, intensity(), ZONE)
        await self.post(POLICIES, made, MODEL)
        return made


@dataclass
class RouterProcess:
    """A router as it runs in production: a process with an environment."""

    supervisor: Supervisor
    kafka: KafkaSettings
    fleet: Path
    clock: Clock = field(default_factory=Clock)
    settings: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def start(self, **changes: str) -> str:
        """Start one; returns its process's name once it is ready."""
        spec = self._spec(changes)
        self.supervisor.start(spec)
        return spec.name

    def start_unready(self, **changes: str) -> str:
        """Start one without waiting; returns its process's name."""
        spec = self._spec(changes)
        self.supervisor.spawn(spec)
        return spec.name

    def _spec(self, changes: Mapping[str, str]) -> ProcessSpec:
        self.count += 1
        name = f"{self.kafka.topic_prefix}router{self.count}"
        (port,) = free_ports(1)
        around = Surroundings(
            bootstrap_servers=self.kafka.bootstrap_servers,
            topic_prefix=self.kafka.topic_prefix,
            database_url="",
            fleet_file=self.fleet,
            clock=self.clock.environment(),
        )
        settings = {
            "SPROUT_KAFKA_GROUP_PREFIX": self.kafka.group_prefix,
            "SPROUT_ROUTER_SAMPLE_SHARE": "0",
            **self.settings,
            **changes,
        }
        return service_spec("router", port=port, around=around, settings=settings, name=name)

    def stop_gently(self, name: str, *, within_s: float) -> float:
        """SIGTERM; returns the seconds until it had ended."""
        process = self.supervisor.process(name)
        began = time.monotonic()
        process.ask_to_stop()
        while process.alive:
            if time.monotonic() - began > within_s:
                raise AssertionError(f"still running {within_s} s after SIGTERM")
            time.sleep(0.02)
        return time.monotonic() - began

    def log(self, name: str) -> str:
        return self.supervisor.process(name).log.read_text()


async def committed(kafka: KafkaSettings, group: str = "router") -> dict[int, tuple[int, int]]:
    """Committed offset and end of every partition of the topic `requests`."""
    topic = kafka.topic(REQUESTS)
    consumer = AIOKafkaConsumer(**kafka.client_options(), group_id=kafka.group(group), enable_auto_commit=False)
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, number) for number in range(REQUESTS.partitions)]
        ends = await consumer.end_offsets(partitions)
        return {one.partition: (await consumer.committed(one) or 0, ends[one]) for one in partitions}
    finally:
        await consumer.stop()
