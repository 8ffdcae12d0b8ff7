"""Several routers, and a long backlog: `python -m tests.benchmarks.bench_router_scale [--backlog N]`.

One, two and three router processes of one consumer group are given the same burst of requests on the same Kafka and
Triton. Then a backlog of 200,000 requests is laid down before two routers that are just starting, and served to its
end, while their resident memory is watched. All of it runs on one machine: with fewer cores than processes they share
what there is.
"""

import argparse
import asyncio
import os
import time
from datetime import UTC, datetime

import psutil
from aiokafka import AIOKafkaConsumer

from deploy.triton.stand_in.batching import BatchRules
from shared.messages import GenerationRequest
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from shared.topics import RESPONSES
from tests.benchmarks.ground import LEVELS, Ground, laid, prompt
from tests.benchmarks.results import record
from tests.support.processes import RouterProcess
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
"""Without a single answer for so long, something is broken."""
SAY_EVERY = 20_000
MIB = 1024 * 1024


async def ask(kafka: KafkaSettings, run: str, count: int) -> None:
    """Publish requests; returns once Kafka has them all."""
    async with producing(kafka) as producer:
        for first in range(0, count, BATCH):
            await producer.ask(
                *(
                    GenerationRequest(id=f"{run}-{number}", prompt=prompt(number % PROMPTS))
                    for number in range(first, min(first + BATCH, count))
                )
            )


class Answers:
    """Counts the distinct answers of a run."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._consumer = AIOKafkaConsumer(
            kafka.topic(RESPONSES), bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest"
        )
        self._seen: set[bytes] = set()

    async def until(self, run: str, count: int, *, say_every: int = 0) -> None:
        """Read until every request of a run was answered.

        Raises:
            TimeoutError: for `STALL_S` there was no answer.
        """
        await self._consumer.start()
        mine = f"{run}-".encode()
        try:
            heard = time.monotonic()
            while len(self._seen) < count:
                before = len(self._seen)
                for batch in (await self._consumer.getmany(timeout_ms=200)).values():
                    self._seen.update(answer.key for answer in batch if answer.key.startswith(mine))
                if len(self._seen) > before:
                    heard = time.monotonic()
                    if say_every and len(self._seen) // say_every > before // say_every:
                        print(f"  {len(self._seen):,} of {count:,} answered", flush=True)
                elif time.monotonic() - heard > STALL_S:
                    raise TimeoutError(f"{count - len(self._seen)} requests of {run} without an answer")
        finally:
            await self._consumer.stop()


async def burst(kafka: KafkaSettings, run: str) -> float:
    """Requests a second."""
    began = time.perf_counter()
    await asyncio.gather(ask(kafka, run, BURST), Answers(kafka).until(run, BURST))
    return BURST / (time.perf_counter() - began)


def scaling(ground: Ground, clock: Clock) -> dict[str, float]:
    """The best of the rounds' requests a second, by number of processes."""
    found = {}
    for processes in PROCESSES:
        kafka = ground.topics(f"scale{processes}")
        routers = ground.routers(kafka, clock=clock)
        names = [routers.start() for _ in range(processes)]
        asyncio.run(burst(kafka, "warm"))
        found[str(processes)] = max(asyncio.run(burst(kafka, f"round{number}")) for number in range(ROUNDS))
        print(f"{processes} router{'s' if processes > 1 else ' '}  {found[str(processes)]:6.0f} requests/s", flush=True)
        for name in names:
            ground.supervisor.stop(name)
    return found


async def watch(pids: list[int], peak: dict[int, int]) -> None:
    """Note the largest resident memory of processes, for ever."""
    while True:
        for pid in pids:
            peak[pid] = max(peak.get(pid, 0), psutil.Process(pid).memory_info().rss)
        await asyncio.sleep(0.5)


async def drained(kafka: KafkaSettings, routers: RouterProcess, count: int) -> tuple[float, float]:
    """Serve a backlog; the largest peak of a router's resident memory in MiB, and requests a second."""
    await ask(kafka, "backlog", count)
    peak: dict[int, int] = {}
    names = [await asyncio.to_thread(routers.start) for _ in range(BACKLOG_ROUTERS)]
    watching = asyncio.create_task(watch([routers.supervisor.process(name).pid for name in names], peak))
    began = time.perf_counter()
    try:
        await Answers(kafka).until("backlog", count, say_every=SAY_EVERY)
    finally:
        watching.cancel()
    return max(peak.values()) / MIB, count / (time.perf_counter() - began)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backlog", type=int, default=BACKLOG, help="requests that wait (default: %(default)s)")
    backlog = parser.parse_args().backlog
    clock = Clock.starting(datetime(2024, 2, 8, tzinfo=UTC), rate=RATE)
    answers = {prompt(number): dict.fromkeys(LEVELS, (8, 60.0)) for number in range(PROMPTS)}
    print(f"bursts of {BURST:,} requests, best of {ROUNDS}; {os.cpu_count()} cores for everything")
    with laid(workload=answers, clock=clock, batch=BatchRules(slots=2_000, slowdown=0.0)) as ground:
        record("scaling", scaling(ground, clock))
        print(f"a backlog of {backlog:,} requests before {BACKLOG_ROUTERS} routers")
        kafka = ground.topics("backlog")
        peak_mb, throughput = asyncio.run(drained(kafka, ground.routers(kafka, clock=clock), backlog))
        ground.supervisor.check()
    print(f"served at {throughput:.0f} requests/s; peak resident memory of a router {peak_mb:.0f} MiB")
    record("backlog_peak_rss_mb", peak_mb)


if __name__ == "__main__":
    main()
