"""The ledger after an outage: `python -m tests.benchmarks.bench_ledger [--calls 3600000] [--ledgers 2]`.

A backlog of valid responses waits in Kafka, as after an hour at 1,000 answers per second; nobody has read the meters
meanwhile. A ledger starts and works it off, while new answers go on arriving. Measured are the calls per second from
its start until the last footprint is published, the processor time per call and the memory of the ledgers and of
PostgreSQL with all its backends, and the bytes of a settled call. Afterwards the accounts are checked: every call once,
joules and seconds as on the meters. With `--cpu-share` each ledger gets at most so much of one core: where all share a
few cores, that leaves PostgreSQL and Kafka enough for two ledgers.

Fails if a process takes more memory than its limit, or the accounts are wrong.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import psutil
from aiokafka import AIOKafkaProducer

from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import ProcessSpec, free_ports, http_probe
from deploy.local.services import ServiceEnvironment, service_spec
from services.ledger.sql import SERVER_SETTINGS, to_iso
from shared.kafka.admin import create_topics
from shared.messages import Decision, GenerationResponse, Timing, Usage
from shared.runtime.database import migrate, open_pool
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import RESPONSES, TOPICS
from tests.benchmarks.cpu_share import limits
from tests.benchmarks.results import record
from tests.support.environment import Environment
from tests.support.fleets import ZONE, fleet_toml

ENDPOINTS = 16
PER_SECOND = 1_000.0
"""Calls per second of the time that the backlog covers."""
CALL_S = 2.5
"""Mean duration of a call."""
POWER_W = 400.0
LEDGER_LIMIT_MIB = 256
POSTGRES_LIMIT_MIB = 512
POSTGRES = ("shared_buffers=96MB", "work_mem=4MB", "maintenance_work_mem=32MB", "max_wal_size=512MB")
LEVELS = {"L0": 0.3, "L1": 0.7}
"""Shares of the levels."""
TEXTS = 256
PREFIX = "bench."
MIB = 1024 * 1024


def fleet_of(metrics: str) -> str:
    """The fleet file: one pool of endpoints that share a metrics page."""
    endpoints = (
        f'[[pools.endpoints]]\nname = "e{n}"\ngrpc = "127.0.0.1:{n + 1}"\nmetrics = "{metrics}"\ngpus = ["g{n}"]\n'
        for n in range(ENDPOINTS)
    )
    pool = "pue = 1.2\nembodied_g_per_s = 0.0001\nidle_power_w = 80"
    return fleet_toml([], levels=("L0", "L1"), pool=pool) + "".join(endpoints)


@dataclass
class Peaks:
    """The most memory seen, MiB, and processor time from the start of the ledgers, s; also until calls were settled."""

    ledger: float = 0.0
    postgres: float = 0.0
    ledger_cpu_s: float = 0.0
    postgres_cpu_s: float = 0.0
    ledger_intake_cpu_s: float = 0.0
    postgres_intake_cpu_s: float = 0.0
    published: int = 0


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


async def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit status."""
    with limits(arguments.ledgers, arguments.cpu_share) as prefixes:
        async with servers(arguments.folder) as (environment, url, postgres):
            return await _measure(arguments, environment, prefixes, url, postgres)


async def _measure(
    arguments: argparse.Namespace,
    environment: Environment,
    prefixes: Sequence[tuple[str, ...]],
    url: str,
    postgres: psutil.Process,
) -> int:
    count: int = arguments.calls
    began_s = time.time()
    since_s = began_s - count / PER_SECOND - 30.0
    database = DatabaseSettings(url=url)
    pool = await open_pool(database, schema="ledger", server_settings=SERVER_SETTINGS)
    await migrate(pool, schema="ledger", package="services.ledger.migrations")
    await pool.executemany(
        "INSERT INTO readings (endpoint, at, gpu, energy_j) VALUES ($1, $2, $3, 0)",
        [(f"e{n}", datetime.fromtimestamp(since_s, UTC), f"g{n}") for n in range(ENDPOINTS)],
    )
    await pool.execute(
        "INSERT INTO intensity SELECT $2, $1::timestamptz + n * interval '5 minutes', 200 + n % 50, false, 'bench' "
        "FROM generate_series(-1, 1000) AS n",
        datetime.fromtimestamp(since_s, UTC),
        ZONE,
    )
    answers = Answers(seed=1)
    async with meters(since_s) as metrics:
        producer = AIOKafkaProducer(
            bootstrap_servers=environment.bootstrap_servers, acks="all", max_batch_size=256 * 1024,
            max_request_size=4 * MIB, compression_type="lz4", request_timeout_ms=300_000,
        )  # fmt: skip
        await producer.start()
        try:
            await publish(producer, answers, count=count, since_s=since_s + 1.0)
            print(f"{count:,} responses published in {time.time() - began_s:.0f} s")
            fleet = environment.folder / "fleet.toml"
            fleet.write_text(fleet_of(metrics), encoding="utf-8")
            specs = [_ledger(f"ledger-{n}", environment, url, fleet, prefix) for n, prefix in enumerate(prefixes)]
            started = time.perf_counter()
            processes = [psutil.Process(one.pid) for one in await environment.start(*specs)]
            going_on = asyncio.create_task(_go_on(producer, answers, arguments.meanwhile))
            peaks = Peaks(postgres_cpu_s=-cpu_s(postgres))
            took_s, intake_s = await _watch(pool, processes, postgres, peaks, count, started, arguments.seconds)
            going_on.cancel()
            return await _report(pool, arguments, peaks, min(count, peaks.published), took_s, intake_s)
        finally:
            await producer.stop()
            await pool.close()


def _ledger(name: str, environment: Environment, url: str, fleet: Path, prefix: tuple[str, ...]) -> ProcessSpec:
    (port,) = free_ports(1)
    spec = service_spec(
        "ledger",
        port=port,
        name=name,
        environment=ServiceEnvironment(
            bootstrap_servers=environment.bootstrap_servers, topic_prefix=PREFIX, database_url=url,
            fleet_file=fleet, clock={},
        ),
        settings={"SPROUT_KAFKA_GROUP_PREFIX": PREFIX, "SPROUT_LEDGER_SETTLE_DELAY_S": "10"},
    )  # fmt: skip
    # Not ready: the backlog is old.
    return replace(
        spec,
        command=(*prefix, *spec.command),
        niceness=0,
        ready=http_probe(f"http://127.0.0.1:{port}/health"),
    )


async def _go_on(producer: AIOKafkaProducer, answers: Answers, per_s: float) -> None:
    """Publish new answers."""
    while per_s > 0:
        await publish(producer, answers, count=round(per_s), since_s=time.time() - 5.0, per_s=per_s)
        await asyncio.sleep(1.0)


PROGRESS = """
SELECT (SELECT coalesce(sum(calls), 0) FROM chunks) AS settled,
       (SELECT coalesce(sum(calls), 0) FROM chunks WHERE published) AS published,
       (SELECT reltuples FROM pg_class WHERE relname = 'open_calls') AS open
"""


async def _watch(
    pool: asyncpg.Pool,
    processes: list[psutil.Process],
    postgres: psutil.Process,
    peaks: Peaks,
    count: int,
    started: float,
    most_s: float,
) -> tuple[float, float]:
    """Wait until all calls of the backlog are published, at most for some seconds; returns the seconds until then, and
    until the first was settled."""
    intake_s, shown = 0.0, 0.0
    while True:
        (found,) = await pool.fetch(PROGRESS)
        now = time.perf_counter() - started
        peaks.ledger = max(peaks.ledger, *(memory_mib(one) for one in processes))
        peaks.postgres = max(peaks.postgres, memory_mib(postgres))
        if found["settled"] and not intake_s:
            intake_s = now
            peaks.ledger_intake_cpu_s = sum(cpu_s(one) for one in processes)
            peaks.postgres_intake_cpu_s = peaks.postgres_cpu_s + cpu_s(postgres)
        if now > shown + 10.0:
            shown = now
            cpu = ", ".join(f"{cpu_s(one):.0f}" for one in processes)
            print(
                f"{now:5.0f} s: settled {found['settled']:,}, published {found['published']:,}; ledger "
                f"{peaks.ledger:.0f} MiB, {cpu} s CPU; PostgreSQL {peaks.postgres:.0f} MiB, "
                f"{peaks.postgres_cpu_s + cpu_s(postgres):.0f} s CPU",
                flush=True,
            )
        if found["published"] >= count or now > most_s:
            peaks.published = found["published"]
            peaks.ledger_cpu_s = sum(cpu_s(one) for one in processes)
            peaks.postgres_cpu_s += cpu_s(postgres)
            return now, intake_s
        await asyncio.sleep(0.5)


ACCOUNTS = """
SELECT (SELECT count(*) FROM settled_calls) AS calls, (SELECT count(DISTINCT id) FROM settled_calls) AS distinct_calls,
       (SELECT sum(metered_j) FROM intervals) AS metered_j,
       (SELECT sum(idle_j + unattributed_j) FROM intervals) AS rest_j, (SELECT sum(idle_s) FROM intervals) AS idle_s,
       (SELECT sum(extract(epoch FROM finished_at - started_at))::float8 FROM intervals) AS length_s,
       (SELECT sum(energy_j) FROM (SELECT energy_j FROM settled_calls UNION ALL SELECT energy_j FROM open_calls) AS c)
           AS calls_j,
       (SELECT sum(server_s) FROM (SELECT server_s FROM settled_calls UNION ALL SELECT server_s FROM open_calls) AS c)
           AS server_s,
       (SELECT count(*) FROM settled_calls WHERE partial) AS partial,
       (SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits WHERE inhparent = 'settled_calls'::regclass)
           + pg_total_relation_size('dimensions') AS bytes
"""


async def _report(
    pool: asyncpg.Pool, arguments: argparse.Namespace, peaks: Peaks, count: int, took_s: float, intake_s: float
) -> int:
    (accounts,) = await pool.fetch(ACCOUNTS, timeout=300.0)
    energy = abs((accounts["calls_j"] + accounts["rest_j"]) / accounts["metered_j"] - 1.0)
    seconds = abs((accounts["server_s"] + accounts["idle_s"]) / accounts["length_s"] - 1.0)
    figures = {
        "calls": float(count),
        "ledgers": float(arguments.ledgers),
        "cpu_share": arguments.cpu_share or 0.0,
        "calls_per_s": count / took_s,
        "seconds": took_s,
        "seconds_until_settlement_began": intake_s,
        "ledger_mib": peaks.ledger,
        "postgres_mib": peaks.postgres,
        "ledger_cpu_us_per_call": 1e6 * peaks.ledger_cpu_s / accounts["calls"],
        "postgres_cpu_us_per_call": 1e6 * peaks.postgres_cpu_s / accounts["calls"],
        "ledger_cpu_s_until_settlement_began": peaks.ledger_intake_cpu_s,
        "postgres_cpu_s_until_settlement_began": peaks.postgres_intake_cpu_s,
        "bytes_per_call": float(accounts["bytes"]) / accounts["calls"],
        "energy_error": energy,
        "time_error": seconds,
    }
    for name, value in figures.items():
        print(f"{name:32} {value:,.6g}")
    limited = "" if arguments.cpu_share is None else f"_of_{arguments.cpu_share:g}_cores"
    record(f"ledger_backlog_{arguments.ledgers}{limited}", figures)
    problems = []
    if accounts["calls"] != accounts["distinct_calls"] or accounts["calls"] < count or accounts["partial"]:
        problems.append(f"the accounts are wrong: {dict(accounts)}")
    if max(energy, seconds) > 1e-5:
        problems.append(f"joules or seconds do not add up: {energy}, {seconds}")
    if peaks.ledger > LEDGER_LIMIT_MIB or peaks.postgres > POSTGRES_LIMIT_MIB:
        problems.append(f"memory: {peaks.ledger:.0f} and {peaks.postgres:.0f} MiB")
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000, help="size of the backlog")
    parser.add_argument("--ledgers", type=int, default=1)
    parser.add_argument("--cpu-share", type=float, help="of one core that each ledger gets at most; default: no limit")
    parser.add_argument("--meanwhile", type=float, default=200.0, help="new answers per second")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then report what was done until then")
    parser.add_argument("--folder", default=None, help="for Kafka's and PostgreSQL's data")
    sys.exit(asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
