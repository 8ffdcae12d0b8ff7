"""Gateways as processes, with a key of their own."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from deploy.local.processes import Supervisor, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from services.gateway.keys import KeyStore
from shared.runtime.database import DatabaseStatus, open_pool
from shared.runtime.settings import DatabaseSettings, KafkaSettings


@dataclass
class GatewayProcess:
    """Gateways on the topics of one test.

    Attributes:
        names: of their processes.
        urls: of their HTTP interfaces.
    """

    supervisor: Supervisor
    kafka: KafkaSettings
    database: DatabaseSettings
    fleet: Path
    names: list[str]
    urls: list[str]

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
        settings = {"SPROUT_KAFKA_GROUP_PREFIX": self.kafka.group_prefix, **changes}
        name = f"{self.kafka.topic_prefix}gateway{len(self.names)}"
        spec = service_spec("gateway", port=port, environment=environment, settings=settings, name=name)
        self.supervisor.start(spec)
        self.names.append(name)
        self.urls.append(spec.url or "")
        return self.urls[-1]

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
