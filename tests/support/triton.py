"""A real Triton server with stand-in models, its energy counters, and a small workload."""

import asyncio
import json
import os
import select
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.local.config import default_state_dir
from deploy.local.processes import ProcessSpec, Supervisor
from deploy.local.triton import free_triton_ports, install, metrics_url, ready_probe
from deploy.triton.repository import RepositoryModel, write_repository
from deploy.triton.server import TritonPorts
from shared.runtime.clock import Clock
from tests.support.deadlines import DEADLINE_S, POLL_S, REPLY_S, until

LEVELS = {"L0": (100, 2.0), "L1": (30, 0.6), "L2": (10, 0.2)}

UPDATE_S = 0.02
"""Wall seconds that the server may take from the time of an update to its counter."""


@dataclass(frozen=True)
class ServingTriton:
    """A running server."""

    ports: TritonPorts
    clock: Clock
    pid: int
    log: Path

    @property
    def address(self) -> str:
        """host:port of its gRPC service."""
        return f"127.0.0.1:{self.ports.grpc}"

    def metric(self, name: str, gpu: str) -> float:
        """The value of one of its energy metrics."""
        return gpu_metric(metrics_url(self.ports), name, gpu)

    def energy_j(self, gpu: str) -> float:
        return self.metric("nv_energy_consumption", gpu)

    async def until_energy_above(self, gpu: str, energy_j: float) -> None:
        """Wait until a model without idle power has begun to work on a request."""
        await until(lambda: self.energy_j(gpu), lambda found_j: found_j > energy_j)

    async def settled_energy_j(self, gpu: str) -> float:
        """The energy of a model without idle power, once it no longer grows."""
        return await settled(lambda: self.energy_j(gpu))


@dataclass(frozen=True)
class CounterUpdate:
    """An energy counter right after an update, which took place between two event times."""

    energy_j: float
    earliest_s: float
    latest_s: float

    def power_w(self, before: "CounterUpdate") -> tuple[float, float]:
        """Bounds of the mean power since an earlier update."""
        used_j = self.energy_j - before.energy_j
        return used_j / (self.latest_s - before.earliest_s), used_j / (self.earliest_s - before.latest_s)

    def above_idle_j(self, before: "CounterUpdate", idle_w: float) -> tuple[float, float]:
        """Bounds of the energy since an earlier update, without the idle energy."""
        used_j = self.energy_j - before.energy_j
        longest_s, shortest_s = self.latest_s - before.earliest_s, self.earliest_s - before.latest_s
        return used_j - idle_w * longest_s, used_j - idle_w * shortest_s


async def next_update(read: Callable[[], float], clock: Clock) -> CounterUpdate:
    """Wait for the next update of the counter of a model with idle power, which always grows.

    However long this process or the server stands still, the update lies between the two times.
    """
    earliest_s, before_j = clock.now_s(), read()
    async with asyncio.timeout(DEADLINE_S):
        while True:
            await asyncio.sleep(POLL_S)
            asked_s, energy_j = clock.now_s(), read()
            if energy_j != before_j:
                return CounterUpdate(energy_j, earliest_s - UPDATE_S * clock.rate, clock.now_s())
            earliest_s = asked_s


async def settled(read: Callable[[], float], *, tolerance: float = 0.0) -> float:
    """A counter's value once it grows by at most `tolerance` in 0.4 s; running requests update it every 50 ms."""
    readings = [read()]
    async with asyncio.timeout(DEADLINE_S):
        while len(readings) < 5 or readings[-1] - readings[-5] > tolerance:
            await asyncio.sleep(0.1)
            readings.append(read())
    return readings[-1]


def gpu_metric(url: str, name: str, gpu: str) -> float:
    """The value of a metric on a page of Triton's metrics."""
    with urllib.request.urlopen(url, timeout=REPLY_S) as page:
        lines = page.read().decode().splitlines()
    (value,) = (line.rpartition(" ")[2] for line in lines if line.startswith(f'{name}{{gpu_uuid="{gpu}"}}'))
    return float(value)


@contextmanager
def serving_triton(
    folder: Path, models: Sequence[RepositoryModel], *, clock: Clock | None = None, flags: Sequence[str] = ()
) -> Iterator[ServingTriton]:
    """Serve models until the block ends; Triton's environment is created once.

    Args:
        folder: for the model repository and the log.
        flags: further arguments of the server.
    """
    clock = clock or Clock()
    installation = install(default_state_dir(), say=print)
    write_repository(folder / "models", models)
    ports = free_triton_ports()
    with Supervisor(folder / "logs") as supervisor:
        process = supervisor.start(
            ProcessSpec(
                name="triton",
                command=(*installation.command(folder / "models", ports), *flags),
                environment=installation.environment(clock.environment()),
                ready=ready_probe(ports),
            )
        )
        yield ServingTriton(ports, clock, process.pid, process.log)


def text_of(number: int, level: str) -> str:
    tokens, _ = LEVELS[level]
    return f"Answer {number} at {level}: " + "word " * tokens + "end."


def entry(number: int) -> dict[str, object]:
    return {
        "task": "test",
        "prompt": f"Question number {number}?",
        "preferred": ("L0", "L1", "L2")[number % 3],
        "reference": None,
        "responses": {
            f"m/{level}": {"text": text_of(number, level), "tokens": tokens, "energy_j": tokens * 6.0, "time_s": time_s}
            for level, (tokens, time_s) in LEVELS.items()
        },
    }


def write_entries(path: Path) -> Path:
    """Write thirty entries, and a last line that cannot be parsed."""
    path.write_text("".join(json.dumps(entry(number)) + "\n" for number in range(30)) + "{broken\n")
    return path


def model_processes(server: int) -> list[psutil.Process]:
    """The processes of the models, without their watchdogs."""
    return [process for process in psutil.Process(server).children() if process.name().startswith("triton_python")]


def wait_until_ended(process: psutil.Process) -> None:
    """Return once a process has ended, reaped or not."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    assert poller.poll(DEADLINE_S * 1_000)
    os.close(descriptor)
