"""The overhead of the router: `python -m tests.benchmarks.bench_router`.

Compares the router with a minimal loop (`bare_loop.py`) on the same Kafka and the same Triton with the stand-in model,
which streams answers 720 times as fast as recorded. In every round each process gets the same 1,500 requests at once,
in alternating order; then evenly spaced requests at two loads. The medians of the rounds are printed and recorded, as
ratios and differences of this run.

The loads are half the router's throughput, and the rate at which the machine's cores are half busy. They differ if
Kafka, Triton, the clients and the process share few cores: single requests need a fetch, a send and a wake-up of every
process each, which a burst shares. The share of busy cores is printed.
"""

import asyncio
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from deploy.local.processes import ProcessSpec
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from tests.benchmarks.results import record
from tests.support.environment import Environment
from tests.support.fleets import LEVELS

RATE = 720.0
ROUNDS = 3
REQUESTS = 1_500
PACED_S = 6.0
"""Wall seconds of evenly spaced requests."""
TRIAL_S = 2.0
"""Wall seconds of a trial, to find the rate for half busy cores."""
TRIALS = 6
PROMPTS = 100
TIMEOUT_S = 60.0
HALF_THROUGHPUT, HALF_BUSY = "half throughput", "half busy"
LOADS = {HALF_THROUGHPUT: "added_latency", HALF_BUSY: "added_latency_half_busy"}
"""Names of the figures by load."""


@dataclass
class Candidate:
    """The router or the minimal loop, as a process with its own topics.

    Attributes:
        throughputs: requests per second, by round.
        cpu_s: CPU seconds per 1,000 requests, by round.
        latencies_ms: of the evenly spaced requests, from the send until the answer was read; by load, by round.
        busy: share of busy cores; by load, by round.
    """

    name: str
    kafka: KafkaSettings
    process: psutil.Process
    sent: int = 0
    throughputs: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    latencies_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    busy: dict[str, list[float]] = field(default_factory=dict)


class Client:
    """Sends requests to a candidate and reads the answers."""

    def __init__(self, candidate: Candidate, producer: AIOKafkaProducer, consumer: AIOKafkaConsumer) -> None:
        self._candidate = candidate
        self._producer = producer
        self._consumer = consumer

    async def burst(self) -> None:
        """Send all requests at once; measures throughput and CPU time."""
        candidate = self._candidate
        before, began = _cpu_s(candidate.process), time.perf_counter()
        sent = [await self._send() for _ in range(REQUESTS)]
        await self._answers({name for name, _ in sent})
        took_s = time.perf_counter() - began
        candidate.throughputs.append(REQUESTS / took_s)
        candidate.cpu_s.append((_cpu_s(candidate.process) - before) * 1_000 / REQUESTS)

    async def paced(self, rate: float, *, seconds: float = PACED_S) -> list[float]:
        """Send evenly spaced requests; returns their latencies, ms."""
        count = round(seconds * rate)
        sent: dict[str, float] = {}
        arrived: dict[str, float] = {}
        reader = asyncio.create_task(self._collect(arrived, count))
        begin = time.perf_counter()
        for number in range(count):
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            name, at = await self._send()
            sent[name] = at
        await asyncio.wait_for(reader, TIMEOUT_S)
        return [1e3 * (arrived[name] - at) for name, at in sent.items()]

    async def _send(self) -> tuple[str, float]:
        candidate = self._candidate
        name, number = f"{candidate.name}-{candidate.sent}", candidate.sent % PROMPTS
        candidate.sent += 1
        request = {"id": name, "prompt": prompt(number), "sampling": {"max_tokens": 512}}
        at = time.perf_counter()
        await self._producer.send(
            candidate.kafka.topic_prefix + "requests", json.dumps(request).encode(), key=name.encode()
        )
        return name, at

    async def _answers(self, missing: set[str]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while missing:
                for batch in (await self._consumer.getmany(timeout_ms=50)).values():
                    missing -= {answer.key.decode() for answer in batch}

    async def _collect(self, arrived: dict[str, float], count: int) -> None:
        while len(arrived) < count:
            answer = await self._consumer.getone()
            name = answer.key.decode()
            arrived.setdefault(name, time.perf_counter())


@asynccontextmanager
async def connected(candidate: Candidate) -> AsyncIterator[Client]:
    """A client that starts at the end of the answers."""
    servers = candidate.kafka.bootstrap_servers
    producer = AIOKafkaProducer(bootstrap_servers=servers)
    consumer = AIOKafkaConsumer(
        candidate.kafka.topic_prefix + "responses", bootstrap_servers=servers, auto_offset_reset="latest"
    )
    await producer.start()
    await consumer.start()
    await consumer.seek_to_end()
    try:
        yield Client(candidate, producer, consumer)
    finally:
        await producer.stop()
        await consumer.stop()


async def start_candidates(environment: Environment) -> list[Candidate]:
    """Start both processes and wait until they are ready."""
    kafkas = {name: await environment.topics(f"{name}.") for name in ("router", "bare")}
    router = environment.routers(kafkas["router"], {"SPROUT_LOG_LEVEL": "WARNING"}).spec({})
    loop = Path(__file__).with_name("bare_loop.py")
    (triton,) = environment.model_servers
    command = (
        sys.executable, str(loop), environment.bootstrap_servers, kafkas["bare"].topic_prefix, triton.address,
    )  # fmt: skip
    processes = await environment.start(router, ProcessSpec(name="bare", command=command))
    return [
        Candidate(name, kafka, psutil.Process(process.pid))
        for (name, kafka), process in zip(kafkas.items(), processes, strict=True)
    ]


async def measure(candidates: list[Candidate]) -> None:
    """Run all rounds."""
    for candidate in candidates:  # a warm-up round, not counted
        async with connected(candidate) as client:
            await client.burst()
        candidate.throughputs.clear()
        candidate.cpu_s.clear()
    for number in range(ROUNDS):
        for candidate in candidates if number % 2 == 0 else reversed(candidates):
            async with connected(candidate) as client:
                await client.burst()
    router = candidates[0]
    loads = {HALF_THROUGHPUT: statistics.median(router.throughputs) / 2, HALF_BUSY: await half_busy(router)}
    print("evenly spaced: " + ", ".join(f"{rate:.0f} requests/s ({load})" for load, rate in loads.items()))
    for load, rate in loads.items():
        for number in range(ROUNDS):
            for candidate in candidates if number % 2 == 0 else reversed(candidates):
                async with connected(candidate) as client:
                    latencies, busy = await with_load(client.paced(rate))
                candidate.latencies_ms.setdefault(load, []).append(latencies)
                candidate.busy.setdefault(load, []).append(busy)


async def half_busy(router: Candidate) -> float:
    """Find the rate of evenly spaced requests at which the machine's cores are half busy.

    At most half the router's throughput, because one router cannot keep many cores half busy.
    """
    most = statistics.median(router.throughputs) / 2
    rate = most / 4
    for _ in range(TRIALS):
        async with connected(router) as client:
            _, busy = await with_load(client.paced(rate, seconds=TRIAL_S))
        # CPU time per request falls with the load, so the rate changes by more than the share.
        rate = min(most, rate * min(2.0, max(0.5, (0.5 / max(busy, 0.01)) ** 1.5)))
    return rate


async def with_load(paced: Awaitable[list[float]]) -> tuple[list[float], float]:
    """The latencies, and the share of the machine's cores that was busy."""
    psutil.cpu_percent()
    latencies = await paced
    return latencies, psutil.cpu_percent() / 100.0


def percentiles(candidate: Candidate, load: str) -> tuple[float, float]:
    """p50 and p99 of the latencies, ms; medians of the rounds."""
    cuts = [statistics.quantiles(latencies, n=100) for latencies in candidate.latencies_ms[load]]
    return statistics.median(cut[49] for cut in cuts), statistics.median(cut[98] for cut in cuts)


def report(router: Candidate, bare: Candidate) -> None:
    """Print and record the figures."""
    for one in (router, bare):
        print(
            f"{one.name}: {statistics.median(one.throughputs):.0f} requests/s, "
            f"{statistics.median(one.cpu_s):.2f} CPU s per 1,000 requests"
        )
        for load in LOADS:
            p50, p99 = percentiles(one, load)
            busy = statistics.median(one.busy[load])
            print(f"  {load}: p50 {p50:.1f} ms, p99 {p99:.1f} ms; {busy:.0%} of the cores busy")
    found = {
        "throughput_ratio": statistics.median(a / b for a, b in zip(router.throughputs, bare.throughputs, strict=True)),
        "cpu_ratio": statistics.median(a / b for a, b in zip(router.cpu_s, bare.cpu_s, strict=True)),
    }
    for load, name in LOADS.items():
        (p50, p99), (bare_p50, bare_p99) = percentiles(router, load), percentiles(bare, load)
        found[f"{name}_p50_ms"], found[f"{name}_p99_ms"] = p50 - bare_p50, p99 - bare_p99
    for name, value in found.items():
        print(f"{name:38} {value:.3f}")
        record(name, value)


def main() -> None:
    """Run the benchmark."""
    print(f"router and minimal loop: {REQUESTS} requests at once, then {PACED_S:g} s at each load; {ROUNDS} rounds")
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it logs retries for new topics
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as folder:
        report(*asyncio.run(run(Path(folder))))


async def run(folder: Path) -> list[Candidate]:
    """Start the environment and measure."""
    clock = Clock.starting(datetime(2024, 2, 8, tzinfo=UTC), rate=RATE)
    answers = {prompt(number): dict.fromkeys(LEVELS, (40, 1.0)) for number in range(PROMPTS)}
    async with Environment(folder, answers=answers, clock=clock) as environment:
        candidates = await start_candidates(environment)
        await measure(candidates)
        await environment.check()
    return candidates


def prompt(number: int) -> str:
    """A prompt with recorded answers."""
    return f"Question {number}?"


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
