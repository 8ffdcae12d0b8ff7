"""A large batch through the gateway, with kills: `python -m tests.benchmarks.bench_batches`.

Uploads a file of `LINES` lines (default 50,000: 100 MB), of which one in a thousand is malformed, and waits for its
batch. The model servers are stand-ins that answer in 20 ms. At a quarter of the lines the gateway is killed (SIGKILL),
and another one takes over; at half of them the router. Checks that every line is exactly once in the output or the
error file, and records the gateways' largest resident memory and the lines per second.
"""

import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from pydantic import SecretStr

from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import ManagedProcess, ProcessSpec, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from tests.benchmarks.results import record
from tests.support.environment import Environment
from tests.support.fleets import MODEL
from tests.support.gateway import GatewayProcess
from tests.support.traffic import producing

LINES = int(os.environ.get("LINES", "50000"))
MALFORMED_EVERY = 1_000
PROMPTS = 40
ANSWER = (10, 0.02)
"""Tokens and seconds."""
LINE_BYTES = 2_000
ENDED = {"completed", "failed", "expired", "cancelled"}


def prompt(number: int) -> str:
    """One of the recorded prompts, so long that a line has `LINE_BYTES`."""
    return f"Question number {number % PROMPTS}? " + "x" * (LINE_BYTES - 240)


def lines() -> Iterator[bytes]:
    """The input file."""
    for number in range(LINES):
        if number % MALFORMED_EVERY == MALFORMED_EVERY - 1:
            yield b'{"custom_id": "broken ' + b"x" * LINE_BYTES + b"\n"
            continue
        body = {"model": MODEL, "messages": [{"role": "user", "content": prompt(number)}]}
        line = {"custom_id": f"request-{number:08}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        yield json.dumps(line).encode() + b"\n"


class Memory:
    """The largest resident memory of processes, sampled ten times a second."""

    def __init__(self) -> None:
        self.largest = 0
        self.pids: set[int] = set()

    async def watch(self) -> None:
        """Sample until cancelled."""
        while True:
            for pid in self.pids:
                with suppress(psutil.NoSuchProcess):
                    self.largest = max(self.largest, psutil.Process(pid).memory_info().rss)
            await asyncio.sleep(0.1)


class Run:
    """One batch on its environment."""

    def __init__(self, environment: Environment, kafka: KafkaSettings, database: DatabaseSettings, fleet: Path) -> None:
        self.environment, self.kafka, self.database, self.fleet = environment, kafka, database, fleet
        self.memory = Memory()
        self.began = time.perf_counter()
        self.gateways: list[ManagedProcess] = []

    def spec(self) -> ProcessSpec:
        """The process of one more gateway."""
        shared = ServiceEnvironment(
            bootstrap_servers=self.kafka.bootstrap_servers, topic_prefix=self.kafka.topic_prefix,
            database_url=self.database.url.get_secret_value(), fleet_file=self.fleet, clock={},
        )  # fmt: skip
        settings = {"SPROUT_KAFKA_GROUP_PREFIX": self.kafka.group_prefix, "SPROUT_GATEWAY_BATCH_LEASE_S": "5"}
        name, (port,) = f"gateway-{len(self.gateways)}", free_ports(1)
        return service_spec("gateway", port=port, environment=shared, settings=settings, name=name)

    async def start_gateway(self) -> str:
        """Start a gateway; returns its URL."""
        (process,) = await self.environment.start(self.spec())
        self.gateways.append(process)
        self.memory.pids.add(process.pid)
        return process.spec.url or ""

    async def until(self, client: httpx.AsyncClient, batch_id: str, completed: int) -> dict[str, Any]:
        """Wait until so many lines are completed, or the batch has ended; prints the progress."""
        printed = 0.0
        while True:
            batch: dict[str, Any] = (await client.get(f"/v1/batches/{batch_id}")).raise_for_status().json()
            if batch["status"] in ENDED or batch["request_counts"]["completed"] >= completed:
                return batch
            if time.perf_counter() - printed > 10:
                printed = time.perf_counter()
                print(f"{printed - self.began:.0f} s: {batch['status']}, {batch['request_counts']}", flush=True)
            await asyncio.sleep(0.25)


async def check(client: httpx.AsyncClient, batch: dict[str, object]) -> None:
    """Check that every line is in one of the files, once."""
    names: set[str] = set()
    malformed = 0
    for file_id in (batch["output_file_id"], batch["error_file_id"]):
        async with client.stream("GET", f"/v1/files/{file_id}/content") as answer:
            async for line in answer.aiter_lines():
                found = json.loads(line)
                if found["custom_id"] is None:
                    malformed += 1
                    continue
                assert found["custom_id"] not in names, "a line is there twice"
                assert found["response"]["status_code"] == 200, found["custom_id"]
                names.add(found["custom_id"])
    assert malformed == LINES // MALFORMED_EVERY
    assert len(names) == LINES - malformed, "lines are missing"


async def measure(folder: Path) -> None:
    """Run the batch, and record the figures."""
    answers = {prompt(number): dict.fromkeys(("L0", "L1", "L2"), ANSWER) for number in range(PROMPTS)}
    async with Environment(folder, answers=answers, restart=True) as environment:
        postgres, url = postgres_spec(folder / "postgres")
        await environment.start(postgres)
        await create_database(url.rpartition("/")[0] + "/batches")
        database = DatabaseSettings(url=SecretStr(url.rpartition("/")[0] + "/batches"))
        kafka = await environment.topics("batches.")
        async with producing(kafka) as producer:
            await producer.prepare({"L1": 1.0})
        routers = environment.routers(kafka, {})
        run = Run(environment, kafka, database, routers.fleet)
        (router,) = await environment.start(routers.spec({}))
        base_url = await run.start_gateway()
        watching = asyncio.create_task(run.memory.watch())
        await asyncio.sleep(1)
        idle = run.memory.largest
        tables = GatewayProcess(None, kafka, database, routers.fleet, [], [])  # type: ignore[arg-type]
        headers = {"authorization": f"Bearer {await tables.create_key()}"}
        source = folder / "input.jsonl"
        with source.open("wb") as file:
            file.writelines(lines())
        size = source.stat().st_size

        began = time.perf_counter()
        async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=120) as client:
            with source.open("rb") as file:
                uploaded = await client.post("/v1/files", files={"file": ("in.jsonl", file)}, data={"purpose": "batch"})
            upload_s = time.perf_counter() - began
            after_upload = run.memory.largest
            body = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
            run.began = began = time.perf_counter()
            made = await client.post(
                "/v1/batches", json=body | {"input_file_id": uploaded.raise_for_status().json()["id"]}
            )
            batch_id = made.raise_for_status().json()["id"]
            await run.until(client, batch_id, LINES // 4)
        print(f"{time.perf_counter() - began:.0f} s: the gateway is killed")
        await environment.kill(run.gateways[0].spec.name)
        base_url = await run.start_gateway()
        print(f"{time.perf_counter() - began:.0f} s: another gateway has started")
        async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=120) as client:
            await run.until(client, batch_id, LINES // 2)
            print(f"{time.perf_counter() - began:.0f} s: the router is killed")
            await environment.kill(router.spec.name)
            await environment.start(routers.spec({}))
            print(f"{time.perf_counter() - began:.0f} s: another router has started")
            batch = await run.until(client, batch_id, LINES)
            while batch["status"] not in ENDED:
                batch = await run.until(client, batch_id, LINES + 1)
            batch_s = time.perf_counter() - began
            assert batch["status"] == "completed", batch
            await check(client, batch)
        watching.cancel()
    figures = {
        "lines": LINES,
        "input_mb": size / 1e6,
        "upload_s": upload_s,
        "batch_s": batch_s,
        "lines_per_s": LINES / batch_s,
        "idle_mib": idle / 2**20,
        "after_upload_mib": after_upload / 2**20,
        "largest_mib": run.memory.largest / 2**20,
    }
    for name, value in figures.items():
        record(f"gateway_batch.{name}", round(value, 1))
        print(f"{name:>18} {value:.1f}")
    print("every line is once in the output or the error file")


if __name__ == "__main__":
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as scratch:
        sys.exit(asyncio.run(measure(Path(scratch))))
