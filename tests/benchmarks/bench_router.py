"""What the router's guarantees cost: `python -m tests.benchmarks.bench_router`.

The router process against a bare loop of aiokafka and tritonclient (`bare_loop.py`) on the same Kafka broker and the
same Triton with the stand-in model, as it streams answers 720 times as fast as recorded. In every round each is given
the same 1,500 requests at once, the one or the other first; then each gets requests evenly spread, at two loads.
Medians of the rounds are printed and recorded, as ratios and differences of this one run.

The loads: half the router's throughput, and the rate at which the machine's cores are half busy. The two differ where
Kafka, Triton, the clients and the contestant share few cores: requests that come one by one have each a fetch, a send
and a turn of every process of their own, which requests that come at once share. How busy the cores were is printed.
"""

import asyncio
import json
import statistics
import sys
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
from tests.benchmarks.ground import LEVELS, Ground, laid, prompt
from tests.benchmarks.results import record

RATE = 720.0
ROUNDS = 3
REQUESTS = 1_500
PACED_S = 6.0
"""Wall seconds of evenly spread requests."""
TRIAL_S = 2.0
"""The same, to see how busy a rate keeps the machine."""
TRIALS = 6
PROMPTS = 100
TIMEOUT_S = 60.0
HALF_THROUGHPUT, HALF_BUSY = "half throughput", "half busy"
LOADS = {HALF_THROUGHPUT: "added_latency", HALF_BUSY: "added_latency_half_busy"}
"""How the figures of each are called."""


@dataclass
class Contestant:
    """The router or the bare loop, as a process with topics of its own.

    Attributes:
        throughputs: requests a second, by round.
        cpu_s: CPU seconds per 1,000 requests, by round.
        latencies_ms: of the evenly spread requests, from before the send until the answer was read; by load, by round.
        busy: share of the machine's cores meanwhile; by load, by round.
    """

    name: str
    kafka: KafkaSettings
    process: psutil.Process
    asked: int = 0
    throughputs: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    latencies_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    busy: dict[str, list[float]] = field(default_factory=dict)


class Conversation:
    """A producer of requests and the reader of their answers."""

    def __init__(self, contestant: Contestant, producer: AIOKafkaProducer, consumer: AIOKafkaConsumer) -> None:
        self._contestant = contestant
        self._producer = producer
        self._consumer = consumer

    async def burst(self) -> None:
        """Everything at once: throughput and CPU time."""
        contestant = self._contestant
        before, began = _cpu_s(contestant.process), time.perf_counter()
        asked = [await self._ask() for _ in range(REQUESTS)]
        await self._answers({name for name, _ in asked})
        took_s = time.perf_counter() - began
        contestant.throughputs.append(REQUESTS / took_s)
        contestant.cpu_s.append((_cpu_s(contestant.process) - before) * 1_000 / REQUESTS)

    async def paced(self, rate: float, *, seconds: float = PACED_S) -> list[float]:
        """Evenly spread: latencies, ms."""
        count = round(seconds * rate)
        sent: dict[str, float] = {}
        arrived: dict[str, float] = {}
        reader = asyncio.create_task(self._collect(arrived, count))
        begin = time.perf_counter()
        for number in range(count):
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            name, at = await self._ask()
            sent[name] = at
        await asyncio.wait_for(reader, TIMEOUT_S)
        return [1e3 * (arrived[name] - at) for name, at in sent.items()]

    async def _ask(self) -> tuple[str, float]:
        contestant = self._contestant
        name, number = f"{contestant.name}-{contestant.asked}", contestant.asked % PROMPTS
        contestant.asked += 1
        request = {"id": name, "prompt": prompt(number), "sampling": {"max_tokens": 512}}
        at = time.perf_counter()
        await self._producer.send(
            contestant.kafka.topic_prefix + "requests", json.dumps(request).encode(), key=name.encode()
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
async def talking(contestant: Contestant) -> AsyncIterator[Conversation]:
    """A conversation that has heard every earlier answer."""
    servers = contestant.kafka.bootstrap_servers
    producer = AIOKafkaProducer(bootstrap_servers=servers)
    consumer = AIOKafkaConsumer(
        contestant.kafka.topic_prefix + "responses", bootstrap_servers=servers, auto_offset_reset="latest"
    )
    await producer.start()
    await consumer.start()
    await consumer.seek_to_end()
    try:
        yield Conversation(contestant, producer, consumer)
    finally:
        await producer.stop()
        await consumer.stop()


def start_contestants(ground: Ground, clock: Clock) -> list[Contestant]:
    """Both processes, ready."""
    kafkas = {name: ground.topics(name) for name in ("router", "bare")}
    routers = ground.routers(kafkas["router"], clock=clock)
    supervisor = ground.supervisor
    loop = Path(__file__).with_name("bare_loop.py")
    command = (sys.executable, str(loop), ground.servers, kafkas["bare"].topic_prefix, ground.triton)
    pids = {
        "router": supervisor.process(routers.start()).pid,
        "bare": supervisor.start(ProcessSpec(name="bare", command=command)).pid,
    }
    return [Contestant(name, kafka, psutil.Process(pids[name])) for name, kafka in kafkas.items()]


async def compete(contestants: list[Contestant]) -> None:
    """All rounds."""
    for contestant in contestants:  # warm, and not counted
        async with talking(contestant) as conversation:
            await conversation.burst()
        contestant.throughputs.clear()
        contestant.cpu_s.clear()
    for number in range(ROUNDS):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            async with talking(contestant) as conversation:
                await conversation.burst()
    router = contestants[0]
    loads = {HALF_THROUGHPUT: statistics.median(router.throughputs) / 2, HALF_BUSY: await half_busy(router)}
    print("evenly spread: " + ", ".join(f"{rate:.0f} requests/s ({load})" for load, rate in loads.items()))
    for load, rate in loads.items():
        for number in range(ROUNDS):
            for contestant in contestants if number % 2 == 0 else reversed(contestants):
                async with talking(contestant) as conversation:
                    latencies, busy = await watched(conversation.paced(rate))
                contestant.latencies_ms.setdefault(load, []).append(latencies)
                contestant.busy.setdefault(load, []).append(busy)


async def half_busy(router: Contestant) -> float:
    """The rate of evenly spread requests through the router at which the machine's cores are half busy.

    No more than half the router's throughput: one router cannot keep a machine of many cores half busy.
    """
    most = statistics.median(router.throughputs) / 2
    rate = most / 4
    for _ in range(TRIALS):
        async with talking(router) as conversation:
            _, busy = await watched(conversation.paced(rate, seconds=TRIAL_S))
        # The busier, the less a further request takes, so the rate must change by more than the share.
        rate = min(most, rate * min(2.0, max(0.5, (0.5 / max(busy, 0.01)) ** 1.5)))
    return rate


async def watched(paced: Awaitable[list[float]]) -> tuple[list[float], float]:
    """Latencies, and the share of the machine's cores that was busy meanwhile."""
    psutil.cpu_percent()
    latencies = await paced
    return latencies, psutil.cpu_percent() / 100.0


def percentiles(contestant: Contestant, load: str) -> tuple[float, float]:
    """p50 and p99 of the latencies, ms: medians of the rounds."""
    cuts = [statistics.quantiles(latencies, n=100) for latencies in contestant.latencies_ms[load]]
    return statistics.median(cut[49] for cut in cuts), statistics.median(cut[98] for cut in cuts)


def report(router: Contestant, bare: Contestant) -> None:
    """Print and record."""
    for one in (router, bare):
        print(
            f"{one.name}: {statistics.median(one.throughputs):.0f} requests/s, "
            f"{statistics.median(one.cpu_s):.2f} CPU s per 1,000 requests"
        )
        for load in LOADS:
            p50, p99 = percentiles(one, load)
            busy = statistics.median(one.busy[load])
            print(f"  {load}: p50 {p50:.1f} ms, p99 {p99:.1f} ms; the cores {busy:.0%} busy")
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
    print(
        f"the router against a bare loop: {REQUESTS} requests at once, then {PACED_S:g} s at each load; {ROUNDS} rounds"
    )
    clock = Clock.starting(datetime(2024, 2, 8, tzinfo=UTC), rate=RATE)
    with laid(
        workload={prompt(number): dict.fromkeys(LEVELS, (40, 1.0)) for number in range(PROMPTS)}, clock=clock
    ) as ground:
        contestants = start_contestants(ground, clock)
        asyncio.run(compete(contestants))
        ground.supervisor.check()
    report(*contestants)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
