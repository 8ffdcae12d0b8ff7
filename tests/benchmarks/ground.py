"""Kafka, Triton with the stand-in model, and routers, for benchmarks that need them all."""

import asyncio
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.local.java import ensure_java
from deploy.local.kafka import install_kafka, kafka_spec
from deploy.local.paths import default_state_dir
from deploy.local.processes import Supervisor
from deploy.triton.models import stand_in_llm
from deploy.triton.stand_in.batching import BatchRules
from shared.kafka.admin import create_topics
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from tests.support.fleet import MODEL, Answers, fleet_toml, write_workload
from tests.support.processes import RouterProcess, start_triton

LEVELS = ("L0", "L1", "L2")


@dataclass(frozen=True, slots=True)
class Ground:
    """What runs.

    Attributes:
        servers: Kafka's address.
        triton: Triton's, gRPC.
        folder: for what a benchmark writes.
    """

    supervisor: Supervisor
    servers: str
    triton: str
    folder: Path

    def topics(self, name: str) -> KafkaSettings:
        """Topics and groups of a prefix of their own, created."""
        kafka = KafkaSettings(bootstrap_servers=self.servers, topic_prefix=f"{name}.", group_prefix=f"{name}.")
        asyncio.run(create_topics(kafka))
        return kafka

    def routers(self, kafka: KafkaSettings, *, clock: Clock) -> RouterProcess:
        """Routers before the model server, none started yet."""
        fleet = self.folder / f"{kafka.topic_prefix}toml"
        fleet.write_text(fleet_toml([self.triton]), encoding="utf-8")
        return RouterProcess(self.supervisor, kafka, fleet, clock, {"SPROUT_LOG_LEVEL": "WARNING"})


@contextmanager
def laid(*, workload: Mapping[str, Answers], clock: Clock, batch: BatchRules | None = None) -> Iterator[Ground]:
    """Start the servers; they are gone at the end.

    Args:
        workload: recorded answers by prompt and level.
        batch: how the model server's requests slow each other down.
    """
    installed = default_state_dir()
    # A producer that is told of a topic's leader a moment late says so at length, and tries again.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="sprout-bench-") as scratch:
        folder = Path(scratch)
        supervisor = Supervisor(folder / "logs")
        try:
            java = ensure_java(installed, print)
            spec, servers = kafka_spec(folder / "kafka", libs=install_kafka(installed, java=java, say=print), java=java)
            supervisor.start(spec)
            models = [stand_in_llm(write_workload(folder / "workload.jsonl", workload), model=MODEL, batch=batch)]
            triton = start_triton(supervisor, folder, models, name="triton", clock=clock)
            yield Ground(supervisor, servers, triton.address, folder)
        finally:
            supervisor.stop_all()


def prompt(number: int) -> str:
    """A prompt of the workload."""
    return f"Question {number}?"
