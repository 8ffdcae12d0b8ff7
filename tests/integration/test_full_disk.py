"""The disk of PostgreSQL is full: the ledger says so and waits, and then books every call once."""

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from pydantic import SecretStr

from shared.runtime.settings import DatabaseSettings
from tests.support.deadlines import until
from tests.support.outages import until_ready
from tests.support.processes import start_service
from tests.support.replay import ENDPOINTS, Answers, fleet_of, meters

pytestmark = pytest.mark.integration

CALLS = 2_000
SETTLED = "SELECT count(*) FROM settled_calls"
METERED = f"SELECT count(*) = {ENDPOINTS} AND max(metered_from) < now() - interval '10 s' FROM meters"
"""All calls below start after the first reading of their meter; the others would be unmetered."""
ACCOUNTS = """
SELECT (SELECT count(DISTINCT id) FROM settled_calls) AS distinct_calls,
       (SELECT sum(energy_j) FROM settled_calls) + (SELECT sum(idle_j + unattributed_j) FROM intervals) AS accounted_j,
       (SELECT sum(metered_j) FROM intervals) AS metered_j
"""


@dataclass(frozen=True)
class Disk:
    """A small file system with a database.

    Attributes:
        database: whose tables are on the disk. The write-ahead log is elsewhere: without it PostgreSQL ends.
    """

    folder: Path
    database: DatabaseSettings

    def fill(self) -> None:
        left = os.statvfs(self.folder)
        with (self.folder / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_frsize)

    def make_space(self) -> None:
        (self.folder / "filler").unlink()


@pytest.fixture
def mounted() -> Iterator[Path]:
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    # Not in pytest's folders: PostgreSQL runs as another user, who must be able to enter the folder.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        disk = folder / "disk"
        disk.mkdir()
        done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=64m,mode=755", "sprout-test", disk], check=False)
        if done.returncode:
            pytest.skip("this machine lets nobody mount a disk")
        yield disk
        subprocess.run(["umount", "--lazy", disk], check=True)


def give(folder: Path, *, like: str) -> None:
    """Give a folder the owner of another one."""
    owner = Path(like).stat()
    os.chown(folder, owner.st_uid, owner.st_gid)


@pytest.fixture
async def disk(mounted: Path, postgres_server: str) -> AsyncIterator[Disk]:
    name, space = f"full_{time.monotonic_ns()}", mounted / "tables"
    space.mkdir()
    connection = await asyncpg.connect(f"{postgres_server}postgres")
    try:
        give(space, like=await connection.fetchval("SHOW data_directory"))
        await connection.execute(f"CREATE TABLESPACE {name} LOCATION '{space}'")
        await connection.execute(f"CREATE DATABASE {name} TABLESPACE {name}")
        yield Disk(mounted, DatabaseSettings(url=SecretStr(postgres_server + name)))
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await connection.execute(f"DROP TABLESPACE {name}")
    finally:
        await connection.close()


async def test_a_ledger_waits_for_space_and_books_every_call_once(supervisor, kafka, disk, tmp_path):
    since_s = time.time() - 60.0
    fleet = tmp_path / "fleet.toml"
    settings = {
        "SPROUT_LEDGER_SCRAPE_INTERVAL_S": "0.5",
        "SPROUT_LEDGER_SETTLE_INTERVAL_S": "0.5",
        "SPROUT_LEDGER_SETTLE_DELAY_S": "5",
    }
    async with meters(since_s) as metrics, AIOKafkaProducer(**kafka.client_options()) as producer:
        fleet.write_text(fleet_of(metrics))
        start = partial(start_service, kafka=kafka, database=disk.database, fleet=fleet, settings=settings)
        name = await asyncio.to_thread(start, "ledger", supervisor)  # the meters are in this process
        pool = await asyncpg.create_pool(
            disk.database.url.get_secret_value(), min_size=1, max_size=1, server_settings={"search_path": "ledger"}
        )
        try:
            pid = supervisor.process(name).pid
            await until(lambda: pool.fetchval(METERED))
            disk.fill()
            answers, topic = Answers(seed=1), f"{kafka.topic_prefix}responses"
            for _ in range(CALLS):
                key, value = answers.make(time.time() - 5.0)
                await producer.send(topic, value, key=key, headers=[("content-type", b"application/json")])
            await producer.flush()
            await until_ready(supervisor, [name], "DiskFullError")
            assert await pool.fetchval(SETTLED) < CALLS
            disk.make_space()
            await until(lambda: pool.fetchval(SETTLED), lambda found: found >= CALLS)
            await until_ready(supervisor, [name])
            (accounts,) = await pool.fetch(ACCOUNTS)
            assert accounts["distinct_calls"] == await pool.fetchval(SETTLED) == CALLS
            assert accounts["accounted_j"] == pytest.approx(accounts["metered_j"], rel=1e-6)
            assert await pool.fetchval("SELECT count(*) FROM open_calls") == 0
            assert supervisor.process(name).pid == pid
        finally:
            await pool.close()
            supervisor.stop(name)
