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
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import psutil
from aiokafka import AIOKafkaProducer

from deploy.local.processes import ProcessSpec, free_ports, http_probe
from deploy.local.services import ServiceEnvironment, service_spec
from services.ledger.sql import SERVER_SETTINGS
from shared.runtime.database import migrate, open_pool
from shared.runtime.settings import DatabaseSettings
from tests.benchmarks.cpu_share import limits
from tests.benchmarks.results import record
from tests.support.environment import Environment
from tests.support.fleets import ZONE
from tests.support.replay import (
    ENDPOINTS,
    MIB,
    PER_SECOND,
    PREFIX,
    Answers,
    cpu_s,
    fleet_of,
    memory_mib,
    meters,
    publish,
    servers,
)

LEDGER_LIMIT_MIB = 256
POSTGRES_LIMIT_MIB = 512


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
