"""PostgreSQL and Kafka freeze and restart under all services: `/ready` says so, no process ends, and work continues."""

import asyncio
import os
import signal
import urllib.error
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from deploy.local.processes import Supervisor
from shared.runtime.settings import KafkaSettings
from shared.topics import FOOTPRINTS, RESPONSES, SAMPLES, TopicSpec
from tests.conftest import KafkaServer, start_kafka, start_postgres
from tests.support.contract import EXAMPLES
from tests.support.deadlines import DEADLINE_S, until
from tests.support.evaluator import judged_fleet
from tests.support.processes import start_service
from tests.support.router import page, producing, reading, request

pytestmark = pytest.mark.integration

NOTICED_S = 30.0
"""The services notice an outage within 10 s; a busy test machine may stand still for as long again."""

STORING = ("ledger", "optimizer", "evaluator")
GROUPS = (("ledger.responses", RESPONSES), ("optimizer", FOOTPRINTS), ("evaluator", SAMPLES))


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """Servers of this module: those of the session serve other tests, and have topics that make a restart long."""
    with Supervisor(tmp_path_factory.mktemp("server-logs")) as running:
        yield running


@pytest.fixture(scope="module")
def kafka_server(supervisor, tmp_path_factory) -> KafkaServer:
    return start_kafka(supervisor, tmp_path_factory.mktemp("kafka"))


@pytest.fixture(scope="module")
def postgres_server(supervisor, tmp_path_factory) -> str:
    return start_postgres(supervisor, tmp_path_factory.mktemp("postgres"))


@pytest.fixture
def services(supervisor, kafka, database, triton, tmp_path) -> Iterator[dict[str, str]]:
    """The name of the process of every service."""
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet(triton.address))
    settings = {
        "carbon_feed": {"SPROUT_CARBON_FEED_PROVIDERS": '{"GB": [{"kind": "constant", "intensity_g_per_kwh": 100}]}'},
        "router": {"SPROUT_ROUTER_SAMPLE_SHARE": "0"},
    }
    names = {
        name: start_service(
            name, supervisor, kafka=kafka, database=database, fleet=fleet, settings=settings.get(name), wait=False
        )
        for name in ("carbon_feed", "router", *STORING)
    }
    for name in names.values():
        supervisor.process(name).wait_ready()
    yield names
    for name in names.values():
        supervisor.stop(name)


async def test_outages_of_postgresql_and_kafka(services, supervisor, kafka):
    pids = {name: supervisor.process(name).pid for name in services.values()}
    storing = [services[name] for name in STORING]
    async with producing(kafka) as producer:
        with frozen(supervisor.process("postgres").pid):
            await until_ready(supervisor, storing, "PostgreSQL")
        await until_ready(supervisor, services.values())
        await restart(supervisor, "postgres")
        await until_ready(supervisor, services.values())
        with frozen(supervisor.process("kafka").pid):
            await until_ready(supervisor, services.values(), "Kafka does not answer")
        await until_ready(supervisor, services.values())
        await restart(supervisor, "kafka")
        await until_ready(supervisor, services.values())
        assert {name: supervisor.process(name).pid for name in services.values()} == pids
        supervisor.check()

        await producer.ask(request(1))
        async with reading(kafka) as answers:
            await answers.ids(["r1"])
        for spec in (FOOTPRINTS, SAMPLES):
            await producer.post(spec, EXAMPLES[spec.name], "key")
    for group, spec in GROUPS:
        await until(lambda group=group, spec=spec: consumed(kafka, group, spec))


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop a process and its children, which may be in sessions of their own."""
    tree = [pid, *descendants(pid)]
    for one in tree:
        os.kill(one, signal.SIGSTOP)
    try:
        yield
    finally:
        for one in tree:
            os.kill(one, signal.SIGCONT)


def descendants(pid: int) -> list[int]:
    children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *descendants(child))]


async def restart(supervisor: Supervisor, name: str) -> None:
    await asyncio.to_thread(supervisor.respawn(name).wait_ready)


async def until_ready(supervisor: Supervisor, names: Collection[str], problem: str | None = None) -> None:
    """Wait until every service is ready, or until every one reports a problem."""
    async with asyncio.timeout(DEADLINE_S if problem is None else NOTICED_S):
        for name in names:
            await until(
                lambda name=name: asyncio.to_thread(readiness, supervisor, name),
                lambda found: (problem or '"ready"') in found,
            )


def readiness(supervisor: Supervisor, name: str) -> str:
    try:
        return page(f"{supervisor.process(name).spec.url}/ready")
    except urllib.error.HTTPError as error:
        return error.read().decode()


async def consumed(kafka: KafkaSettings, group: str, spec: TopicSpec) -> bool:
    """Whether a group has committed a record of a topic."""
    admin = AIOKafkaAdminClient(**kafka.client_options())
    await admin.start()
    try:
        partitions = [TopicPartition(kafka.topic(spec), number) for number in range(spec.partitions)]
        stored = await admin.list_consumer_group_offsets(kafka.group(group), partitions=partitions)
    finally:
        await admin.close()
    return any(one.offset > 0 for one in stored.values())


async def test_outages_under_a_gateway(supervisor, kafka, database, tmp_path):
    """An idle one, which learns of an outage by no request."""
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet("127.0.0.1:9"))
    name = start_service("gateway", supervisor, kafka=kafka, database=database, fleet=fleet)
    pid = supervisor.process(name).pid
    try:
        for server, problem in (("postgres", "PostgreSQL"), ("kafka", "Kafka does not answer")):
            with frozen(supervisor.process(server).pid):
                await until_ready(supervisor, [name], problem)
            await until_ready(supervisor, [name])
            await restart(supervisor, server)
            await until_ready(supervisor, [name])
        assert supervisor.process(name).pid == pid
        supervisor.check()
        assert 'sprout_database_connections{state="max"}' in page(f"{supervisor.process(name).spec.url}/metrics")
    finally:
        supervisor.stop(name)
