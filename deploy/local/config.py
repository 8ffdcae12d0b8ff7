"""What a local stack is asked to be."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator, model_validator

from deploy.local.fleet import ModelName
from deploy.local.paths import STATE_VARIABLE, default_state_dir

BROKER_VARIABLE = "SPROUT_LOCAL_BROKER"
"""Environment variable that chooses the broker: `auto`, `kafka` or `in-memory`."""

INSTALL_VARIABLE = "SPROUT_LOCAL_INSTALL"
"""Environment variable that names a folder for what is installed, to share it between several state folders."""

BrokerChoice = Literal["auto", "kafka", "in-memory"]


def state_dir_from_environment() -> Path:
    """The state folder: the one that `SPROUT_LOCAL_STATE` names, else `.sprout/` in the checkout."""
    text = os.environ.get(STATE_VARIABLE)
    return Path(text).expanduser().resolve() if text else default_state_dir()


def install_dir_from_environment() -> Path:
    """Where things are installed: the folder that `SPROUT_LOCAL_INSTALL` names, else the state folder."""
    text = os.environ.get(INSTALL_VARIABLE)
    return Path(text).expanduser().resolve() if text else state_dir_from_environment()


def broker_from_environment() -> BrokerChoice:
    """The broker that the environment chooses.

    Raises:
        ValueError: it names one that does not exist.
    """
    choice = os.environ.get(BROKER_VARIABLE) or "auto"
    match choice:
        case "auto" | "kafka" | "in-memory":
            return choice
        case _:
            raise ValueError(f"{BROKER_VARIABLE} must be auto, kafka or in-memory, got {choice!r}")


class StackConfig(BaseModel):
    """A local stack, before it is started.

    Time: with `event_start` the stack replays from that instant, `rate` event seconds per wall second; event time
    reaches `event_start` `lead_s` wall seconds after the servers are up, so that the services have time to start.
    Without it the stack lives in real time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state_dir: Path = Field(default_factory=state_dir_from_environment)
    install_dir: Path = Field(
        default_factory=install_dir_from_environment,
        description="What is fetched once: jars, Triton, a Java runtime; may be shared by several stacks",
    )
    broker: BrokerChoice = Field(default_factory=broker_from_environment)
    event_start: AwareDatetime | None = None
    rate: float = Field(default=1.0, gt=0)
    lead_s: float = Field(default=10.0, ge=0)
    model: ModelName = "llama-2-13b-chat"
    workload: Path | None = Field(default=None, description="JSON lines, may be gzipped; null: the one shipped")
    zone: str = Field(default="US-CAL-CISO", min_length=1, max_length=64)
    carbon: dict[str, Path] = Field(
        default_factory=dict, description="Zone to trace (CSV); a zone without one gets the trace shipped for it"
    )
    routers: int = Field(default=1, ge=1, le=8)
    services: tuple[str, ...] = Field(
        default=("carbon_feed", "optimizer", "evaluator", "ledger", "router"), description="Services to run"
    )
    settings: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="Environment added to a service, by its name; `triton` is one too"
    )

    @field_validator("state_dir", "install_dir", "workload")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().resolve()

    @field_validator("workload")
    @classmethod
    def _workload_exists(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError(f"there is no file {path}; give a workload of JSON lines, may be gzipped")
        return path

    @field_validator("carbon")
    @classmethod
    def _traces_exist(cls, traces: dict[str, Path]) -> dict[str, Path]:
        absolute = {zone: path.expanduser().resolve() for zone, path in traces.items()}
        for zone, path in absolute.items():
            if not path.is_file():
                raise ValueError(f"there is no file {path}; give zone {zone!r} a CSV of its carbon intensity")
        return absolute

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.event_start is None and self.rate != 1.0:
            raise ValueError("'rate' is for a replay: give 'event_start' as well, or leave the rate at 1")
        return self


def event_time(text: str) -> datetime:
    """An instant as people write it; without a zone it is UTC.

    Raises:
        ValueError: not an ISO 8601 date or time.
    """
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
