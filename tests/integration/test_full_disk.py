"""The disk of PostgreSQL is full: the ledger's store says so, and stores every call once when there is space."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr

from services.ledger.calls import Labels, NewCall
from services.ledger.sql import Storage
from shared.runtime.database import DatabaseUnavailableError, migrate, open_pool
from shared.runtime.settings import DatabaseSettings

pytestmark = pytest.mark.integration

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
CALLS, BATCH = 20_000, 1_000
STORED = "SELECT count(*) FROM open_calls"


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


async def add_all(storage: Storage, batches: list[list[NewCall]]) -> None:
    for batch in batches:
        await storage.add_calls(batch)


async def test_the_ledger_says_so_and_stores_every_call_once_when_there_is_space(disk):
    pool = await open_pool(disk.database, schema="ledger")
    try:
        await migrate(pool, schema="ledger", package="services.ledger.migrations")
        storage = Storage()
        storage.attach(pool)
        labels = Labels("request", None, "m", "g", None, None, "p", "L0", "Z", "e0", None, "policy", 1.0, ())
        calls = [NewCall(f"requests/0/{n}/1", "r", labels, AT, AT, AT, 5, 20) for n in range(CALLS)]
        batches = [calls[begin : begin + BATCH] for begin in range(0, CALLS, BATCH)]
        await storage.add_calls(batches[0])
        disk.fill()
        with pytest.raises(DatabaseUnavailableError, match="DiskFullError"):
            await add_all(storage, batches)
        assert "DiskFullError" in (storage.status.problem() or "")
        stored = await pool.fetchval(STORED)
        assert BATCH <= stored < CALLS
        assert stored % BATCH == 0  # a batch is stored whole or not at all
        disk.make_space()
        await add_all(storage, batches)  # Kafka delivers again what was not acknowledged
        assert storage.status.problem() is None
        assert await pool.fetchval(STORED) == CALLS
    finally:
        await pool.close()
