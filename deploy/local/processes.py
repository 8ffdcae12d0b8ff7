"""Child processes of the local stack: started, watched for readiness and death, and stopped in reverse order."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local import tether
from deploy.local.logtail import tail
from deploy.local.records import ProcessRecord, record_of

Probe = Callable[[], str | None]
"""Returns None once the process is ready, else what it is still waiting for."""

POLL_S = 0.1


class ProcessFailedError(RuntimeError):
    """A child process ended, or did not become ready; the message carries the end of its log."""

    def __init__(self, name: str, what: str, log: Path) -> None:
        super().__init__(f"{name} {what}. The end of {log}:\n{tail(log)}")
        self.name = name
        self.log = log


class StartAbortedError(RuntimeError):
    """The start was called off while a process was awaited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """How to run one child process.

    Attributes:
        environment: added to this process's own.
        ready: asked until it returns None; None means ready as soon as it runs.
        stop_signal: what asks it to end in good order.
        stop_grace_s: after this long it is killed, its whole process group included.
        tier: processes of a higher tier use those of a lower one, and are stopped before them.
        port: where it listens, for people to see.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    ready: Probe | None = None
    ready_timeout_s: float = 60.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_grace_s: float = 10.0
    tier: int = 0
    port: int | None = None
    url: str | None = None


class ManagedProcess:
    """A child process that was started from a spec."""

    def __init__(
        self, spec: ProcessSpec, popen: "subprocess.Popen[bytes]", *, log: Path, aborted: threading.Event
    ) -> None:
        self.spec = spec
        self.log = log
        self._popen = popen
        self._aborted = aborted
        self.record: ProcessRecord = record_of(
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
        """Whether it still runs."""
        return self._popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, such as SIGSTOP and SIGCONT, if it still runs."""
        if self.alive:
            self._popen.send_signal(number)

    def check(self) -> None:
        """Say so if it ended.

        Raises:
            ProcessFailedError: it ended.
        """
        status = self._popen.poll()
        if status is not None:
            raise ProcessFailedError(self.spec.name, describe_exit(status), self.log)

    def wait_ready(self) -> None:
        """Wait until the probe is content.

        Raises:
            ProcessFailedError: it ended, or was not ready in time.
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
                raise StartAbortedError(f"the start was called off while {self.spec.name} was awaited")

    def ask_to_stop(self) -> None:
        """Send the stop signal, if it still runs."""
        if self.alive:
            self._popen.send_signal(self.spec.stop_signal)

    def finish(self) -> None:
        """Wait for the end that was asked for; past the grace period, and for stragglers of its group, kill."""
        try:
            self._popen.wait(self.spec.stop_grace_s)
        except subprocess.TimeoutExpired:
            _kill_group(self.pid)
            self._popen.wait()
        _kill_group(self.pid)

    def kill(self) -> None:
        """SIGKILL the whole process group at once, and reap it."""
        _kill_group(self.pid)
        self._popen.wait()


class Supervisor:
    """Starts processes and answers for their end.

    Processes are tethered: they die with the thread that started them, so start them from one that lives as long as
    they shall (see `deploy.local.tether`). With `tethered=False` they outlive this process; whoever started them must
    keep `records()` to stop them later.
    """

    def __init__(self, log_dir: Path, *, tethered: bool = True) -> None:
        self._log_dir = log_dir
        self._tethered = tethered
        self._aborted = threading.Event()
        self._processes: dict[str, ManagedProcess] = {}
        self._specs: dict[str, ProcessSpec] = {}

    def start(self, spec: ProcessSpec) -> ManagedProcess:
        """Start a process and wait until it is ready.

        Raises:
            ProcessFailedError: it ended, or was not ready in time.
        """
        process = self.spawn(spec)
        process.wait_ready()
        return process

    def spawn(self, spec: ProcessSpec) -> ManagedProcess:
        """Start a process without waiting; its output goes to `NAME.log`, anew unless it ran here before.

        Raises:
            ValueError: a process of this name runs.
            FileNotFoundError: no such program.
        """
        earlier = self._processes.get(spec.name)
        if earlier is not None and earlier.alive:
            raise ValueError(f"process {spec.name!r} runs already, with pid {earlier.pid}")
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log = self._log_dir / f"{spec.name}.log"
        command = list(spec.command)
        if self._tethered:
            tethering = [sys.executable, "-I", "-S", str(Path(tether.__file__)), str(os.getpid())]
            command = [*tethering, str(int(spec.stop_signal)), *command]
        with log.open("ab" if spec.name in self._specs else "wb") as output:
            popen = subprocess.Popen(
                command,
                env={**os.environ, **spec.environment},
                cwd=spec.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal must reach the supervisor alone
            )
        process = ManagedProcess(spec, popen, log=log, aborted=self._aborted)
        self._processes.pop(spec.name, None)
        self._processes[spec.name] = process
        self._specs[spec.name] = spec
        return process

    def process(self, name: str) -> ManagedProcess:
        """A process by name.

        Raises:
            KeyError: none of this name was started, or it was stopped.
        """
        return self._processes[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Every process that was not stopped, in order of starting."""
        return tuple(self._processes)

    def check(self) -> None:
        """Say so if any process ended by itself.

        Raises:
            ProcessFailedError: for the first that did.
        """
        for process in list(self._processes.values()):
            process.check()

    def records(self) -> list[ProcessRecord]:
        """What is needed to find every process again from elsewhere, in order of starting."""
        return [process.record for process in self._processes.values()]

    def abort(self) -> None:
        """Call off a start that another thread is waiting in."""
        self._aborted.set()

    def stop(self, name: str) -> None:
        """Stop one process in good order."""
        process = self._processes.pop(name)
        process.ask_to_stop()
        process.finish()

    def kill(self, name: str) -> None:
        """Kill one process and its group with SIGKILL, as a crash would."""
        self._processes.pop(name).kill()

    def respawn(self, name: str) -> ManagedProcess:
        """Start a process again as it was; one that still runs is stopped first.

        Raises:
            KeyError: none of this name was ever started.
        """
        spec = self._specs[name]
        if name in self._processes:
            self.stop(name)
        return self.spawn(spec)

    def stop_all(self) -> None:
        """Stop every process, the last started first; those of one tier end side by side."""
        for tier in sorted({process.spec.tier for process in self._processes.values()}, reverse=True):
            leaving = [process for process in reversed(self._processes.values()) if process.spec.tier == tier]
            for process in leaving:
                process.ask_to_stop()
            for process in leaving:
                process.finish()
                del self._processes[process.spec.name]


def describe_exit(status: int) -> str:
    """A return code of `subprocess` in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def http_probe(url: str, *, timeout_s: float = 2.0) -> Probe:
    """Ready once a GET of `url` answers 200; until then the answer's body says what is missing."""

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
        return  # nobody of the group is left; PermissionError is macOS's word for a group of zombies
