"""A Kafka that lets every principal do only what `sprout topics acls` grants."""

from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

import pytest
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.admin import CreateAclsRequest
from pydantic import SecretStr

from deploy.local.config import default_state_dir
from deploy.local.java import KafkaInstallationError
from deploy.local.kafka import Listener, install_kafka, kafka_spec
from deploy.local.processes import Supervisor, free_ports
from shared.access import ACCESS, acl_arguments
from shared.kafka.admin import create_topics
from shared.runtime.settings import KafkaSettings

PASSWORD = "of-all"

# Kafka's numbers of resource types, operations, and of the pattern type and permission that are used here.
RESOURCES = {"--topic": 2, "--group": 3, "--transactional-id": 5}
OPERATIONS = {"Read": 3, "Write": 4, "Describe": 8}
LITERAL = ALLOW = 3


@dataclass(frozen=True)
class GuardedKafka:
    """A broker; its plaintext listener lets everybody do everything.

    Attributes:
        operator: settings of who may do everything.
        guarded: bootstrap servers at which users have the rights of their principals.
    """

    operator: KafkaSettings
    guarded: str

    def user(self, principal: str) -> KafkaSettings:
        """The settings of a principal of `shared.access.ACCESS`."""
        return KafkaSettings(
            bootstrap_servers=self.guarded,
            topic_prefix=self.operator.topic_prefix,
            group_prefix=self.operator.group_prefix,
            security_protocol="SASL_PLAINTEXT",
            sasl_mechanism="PLAIN",
            sasl_username=principal,
            sasl_password=SecretStr(PASSWORD),
        )

    async def prepare(self) -> None:
        """Create the topics, and grant the rights."""
        await create_topics(self.operator)
        client = AIOKafkaClient(bootstrap_servers=self.operator.bootstrap_servers)
        await client.bootstrap()
        try:
            principals = {name: f"User:{name}" for name, access in ACCESS.items() if not access.creates}
            for _, principal, *operations, resource, name in acl_arguments(self.operator, principals):
                for operation in operations[1::2]:
                    request = CreateAclsRequest(
                        RESOURCES[resource], name, LITERAL, principal, "*", OPERATIONS[operation], ALLOW
                    )
                    answer = await client.send(client.get_random_node(), request)
                    assert not any(code for code, _ in answer.creation_responses), answer
        finally:
            await client.close()


@pytest.fixture(scope="module")
def guarded_kafka(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedKafka]:
    """The broker of a test module; without topics and rights before `prepare`."""
    try:
        installation = install_kafka(default_state_dir(), say=print)
    except KafkaInstallationError as error:
        pytest.skip(f"no real Kafka: {error}")
    users = " ".join(f'user_{name}="{PASSWORD}"' for name in ACCESS)
    module = f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};"
    (port,) = free_ports(1)
    listener = Listener(
        name="GUARDED",
        protocol="SASL_PLAINTEXT",
        port=port,
        properties={"sasl.enabled.mechanisms": "PLAIN", "plain.sasl.jaas.config": module},
    )
    spec, bootstrap = kafka_spec(
        tmp_path_factory.mktemp("kafka"),
        installation,
        name="guarded-kafka",
        listeners=[listener],
        further={
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
        },
    )
    supervisor.start(spec)
    prefix = f"t{uuid4().hex[:10]}."
    yield GuardedKafka(
        KafkaSettings(bootstrap_servers=bootstrap, topic_prefix=prefix, group_prefix=prefix), listener.address
    )
    supervisor.stop(spec.name)
