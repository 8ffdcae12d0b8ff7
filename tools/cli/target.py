"""Which Kafka a subcommand talks to: the one named, the environment's, or the local stack's."""

import os
from dataclasses import dataclass
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

from deploy.local.config import state_dir_from_environment
from deploy.local.state import StackState, StateError, read_state
from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.dead_letters import describe
from shared.runtime.clock import Clock
from shared.runtime.settings import FleetSettings, KafkaSettings
from tools.cli.console import Exit, fail

BOOTSTRAP_VARIABLE = "SPROUT_KAFKA_BOOTSTRAP_SERVERS"

Bootstrap = Annotated[
    str | None,
    typer.Option(
        "--bootstrap", metavar="HOST:PORT", help=f"Kafka's address; default: {BOOTSTRAP_VARIABLE}, else the local stack"
    ),
]


@dataclass(frozen=True, slots=True)
class Target:
    """A deployment to talk to.

    Attributes:
        state: of the local stack, where it is one.
    """

    kafka: KafkaSettings
    state: StackState | None

    @property
    def clock(self) -> Clock:
        """The deployment's clock: the local stack's, else that of this environment."""
        return Clock.from_environment() if self.state is None else self.state.event_clock

    def fleet(self) -> Fleet | None:
        """The fleet, where its file can be read from here."""
        path = FleetSettings().file if self.state is None else self.state.fleet_file
        try:
            return None if path is None or not path.exists() else load_fleet(path)
        except FleetError as error:
            fail(str(error))


def unreachable(target: Target, error: Exception) -> NoReturn:
    """Leave because Kafka did not answer, or rejected the login."""
    fail(
        f"no Kafka answers at {target.kafka.bootstrap_servers} ({type(error).__name__})",
        remedy=f"{target.kafka.connection_advice()}; or start the local stack: sprout up",
        code=Exit.NOT_RUNNING,
    )


def local_state() -> StackState | None:
    """The state file of the local stack; leaves with an error where it is unreadable."""
    try:
        return read_state(state_dir_from_environment())
    except StateError as error:
        fail(str(error))


def running_stack() -> StackState:
    """The local stack; leaves with an error where none runs."""
    state = local_state()
    if state is None:
        fail("no local stack is running", remedy="start one: sprout up", code=Exit.NOT_RUNNING)
    if not state.running:
        fail(
            "the local stack is not running any more: all of its processes have ended",
            remedy="see 'sprout logs' for why, clear up with 'sprout down', start again with 'sprout up'",
            code=Exit.NOT_RUNNING,
        )
    return state


def find_target(bootstrap: str | None) -> Target:
    """The deployment that a subcommand is about; leaves with an error where there is none."""
    if bootstrap or os.environ.get(BOOTSTRAP_VARIABLE):
        try:
            return Target(KafkaSettings(bootstrap_servers=bootstrap) if bootstrap else KafkaSettings(), None)
        except ValidationError as error:
            fail(describe(error, root="Kafka settings"))
    state = local_state()
    if state is None or not state.running or not state.bootstrap_servers:
        fail(
            "no local stack is running, and no other Kafka was named",
            remedy=f"start one with 'sprout up', or give --bootstrap HOST:PORT or {BOOTSTRAP_VARIABLE}",
            code=Exit.NOT_RUNNING,
        )
    return Target(state.kafka, state)
