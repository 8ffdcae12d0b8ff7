"""The report over a month at 1,000 calls per second: `python -m tests.benchmarks.bench_report [--days 30]`.

The roll-ups of the month are written to a new PostgreSQL, then `sprout report` runs as a process. Measured are its
time, its processor time and its memory. Fails if time or memory exceed their limits, or if the report does not count
every call.
"""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import asyncpg

from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import Supervisor
from shared.runtime.database import migrate, open_pool
from shared.runtime.settings import DatabaseSettings
from shared.switchback import SwitchbackSchedule
from tests.benchmarks.results import record
from tests.support.metered import fleet_toml, metered_fleet
from tests.support.report import DAY, EMBODIED_G_PER_S, GROUPS, MODEL, OPTIONS, POOL, PUE, ZONE, policy_at

LIMIT_S = 10.0
LIMIT_MIB = 256
PER_SECOND = 1_000
ENDPOINTS = 16
TASKS = 2
LEARNED = 10
"""Prompt groups of each task of the test's data."""

DISTRIBUTIONS = """
INSERT INTO distributions
SELECT DISTINCT ON (md5(p::text)) md5(p::text)::uuid, p FROM (
    SELECT jsonb_build_object($2::text, 0.3 + h % 7 * 0.01, $3::text, 0.4, $4::text, 0.3 - h % 7 * 0.01) AS p
    FROM generate_series(0, $1::int - 1) AS h
) AS made
"""
CALLS = """
INSERT INTO hourly_calls
SELECT $1::timestamptz + h * interval '1 hour', 'request', $2, g || '.' || n, 'task' || t, $3, 'L' || l, $4, 1 + h % 24,
       'policy', d.id, calls, extract(epoch FROM $1::timestamptz) + h * 3600, extract(epoch FROM $1::timestamptz)
       + h * 3600 + 3599, calls * 60, calls * 100, calls * 3.0, calls * s, calls * e, calls * s * $5,
       calls * e * e * 1.3, calls * s * s * 1.3, calls * e * s * 1.2, calls, calls * k, calls * k * k, calls * e * k,
       calls * op, calls * (op + s * $5), calls * (op + s * $5) ^ 2 * 1.3, calls * (op + s * $5) * k, 0
FROM (
    SELECT h, g, n, t, l, $7::bigint AS calls, 0.02 / (1 + l) AS s, 900.0 / (1 + l) AS e, 200 + 100 * sin(h / 4.0) AS k,
           900.0 / (1 + l) / 3.6e6 * $6 * (200 + 100 * sin(h / 4.0)) AS op
    FROM generate_series(0, $8::int - 1) AS h, unnest($9::text[]) AS g, generate_series(1, $10::int) AS n,
         generate_series(1, $11::int) AS t, generate_series(0, 2) AS l
) AS cells JOIN LATERAL (SELECT id FROM distributions ORDER BY id OFFSET (h % 7) LIMIT 1) AS d ON true
"""
STARTS = """
INSERT INTO call_starts
SELECT $1::timestamptz + c * interval '150 seconds', 'request', $2, 'L' || l,
       CASE WHEN ($5::bool[])[c + 1] THEN 'switchback' ELSE 'policy' END, $3::bigint, $3::bigint * 100, $3::bigint * 3.0
FROM generate_series(0, $4::int - 1) AS c, generate_series(0, 2) AS l
"""
HISTOGRAMS = """
INSERT INTO histograms
SELECT $1::timestamptz + h * interval '1 hour', kind, CASE WHEN kind = 'tokens' THEN g ELSE $2 END, false, b, 100
FROM generate_series(0, $3::int - 1) AS h, unnest(ARRAY['ttft', 'tpot']) AS kind, generate_series(40, 120) AS b,
     (SELECT '' AS g) AS none
UNION ALL
SELECT $1::timestamptz + h * interval '24 hours', 'tokens', g || '.' || n, false, b, 100
FROM generate_series(0, $3::int / 24 - 1) AS h, unnest($4::text[]) AS g, generate_series(1, $5::int) AS n,
     generate_series(60, 120) AS b
"""
METERS = """
INSERT INTO meter_sums
SELECT $2 || '-' || e, $1::timestamptz + m * interval '5 minutes', $2, $3, 120000, 90000, 24000, 6000, 0, 300, 290,
       10, false
FROM generate_series(0, $4::int - 1) AS m, generate_series(0, $5::int - 1) AS e
"""


async def write_month(url: str, days: int) -> int:
    """Write the roll-ups of some days; returns the number of calls."""
    await create_database(url)
    pool = await open_pool(DatabaseSettings(url=url, command_timeout_s=600.0), schema="ledger")
    await migrate(pool, schema="ledger", package="services.ledger.migrations")
    hours, groups = 24 * days, list(GROUPS)
    cells = len(groups) * LEARNED * TASKS * 3
    calls = PER_SECOND * 3600 // cells
    await pool.execute(DISTRIBUTIONS, hours, *OPTIONS)
    await pool.execute(
        CALLS, DAY, MODEL, POOL, ZONE, EMBODIED_G_PER_S, PUE, calls, hours, groups, LEARNED, TASKS
    )  # fmt: skip
    schedule = SwitchbackSchedule(metered_fleet().switchback)
    starts = [DAY + timedelta(seconds=150 * number) for number in range(hours * 24)]
    blocks = [schedule.world(one) == "reference" for one in starts]
    await pool.execute(STARTS, DAY, POOL, calls * cells // 72, hours * 24, blocks)
    await pool.execute(HISTOGRAMS, DAY, POOL, hours, groups, LEARNED)
    await pool.execute(METERS, DAY, POOL, ZONE, hours * 12, ENDPOINTS)
    await pool.execute(
        "INSERT INTO intensity SELECT $1, $2::timestamptz + n * interval '5 minutes', 200, false, 'bench' "
        "FROM generate_series(0, $3::int) AS n",
        ZONE, DAY, hours * 12,
    )  # fmt: skip
    await pool.executemany(
        "INSERT INTO policies VALUES ($1, $2, $3, $4)",
        [(one.model, one.version, one.created_at, one.model_dump_json()) for one in map(policy_at, range(24))],
    )
    await pool.execute("VACUUM ANALYZE")
    await pool.close()
    return calls * cells * hours


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--days", type=int, default=2)
    days = parser.parse_args().days
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as folder:
        supervisor = Supervisor(Path(folder) / "logs")
        spec, url = postgres_spec(Path(folder) / "postgres")
        supervisor.start(spec)
        try:
            calls = asyncio.run(write_month(url, days))
            fleet, figures = Path(folder) / "fleet.toml", Path(folder) / "report.json"
            fleet.write_text(fleet_toml(), encoding="utf-8")
            until = DAY + timedelta(days=days)
            command = ["report", "--database", url, "--fleet", str(fleet), "--json", str(figures), "--no-hours"]
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "tools.cli.main", *command, "--since", DAY.isoformat(), "--until",
                 until.isoformat()],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            took_s = time.perf_counter() - began
            usage = resource.getrusage(resource.RUSAGE_CHILDREN)
            found = json.loads(figures.read_text(encoding="utf-8"))["report"]["requests"]["settled"]
            asyncio.run(_print_sizes(url))
        finally:
            supervisor.stop_all()
    memory = usage.ru_maxrss / 1024
    cpu_s = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime  # without PostgreSQL's initdb
    print(f"{calls:,} calls in {days} days: {took_s:.1f} s, {cpu_s:.1f} s of processor time, {memory:.0f} MiB")
    record(
        "report_month",
        {"days": float(days), "calls": float(calls), "seconds": took_s, "cpu_s": cpu_s, "mib": memory},
    )
    if found != calls or took_s > LIMIT_S or memory > LIMIT_MIB:
        sys.exit(f"FAILED: {found:,} calls counted, {took_s:.1f} s, {memory:.0f} MiB")


async def _print_sizes(url: str) -> None:
    connection = await asyncpg.connect(url, server_settings={"search_path": "ledger"})
    for table in ("hourly_calls", "call_starts", "histograms", "meter_sums"):
        size = await connection.fetchval(f"SELECT pg_total_relation_size('{table}')")
        print(f"{table:16} {size / 2**20:8,.0f} MiB")
    await connection.close()


if __name__ == "__main__":
    main()
