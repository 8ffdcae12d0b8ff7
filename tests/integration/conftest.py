"""Fixtures of the router's tests: a Triton server with the stand-in model, router processes, a producer."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy.local.processes import Supervisor
from shared.runtime.settings import KafkaSettings
from tests.support.gateway import gateways
from tests.support.router import Producer, RouterProcess, TritonServer, fleet_toml, producing, restarted_triton

__all__ = ["gateways"]  # a fixture


@pytest.fixture(scope="module")
def triton(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A model server, restarted after a crash: the cancelled streams of a killed router can crash Triton."""
    with restarted_triton(supervisor, tmp_path_factory.mktemp("triton"), name="router-triton") as server:
        yield server


@pytest.fixture
def routers(
    supervisor: Supervisor, kafka: KafkaSettings, triton: TritonServer, tmp_path: Path
) -> Iterator[RouterProcess]:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(fleet_toml([triton.address]))
    running = RouterProcess(supervisor, kafka, fleet)
    yield running
    for name in [name for name in supervisor.names if name.startswith(kafka.topic_prefix)]:
        supervisor.stop(name)


@pytest.fixture
async def producer(kafka: KafkaSettings) -> AsyncIterator[Producer]:
    async with producing(kafka) as made:
        yield made
