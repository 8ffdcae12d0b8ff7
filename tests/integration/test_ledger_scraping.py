"""The ledger reads energy counters over TLS, from a real HTTPS server into a real PostgreSQL."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from pydantic import HttpUrl

from services.ledger.meters import Scraper, scrapers_of
from services.ledger.metrics import LedgerMetrics
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Storage
from shared.fleet import Directive, Fleet, FleetError, Model
from shared.pools import Endpoint, Pool
from shared.runtime.clock import Clock, ManualClock
from shared.runtime.database import migrate, open_pool
from tests.support.certificate import Authority, Certificate
from tests.support.deadlines import REPLY_S

pytestmark = pytest.mark.integration

NAME = "meters.example"
METERS = b'# TYPE nv_energy_consumption counter\nnv_energy_consumption{gpu_uuid="GPU-1"} 42.5\n'


@pytest.fixture
async def storage(database) -> AsyncIterator[Storage]:
    """An empty ledger."""
    pool = await open_pool(database, schema="ledger")
    await migrate(pool, schema="ledger", package="services.ledger.migrations")
    found = Storage()
    found.attach(pool)
    yield found
    await pool.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def ours(authority: Authority) -> Certificate:
    return authority.issue("ledger")


@pytest.fixture
async def port(authority: Authority) -> AsyncIterator[int]:
    """The port of a server whose certificate names another host, and that requires a client certificate."""
    theirs = authority.issue("meters", alternative=f"DNS:{NAME}")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.certificate)
    context.load_cert_chain(theirs.certificate, theirs.key)
    context.verify_mode = ssl.CERT_REQUIRED

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {len(METERS)}\r\n\r\n"
        writer.write(head.encode() + METERS)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()


def scraper(storage: Storage, port: int, *, clock: Clock | None = None, **security: Any) -> Scraper:
    endpoint = Endpoint(name="gpu-0", grpc="127.0.0.1:8001", metrics=HttpUrl(f"https://127.0.0.1:{port}/metrics"))
    fleet = Fleet(
        directives=(Directive(level="L0"),),
        models=(Model(name="m", chat_template="llama-2"),),
        pools=(Pool(name="p", model="m", zone="GB", endpoints=(endpoint,), **security),),
    )
    settings = LedgerSettings(scrape_interval_s=1.0, scrape_timeout_s=REPLY_S)
    (one,) = scrapers_of(
        fleet, settings=settings, storage=storage, clock=clock or Clock(), metrics=LedgerMetrics(CollectorRegistry())
    )
    return one


async def read_once(one: Scraper) -> str | None:
    async with one.client() as client:
        await one.run_once(client)
    return one.problem()


async def test_meters_are_read_over_mutual_tls(storage, port, authority, ours):
    one = scraper(
        storage, port, tls_ca_file=authority.certificate, tls_cert_file=ours.certificate, tls_key_file=ours.key,
        tls_server_name=NAME,
    )  # fmt: skip
    assert await read_once(one) is None
    assert await storage.pool.fetchval("SELECT energy_j FROM readings WHERE endpoint = 'gpu-0'") == 42.5


async def test_a_clock_that_was_set_back_leaves_the_readings_in_order(storage, port, authority, ours):
    clock = ManualClock(datetime(2026, 3, 1, 12, tzinfo=UTC))
    one = scraper(
        storage, port, clock=clock, tls_ca_file=authority.certificate, tls_cert_file=ours.certificate,
        tls_key_file=ours.key, tls_server_name=NAME,
    )  # fmt: skip
    assert await read_once(one) is None
    clock.advance(timedelta(minutes=-10))
    problem = await read_once(one)
    assert problem is not None
    assert "a clock was set back: the last reading is of 2026-03-01T12:00:00+00:00" in problem
    assert await storage.pool.fetchval("SELECT count(*) FROM readings") == 1
    clock.advance(timedelta(minutes=10, seconds=2))
    assert await read_once(one) is None
    assert await storage.pool.fetchval("SELECT count(*) FROM readings") == 2


async def test_an_untrusted_server_is_not_read(storage, port, authority, ours):
    certificate = {"tls_cert_file": ours.certificate, "tls_key_file": ours.key}
    for security in ({"tls_server_name": NAME}, {"tls_ca_file": authority.certificate}):
        problem = await read_once(scraper(storage, port, **certificate, **security))
        assert problem is not None
        assert "endpoint gpu-0 is unmetered" in problem
        assert "CERTIFICATE_VERIFY_FAILED" in problem
    assert await storage.pool.fetchval("SELECT count(*) FROM readings") == 0


def test_an_unusable_file_is_named(tmp_path):
    with pytest.raises(FleetError, match=r"endpoint 'gpu-0': tls_ca_file .*nowhere\.pem cannot be used"):
        scraper(Storage(), 1, tls_ca_file=tmp_path / "nowhere.pem")
