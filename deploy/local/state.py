"""The state file of a local stack and its processes, found and stopped by their records.

`sprout up` starts a stack and exits; the state file is all that the other commands know of it. A pid alone does not
identify a process, because the kernel reuses pids; a pid with its start time does.
"""

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from deploy.local.signals import uninterrupted
from shared.runtime.clock import Clock
from shared.runtime.settings import DatabaseSettings, KafkaSettings

FILE_NAME = "stack.json"
TOKEN_FILE = "evaluations-token"
"""Name of the file, in the state folder, with the token of the evaluator's `POST /evaluations`."""

START_TIME_TOLERANCE_S = 1.0


class StateError(RuntimeError):
    """A stack runs already, none runs, or its state file is unreadable; the message says what to do."""


class ProcessRecord(BaseModel):
    """A process in the state file."""

    model_config = ConfigDict(frozen=True)

    name: str
    pid: int = Field(description="Also the id of its process group and session")
    started_at_s: float = Field(description="Start time according to the kernel, seconds since the Unix epoch")
    log: Path
    port: int | None = None
    url: str | None = Field(default=None, description="Base URL of its HTTP interface, if it has one")
    stop_signal: int = int(signal.SIGTERM)
    tier: int = Field(default=0, description="Higher tiers are stopped before lower ones")

    @classmethod
    def of_child(
        cls,
        pid: int,
        *,
        name: str,
        log: Path,
        port: int | None,
        url: str | None,
        stop_signal: signal.Signals,
        tier: int,
    ) -> Self:
        """The record of a child process that was just started.

        Raises:
            psutil.NoSuchProcess: it was reaped already.
        """
        return cls(
            name=name,
            pid=pid,
            started_at_s=psutil.Process(pid).create_time(),
            log=log,
            port=port,
            url=url,
            stop_signal=int(stop_signal),
            tier=tier,
        )

    def process(self) -> psutil.Process | None:
        """The recorded process; None if it ended, also if another process has its pid now."""
        try:
            found = psutil.Process(self.pid)
            started_at_s = found.create_time()
            zombie = found.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        if zombie or abs(started_at_s - self.started_at_s) > START_TIME_TOLERANCE_S:
            return None
        return found

    @property
    def alive(self) -> bool:
        """Whether the recorded process is running."""
        return self.process() is not None


class StackState(BaseModel):
    """A local stack that was started."""

    model_config = ConfigDict(frozen=True)

    state_dir: Path
    owner_pid: int | None = Field(
        description="The process that runs the stack in the foreground; None for a stack of `sprout up`"
    )
    started_at_s: float = Field(description="Wall time, seconds since the Unix epoch")
    ready: bool = Field(default=False, description="Whether every process was started and became ready")
    model: str = Field(description="Name of the model in requests")
    zone: str
    topic_prefix: str
    bootstrap_servers: str = Field(default="", description="Empty until Kafka is ready")
    database_url: str = Field(
        default="", description="As the operator's role, with its password; empty until PostgreSQL is ready"
    )
    fleet_file: Path | None = None
    clock: dict[str, str] = Field(default_factory=dict, description="SPROUT_CLOCK_* of every process; empty: real time")
    processes: tuple[ProcessRecord, ...] = Field(default=(), description="In order of starting")

    @property
    def kafka(self) -> KafkaSettings:
        """Settings to connect to the stack's Kafka."""
        return KafkaSettings(bootstrap_servers=self.bootstrap_servers, topic_prefix=self.topic_prefix)

    @property
    def database(self) -> DatabaseSettings:
        """Settings to connect to the stack's PostgreSQL."""
        return DatabaseSettings(url=SecretStr(self.database_url))

    @property
    def event_clock(self) -> Clock:
        """The clock of the stack's processes."""
        return Clock.from_environment(self.clock)

    @property
    def running(self) -> tuple[ProcessRecord, ...]:
        """The recorded processes that are running."""
        return tuple(process for process in self.processes if process.alive)

    def process(self, name: str) -> ProcessRecord:
        """A process by name.

        Raises:
            StateError: there is no process of this name; the message lists the names.
        """
        for process in self.processes:
            if process.name == name:
                return process
        raise StateError(f"no process {name!r}; this stack has {', '.join(one.name for one in self.processes)}")

    def save(self) -> None:
        """Write the state file atomically; only its owner may read it."""
        write_private(self.state_dir / FILE_NAME, self.model_dump_json(indent=2))


def write_private(path: Path, text: str) -> None:
    """Write a file atomically; at no time may anyone but its owner read it."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600, exist_ok=False)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_state(state_dir: Path) -> StackState | None:
    """Read the state file; None if no stack was started here, or it was stopped.

    Raises:
        StateError: the file is not a state file.
    """
    path = state_dir / FILE_NAME
    try:
        return StackState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise StateError(
            f"{path} is not the state of a local stack ({error.error_count()} problems); remove it if no stack runs"
        ) from error


def remove_state(state_dir: Path) -> None:
    """Remove the state file."""
    (state_dir / FILE_NAME).unlink(missing_ok=True)


def refuse_second_stack(state_dir: Path) -> None:
    """Check that no stack uses the state folder; the folder is created.

    Raises:
        StateError: a stack is running; the message says how to stop it.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    state = read_state(state_dir)
    if state is None or not state.running:
        return
    remedy = (
        "stop it with 'sprout down', or use another folder (SPROUT_LOCAL_STATE)"
        if state.owner_pid is None
        else f"process {state.owner_pid} runs it in the foreground: stop that process first"
    )
    raise StateError(f"a stack is running in {state_dir} ({len(state.running)} processes); {remedy}")


def stop_stack(state: StackState, *, say: Callable[[str], None] = lambda _: None) -> int:
    """Stop a detached stack.

    Returns:
        How many processes were running.

    Raises:
        StateError: another process runs the stack in the foreground.
    """
    if state.owner_pid is not None and state.running:
        raise StateError(
            f"process {state.owner_pid} runs this stack in the foreground; end that process (Ctrl-C), "
            "and it stops the stack"
        )
    with uninterrupted():
        stopped = stop_recorded(state.processes)
        for record in stopped:
            say(f"stopped {record.name}")
        remove_state(state.state_dir)
    return len(stopped)


def stop_recorded(records: Sequence[ProcessRecord], *, grace_s: float = 15.0) -> list[ProcessRecord]:
    """Stop recorded processes: tier by tier, the last started first, with SIGKILL after the grace period.

    Returns:
        Those that were running. A process that reuses a recorded pid is not touched.
    """
    stopped: list[ProcessRecord] = []
    for tier in sorted({record.tier for record in records}, reverse=True):
        stopping = [
            (record, found)
            for record in reversed(records)
            if record.tier == tier and (found := record.process()) is not None
        ]
        for record, found in stopping:
            with suppress(psutil.NoSuchProcess):
                found.send_signal(record.stop_signal)
        _, remaining = psutil.wait_procs([found for _, found in stopping], timeout=grace_s)
        for found in remaining:
            with suppress(psutil.NoSuchProcess):
                found.kill()
        for record, _ in stopping:
            # The group's id is the pid, which the kernel does not reuse while the group has members.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(record.pid, signal.SIGKILL)
            stopped.append(record)
    return stopped
