"""Gateways as processes, with a key of their own, and the gateway that the test modules share."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from deploy.local.postgres import create_database
from deploy.local.processes import Supervisor, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from services.gateway.keys import KeyStore
from shared.kafka.admin import create_topics
from shared.runtime.database import DatabaseStatus, open_pool
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import REPLIES, TOPICS
from tests.support.router import RouterProcess, fleet_toml, producing, restarted_triton

PATIENT = {
    # A busy machine stands still for seconds, and a client would get 503, or headers that say nothing.
    "SPROUT_GATEWAY_ADMISSION_TIMEOUT_S": "30",
    "SPROUT_GATEWAY_PUBLISH_TIMEOUT_S": "30",
    "SPROUT_GATEWAY_FIRST_REPLY_WAIT_S": "30",
}
"""Settings of every gateway."""


@dataclass
class GatewayProcess:
    """Gateways on the topics of one test, with routers whose policy draws L1.

    Attributes:
        names: of their processes.
        urls: of their HTTP interfaces.
        routers: those of `prepare_gateways`.
    """

    supervisor: Supervisor
    kafka: KafkaSettings
    database: DatabaseSettings
    fleet: Path
    names: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    routers: RouterProcess | None = None

    def start(self, **changes: str) -> str:
        """Start a gateway, and wait until it is ready; returns its URL."""
        (port,) = free_ports(1)
        environment = ServiceEnvironment(
            bootstrap_servers=self.kafka.bootstrap_servers,
            topic_prefix=self.kafka.topic_prefix,
            database_url=self.database.url.get_secret_value(),
            fleet_file=self.fleet,
            clock={},
        )
        settings = {"SPROUT_KAFKA_GROUP_PREFIX": self.kafka.group_prefix, **PATIENT, **changes}
        name = f"{self.kafka.topic_prefix}gateway{len(self.names)}"
        spec = service_spec("gateway", port=port, environment=environment, settings=settings, name=name)
        self.supervisor.start(spec)
        self.names.append(name)
        self.urls.append(spec.url or "")
        return self.urls[-1]

    def stop(self, url: str) -> None:
        """Stop the gateway with this URL."""
        self.supervisor.stop(self.names[self.urls.index(url)])

    def stop_all(self) -> None:
        """Stop all gateways and routers of these topics."""
        for name in reversed(self.supervisor.names):
            if name.startswith(self.kafka.topic_prefix):
                self.supervisor.stop(name)

    async def create_key(self, *, tenant: str | None = None) -> str:
        """A new key, once a gateway has made the tables."""
        pool = await open_pool(self.database, schema="gateway")
        try:
            store = KeyStore(pool, DatabaseStatus(), cache_s=0.0)
            return (await store.create(name="test", tenant=tenant, now=datetime.now(UTC)))[1]
        finally:
            await pool.close()

    def log(self, number: int = 0) -> str:
        """The log of a gateway."""
        return self.supervisor.process(self.names[number]).log.read_text()


async def prepare_gateways(
    supervisor: Supervisor,
    *,
    bootstrap_servers: str,
    database_url: str,
    triton: str,
    folder: Path,
    prefix: str,
    reply_partitions: int = REPLIES.partitions,
    router: dict[str, Any] | None = None,
) -> GatewayProcess:
    """Topics, a database and a router; no gateway yet.

    Args:
        triton: address of its gRPC interface.
        prefix: of topics and groups.
        router: settings of the routers.
    """
    kafka = KafkaSettings(bootstrap_servers=bootstrap_servers, topic_prefix=prefix, group_prefix=prefix)
    fleet = folder / f"{prefix}toml"
    fleet.write_text(fleet_toml([triton]))
    specs = tuple(replace(one, partitions=reply_partitions) if one is REPLIES else one for one in TOPICS)
    await create_topics(kafka, specs=specs)
    await create_database(database_url)
    async with producing(kafka) as producer:
        await producer.prepare({"L1": 1.0}, valid_s=86_400.0)
    routers = RouterProcess(supervisor, kafka, fleet)
    routers.settings |= router or {}
    return GatewayProcess(supervisor, kafka, DatabaseSettings(url=SecretStr(database_url)), fleet, routers=routers)


@pytest.fixture(scope="session")
def gateways(
    supervisor: Supervisor, kafka_server: Any, postgres_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """A gateway and a router, for all test modules."""
    folder = tmp_path_factory.mktemp("gateway")
    with restarted_triton(supervisor, folder, name="gateway-triton") as triton:
        made = asyncio.run(
            prepare_gateways(
                supervisor,
                bootstrap_servers=kafka_server.bootstrap_servers,
                database_url=postgres_server + "gateway",
                triton=triton.address,
                folder=folder,
                prefix="gateway.",
            )
        )
        assert made.routers is not None
        made.routers.start()
        made.start()
        yield made
