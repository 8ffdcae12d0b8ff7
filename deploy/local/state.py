"""The state file of a local stack: what runs, where, and under which clock. Written as it starts, read by `sprout`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from deploy.local.records import ProcessRecord
from shared.runtime.clock import Clock
from shared.runtime.settings import DatabaseSettings, KafkaSettings

BrokerKind = Literal["kafka", "in-memory"]
FILE_NAME = "stack.json"


class StateError(RuntimeError):
    """There is no stack, or its state file is unreadable; the message says what to do."""


class StackState(BaseModel):
    """A stack that was started."""

    model_config = ConfigDict(frozen=True)

    state_dir: Path
    owner_pid: int | None = Field(
        description="The process that runs it in the foreground and ends with it; null for `sprout up`"
    )
    started_at_s: float = Field(description="Wall time, seconds since the Unix epoch")
    ready: bool = Field(default=False, description="Whether everything was started and became ready")
    broker: BrokerKind
    model: str = Field(description="Logical model that producers ask for")
    zone: str
    topic_prefix: str
    bootstrap_servers: str = Field(default="", description="Empty until the broker is up")
    database_url: str = Field(default="", description="Empty until PostgreSQL is up")
    fleet_file: Path | None = None
    clock: dict[str, str] = Field(default_factory=dict, description="SPROUT_CLOCK_* of every process; empty: real time")
    processes: tuple[ProcessRecord, ...] = Field(default=(), description="In order of starting")

    @property
    def kafka(self) -> KafkaSettings:
        """How to reach the stack's broker."""
        return KafkaSettings(bootstrap_servers=self.bootstrap_servers, topic_prefix=self.topic_prefix)

    @property
    def database(self) -> DatabaseSettings:
        """How to reach the stack's database."""
        return DatabaseSettings(url=SecretStr(self.database_url))

    @property
    def event_clock(self) -> Clock:
        """The clock of the stack's processes."""
        return Clock.from_environment(self.clock)

    @property
    def running(self) -> tuple[ProcessRecord, ...]:
        """The recorded processes that still run."""
        return tuple(process for process in self.processes if process.alive)

    def process(self, name: str) -> ProcessRecord:
        """A process by name.

        Raises:
            StateError: none of this name; the message lists those there are.
        """
        for process in self.processes:
            if process.name == name:
                return process
        raise StateError(f"no process {name!r}; this stack has {', '.join(one.name for one in self.processes)}")

    def save(self) -> None:
        """Write the state file, whole or not at all; readable by its owner alone."""
        path = self.state_dir / FILE_NAME
        partial = path.with_suffix(".partial")
        partial.write_text(self.model_dump_json(indent=2), encoding="utf-8")
        partial.chmod(0o600)
        partial.replace(path)


def read_state(state_dir: Path) -> StackState | None:
    """The state that was last written; None where no stack was started, or it was stopped in good order.

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


def forget_state(state_dir: Path) -> None:
    """Remove the state file."""
    (state_dir / FILE_NAME).unlink(missing_ok=True)
