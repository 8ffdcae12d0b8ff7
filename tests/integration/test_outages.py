"""Servers freeze and go away under all services, also while these start: `/ready` says so, and no process ends."""

import asyncio
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from deploy.local.processes import Supervisor
from shared.runtime.settings import KafkaSettings
from shared.topics import FOOTPRINTS, RESPONSES, SAMPLES, TopicSpec
from tests.conftest import KafkaServer, start_kafka, start_postgres
from tests.support.contract import EXAMPLES
from tests.support.deadlines import until
from tests.support.evaluator import judged_fleet
from tests.support.outages import frozen, kill, restart, until_ready
from tests.support.processes import start_service
from tests.support.router import page, producing, reading, request

pytestmark = pytest.mark.integration

STORING = ("ledger", "optimizer", "evaluator")
WITH_DATABASE = (*STORING, "gateway")
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
def start(supervisor, kafka, database, triton, tmp_path) -> Iterator[Callable[..., dict[str, str]]]:
    """Starts services without waiting for them; returns the names of their processes, and stops them at the end."""
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet(triton.address))
    settings = {
        "carbon_feed": {"SPROUT_CARBON_FEED_PROVIDERS": '{"GB": [{"kind": "constant", "intensity_g_per_kwh": 100}]}'},
        "router": {"SPROUT_ROUTER_SAMPLE_SHARE": "0"},
    }
    names: dict[str, str] = {}

    def start_all(*services: str) -> dict[str, str]:
        for one in services:
            names[one] = start_service(
                one, supervisor, kafka=kafka, database=database, fleet=fleet, settings=settings.get(one), wait=False
            )
        return names

    yield start_all
    for name in names.values():
        supervisor.stop(name)


async def test_outages_of_postgresql_and_kafka(start, supervisor, kafka):
    services = start("carbon_feed", "router", *STORING)
    pids = {name: supervisor.process(name).pid for name in services.values()}
    storing = [services[name] for name in STORING]
    await until_ready(supervisor, services.values())
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


async def test_services_that_start_before_kafka_and_postgresql_wait_for_them(start, supervisor):
    for server in ("kafka", "postgres"):
        supervisor.stop(server)
    services = start("carbon_feed", "router", *WITH_DATABASE)
    pids = {name: supervisor.process(name).pid for name in services.values()}
    await until_ready(supervisor, services.values(), "Kafka does not answer")
    for name in services.values():
        assert "alive" in await asyncio.to_thread(page, f"{supervisor.process(name).spec.url}/health")
    await restart(supervisor, "kafka")
    await until_ready(supervisor, [services[one] for one in WITH_DATABASE], "PostgreSQL is unavailable")
    await restart(supervisor, "postgres")
    await until_ready(supervisor, services.values())
    assert {name: supervisor.process(name).pid for name in services.values()} == pids


async def test_kafka_and_postgresql_go_away_while_services_start(start, supervisor, kafka, database):
    holding = await asyncpg.connect(database.url.get_secret_value())
    for schema in WITH_DATABASE:
        await holding.execute("SELECT pg_advisory_lock(hashtext($1))", f"sprout.migrate.{schema}")
    services = start("carbon_feed", "router", *WITH_DATABASE)
    pids = {name: supervisor.process(name).pid for name in services.values()}

    for name in ("carbon_feed", "router"):
        # One more than that of the check and that of the producer: the first topics are subscribed to.
        await until(lambda name=name: connections(pids[services[name]], kafka) > 2)
    with frozen(supervisor.process("kafka").pid):
        await until_ready(supervisor, services.values(), "Kafka does not answer")

    await until(lambda: holding.fetchval("SELECT count(*) = 4 FROM pg_locks WHERE NOT granted"))
    with frozen(supervisor.process("postgres").pid):
        await until_ready(supervisor, [services[one] for one in WITH_DATABASE], "PostgreSQL is unavailable")
    kill(supervisor, "postgres")
    await restart(supervisor, "postgres")

    logs = [supervisor.process(services[one]).log for one in WITH_DATABASE]
    await until(lambda: any("schema migrated" in log.read_text() for log in logs))
    supervisor.stop("kafka")
    await until_ready(supervisor, services.values(), "Kafka does not answer")
    await restart(supervisor, "kafka")
    await until_ready(supervisor, services.values())
    assert {name: supervisor.process(name).pid for name in services.values()} == pids


def connections(pid: int, kafka: KafkaSettings) -> int:
    """The connections of a process to Kafka."""
    port = urlsplit(f"//{kafka.bootstrap_servers}").port
    return sum(bool(one.raddr) and one.raddr.port == port for one in psutil.Process(pid).net_connections("tcp"))


async def test_model_servers_that_do_not_answer_while_services_start(start, supervisor, triton):
    with frozen(supervisor.process(triton.name).pid):
        services = start("router", "evaluator")
        pids = {name: supervisor.process(name).pid for name in services.values()}
        await until_ready(supervisor, [services["router"]], "endpoints")
    await until_ready(supervisor, services.values())
    assert {name: supervisor.process(name).pid for name in services.values()} == pids
