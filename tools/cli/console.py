"""Shared by the subcommands: output, exit codes, and the deployment that a command talks to."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from deploy.local.config import state_dir_from_environment
from deploy.local.state import StackState, StateError, read_state
from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.records import describe
from shared.runtime.clock import Clock
from shared.runtime.logs import printable
from shared.runtime.settings import FleetSettings, KafkaSettings

PLAIN_WIDTH = 140
"""Columns of output to a file or a pipe, unless COLUMNS is set."""

BOOTSTRAP_VARIABLE = "SPROUT_KAFKA_BOOTSTRAP_SERVERS"

out = Console(highlight=False, width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH)
"""Standard output, for results."""
err = Console(stderr=True, highlight=False)
"""Standard error, for progress and errors."""

Bootstrap = Annotated[
    str | None,
    typer.Option(
        "--bootstrap", metavar="HOST:PORT", help=f"Kafka's address; default: {BOOTSTRAP_VARIABLE}, else the local stack"
    ),
]


class Exit(IntEnum):
    """Exit codes of the subcommands; Typer uses 2 for wrong usage."""

    FAILED = 1
    NOT_RUNNING = 3
    TIMED_OUT = 4


@dataclass(frozen=True, slots=True)
class Target:
    """The deployment that a command talks to.

    Attributes:
        state: of the local stack; None for another deployment.
    """

    kafka: KafkaSettings
    state: StackState | None

    @property
    def clock(self) -> Clock:
        """The clock of the local stack, else of this environment."""
        return Clock.from_environment() if self.state is None else self.state.event_clock

    def fleet(self) -> Fleet | None:
        """The fleet; None if there is no fleet file."""
        path = FleetSettings().file if self.state is None else self.state.fleet_file
        try:
            return None if path is None or not path.exists() else load_fleet(path)
        except FleetError as error:
            fail(str(error))


def say(line: str) -> None:
    """Print a progress line."""
    err.print(printable(line, keep="\n"), markup=False, soft_wrap=True)


def fail(message: str, *, remedy: str = "", code: Exit = Exit.FAILED) -> NoReturn:
    """Print an error and what to do, and exit.

    Raises:
        typer.Exit: always.
    """
    err.print("error:", style="bold red", end=" ")
    err.print(printable(message, keep="\n"), markup=False, soft_wrap=True)
    if remedy:
        err.print(printable(remedy, keep="\n"), markup=False, soft_wrap=True)
    raise typer.Exit(code)


def print_text(text: str, *, end: str = "\n") -> None:
    """Print text to standard output as it is, with its lines and tabs, but without other control characters."""
    print(printable(text, keep="\n\t"), end=end, flush=True)


@contextmanager
def needs_extra(*extras: str) -> Iterator[None]:
    """Exit with an error that names the extras to install if a module that the block imports is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(
            f"this command needs the Python module {error.name}, which is not installed",
            remedy=f"in the repository: pip install -e '.[{','.join(('cli', *extras))}]'",
        )


def quiet_clients() -> None:
    """Silence the log of the Kafka client: its errors are also raised, and printed by the commands."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def unreachable(target: Target, error: Exception) -> NoReturn:
    """Exit because Kafka did not answer or rejected the connection."""
    fail(
        f"no Kafka answers at {target.kafka.bootstrap_servers} ({type(error).__name__})",
        remedy=f"{target.kafka.connection_advice()}; or start a local stack: sprout up",
        code=Exit.NOT_RUNNING,
    )


def local_state() -> StackState | None:
    """The state of the local stack; None if there is none. Exits with an error if it is unreadable."""
    try:
        return read_state(state_dir_from_environment())
    except StateError as error:
        fail(str(error))


def running_stack() -> StackState:
    """The running local stack. Exits with an error if none is running."""
    state = local_state()
    if state is None:
        fail("no local stack is running", remedy="start one: sprout up", code=Exit.NOT_RUNNING)
    if not state.running:
        fail(
            "the local stack is not running any more: all of its processes have ended",
            remedy="find the cause with 'sprout logs', clean up with 'sprout down', start again with 'sprout up'",
            code=Exit.NOT_RUNNING,
        )
    return state


def find_target(bootstrap: str | None) -> Target:
    """The deployment of `--bootstrap`, of the environment, or the local stack. Exits with an error if there is none."""
    if bootstrap or os.environ.get(BOOTSTRAP_VARIABLE):
        try:
            return Target(KafkaSettings(bootstrap_servers=bootstrap) if bootstrap else KafkaSettings(), None)
        except ValidationError as error:
            fail(describe(error, root="Kafka settings"))
    state = local_state()
    if state is None or not state.running or not state.bootstrap_servers:
        fail(
            "no local stack is running, and no other Kafka is configured",
            remedy=f"start a stack with 'sprout up', or set --bootstrap HOST:PORT or {BOOTSTRAP_VARIABLE}",
            code=Exit.NOT_RUNNING,
        )
    return Target(state.kafka, state)
