"""Memory of all services under steady load: `python -m tests.benchmarks.soak [--minutes 30] [--per-second 500]`.

Responses as model servers would send them are replayed evenly; a router, ledger, optimizer, evaluator, carbon_feed and
gateway run beside each other. The memory of each is printed every minute; at the end also the processor time of each,
and the bytes that Kafka and PostgreSQL store, per 1,000 responses. Fails if a process ends, if its memory grows by more
than a tenth between the middle of the run and its end, or if the ledger falls behind.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import psutil
from aiokafka import AIOKafkaProducer

from deploy.local.processes import ProcessSpec, free_ports, http_probe
from deploy.local.services import ServiceEnvironment, service_spec
from tests.benchmarks.results import record
from tests.support.environment import KAFKA, Environment
from tests.support.fleets import ZONE
from tests.support.replay import PREFIX, Answers, fleet_of, memory_mib, meters, publish, servers

SERVICES = ("carbon_feed", "router", "ledger", "optimizer", "evaluator", "gateway")
SETTINGS = {
    "carbon_feed": {
        "SPROUT_CARBON_FEED_PROVIDERS": json.dumps({ZONE: [{"kind": "constant", "intensity_g_per_kwh": 250}]})
    },
    "ledger": {"SPROUT_LEDGER_SETTLE_DELAY_S": "10"},
}
SAMPLE_S = 10.0
"""Between two readings of the memory."""
GROWTH = 0.1
"""Most growth of a process's memory from the middle of the run to its end; MiB below `SLACK_MIB` are not counted."""
SLACK_MIB = 8.0
MOST_OPEN_S = 120.0
"""Unsettled calls of more seconds of the load than this: the ledger falls behind."""


async def run(arguments: argparse.Namespace) -> int:
    """Run the soak; returns the exit status."""
    async with servers(arguments.folder) as (environment, url, postgres), meters(time.time()) as metrics:
        fleet = environment.folder / "fleet.toml"
        fleet.write_text(fleet_of(metrics) + '[judge]\npool = "p"\n', encoding="utf-8")
        started = await environment.start(*_services(environment, url, fleet))
        processes = {one.spec.name: psutil.Process(one.pid) for one in started}
        (kafka,) = await environment.running([KAFKA])
        processes |= {KAFKA: psutil.Process(kafka.pid), "postgres": postgres}
        return await _watch(arguments, environment, url, processes)


def _services(environment: Environment, url: str, fleet: Path) -> list[ProcessSpec]:
    """A process of every service; the model servers do not exist, so the router is never ready."""
    shared = ServiceEnvironment(
        bootstrap_servers=environment.bootstrap_servers, topic_prefix=PREFIX, database_url=url, fleet_file=fleet,
        clock={},
    )  # fmt: skip
    return [
        replace(
            service_spec(
                name,
                port=port,
                environment=shared,
                settings={"SPROUT_KAFKA_GROUP_PREFIX": PREFIX, **SETTINGS.get(name, {})},
                name=name,
            ),
            ready=http_probe(f"http://127.0.0.1:{port}/health"),
        )
        for name, port in zip(SERVICES, free_ports(len(SERVICES)), strict=True)
    ]


async def _watch(
    arguments: argparse.Namespace, environment: Environment, url: str, processes: dict[str, psutil.Process]
) -> int:
    memory: dict[str, list[float]] = {name: [] for name in processes}
    producer = AIOKafkaProducer(bootstrap_servers=environment.bootstrap_servers, acks="all", compression_type="lz4")
    await producer.start()
    connection = await asyncpg.connect(url, server_settings={"search_path": "ledger"})
    load = asyncio.create_task(_load(producer, arguments.per_second))
    problems = []
    began, shown = time.monotonic(), 0.0
    cpu_s, stored = {name: _cpu_s(process) for name, process in processes.items()}, _stored(environment.folder)
    try:
        while time.monotonic() < began + arguments.minutes * 60.0:
            await asyncio.sleep(SAMPLE_S)
            await environment.check()
            if load.done():
                load.result()
            for name, process in processes.items():
                memory[name].append(memory_mib(process))
            if time.monotonic() > began + shown + 60.0:
                shown = time.monotonic() - began
                now = ", ".join(f"{name} {values[-1]:.0f}" for name, values in memory.items())
                print(f"{datetime.now(UTC):%H:%M:%S} {shown / 60.0:4.0f} min: {now} MiB", flush=True)
        load.cancel()
        thousands = arguments.minutes * 60.0 * arguments.per_second / 1_000.0
        cpu_s = {name: (_cpu_s(process) - cpu_s[name]) / thousands for name, process in processes.items()}
        stored = {name: (size - stored[name]) / thousands for name, size in _stored(environment.folder).items()}
        ((settled, waiting),) = await connection.fetch(
            "SELECT (SELECT coalesce(sum(calls), 0) FROM chunks), (SELECT count(*) FROM open_calls)"
        )
    finally:
        load.cancel()
        await connection.close()
        await producer.stop()
    figures: dict[str, float] = {"minutes": arguments.minutes, "settled": float(settled), "waiting": float(waiting)}
    figures |= {f"{name}_cpu_ms_per_1000": 1_000.0 * used for name, used in cpu_s.items()}
    figures |= {f"{name}_kb_per_1000": size / 1_000.0 for name, size in stored.items()}
    for name, values in memory.items():
        half = values[len(values) // 2 :]
        # Medians of a few readings: a process has peaks.
        middle, end = statistics.median(half[:6]), statistics.median(half[-6:])
        figures |= {f"{name}_mib_middle": middle, f"{name}_mib_end": end, f"{name}_mib_most": max(values)}
        if end > middle * (1.0 + GROWTH) + SLACK_MIB:
            problems.append(f"{name} grew from {middle:.0f} to {end:.0f} MiB")
    if waiting > MOST_OPEN_S * arguments.per_second:
        problems.append(f"{waiting:,} calls wait for settlement")
    for name, value in figures.items():
        print(f"{name:28} {value:,.6g}")
    record("soak", figures)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _cpu_s(process: psutil.Process) -> float:
    """Processor time of a process and its children, also of those that have ended."""
    times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
    return sum(one.user + one.system for one in times) + times[0].children_user + times[0].children_system


def _stored(folder: Path) -> dict[str, int]:
    """Bytes on disk of Kafka and PostgreSQL; Kafka's files of indexes are allocated ahead, and left out."""
    sizes = {"kafka": 0, "postgres": 0}
    for name in sizes:
        for path in (folder / name).rglob("*"):
            with suppress(FileNotFoundError):  # a file that was removed meanwhile
                if path.is_file() and "index" not in path.suffix:
                    sizes[name] += path.stat().st_size
    return sizes


async def _load(producer: AIOKafkaProducer, per_second: float) -> None:
    """Publish responses evenly, until cancelled."""
    answers, due = Answers(seed=2), time.monotonic()
    while True:
        await publish(producer, answers, count=round(per_second), since_s=time.time() - 5.0, per_s=per_second)
        due += 1.0
        await asyncio.sleep(max(0.0, due - time.monotonic()))


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--per-second", type=float, default=500.0, help="responses per second")
    parser.add_argument("--folder", default=None, help="for Kafka's and PostgreSQL's data")
    sys.exit(asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
