"""Replayed responses, with the energy counters and the servers that a ledger needs beside them."""

import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from aiokafka import AIOKafkaProducer

from deploy.local.postgres import create_database, postgres_spec
from services.ledger.sql import to_iso
from shared.kafka.admin import create_topics
from shared.messages import Decision, GenerationResponse, Timing, Usage
from shared.runtime.settings import KafkaSettings
from shared.topics import RESPONSES, TOPICS
from tests.support.environment import Environment
from tests.support.fleets import ZONE, fleet_toml

ENDPOINTS = 16
PER_SECOND = 1_000.0
"""Calls per second of the time that a backlog covers."""
CALL_S = 2.5
"""Mean duration of a call."""
POWER_W = 400.0
LEVELS = {"L0": 0.3, "L1": 0.7}
"""Shares of the levels."""
TEXTS = 256
PREFIX = "bench."
MIB = 1024 * 1024
POSTGRES = ("shared_buffers=96MB", "work_mem=4MB", "maintenance_work_mem=32MB", "max_wal_size=512MB")


def fleet_of(metrics: str) -> str:
    """The fleet file: one pool of endpoints that share a metrics page."""
    endpoints = (
        f'[[pools.endpoints]]\nname = "e{n}"\ngrpc = "127.0.0.1:{n + 1}"\nmetrics = "{metrics}"\ngpus = ["g{n}"]\n'
        for n in range(ENDPOINTS)
    )
    pool = "pue = 1.2\nembodied_g_per_s = 0.0001\nidle_power_w = 80"
    return fleet_toml([], levels=("L0", "L1"), pool=pool) + "".join(endpoints)


class Answers:
    """Makes valid responses: JSON of one message, with the varying parts filled in."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        words = [f"{a}{b}" for a in ("car", "sun", "wind", "grid", "load", "heat") for b in ("s", "ing", "er", "", "y")]
        texts = [" ".join(self._random.choices(words, k=90)) for _ in range(TEXTS)]
        self._made = {level: [self._template(level, share, text) for text in texts] for level, share in LEVELS.items()}
        self.count = 0

    @staticmethod
    def _template(level: str, share: float, text: str) -> str:
        """A response as JSON for the operator %, to be filled in by name."""
        at = datetime(2024, 1, 1, tzinfo=UTC)
        message = GenerationResponse(
            request_id="R", record="K", model="m", status="ok", text=text, finish_reason="stop", endpoint="E",
            decision=Decision(
                source="policy", group="G", pool="p", level=level, zone=ZONE, policy_version=3, propensity=share,
                propensities={f"p/{one}": likely for one, likely in LEVELS.items()},
            ),
            usage=Usage(prompt_tokens=100, completion_tokens=1, source="server"),
            timing=Timing(received_at=at, started_at=at, first_token_at=at, finished_at=at),
            requested_at=at, task="qa", tenant="acme",
        ).model_dump(mode="json")  # fmt: skip
        message |= {"request_id": "%(id)s", "record": "%(record)s", "endpoint": "%(endpoint)s"}
        message["decision"]["group"] = "%(group)s"
        message["usage"]["completion_tokens"] = "%(tokens)d"
        message["timing"] = {
            "received_at": "%(start)s", "started_at": "%(start)s", "first_token_at": "%(first)s",
            "finished_at": "%(end)s",
        }  # fmt: skip
        message["requested_at"] = "%(start)s"
        return json.dumps(message).replace('"%(tokens)d"', "%(tokens)d")

    def make(self, started_s: float) -> tuple[bytes, bytes]:
        """The key and value of a response to a call that started at a time."""
        number, draw = self.count, self._random.random
        self.count += 1
        level = "L0" if draw() < LEVELS["L0"] else "L1"
        seconds = CALL_S * (0.2 + 1.6 * draw())
        request_id = f"{number:08x}-6e1f-4a44-9a7c-{self._random.getrandbits(48):012x}"
        content = self._made[level][number % TEXTS] % {
            "id": request_id,
            "record": f"requests/{number % 12}/{number // 12}/{round(1000 * started_s)}",
            "endpoint": f"e{number % ENDPOINTS}",
            "group": f"v1:g{int(30 * draw())}",
            "tokens": 10 + int(60 * seconds),
            "start": to_iso(started_s),
            "first": to_iso(started_s + 0.1),
            "end": to_iso(started_s + seconds),
        }
        return request_id.encode(), content.encode()


async def publish(
    producer: AIOKafkaProducer, answers: Answers, *, count: int, since_s: float, per_s: float = PER_SECOND
) -> None:
    """Publish a backlog, in batches by partition."""
    topic, headers = PREFIX + RESPONSES.name, [("content-type", b"application/json")]
    pending: set[asyncio.Future[Any]] = set()
    partition = 0
    batch = producer.create_batch()
    for number in range(count):
        key, value = answers.make(since_s + number / per_s)
        while batch.append(key=key, value=value, timestamp=None, headers=headers) is None:
            pending.add(await producer.send_batch(batch, topic, partition=partition))
            partition = (partition + 1) % RESPONSES.partitions
            batch = producer.create_batch()
            if len(pending) > 50:
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    pending.add(await producer.send_batch(batch, topic, partition=partition))
    await asyncio.wait(pending)


@asynccontextmanager
async def meters(since_s: float) -> AsyncIterator[str]:
    """A page with the energy counters of all endpoints; yields its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        joules = POWER_W * (time.time() - since_s)
        body = "".join(f'nv_energy_consumption{{gpu_uuid="g{n}"}} {joules!r}\n' for n in range(ENDPOINTS)).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
    finally:
        server.close()


def memory_mib(process: psutil.Process) -> float:
    """Proportional memory of a process and its children, MiB: pages that they share count once."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total / MIB


def cpu_s(process: psutil.Process) -> float:
    """Processor time of a process and its children, also of those that have ended, seconds."""
    total = sum(process.cpu_times()[:4])
    for one in process.children(recursive=True):
        try:
            total += sum(one.cpu_times()[:2])
        except psutil.Error:
            continue
    return float(total)


@asynccontextmanager
async def servers(parent: str | None) -> AsyncIterator[tuple[Environment, str, psutil.Process]]:
    """Kafka with all topics, and PostgreSQL with a database, below a folder; yields its URL and process too."""
    with tempfile.TemporaryDirectory(prefix="sprout-bench-", dir=parent) as folder:
        async with Environment(Path(folder), answers={}, model_servers=0, say=lambda _: None) as environment:
            spec, url = postgres_spec(Path(folder) / "postgres")
            options = [part for option in POSTGRES for part in ("-c", option)]
            (server,) = await environment.start(replace(spec, command=(*spec.command, *options)))
            await create_database(url)
            kafka = KafkaSettings(
                bootstrap_servers=environment.bootstrap_servers, topic_prefix=PREFIX, group_prefix=PREFIX
            )
            # A backlog is written late, and a busy machine may be late.
            await create_topics(kafka, specs=[replace(one, max_age_ms=None) for one in TOPICS])
            yield environment, url, psutil.Process(server.pid)
