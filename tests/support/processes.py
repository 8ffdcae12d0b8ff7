"""Triton servers and routers as processes, the restart of exited processes, and which copy of a service leads."""

import asyncio
import json
import time
import urllib.request
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from deploy.local.config import default_state_dir
from deploy.local.java import Say
from deploy.local.model_servers import MODEL_TIER
from deploy.local.processes import LOOPBACK, ProcessFailedError, ProcessSpec, Supervisor, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from deploy.local.triton import TritonInstallation, free_triton_ports, install, metrics_url, ready_probe
from deploy.triton.repository import RepositoryModel, write_repository
from deploy.triton.server import TritonPorts
from shared.runtime.clock import Clock
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from tests.support.deadlines import DEADLINE_S


@dataclass(frozen=True)
class TritonServer:
    """A Triton server with the stand-in model.

    Attributes:
        name: of its process.
        address: of its gRPC interface.
        metrics: URL of its Prometheus metrics.
    """

    supervisor: Supervisor
    name: str
    address: str
    metrics: str = ""


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """An unexpected exit of a process.

    Attributes:
        at: `time.monotonic()` when it was noticed.
        description: exit status and end of the log.
    """

    name: str
    at: float
    description: str


def restart_exited(supervisor: Supervisor, names: Iterable[str]) -> list[ProcessExit]:
    """Start processes that exited unexpectedly again, as an orchestrator would; stopped ones are not started.

    Call it in the thread that started the processes: they end with that thread.

    Returns:
        The exits; the new processes may not be ready yet.
    """
    exits = []
    for name in names:
        try:
            supervisor.process(name).check()
        except KeyError:
            continue
        except ProcessFailedError as error:
            exits.append(ProcessExit(name, time.monotonic(), str(error)))
            supervisor.respawn(name)
    return exits


async def leader(supervisor: Supervisor, names: Collection[str], *, within_s: float = DEADLINE_S) -> str:
    """The one of some copies of a service that says that it is the leader; waits for that.

    Raises:
        TimeoutError: none does within `within_s` (wall).
    """
    async with asyncio.timeout(within_s):
        while True:
            for name in names:
                if await asyncio.to_thread(_role, supervisor, name) == "leader":
                    return name
            await asyncio.sleep(0.1)


def _role(supervisor: Supervisor, name: str) -> str | None:
    """What a copy of a service says it is; None while it does not answer, or is not ready."""
    try:
        with urllib.request.urlopen(f"{supervisor.process(name).spec.url}/ready", timeout=5) as response:
            return str(json.load(response).get("role"))
    except OSError:
        return None


def triton_spec(
    installation: TritonInstallation,
    folder: Path,
    models: Sequence[RepositoryModel],
    *,
    name: str,
    clock: Clock | None = None,
) -> tuple[ProcessSpec, TritonPorts]:
    """Write a model repository in a folder; returns the server's process and its ports."""
    write_repository(folder / "models", models)
    ports = free_triton_ports()
    spec = ProcessSpec(
        name=name,
        command=tuple(installation.command(folder / "models", ports)),
        environment=installation.environment((clock or Clock()).environment()),
        ready=ready_probe(ports),
        tier=MODEL_TIER,
    )
    return spec, ports


def start_triton(
    supervisor: Supervisor,
    folder: Path,
    models: Sequence[RepositoryModel],
    *,
    name: str,
    clock: Clock | None = None,
    say: Say = print,
) -> TritonServer:
    """Start a server and wait until it is ready; Triton's environment is installed if it is missing.

    Raises:
        ModelServerError: the environment could not be installed.
        ProcessFailedError: the server exited, or was not ready in time.
    """
    spec, ports = triton_spec(install(default_state_dir(), say=say), folder, models, name=name, clock=clock)
    supervisor.start(spec)
    return triton_server(supervisor, name, ports)


def triton_server(supervisor: Supervisor, name: str, ports: TritonPorts) -> TritonServer:
    """Where a server answers."""
    return TritonServer(supervisor, name, f"{LOOPBACK}:{ports.grpc}", metrics_url(ports))


PATIENT: Final = {"SPROUT_ROUTER_POLICY_WAIT_S": "120"}
"""A router that is starting on a busy machine does not answer before it has read the policy."""


@dataclass
class RouterProcess:
    """Routers of one consumer group.

    Attributes:
        settings: environment variables of every router.
        count: number of routers so far.
    """

    supervisor: Supervisor
    kafka: KafkaSettings
    fleet: Path
    clock: Clock = field(default_factory=Clock)
    settings: dict[str, str] = field(default_factory=lambda: dict(PATIENT))
    count: int = 0

    def start(self, **changes: str) -> str:
        """Start a router and wait until it is ready; returns its process name."""
        spec = self.spec(changes)
        self.supervisor.start(spec)
        return spec.name

    def start_unready(self, **changes: str) -> str:
        """Start a router without waiting for it; returns its process name."""
        spec = self.spec(changes)
        self.supervisor.spawn(spec)
        return spec.name

    def spec(self, changes: Mapping[str, str]) -> ProcessSpec:
        """The process of one more router, with changed settings."""
        self.count += 1
        name = f"{self.kafka.topic_prefix}router{self.count}"
        (port,) = free_ports(1)
        environment = ServiceEnvironment(
            bootstrap_servers=self.kafka.bootstrap_servers,
            topic_prefix=self.kafka.topic_prefix,
            database_url="",
            fleet_file=self.fleet,
            clock=self.clock.environment(),
        )
        settings = {
            "SPROUT_KAFKA_GROUP_PREFIX": self.kafka.group_prefix,
            "SPROUT_ROUTER_SAMPLE_SHARE": "0",
            **self.settings,
            **changes,
        }
        return service_spec("router", port=port, environment=environment, settings=settings, name=name)

    def stop_gently(self, name: str, *, within_s: float) -> float:
        """Send SIGTERM and wait; returns the seconds until the exit.

        Raises:
            AssertionError: it is still running after `within_s`.
        """
        process = self.supervisor.process(name)
        began = time.monotonic()
        process.ask_to_stop()
        while process.alive:
            if time.monotonic() - began > within_s:
                raise AssertionError(f"still running {within_s} s after SIGTERM")
            time.sleep(0.02)
        return time.monotonic() - began

    def log(self, name: str) -> str:
        """The log of a router."""
        return self.supervisor.process(name).log.read_text()


def start_service(
    service: str,
    supervisor: Supervisor,
    *,
    kafka: KafkaSettings,
    database: DatabaseSettings,
    fleet: Path,
    settings: Mapping[str, str] | None = None,
    name: str = "",
    wait: bool = True,
) -> str:
    """Start a service, wait until it is ready, and return the name of its process; default: that of the service."""
    spec = service_process(service, kafka=kafka, database=database, fleet=fleet, settings=settings, name=name)
    process = supervisor.spawn(spec)
    if wait:
        process.wait_ready()
    return spec.name


def service_process(
    service: str,
    *,
    kafka: KafkaSettings,
    database: DatabaseSettings,
    fleet: Path,
    settings: Mapping[str, str] | None = None,
    name: str = "",
) -> ProcessSpec:
    """The process of a service; its name is by default that of the service."""
    (port,) = free_ports(1)
    name = f"{kafka.topic_prefix}{name or service}"
    environment = ServiceEnvironment(
        bootstrap_servers=kafka.bootstrap_servers,
        topic_prefix=kafka.topic_prefix,
        database_url=database.url.get_secret_value(),
        fleet_file=fleet,
        clock={},
    )
    prefixes = {"SPROUT_KAFKA_GROUP_PREFIX": kafka.group_prefix}
    return service_spec(
        service, port=port, environment=environment, settings={**prefixes, **(settings or {})}, name=name
    )


def memory_mib(pid: int, field: str = "VmRSS") -> int:
    """Resident memory of a process, MiB; `VmHWM` is the largest so far."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status[field].split()[0]) // 1024 if field in status else 0
