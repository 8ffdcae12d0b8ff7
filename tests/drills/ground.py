"""The ground of the drills: real Kafka and two real model servers, and an orchestrator that starts again what dies."""

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Final, Self, TypeVar

from deploy.local.interruption import uninterrupted
from deploy.local.java import Say, ensure_java
from deploy.local.kafka import install_kafka, kafka_spec
from deploy.local.paths import default_state_dir
from deploy.local.processes import ManagedProcess, ProcessSpec, Supervisor
from deploy.local.triton import TritonInstallation, install
from deploy.triton.models import stand_in_llm
from deploy.triton.stand_in.batching import BatchRules
from deploy.triton.stand_in.faults import FaultRules
from shared.runtime.settings import KafkaSettings
from tests.support.fleet import MODEL, write_workload
from tests.support.processes import Death, RouterProcess, revive, triton_spec

KAFKA: Final = "kafka"
PROMPTS: Final = 40
LEVELS: Final = {"L0": (12, 2.4), "L1": (6, 1.5), "L2": (3, 0.8)}
"""Tokens and seconds of the answers: long enough for hundreds to be in flight and for a backlog to last through several
faults, with few messages each."""
BATCH: Final = BatchRules(slots=1_000, slowdown=0.0)
"""The model servers must not be what limits the routers."""
WATCH_S: Final = 0.25

T = TypeVar("T")


def prompt(number: int) -> str:
    """A prompt whose answers are recorded."""
    return f"Question number {number % PROMPTS}?"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model server: its process's name and its gRPC address."""

    name: str
    address: str


class Ground:
    """What all scenarios stand on; an asynchronous context manager.

    Attributes:
        bootstrap_servers: of Kafka.
        endpoints: two model servers without faults of their own.
        deaths: processes that ended by themselves; each was started again.
    """

    def __init__(self, folder: Path, *, say: Say) -> None:
        """Set up; nothing runs yet.

        Args:
            folder: for logs and data; what is in it may be replaced.
        """
        self.folder = folder
        self.bootstrap_servers = ""
        self.endpoints: tuple[Endpoint, ...] = ()
        self.deaths: list[Death] = []
        self._say = say
        # Processes die with the thread that started them, so they all have one that stays.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drill-processes")
        self._supervisor = Supervisor(folder / "logs")
        self._triton: TritonInstallation | None = None
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()

    @property
    def logs(self) -> Path:
        """Where every process's output is."""
        return self.folder / "logs"

    async def start(self, *specs: ProcessSpec) -> None:
        """Start processes side by side, and wait until all are ready.

        Raises:
            ProcessFailedError: one ended, or was not ready in time.
        """
        processes = await self._do(lambda: [self._supervisor.spawn(spec) for spec in specs])
        await asyncio.gather(*(asyncio.to_thread(process.wait_ready) for process in processes))

    async def again(self, name: str) -> None:
        """Start a process again as it was, and wait until it is ready.

        Raises:
            ProcessFailedError: it ended, or was not ready in time.
        """
        process = await self._do(lambda: self._supervisor.respawn(name))
        await asyncio.to_thread(process.wait_ready)

    async def kill(self, name: str) -> None:
        """SIGKILL a process and its group."""
        await self._do(lambda: self._supervisor.kill(name))

    async def stop(self, *names: str) -> None:
        """Ask processes to end, side by side, and wait until they have."""

        def stop_all() -> None:
            for name in names:
                self._supervisor.process(name).ask_to_stop()
            for name in names:
                self._supervisor.stop(name)

        await self._do(stop_all)

    async def signal(self, name: str, number: Signals) -> None:
        """Send a signal to a process alone."""
        await self._do(lambda: self._supervisor.process(name).signal(number))

    async def running(self, names: Collection[str]) -> list[ManagedProcess]:
        """Those of these processes that run."""

        def find() -> list[ManagedProcess]:
            found = (self._supervisor.process(name) for name in self._supervisor.names if name in names)
            return [process for process in found if process.alive]

        return await self._do(find)

    def routers(self, kafka: KafkaSettings, fleet: Path, settings: dict[str, str]) -> RouterProcess:
        """Specs of a scenario's routers; to be started by `start`."""
        return RouterProcess(self._supervisor, kafka, fleet, settings=settings)

    async def model_server(self, name: str, faults: FaultRules | None = None) -> Endpoint:
        """Start a Triton server with the stand-in model."""
        if self._triton is None:
            raise RuntimeError("Triton is installed when the ground is entered")
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        workload = write_workload(folder / "workload.jsonl", {prompt(number): LEVELS for number in range(PROMPTS)})
        models = [stand_in_llm(workload, model=MODEL, batch=BATCH, faults=faults)]
        spec, address = triton_spec(self._triton, folder, models, name=name)
        await self.start(spec)
        return Endpoint(name, address)

    async def _start(self) -> None:
        installed = default_state_dir()
        java = await asyncio.to_thread(ensure_java, installed, self._say)
        libs = await asyncio.to_thread(install_kafka, installed, java=java, say=self._say)
        self._triton = await asyncio.to_thread(install, installed, say=self._say)
        self._say("starting Kafka and two Triton servers with the stand-in model")
        spec, self.bootstrap_servers = await asyncio.to_thread(
            kafka_spec, self.folder / "kafka", libs=libs, java=java, name=KAFKA
        )
        await self.start(spec)
        self.endpoints = (await self.model_server("triton-0"), await self.model_server("triton-1"))
        self._watching = asyncio.create_task(self._watch())

    async def _leave(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._supervisor.abort()
        try:
            with uninterrupted():
                await self._do(self._supervisor.stop_all)
        finally:
            self._thread.shutdown()

    async def _do(self, action: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, action)

    async def _watch(self) -> None:
        """As an orchestrator would: what ends by itself is noted and started again."""
        while True:
            await asyncio.sleep(WATCH_S)
            for death in await self._do(lambda: revive(self._supervisor, self._supervisor.names)):
                self.deaths.append(death)
                self._say(f"!! {death.said.splitlines()[0]} Started again.")
