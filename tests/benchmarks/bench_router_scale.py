"""Several routers, and a long backlog: `python -m tests.benchmarks.bench_router_scale [--backlog N]`.

One, two and three router processes of one consumer group get the same burst of requests on the same Kafka and Triton.
Then two routers start with a backlog of 200,000 requests and serve it, while their resident memory is measured. All
processes share the cores of one machine.
"""

import argparse
import asyncio
import logging
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
from aiokafka import AIOKafkaConsumer

from deploy.triton.stand_in.batching import RecordedRules
from shared.messages import GenerationRequest
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from shared.topics import RESPONSES
from tests.benchmarks.results import record
from tests.support.environment import Environment
from tests.support.fleets import LEVELS
from tests.support.traffic import producing

RATE = 720.0
PROMPTS = 100
BURST = 3_000
BATCH = 1_000
ROUNDS = 3
PROCESSES = (1, 2, 3)
BACKLOG = 200_000
BACKLOG_ROUTERS = 2
STALL_S = 60.0
"""The benchmark fails if no answer has arrived for so long."""
PROGRESS = 20_000
MIB = 1024 * 1024
ROUTER_SETTINGS = {"SPROUT_LOG_LEVEL": "WARNING"}


async def ask(kafka: KafkaSettings, run: str, count: int) -> None:
    """Publish requests; returns when Kafka has acknowledged all."""
    async with producing(kafka) as producer:
        for first in range(0, count, BATCH):
            await producer.ask(
                *(
                    GenerationRequest(id=f"{run}-{number}", prompt=prompt(number % PROMPTS))
                    for number in range(first, min(first + BATCH, count))
                )
            )


class Answers:
    """Counts the answered requests of a run."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._consumer = AIOKafkaConsumer(
            kafka.topic(RESPONSES), bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest"
        )
        self._seen: set[bytes] = set()

    async def until(self, run: str, count: int, *, progress: int = 0) -> None:
        """Read until every request of a run was answered.

        Args:
            progress: print a line for every so many answers; 0: none.

        Raises:
            TimeoutError: no answer has arrived for `STALL_S`.
        """
        await self._consumer.start()
        prefix = f"{run}-".encode()
        try:
            last_answer = time.monotonic()
            while len(self._seen) < count:
                before = len(self._seen)
                for batch in (await self._consumer.getmany(timeout_ms=200)).values():
                    self._seen.update(answer.key for answer in batch if answer.key.startswith(prefix))
                if len(self._seen) > before:
                    last_answer = time.monotonic()
                    if progress and len(self._seen) // progress > before // progress:
                        print(f"  {len(self._seen):,} of {count:,} answered", flush=True)
                elif time.monotonic() - last_answer > STALL_S:
                    raise TimeoutError(f"{count - len(self._seen)} requests of {run} without an answer")
        finally:
            await self._consumer.stop()


async def burst(kafka: KafkaSettings, run: str) -> float:
    """Send a burst; returns requests per second."""
    began = time.perf_counter()
    await asyncio.gather(ask(kafka, run, BURST), Answers(kafka).until(run, BURST))
    return BURST / (time.perf_counter() - began)


async def scaling(environment: Environment) -> dict[str, float]:
    """Requests per second by number of processes; the best of the rounds."""
    found = {}
    for processes in PROCESSES:
        kafka = await environment.topics(f"scale{processes}.")
        routers = environment.routers(kafka, ROUTER_SETTINGS)
        started = await environment.start(*(routers.spec({}) for _ in range(processes)))
        await burst(kafka, "warm")
        found[str(processes)] = max([await burst(kafka, f"round{number}") for number in range(ROUNDS)])
        print(f"{processes} router{'s' if processes > 1 else ' '}  {found[str(processes)]:6.0f} requests/s", flush=True)
        await environment.stop(*(process.spec.name for process in started))
    return found


async def watch(pids: list[int], peak: dict[int, int]) -> None:
    """Update the peak resident memory of processes until cancelled."""
    while True:
        for pid in pids:
            peak[pid] = max(peak.get(pid, 0), psutil.Process(pid).memory_info().rss)
        await asyncio.sleep(0.5)


async def drain(environment: Environment, count: int) -> tuple[float, float]:
    """Serve a backlog; returns the peak resident memory of a router in MiB, and requests per second."""
    kafka = await environment.topics("backlog.")
    await ask(kafka, "backlog", count)
    peak: dict[int, int] = {}
    routers = environment.routers(kafka, ROUTER_SETTINGS)
    started = await environment.start(*(routers.spec({}) for _ in range(BACKLOG_ROUTERS)))
    watching = asyncio.create_task(watch([process.pid for process in started], peak))
    began = time.perf_counter()
    try:
        await Answers(kafka).until("backlog", count, progress=PROGRESS)
    finally:
        watching.cancel()
    return max(peak.values()) / MIB, count / (time.perf_counter() - began)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backlog", type=int, default=BACKLOG, help="requests in the backlog (default: %(default)s)")
    backlog = parser.parse_args().backlog
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it logs retries for new topics
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as folder:
        asyncio.run(run(Path(folder), backlog))


async def run(folder: Path, backlog: int) -> None:
    """Start the environment, measure, print and record."""
    clock = Clock.starting(datetime(2024, 2, 8, tzinfo=UTC), rate=RATE)
    answers = {prompt(number): dict.fromkeys(LEVELS, (8, 60.0)) for number in range(PROMPTS)}
    print(f"bursts of {BURST:,} requests, best of {ROUNDS}; {os.cpu_count()} cores for all processes")
    batch = RecordedRules(slots=2_000, slowdown=0.0)
    async with Environment(folder, answers=answers, clock=clock, batch=batch) as environment:
        record("scaling", await scaling(environment))
        print(f"a backlog of {backlog:,} requests for {BACKLOG_ROUTERS} routers")
        peak_mb, throughput = await drain(environment, backlog)
        await environment.check()
    print(f"served at {throughput:.0f} requests/s; peak resident memory of a router {peak_mb:.0f} MiB")
    record("backlog_peak_rss_mb", peak_mb)


def prompt(number: int) -> str:
    """A prompt with recorded answers."""
    return f"Question {number}?"


if __name__ == "__main__":
    main()
