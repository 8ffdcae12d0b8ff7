"""Fixtures with real Kafka and PostgreSQL, one server of each per session.

`kafka` gives every test its own topics and consumer groups (by a unique prefix), `database` its own database. Kafka and
Triton are installed once in `.sprout/` of the checkout, as for `sprout up`.
"""

import os
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import asyncpg
import hypothesis
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from pydantic import SecretStr

from deploy.local.config import default_state_dir
from deploy.local.java import KafkaInstallationError
from deploy.local.kafka import install_kafka, kafka_spec
from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import Supervisor, tail
from shared.kafka.admin import create_topics
from shared.runtime.settings import DatabaseSettings, KafkaSettings

# A terminal wide enough for every table: the commands wrap their output to it.
os.environ["COLUMNS"] = "200"

INSPECT_AT_START = "SPROUT_KAFKA_INSPECT_AT_START"
os.environ.setdefault(INSPECT_AT_START, "false")
"""Services of tests start without it; the tests of hostile records set it (fixture `inspecting`)."""


# No example is late because the machine is busy. `make test-unit` tries a quarter of the examples.
hypothesis.settings.register_profile("thorough", hypothesis.settings.default, deadline=None)
hypothesis.settings.register_profile("quick", hypothesis.settings.default, deadline=None, max_examples=25)
hypothesis.settings.load_profile("thorough")


@dataclass(frozen=True, slots=True)
class KafkaServer:
    """The session's Kafka."""

    bootstrap_servers: str
    supervisor: Supervisor
    """For tests that stop the process `kafka`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the fixture `measured_data`; `make test-unit` leaves them out."""
    for item in items:
        if "measured_data" in getattr(item, "fixturenames", ()):
            item.add_marker("measured_data")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the end of the servers' logs to a failure, because the log folder is temporary."""
    report = yield
    running = getattr(item, "funcargs", {}).get("supervisor")
    if report.failed and isinstance(running, Supervisor):
        report.sections += [(f"log of {name}", tail(running.process(name).log)) for name in running.names]
    return report


@pytest.fixture(scope="session")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """Runs the session's servers and stops them at its end; they also end with this process."""
    with Supervisor(tmp_path_factory.mktemp("server-logs")) as running:
        yield running


@pytest.fixture(scope="session")
def kafka_server(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> KafkaServer:
    """One Kafka broker for the session; tests are skipped, with the reason, if it cannot be installed."""
    return start_kafka(supervisor, tmp_path_factory.mktemp("kafka"))


def start_kafka(supervisor: Supervisor, folder: Path) -> KafkaServer:
    """Start a broker as process `kafka`; skips the test, with the reason, if it cannot be installed."""
    try:
        installation = install_kafka(default_state_dir(), say=print)
    except KafkaInstallationError as error:
        pytest.skip(f"no real Kafka: {error}")
    spec, bootstrap_servers = kafka_spec(folder, installation)
    supervisor.start(spec)
    return KafkaServer(bootstrap_servers, supervisor)


@pytest.fixture(scope="session")
def postgres_server(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One PostgreSQL cluster for the session; its URL without a database name, ending in `/`."""
    return start_postgres(supervisor, tmp_path_factory.mktemp("postgres"))


def start_postgres(supervisor: Supervisor, folder: Path) -> str:
    """Start a cluster as process `postgres`; returns its URL without a database name, ending in `/`."""
    spec, url = postgres_spec(folder)
    supervisor.start(spec)
    return url.rpartition("/")[0] + "/"


@pytest.fixture
def kafka_settings(kafka_server: KafkaServer) -> KafkaSettings:
    """The session's Kafka with a prefix for this test; no topics yet."""
    prefix = f"t{uuid4().hex[:10]}."
    return KafkaSettings(
        bootstrap_servers=kafka_server.bootstrap_servers,
        topic_prefix=prefix,
        group_prefix=prefix,
        connect_timeout_s=30.0,
    )


@pytest.fixture
async def kafka(kafka_settings: KafkaSettings) -> AsyncIterator[KafkaSettings]:
    """The session's Kafka with every declared topic, with a prefix for this test; deleted after it.

    A hundred partitions of each test would make the broker slow for the later ones.
    """
    await create_topics(kafka_settings)
    yield kafka_settings
    admin = AIOKafkaAdminClient(**kafka_settings.client_options())
    await admin.start()
    try:
        names = [name for name in await admin.list_topics() if name.startswith(kafka_settings.topic_prefix)]
        await admin.delete_topics(names)
    finally:
        await admin.close()


@pytest.fixture
async def database(postgres_server: str) -> AsyncIterator[DatabaseSettings]:
    """An empty database; dropped after the test."""
    name = f"t{uuid4().hex[:12]}"
    await create_database(postgres_server + name)
    yield DatabaseSettings(url=SecretStr(postgres_server + name), pool_size=4)
    connection = await asyncpg.connect(f"{postgres_server}postgres")
    try:
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await connection.close()


@pytest.fixture
def inspecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services look for records that take too much memory before they start, as they do by default."""
    monkeypatch.setenv(INSPECT_AT_START, "true")


@pytest.fixture(scope="session")
def measured_data() -> Path:
    """The folder of measured data next to the checkout; tests are skipped, with the reason, if it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; it has measured data that the project does not ship")
    return folder
