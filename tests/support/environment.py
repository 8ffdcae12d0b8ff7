"""Kafka, Triton servers with the stand-in model, and routers, for fault drills and benchmarks."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Final, Self, TypeVar

import psutil

from deploy.local.config import default_state_dir
from deploy.local.java import Say
from deploy.local.kafka import install_kafka, kafka_spec
from deploy.local.processes import ManagedProcess, ProcessSpec, Supervisor
from deploy.local.signals import uninterrupted
from deploy.local.triton import TritonInstallation, install
from deploy.triton.models import stand_in_judge, stand_in_llm
from deploy.triton.stand_in.batching import BatchRules, RecordedRules
from deploy.triton.stand_in.faults import FaultRules
from shared.kafka.admin import create_topics
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from tests.support.fleets import MODEL, Answers, fleet_toml, write_workload
from tests.support.processes import (
    ProcessExit,
    RouterProcess,
    TritonServer,
    leader,
    restart_exited,
    triton_server,
    triton_spec,
)

KAFKA: Final = "kafka"
WATCH_S: Final = 0.25

T = TypeVar("T")


class Environment:
    """Kafka and Triton servers as processes; an asynchronous context manager that stops them at the end.

    Attributes:
        bootstrap_servers: of Kafka.
        model_servers: those started with the environment.
        exits: unexpected exits of processes, with `restart`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        answers: Mapping[str, Answers],
        model_servers: int = 1,
        batch: RecordedRules | None = None,
        clock: Clock | None = None,
        restart: bool = False,
        say: Say = print,
    ) -> None:
        """Configure the environment; nothing is started yet.

        Args:
            folder: for logs and data; its contents may be replaced.
            answers: recorded answers of the stand-in model, by prompt.
            model_servers: number of Triton servers, named `triton-0`, `triton-1`, ...
            batch: how concurrent requests slow a model server down.
            clock: of the model servers and the routers; default: real time.
            restart: start processes that exit unexpectedly again, as an orchestrator would.
        """
        self.folder = folder
        self.bootstrap_servers = ""
        self.model_servers: tuple[TritonServer, ...] = ()
        self.exits: list[ProcessExit] = []
        self._answers = answers
        self._model_server_count = model_servers
        self._batch = batch
        self._clock = clock or Clock()
        self._restart = restart
        self._say = say
        # Processes end with the thread that started them, so one thread starts them all.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="environment")
        self._supervisor = Supervisor(folder / "logs")
        self._triton: TritonInstallation | None = None
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    @property
    def logs(self) -> Path:
        """The folder of the processes' logs."""
        return self.folder / "logs"

    async def start(self, *specs: ProcessSpec) -> list[ManagedProcess]:
        """Start processes in parallel, and wait until all are ready.

        Raises:
            ProcessFailedError: one exited, or was not ready in time.
        """
        processes = await self._call(lambda: [self._supervisor.spawn(spec) for spec in specs])
        await asyncio.gather(*(asyncio.to_thread(process.wait_ready) for process in processes))
        return processes

    async def restart(self, name: str) -> None:
        """Start a process again, and wait until it is ready.

        Raises:
            ProcessFailedError: it exited, or was not ready in time.
        """
        process = await self._call(lambda: self._supervisor.respawn(name))
        await asyncio.to_thread(process.wait_ready)

    async def kill(self, name: str) -> None:
        """Kill a process, its group and its descendants with SIGKILL.

        PostgreSQL's processes have groups of their own.
        """

        def kill_tree() -> None:
            descendants = psutil.Process(self._supervisor.process(name).pid).children(recursive=True)
            self._supervisor.kill(name)
            for one in descendants:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(descendants, timeout=10)

        await self._call(kill_tree)

    async def stop(self, *names: str) -> None:
        """Stop processes in parallel, and wait until they have exited."""

        def stop_all() -> None:
            for name in names:
                self._supervisor.process(name).ask_to_stop()
            for name in names:
                self._supervisor.stop(name)

        await self._call(stop_all)

    async def signal(self, name: str, number: Signals, *, tree: bool = False) -> None:
        """Send a signal to a process, not to its group.

        Args:
            tree: also to its descendants.
        """

        def send() -> None:
            process = self._supervisor.process(name)
            process.signal(number)
            for one in psutil.Process(process.pid).children(recursive=True) if tree else ():
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(number)

        await self._call(send)

    async def leader(self, names: Collection[str]) -> str:
        """The leader of some copies of a service; see `tests.support.processes.leader`."""
        return await leader(self._supervisor, names)

    async def running(self, names: Collection[str]) -> list[ManagedProcess]:
        """Those of the named processes that are running."""

        def find() -> list[ManagedProcess]:
            found = (self._supervisor.process(name) for name in self._supervisor.names if name in names)
            return [process for process in found if process.alive]

        return await self._call(find)

    async def check(self) -> None:
        """Check that every process is running.

        Raises:
            ProcessFailedError: one exited.
        """
        await self._call(self._supervisor.check)

    async def topics(self, prefix: str) -> KafkaSettings:
        """Create every topic with a prefix, which is also the prefix of the consumer groups."""
        kafka = KafkaSettings(bootstrap_servers=self.bootstrap_servers, topic_prefix=prefix, group_prefix=prefix)
        await create_topics(kafka)
        return kafka

    def routers(
        self,
        kafka: KafkaSettings,
        settings: dict[str, str],
        *,
        model_servers: Collection[TritonServer] = (),
        tenants: Collection[str] = (),
        fleet: Path | None = None,
    ) -> RouterProcess:
        """Specs of routers, to be started with `start`.

        Args:
            settings: environment variables of every router.
            model_servers: default: those of the environment.
            tenants: of the fleet file.
            fleet: the fleet file; default: one with these model servers and tenants.
        """
        if fleet is None:
            fleet = self.folder / f"{kafka.topic_prefix}toml"
            addresses = [server.address for server in model_servers or self.model_servers]
            fleet.write_text(fleet_toml(addresses, tenants=tenants), encoding="utf-8")
        return RouterProcess(self._supervisor, kafka, fleet, self._clock, settings)

    async def model_server(
        self,
        name: str,
        faults: FaultRules | None = None,
        *,
        answers: Mapping[str, Answers] | None = None,
        batch: BatchRules | None = None,
        judge: bool = False,
    ) -> TritonServer:
        """Start a Triton server with the stand-in model and wait until it is ready.

        The label of the model's energy counter is the server's name; the judge's ends in `-judge`.

        Args:
            answers, batch: default: those of the environment.
            judge: it has the stand-in of the judge, too.
        """
        if self._triton is None:
            raise RuntimeError("Triton is installed by the start of the environment")
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        workload = write_workload(folder / "workload.jsonl", answers or self._answers)
        models = [stand_in_llm(workload, model=MODEL, gpu_uuid=name, batch=batch or self._batch, faults=faults)]
        models += [stand_in_judge(workload, gpu_uuid=f"{name}-judge")] if judge else []
        spec, ports = triton_spec(self._triton, folder, models, name=name, clock=self._clock)
        await self.start(spec)
        return triton_server(self._supervisor, name, ports)

    async def _start(self) -> None:
        installed = default_state_dir()
        kafka = await asyncio.to_thread(install_kafka, installed, say=self._say)
        self._triton = await asyncio.to_thread(install, installed, say=self._say)
        self._say(f"starting Kafka and {self._model_server_count} Triton with the stand-in model")
        spec, self.bootstrap_servers = await asyncio.to_thread(kafka_spec, self.folder / "kafka", kafka, name=KAFKA)
        await self.start(spec)
        names = [f"triton-{number}" for number in range(self._model_server_count)]
        self.model_servers = tuple([await self.model_server(name) for name in names])
        if self._restart:
            self._watching = asyncio.create_task(self._watch())

    async def _close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._supervisor.abort()
        try:
            with uninterrupted():
                await self._call(self._supervisor.stop_all)
        finally:
            self._thread.shutdown()

    async def _call(self, action: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, action)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for exited in await self._call(lambda: restart_exited(self._supervisor, self._supervisor.names)):
                self.exits.append(exited)
                self._say(f"!! {exited.description.splitlines()[0]} Restarted.")
