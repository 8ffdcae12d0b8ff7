"""A router as a process before a Triton server with the stand-in model; a file that needs another says so itself."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from router_support import Producer, RouterProcess, TritonServer, fleet_toml, producing, start_triton

from deploy.local.processes import Supervisor
from shared.settings import KafkaSettings


@pytest.fixture(scope="module")
def triton(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    server = start_triton(supervisor, tmp_path_factory.mktemp("triton"), name="router-triton")
    yield server
    supervisor.stop(server.name)


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
