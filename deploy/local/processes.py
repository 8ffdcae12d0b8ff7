"""Child processes of the local stack: start, readiness, unexpected exits, and stopping in reverse order."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from deploy.local import signals
from deploy.local.state import ProcessRecord

LOOPBACK = "127.0.0.1"

Probe = Callable[[], str | None]
"""Returns None if the process is ready, else what is missing."""

_CLAIMS: list[socket.socket] = []
"""Open until this process ends."""

POLL_S = 0.1
LOG_BLOCK_BYTES = 32_768


class ProcessFailedError(RuntimeError):
    """A child process exited, or was not ready in time; the message includes the end of its log."""

    def __init__(self, name: str, what: str, log: Path) -> None:
        super().__init__(f"{name} {what}. The end of {log}:\n{tail(log)}")
        self.name = name
        self.log = log


class StartAbortedError(RuntimeError):
    """`Supervisor.abort` was called during a start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """How to run one child process.

    Attributes:
        environment: added to this process's own.
        ready: called until it returns None; without a probe the process is ready as soon as it runs.
        stop_signal: asks the process to shut down.
        stop_grace_s: after this time the process and its process group are killed.
        tier: a process uses processes of lower tiers, and is stopped before them.
        port: where it listens, for `sprout status`.
        url: base URL of its HTTP interface.
        niceness: added to this process's own; a higher one leaves the processor to the others.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    ready: Probe | None = None
    ready_timeout_s: float = 120.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_grace_s: float = 10.0
    tier: int = 0
    port: int | None = None
    url: str | None = None
    niceness: int = 0


class ManagedProcess:
    """A child process that was started from a spec."""

    def __init__(
        self, spec: ProcessSpec, popen: "subprocess.Popen[bytes]", *, log: Path, aborted: threading.Event
    ) -> None:
        self.spec = spec
        self.log = log
        self._popen = popen
        self._aborted = aborted
        self.record = ProcessRecord.of_child(
            popen.pid,
            name=spec.name,
            log=log,
            port=spec.port,
            url=spec.url,
            stop_signal=spec.stop_signal,
            tier=spec.tier,
        )

    @property
    def pid(self) -> int:
        """Process id; also the id of its process group and session."""
        return self._popen.pid

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, not to its group, if it is running."""
        if self.alive:
            self._popen.send_signal(number)

    def check(self) -> None:
        """Check that the process is running.

        Raises:
            ProcessFailedError: it exited.
        """
        status = self._popen.poll()
        if status is not None:
            raise ProcessFailedError(self.spec.name, describe_exit(status), self.log)

    def wait_ready(self) -> None:
        """Wait until the process is ready.

        Raises:
            ProcessFailedError: it exited, or was not ready in time.
            StartAbortedError: `Supervisor.abort` was called.
        """
        waiting_for: str | None = None
        deadline = time.monotonic() + self.spec.ready_timeout_s
        while True:
            self.check()
            waiting_for = None if self.spec.ready is None else self.spec.ready()
            if waiting_for is None:
                return
            if time.monotonic() > deadline:
                raise ProcessFailedError(
                    self.spec.name, f"was not ready within {self.spec.ready_timeout_s:.0f} s ({waiting_for})", self.log
                )
            if self._aborted.wait(POLL_S):
                raise StartAbortedError(f"the start was aborted while waiting for {self.spec.name}")

    def ask_to_stop(self) -> None:
        """Send the stop signal, if the process is running."""
        if self.alive:
            self._popen.send_signal(self.spec.stop_signal)

    def finish(self) -> None:
        """Wait for the exit; kill the process after the grace period, then the rest of its group."""
        try:
            self._popen.wait(self.spec.stop_grace_s)
        except subprocess.TimeoutExpired:
            _kill_group(self.pid)
            self._popen.wait()
        _kill_group(self.pid)

    def kill(self) -> None:
        """Kill the process group with SIGKILL, and reap the process."""
        _kill_group(self.pid)
        self._popen.wait()


class Supervisor:
    """Starts, checks and stops child processes.

    By default processes end with the thread that started them (see `deploy.local.signals`): start them from a thread
    that lives long enough. Detached processes outlive this process; keep `records()` to stop them later. The end of a
    `with` block stops them all.
    """

    def __init__(self, log_dir: Path, *, detached: bool = False) -> None:
        self._log_dir = log_dir
        self._detached = detached
        self._aborted = threading.Event()
        self._processes: dict[str, ManagedProcess] = {}
        self._specs: dict[str, ProcessSpec] = {}

    def start(self, spec: ProcessSpec) -> ManagedProcess:
        """Start a process and wait until it is ready.

        Raises:
            ProcessFailedError: it exited, or was not ready in time.
        """
        process = self.spawn(spec)
        process.wait_ready()
        return process

    def spawn(self, spec: ProcessSpec) -> ManagedProcess:
        """Start a process without waiting for it.

        Its output goes to `NAME.log`, which is truncated unless this supervisor started the process before.

        Raises:
            ValueError: a process of this name is running.
            FileNotFoundError: the program does not exist.
        """
        earlier = self._processes.get(spec.name)
        if earlier is not None and earlier.alive:
            raise ValueError(f"process {spec.name!r} is running already, with pid {earlier.pid}")
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log = self._log_dir / f"{spec.name}.log"
        command = list(spec.command)
        if not self._detached:
            ending_with_parent = [sys.executable, "-I", "-S", str(Path(signals.__file__)), str(os.getpid())]
            command = [*ending_with_parent, str(int(spec.stop_signal)), *command]
        with log.open("ab" if spec.name in self._specs else "wb") as output:
            popen = subprocess.Popen(
                command,
                env={**os.environ, **spec.environment},
                cwd=spec.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal must reach only the supervisor
            )
        if spec.niceness:
            os.setpriority(os.PRIO_PROCESS, popen.pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + spec.niceness))
        process = ManagedProcess(spec, popen, log=log, aborted=self._aborted)
        self._processes.pop(spec.name, None)
        self._processes[spec.name] = process
        self._specs[spec.name] = spec
        return process

    def process(self, name: str) -> ManagedProcess:
        """A process by name.

        Raises:
            KeyError: no process of this name was started, or it was stopped.
        """
        return self._processes[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the processes that were not stopped, in order of starting."""
        return tuple(self._processes)

    def check(self) -> None:
        """Check that every process is running.

        Raises:
            ProcessFailedError: one exited; for the first.
        """
        for process in list(self._processes.values()):
            process.check()

    def records(self) -> list[ProcessRecord]:
        """The records to find and stop the processes from another process, in order of starting."""
        return [process.record for process in self._processes.values()]

    def abort(self) -> None:
        """Abort a start in another thread."""
        self._aborted.set()

    def stop(self, name: str) -> None:
        """Stop one process with its stop signal."""
        process = self._processes.pop(name)
        process.ask_to_stop()
        process.finish()

    def kill(self, name: str) -> None:
        """Kill one process and its group with SIGKILL."""
        self._processes.pop(name).kill()

    def respawn(self, name: str) -> ManagedProcess:
        """Start a process again from its spec, without waiting for it; a running one is stopped first.

        Raises:
            KeyError: no process of this name was ever started.
        """
        spec = self._specs[name]
        if name in self._processes:
            self.stop(name)
        return self.spawn(spec)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_all()

    def stop_all(self) -> None:
        """Stop every process: tier by tier, within a tier in parallel, the last started first."""
        for tier in sorted({process.spec.tier for process in self._processes.values()}, reverse=True):
            stopping = [process for process in reversed(self._processes.values()) if process.spec.tier == tier]
            for process in stopping:
                process.ask_to_stop()
            for process in stopping:
                process.finish()
                del self._processes[process.spec.name]


def describe_exit(status: int) -> str:
    """Describe a return code of `subprocess`."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def http_probe(url: str, *, timeout_s: float = 2.0) -> Probe:
    """Ready once a GET of `url` answers 200; until then the response body says what is missing."""

    def probe() -> str | None:
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as answer:
                return None if answer.status == 200 else f"{url} answered {answer.status}"
        except urllib.error.HTTPError as error:
            return f"{url} answered {error.code}: {error.read(500).decode(errors='replace')}"
        except OSError as error:
            return f"{url} does not answer: {error}"

    return probe


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # the group is empty; macOS raises PermissionError for a group of zombies


def free_ports(count: int) -> list[int]:
    """Distinct free TCP ports on loopback; bind them soon.

    No port is returned twice, neither by this process nor, until it ends, by another one.
    """
    ports: list[int] = []
    with ExitStack() as stack:
        while len(ports) < count:
            one = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            one.bind((LOOPBACK, 0))
            port = int(one.getsockname()[1])
            if _claim(port):
                ports.append(port)
    return ports


def _claim(port: int) -> bool:
    """Claim a port by the UDP port of the same number: the server that is to bind the port takes seconds to start."""
    claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        claim.bind((LOOPBACK, port))
    except OSError:
        claim.close()
        return False
    _CLAIMS.append(claim)
    return True


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a text file; `[no log]` or `[empty]` if there are none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - LOG_BLOCK_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return "[no log]"
    last = text.splitlines()[-lines:]
    return "\n".join(last) if last else "[empty]"
