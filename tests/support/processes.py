"""A model server and routers as processes of this machine, as they run in production."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.java import Say
from deploy.local.models import MODEL_TIER
from deploy.local.paths import default_state_dir
from deploy.local.ports import LOOPBACK, free_ports
from deploy.local.processes import ProcessFailedError, ProcessSpec, Supervisor
from deploy.local.services import Surroundings, service_spec
from deploy.local.triton import TritonInstallation, free_triton_ports, install, ready_probe
from deploy.triton.repository import RepositoryModel, write_repository
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings


@dataclass(frozen=True)
class TritonServer:
    """A real Triton with the stand-in model."""

    supervisor: Supervisor
    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Death:
    """A process that ended by itself; `said` has its status and the end of its log."""

    name: str
    at: float
    said: str


def revive(supervisor: Supervisor, names: Iterable[str]) -> list[Death]:
    """Start again, as an orchestrator would, what ended by itself; what was stopped on purpose stays so.

    Returns:
        Those that had ended; none is waited for. They die with the calling thread, as all that a supervisor starts.
    """
    deaths = []
    for name in names:
        try:
            supervisor.process(name).check()
        except KeyError:
            continue
        except ProcessFailedError as error:
            deaths.append(Death(name, time.monotonic(), str(error)))
            supervisor.respawn(name)
    return deaths


def triton_spec(
    installation: TritonInstallation,
    folder: Path,
    models: Sequence[RepositoryModel],
    *,
    name: str,
    clock: Clock | None = None,
) -> tuple[ProcessSpec, str]:
    """Write a model repository below a folder; returns how to run its server, and its gRPC address."""
    write_repository(folder / "models", models)
    ports = free_triton_ports()
    spec = ProcessSpec(
        name=name,
        command=tuple(installation.command(folder / "models", ports)),
        environment=installation.environment((clock or Clock()).environment()),
        ready=ready_probe(ports),
        tier=MODEL_TIER,
    )
    return spec, f"{LOOPBACK}:{ports.grpc}"


def start_triton(
    supervisor: Supervisor,
    folder: Path,
    models: Sequence[RepositoryModel],
    *,
    name: str,
    clock: Clock | None = None,
    say: Say = print,
) -> TritonServer:
    """Start a server and wait until it is ready; its environment is made where it is missing.

    Raises:
        ModelServerError: the environment could not be made.
        ProcessFailedError: the server did not become ready.
    """
    spec, address = triton_spec(install(default_state_dir(), say=say), folder, models, name=name, clock=clock)
    supervisor.start(spec)
    return TritonServer(supervisor, name, address)


@dataclass
class RouterProcess:
    """Routers of one consumer group.

    Attributes:
        settings: environment of every one of them.
        count: how many there have been.
    """

    supervisor: Supervisor
    kafka: KafkaSettings
    fleet: Path
    clock: Clock = field(default_factory=Clock)
    settings: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def start(self, **changes: str) -> str:
        """Start one; returns its process's name once it is ready."""
        spec = self.spec(changes)
        self.supervisor.start(spec)
        return spec.name

    def start_unready(self, **changes: str) -> str:
        """Start one without waiting; returns its process's name."""
        spec = self.spec(changes)
        self.supervisor.spawn(spec)
        return spec.name

    def spec(self, changes: Mapping[str, str]) -> ProcessSpec:
        """How to run one more, with changed settings."""
        self.count += 1
        name = f"{self.kafka.topic_prefix}router{self.count}"
        (port,) = free_ports(1)
        around = Surroundings(
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
        return service_spec("router", port=port, around=around, settings=settings, name=name)

    def stop_gently(self, name: str, *, within_s: float) -> float:
        """SIGTERM; returns the seconds until it had ended.

        Raises:
            AssertionError: it still runs after `within_s`.
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
        """What a router has said."""
        return self.supervisor.process(name).log.read_text()
