"""The in-memory broker that ships in `confluent-kafka`: for a machine where Kafka cannot run.

`python -m deploy.local.mock_broker --address-file FILE --topics a,b,c` starts librdkafka's mock cluster
(`test.mock.num.brokers`), creates the topics, writes its address into FILE, and serves until it is stopped. It speaks
Kafka's protocol well enough for producers (idempotent ones too), consumer groups and committed offsets. It is not
Kafka: everything is in memory and lost at the end, each partition keeps about its last 5 MB, every topic has the same
four partitions whatever was declared, nothing is compacted or expires, and administration requests are unknown to it.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException, Producer

from deploy.local.processes import Probe, ProcessSpec

METADATA_TIMEOUT_S = 10.0


class MockBrokerError(RuntimeError):
    """The in-memory broker did not come up."""


def mock_broker_spec(
    data_dir: Path, *, topics: Sequence[str], name: str = "in-memory-broker"
) -> tuple[ProcessSpec, Path]:
    """How to run the broker in a process of its own.

    Returns:
        The process, and the file that holds `host:port` once the process is ready.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    address_file = data_dir / "address"
    address_file.unlink(missing_ok=True)
    spec = ProcessSpec(
        name=name,
        command=(
            sys.executable, "-m", "deploy.local.mock_broker",
            "--address-file", str(address_file), "--topics", ",".join(topics),
        ),
        ready=_written(address_file),
        ready_timeout_s=30.0,
    )  # fmt: skip
    return spec, address_file


def start_mock_cluster(topics: Sequence[str]) -> tuple[Producer, str]:
    """Start the broker inside this process; it lives as long as the producer that is returned.

    Raises:
        MockBrokerError: it does not answer, or a topic could not be created.
    """
    # The bootstrap address is replaced by the mock cluster's own, but must be given.
    owner = Producer(
        {"bootstrap.servers": "127.0.0.1:1", "test.mock.num.brokers": 1, "allow.auto.create.topics": True},
        logger=logging.getLogger(__name__),
    )
    try:
        brokers = owner.list_topics(timeout=METADATA_TIMEOUT_S).brokers
        for topic in topics:
            # Asking about a topic creates it.
            error = owner.list_topics(topic, timeout=METADATA_TIMEOUT_S).topics[topic].error
            if error is not None and error.code() != KafkaError.NO_ERROR:
                raise MockBrokerError(f"the in-memory broker did not create topic {topic}: {error.str()}")
    except KafkaException as error:
        raise MockBrokerError(f"the in-memory broker does not answer: {error}") from error
    broker = next(iter(brokers.values()))
    return owner, f"{broker.host}:{broker.port}"


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local.mock_broker", description=__doc__)
    parser.add_argument("--address-file", type=Path, required=True, help="Where to write host:port")
    parser.add_argument("--topics", default="", help="Topics to create, separated by commas")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    # Blocked first, so that a signal during the start is not lost either.
    stopping = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    owner, address = start_mock_cluster([topic for topic in arguments.topics.split(",") if topic])
    finished = arguments.address_file.with_suffix(".partial")
    finished.write_text(address, encoding="utf-8")
    finished.rename(arguments.address_file)
    signal.sigwait(stopping)
    del owner


def _written(address_file: Path) -> Probe:
    return lambda: None if address_file.exists() else "it has not written its address yet"


if __name__ == "__main__":
    main()
