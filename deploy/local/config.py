"""The configuration of a local stack: folders, services, replay, model servers, grid."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, Self, get_args

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from services import SERVICES
from shared.batch_curve import MEASURED
from shared.fleet import Switchback
from shared.pools import Dispatch, Pool

REPOSITORY: Final = Path(__file__).resolve().parents[2]
"""The checkout that this package was loaded from."""

STATE_VARIABLE: Final = "SPROUT_LOCAL_STATE"
"""Environment variable: the folder for the stack's data, logs and state file; default `.sprout/` in the checkout."""

INSTALL_VARIABLE: Final = "SPROUT_LOCAL_INSTALL"
"""Environment variable: the folder for Kafka, Triton and Java, which stacks may share; default: the state folder."""

ModelName = Literal["llama-2-13b-chat", "smollm2"]
MODELS: Final[tuple[ModelName, ...]] = get_args(ModelName)

MAX_SERVERS: Final = 8

CURVES: Final = (*MEASURED, "recorded")

POOL_SETTINGS: Final = (
    "dispatch", "target_batch", "tpot_objective_ms", "ttft_objective_ms", "scaling", "sleep", "min_awake"
)  # fmt: skip
"""Fields of `StackConfig` that are fields of the model's pool in the fleet file."""


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

    Model servers: the fields from `dispatch` to `switchback` are written to the fleet file, see `shared/pools.py`.
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
    servers: int = Field(default=1, ge=1, le=MAX_SERVERS, description="Model servers: endpoints of the model's pool")
    curve: str = Field(
        default="qwen3-14b-h100",
        description="Power and speed of the stand-ins by batch size, see `shared/batch_curve.py`; or `recorded`: each "
        "request's recorded energy and time",
    )
    small: bool = Field(default=False, description="Also serve a smaller variant of the model, a pool of one server")
    stretch: float = Field(
        default=1.0, gt=0, description="With a curve: steps take this many times as long, at its power"
    )
    dispatch: Dispatch = "spread"
    target_batch: int | None = Field(default=None, ge=1)
    tpot_objective_ms: float | None = Field(default=None, gt=0)
    ttft_objective_ms: float | None = Field(default=None, gt=0)
    scaling: Literal["elastic", "fixed"] | None = None
    sleep: bool = Field(default=False, description="Also starts the process that puts endpoints to sleep")
    min_awake: int = Field(default=1, ge=1)
    max_in_flight: int | None = Field(default=None, ge=1, description="Of every endpoint, per router")
    switchback: Switchback = Field(default=Switchback(share=0.0), description="Default: no reference blocks")
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

    @field_validator("curve")
    @classmethod
    def _known_curve(cls, name: str) -> str:
        if name not in CURVES:
            raise ValueError(f"{name!r} is unknown; choose one of {', '.join(CURVES)}")
        return name

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
        if self.stretch != 1 and self.curve == "recorded":
            raise ValueError("'stretch' is for a curve: choose one, or leave it at 1")
        if self.model == "smollm2" and self.small:
            raise ValueError("smollm2 has no smaller variant: leave out 'small', or choose another model")
        if self.model == "smollm2" and self.servers > 1:
            raise ValueError("smollm2 uses this machine's processor and its meter, so 'servers' must be 1")
        self._check_pool()
        return self

    def pool_settings(self) -> dict[str, str | float]:
        """The settings of the model's pool that have a value, by their names in the fleet file."""
        values = {name: getattr(self, name) for name in POOL_SETTINGS}
        return {name: value for name, value in values.items() if value is not None}

    def _check_pool(self) -> None:
        """Check the pool's settings before anything starts, as every service will."""
        endpoint = {"grpc": "localhost:1", "max_in_flight": self.max_in_flight}
        endpoints = [{"name": f"endpoint-{number}", **endpoint} for number in range(self.servers)]
        try:
            Pool.model_validate({"name": "model", "zone": self.zone, "endpoints": endpoints, **self.pool_settings()})
        except ValidationError as error:
            problems = [problem["msg"].removeprefix("Value error, ") for problem in error.errors()]
            raise ValueError("; ".join(problems)) from error


def event_time(text: str) -> datetime:
    """Parse an event time; without a time zone it is UTC.

    Raises:
        ValueError: the text is not an ISO 8601 date or time.
    """
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
