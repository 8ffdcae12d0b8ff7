"""The configuration of a local stack: folders, services, replay, model, grid."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, Self, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator, model_validator

from services import SERVICES

REPOSITORY: Final = Path(__file__).resolve().parents[2]
"""The checkout that this package was loaded from."""

STATE_VARIABLE: Final = "SPROUT_LOCAL_STATE"
"""Environment variable: the folder for the stack's data, logs and state file; default `.sprout/` in the checkout."""

INSTALL_VARIABLE: Final = "SPROUT_LOCAL_INSTALL"
"""Environment variable: the folder for Kafka, Triton and Java, which stacks may share; default: the state folder."""

ModelName = Literal["llama-2-13b-chat", "smollm2"]
MODELS: Final[tuple[ModelName, ...]] = get_args(ModelName)


def default_state_dir() -> Path:
    """`.sprout/` in the checkout."""
    return REPOSITORY / ".sprout"


def state_dir_from_environment() -> Path:
    """The folder that `SPROUT_LOCAL_STATE` names; default: `.sprout/` in the checkout."""
    text = os.environ.get(STATE_VARIABLE)
    return Path(text).expanduser().resolve() if text else default_state_dir()


def install_dir_from_environment() -> Path:
    """The folder that `SPROUT_LOCAL_INSTALL` names; default: the state folder."""
    text = os.environ.get(INSTALL_VARIABLE)
    return Path(text).expanduser().resolve() if text else state_dir_from_environment()


class StackConfig(BaseModel):
    """The configuration of a local stack.

    Time: with `event_start` the stack replays a trace from that instant, `rate` event seconds per wall second; event
    time reaches `event_start` `lead_s` wall seconds after the model servers are ready, so that the services have time
    to start. Without `event_start` the stack runs in real time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state_dir: Path = Field(default_factory=state_dir_from_environment)
    install_dir: Path = Field(
        default_factory=install_dir_from_environment,
        description="Folder for Kafka's jars, Triton and Java, installed once; several stacks may share it",
    )
    event_start: AwareDatetime | None = None
    rate: float = Field(default=1.0, gt=0)
    lead_s: float = Field(default=10.0, ge=0)
    model: ModelName = "llama-2-13b-chat"
    workload: Path | None = Field(default=None, description="JSON lines, may be gzipped; None: the shipped one")
    zone: str = Field(default="US-CAL-CISO", min_length=1, max_length=64)
    carbon: dict[str, Path] = Field(
        default_factory=dict, description="Trace (CSV) by zone; a zone without one gets the trace shipped for it"
    )
    routers: int = Field(default=1, ge=1, le=8)
    services: tuple[str, ...] = Field(default=tuple(SERVICES), description="Services to start")
    settings: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="Additional environment by service name; `triton` is a name too"
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
    """Parse an event time; without a time zone it is UTC.

    Raises:
        ValueError: the text is not an ISO 8601 date or time.
    """
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
