"""Real Kafka and real PostgreSQL for the tests that ask for them, one of each per session.

`kafka` gives a test its own topics and consumer groups (a unique prefix), `database` a database of its own. What has
to be installed once lies in `.sprout/` of the checkout, shared with `sprout up`.
"""

from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from pydantic import SecretStr

from deploy.local.java import NoJavaError, ensure_java
from deploy.local.kafka import KafkaInstallationError, install_kafka, kafka_spec
from deploy.local.logtail import tail
from deploy.local.paths import default_state_dir
from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import Supervisor
from shared.kafka.admin import create_topics
from shared.runtime.settings import DatabaseSettings, KafkaSettings


@dataclass(frozen=True, slots=True)
class KafkaServer:
    """The session's broker."""

    bootstrap_servers: str
    supervisor: Supervisor
    """Has the process `kafka`, for tests that stop it."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows what the servers said last: their logs lie in a folder that is gone when somebody asks."""
    report = yield
    running = getattr(item, "funcargs", {}).get("supervisor")
    if report.failed and isinstance(running, Supervisor):
        report.sections += [(f"log of {name}", tail(running.process(name).log)) for name in running.names]
    return report


@pytest.fixture(scope="session")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """Runs the session's servers, and stops them at its end; they also die with this process."""
    running = Supervisor(tmp_path_factory.mktemp("server-logs"))
    try:
        yield running
    finally:
        running.stop_all()


@pytest.fixture(scope="session")
def kafka_server(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> KafkaServer:
    """One Kafka broker for the session; skipped, with the reason, where it cannot be installed."""
    installed = default_state_dir()
    try:
        java = ensure_java(installed, print)
        libs = install_kafka(installed, java=java, say=print)
    except (NoJavaError, KafkaInstallationError) as error:
        pytest.skip(f"no real Kafka: {error}")
    spec, bootstrap_servers = kafka_spec(tmp_path_factory.mktemp("kafka"), libs=libs, java=java)
    supervisor.start(spec)
    return KafkaServer(bootstrap_servers, supervisor)


@pytest.fixture(scope="session")
def postgres_server(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One PostgreSQL cluster for the session; its URL without a database's name, ending in `/`."""
    spec, url = postgres_spec(tmp_path_factory.mktemp("postgres"))
    supervisor.start(spec)
    return url.rpartition("/")[0] + "/"


@pytest.fixture
def kafka_settings(kafka_server: KafkaServer) -> KafkaSettings:
    """The session's broker with a prefix of the test's own; no topics yet."""
    prefix = f"t{uuid4().hex[:10]}."
    return KafkaSettings(
        bootstrap_servers=kafka_server.bootstrap_servers,
        topic_prefix=prefix,
        group_prefix=prefix,
        connect_timeout_s=30.0,
    )


@pytest.fixture
async def kafka(kafka_settings: KafkaSettings) -> KafkaSettings:
    """The session's broker with every declared topic, under a prefix of the test's own."""
    await create_topics(kafka_settings)
    return kafka_settings


@pytest.fixture
async def database(postgres_server: str) -> AsyncIterator[DatabaseSettings]:
    """A fresh, empty database; dropped after the test."""
    name = f"t{uuid4().hex[:12]}"
    await create_database(postgres_server + name)
    yield DatabaseSettings(url=SecretStr(postgres_server + name), pool_size=4)
    connection = await asyncpg.connect(f"{postgres_server}postgres")
    try:
        await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def measured_data() -> Path:
    """The folder of measured data beside the checkout; skipped, visibly, where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: it holds measured data that the project does not ship")
    return folder
