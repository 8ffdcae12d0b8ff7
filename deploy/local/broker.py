"""Which broker a local stack gets: real Kafka wherever it can run, the in-memory one otherwise, said plainly."""

from dataclasses import dataclass
from pathlib import Path

from deploy.local.config import BROKER_VARIABLE, BrokerChoice
from deploy.local.java import Java, NoJavaError, Say, ensure_java
from deploy.local.kafka import KafkaInstallationError, install_kafka
from deploy.local.state import BrokerKind


@dataclass(frozen=True, slots=True)
class InstalledBroker:
    """The broker that will be started; for Kafka with what it runs on."""

    kind: BrokerKind
    java: Java | None = None
    libs: Path | None = None


def install_broker(choice: BrokerChoice, install_dir: Path, *, say: Say) -> InstalledBroker:
    """Install Kafka where it is chosen or possible.

    Raises:
        NoJavaError, KafkaInstallationError: Kafka was asked for by name and cannot be had.
    """
    if choice == "in-memory":
        say(f"broker: in-memory, as {BROKER_VARIABLE} says; it is not Kafka, and keeps nothing")
        return InstalledBroker("in-memory")
    try:
        java = ensure_java(install_dir, say)
        libs = install_kafka(install_dir, java=java, say=say)
    except (NoJavaError, KafkaInstallationError) as error:
        if choice == "kafka":
            raise
        say(f"NO KAFKA: {error}")
        say("Going on with the in-memory broker of confluent-kafka: it is not Kafka, and keeps nothing.")
        return InstalledBroker("in-memory")
    return InstalledBroker("kafka", java, libs)
