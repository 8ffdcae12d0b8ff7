"""The gateway against producers that speak Kafka: `python -m tests.benchmarks.bench_gateway`.

Both use the same Kafka, router and Triton with the stand-in model, which streams answers 720 times as fast as recorded.
Measurements, in alternating order, by medians of the rounds:

- time to first token of evenly spaced requests with streams, at the rate at which the machine's cores are half busy:
  through the gateway until the event with the first text, over Kafka until the first chunk;
- throughput of whole answers, with the same number of requests open all the time, and the processor time of all
  processes for an answer, which other work on the machine changes less;
- memory of a gateway with 1,000 open streams that wait for their first token;
- time from a client that leaves in the middle of its stream until the router, which then has ended the generation,
  publishes the part of the answer that there is.

Clients run in this process and count, as in an application. Both parse answers as JSON and do no more; what a client
library over HTTP would take is not included. The gateway checks keys and limits in PostgreSQL and keeps accounts; the
producer does not.
"""

import asyncio
import logging
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition
from pydantic import SecretStr

from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from services.gateway.keys import KeyStore
from shared.messages import GenerationResponse
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseStatus, open_pool
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import RESPONSES
from tests.benchmarks.gateway_clients import PROMPTS, Ask, Http, direct, prompt
from tests.benchmarks.results import record
from tests.support.environment import Environment
from tests.support.fleets import LEVELS
from tests.support.processes import memory_mib

RATE = 720.0
ROUNDS = 3
REQUESTS = 600
"""Whole answers of a round."""
OPEN = 64
"""Requests open at once while throughput is measured."""
PACED_S = 6.0
TRIAL_S = 2.0
TRIALS = 5
STREAMS = 1_000
LEAVING = 20
"""Clients that leave, one after the other."""
LONG = "A question whose answer takes half a minute."
SLOW = "A question that takes ten minutes."
TIMEOUT_S = 120.0
KINDS = ("clients", "services gateway", "services router", "kafka.Kafka", "triton", "postgres")
"""Parts of the command lines of processes; the one that stands first counts."""
OTHER_WORK_PCT = 10.0
"""Of the cores; with more the gateway, which takes more processes than Kafka alone, waits longer for each."""


@dataclass
class Figures:
    """What one way of asking has shown.

    Attributes:
        first_ms: times to first token of the evenly spaced requests, by round.
        throughputs: whole answers per second, by round.
        busy: share of busy cores while requests were evenly spaced, by round.
        cpu_ms: processor time for a whole answer by what took it, ms, by round.
    """

    first_ms: list[list[float]] = field(default_factory=list)
    throughputs: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    cpu_ms: list[dict[str, float]] = field(default_factory=list)

    def cpu_totals_ms(self) -> list[float]:
        """Processor time for a whole answer, ms, by round."""
        return [sum(one.values()) for one in self.cpu_ms]


async def paced(ask: Ask, rate: float, *, seconds: float) -> tuple[list[float], float]:
    """Evenly spaced streams: times to first token, ms, and the share of busy cores."""
    psutil.cpu_percent()
    begin = time.perf_counter()
    asked: list[asyncio.Task[float]] = []
    for number in range(round(seconds * rate)):
        await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
        asked.append(asyncio.create_task(ask(number, True)))
    async with asyncio.timeout(TIMEOUT_S):
        found = await asyncio.gather(*asked)
    return [1e3 * one for one in found], psutil.cpu_percent() / 100.0


async def throughput(ask: Ask) -> float:
    """Whole answers per second with `OPEN` requests at once."""
    numbers = iter(range(REQUESTS))

    async def work() -> None:
        for number in numbers:
            await ask(number, False)

    began = time.perf_counter()
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        for _ in range(OPEN):
            group.create_task(work())
    return REQUESTS / (time.perf_counter() - began)


def processor_ms() -> dict[str, float]:
    """The processor time so far of this process and all that it started, ms, by what they are."""
    spent = dict.fromkeys((*KINDS, "other"), 0.0)
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.Error):  # it has just ended
            command = "clients" if process == this else " ".join(process.cmdline())
            times = process.cpu_times()
            spent[next((kind for kind in KINDS if kind in command), "other")] += 1e3 * (times.user + times.system)
    return spent


async def half_busy(ask: Ask, most: float) -> float:
    """The rate of streams at which the cores are half busy."""
    rate = most / 8
    for _ in range(TRIALS):
        _, busy = await paced(ask, rate, seconds=TRIAL_S)
        rate = min(most, rate * min(2.0, max(0.5, (0.5 / max(busy, 0.01)) ** 1.2)))
    return max(1.0, rate)  # other work may keep the cores busy


async def memory(client: Http, port: int, pid: int) -> int:
    """Resident memory of the gateway with open streams, MiB."""
    opened = []
    for _ in range(STREAMS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(client.request(SLOW, stream=True))
        opened.append((reader, writer))
    async with asyncio.timeout(TIMEOUT_S):
        # The headers are sent once the gateway no longer waits for the first part of the answer.
        heads = await asyncio.gather(*(reader.readuntil(b"\r\n\r\n") for reader, _ in opened))
    answered = sum(head.startswith(b"HTTP/1.1 200") for head in heads)
    if answered != STREAMS:
        raise RuntimeError(f"{answered} of {STREAMS} streams are open")
    used = memory_mib(pid, "VmHWM")
    for _, writer in opened:
        writer.close()
    return used


async def cancellations(client: Http, port: int, kafka: KafkaSettings) -> list[float]:
    """Times from a client that leaves its stream until the router ends the answer, ms, in ascending order."""
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers)
    await consumer.start()
    try:
        consumer.assign([TopicPartition(kafka.topic(RESPONSES), number) for number in range(RESPONSES.partitions)])
        await consumer.seek_to_end()
        async with asyncio.timeout(TIMEOUT_S):
            opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(LEAVING)]
            left_s: dict[bytes, float] = {}
            for reader, writer in opened:
                writer.write(client.request(LONG, stream=True))
                begun = await reader.readuntil(b'"content":""')
                await reader.readuntil(b'"content":"')  # its first text
                name = begun.rpartition(b'"id":"')[2].partition(b'"')[0]
                left_s[name] = time.time()
                writer.close()
            taken_ms: list[float] = []
            while len(taken_ms) < LEAVING:
                record = await consumer.getone()
                response = GenerationResponse.model_validate_json(record.value)
                if record.key in left_s and response.finish_reason == "cancelled":
                    taken_ms.append(record.timestamp - 1e3 * left_s[record.key])
        return sorted(taken_ms)
    finally:
        await consumer.stop()


async def run(folder: Path) -> None:
    """Start the environment, measure, print and record."""
    clock = Clock.starting(datetime(2024, 2, 8, tzinfo=UTC), rate=RATE)
    answers = {prompt(number): dict.fromkeys(LEVELS, (40, 30.0)) for number in range(PROMPTS)}
    answers[LONG] = dict.fromkeys(LEVELS, (500, 30.0 * RATE))
    answers[SLOW] = dict.fromkeys(LEVELS, (40, 600.0 * RATE))
    async with Environment(folder, answers=answers, clock=clock) as environment:
        kafka = await environment.topics("bench.")
        router = environment.routers(kafka, {"SPROUT_LOG_LEVEL": "WARNING"}).spec({})
        postgres, url = await asyncio.to_thread(postgres_spec, folder / "postgres")
        await environment.start(postgres)
        await create_database(url)
        (port,) = free_ports(1)
        services = ServiceEnvironment(
            bootstrap_servers=kafka.bootstrap_servers, topic_prefix=kafka.topic_prefix, database_url=url,
            fleet_file=folder / f"{kafka.topic_prefix}toml", clock=clock.environment(), log_level="WARNING",
        )  # fmt: skip
        # On a busy machine a slow answer is a figure, not an error.
        patient = {"SPROUT_GATEWAY_PUBLISH_TIMEOUT_S": "60", "SPROUT_GATEWAY_ADMISSION_TIMEOUT_S": "60"}
        spec = service_spec("gateway", port=port, environment=services, settings=patient)
        _, gateway = await environment.start(router, spec)
        database = DatabaseSettings(url=SecretStr(url))
        async with await open_pool(database, schema="gateway") as pool:
            store = KeyStore(pool, DatabaseStatus(), cache_s=0.0)
            _, key = await store.create(name="bench", tenant=None, now=datetime.now(UTC))
        http = Http(port, key)
        async with direct(kafka) as client:
            figures = await measure(http.ask, client.ask)
        http.close()
        leaving_ms = await cancellations(http, port, kafka)
        used = await memory(http, port, gateway.pid)
        await environment.check()
    report(figures, leaving_ms, used)


async def measure(over_http: Ask, over_kafka: Ask) -> dict[str, Figures]:
    """All rounds; the order alternates."""
    asks = {"gateway": over_http, "kafka": over_kafka}
    found = {name: Figures() for name in asks}
    for ask in asks.values():  # warm up, not counted
        await throughput(ask)
    for number in range(ROUNDS):
        for name in asks if number % 2 == 0 else reversed(asks):
            before = processor_ms()
            found[name].throughputs.append(await throughput(asks[name]))
            after = processor_ms()
            found[name].cpu_ms.append({kind: (after[kind] - before[kind]) / REQUESTS for kind in after})
    rate = await half_busy(over_http, statistics.median(found["gateway"].throughputs))
    print(f"evenly spaced: {rate:.0f} streams/s")
    for number in range(ROUNDS):
        for name in asks if number % 2 == 0 else reversed(asks):
            first_ms, busy = await paced(asks[name], rate, seconds=PACED_S)
            found[name].first_ms.append(first_ms)
            found[name].busy.append(busy)
    return found


def report(figures: dict[str, Figures], leaving_ms: list[float], used_mib: int) -> None:
    """Print and record the figures."""
    cuts = {}
    for name, one in figures.items():
        quantiles = [statistics.quantiles(values, n=100) for values in one.first_ms]
        cuts[name] = [statistics.median(cut[at] for cut in quantiles) for at in (49, 98)]
        print(
            f"{name}: {statistics.median(one.throughputs):.0f} answers/s; first token p50 {cuts[name][0]:.1f} ms, "
            f"p99 {cuts[name][1]:.1f} ms with {statistics.median(one.busy):.0%} of the cores busy"
        )
        by_kind = {kind: statistics.median(values[kind] for values in one.cpu_ms) for kind in one.cpu_ms[0]}
        parts = ", ".join(f"{kind} {ms:.2f}" for kind, ms in by_kind.items() if ms >= 0.01)
        print(f"    {statistics.median(one.cpu_totals_ms()):.2f} ms of processor time for an answer: {parts}")
    gateway, kafka = figures["gateway"], figures["kafka"]
    found = {
        "gateway_added_first_token_p50_ms": cuts["gateway"][0] - cuts["kafka"][0],
        "gateway_added_first_token_p99_ms": cuts["gateway"][1] - cuts["kafka"][1],
        "gateway_throughput_ratio": statistics.median(
            a / b for a, b in zip(gateway.throughputs, kafka.throughputs, strict=True)
        ),
        "gateway_cpu_ratio": statistics.median(
            a / b for a, b in zip(gateway.cpu_totals_ms(), kafka.cpu_totals_ms(), strict=True)
        ),
        "gateway_cancelled_p50_ms": statistics.median(leaving_ms),
        "gateway_cancelled_longest_ms": leaving_ms[-1],
        "gateway_1000_streams_mib": float(used_mib),
    }
    for name, value in found.items():
        print(f"{name:38} {value:.3f}")
        record(name, value)


def main() -> None:
    """Run the benchmark."""
    print(f"gateway and Kafka: {ROUNDS} rounds of {REQUESTS} answers with {OPEN} open, then {PACED_S:g} s of streams")
    other = psutil.cpu_percent(interval=2.0)
    if other > OTHER_WORK_PCT:
        print(f"other work keeps {other:.0f} % of the cores busy: times and ratios say little")
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it logs retries for new topics
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as folder:
        uvloop.run(run(Path(folder)))


if __name__ == "__main__":
    main()
