"""Fixtures of the router's tests: a Triton server with the stand-in model, router processes, a producer."""

import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.local.processes import Supervisor
from shared.runtime.settings import KafkaSettings
from tests.support.processes import restart_exited
from tests.support.router import Producer, RouterProcess, TritonServer, fleet_toml, producing, start_triton


@pytest.fixture(scope="module")
def triton(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A model server, restarted after a crash: the cancelled streams of a killed router can crash Triton."""
    folder = tmp_path_factory.mktemp("triton")
    leaving = threading.Event()
    # Processes end with the thread that started them, so one thread starts them all.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="triton") as thread:
        server = thread.submit(start_triton, supervisor, folder, name="router-triton").result()

        def restart_until_leaving() -> None:
            while not leaving.wait(0.25):
                restart_exited(supervisor, [server.name])

        restarting = thread.submit(restart_until_leaving)
        try:
            yield server
        finally:
            leaving.set()
            restarting.result()
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
