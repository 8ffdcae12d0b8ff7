"""Topics `load-reports`, `power-curves` and `capacity`: load, power by batch size, and endpoints needed."""

from typing import Literal

from pydantic import Field

from shared.batch_curve import BatchCurve
from shared.messages.base import Identifier, Message, Probability, UtcDatetime, Value


class EndpointLoad(Value):
    """What one instance has running on an endpoint."""

    in_flight: int = Field(ge=0)
    oldest_started_at: UtcDatetime | None = Field(
        default=None, description="Start of the oldest call that is running; null if none is"
    )


class PoolLoad(Value):
    """What one instance has running on a pool."""

    pool: Identifier
    arrivals: int = Field(ge=0, description="Requests for the pool since the instance's last report")
    waiting: int = Field(ge=0, description="Requests that wait for an endpoint")
    endpoints: dict[str, EndpointLoad] = Field(description="By endpoint; all endpoints of the pool")


class LoadReport(Message):
    """The load of one router or evaluator, published about once a second of wall time."""

    instance: Identifier = Field(description="One process; a restarted one has another name")
    service: Literal["router", "evaluator"]
    at: UtcDatetime
    interval_s: float = Field(gt=0, description="Event seconds since the instance's last report")
    share: Probability = Field(description="Share of the partitions of all lanes that the instance reads")
    final: bool = Field(default=False, description="The instance stops; nothing is running any more")
    pools: tuple[PoolLoad, ...]


class EndpointCurve(Message):
    """Power and speed of an endpoint by batch size, learned from its meter and its calls; see `BatchCurve`."""

    endpoint: Identifier
    pool: Identifier
    at: UtcDatetime
    idle_w: float = Field(ge=0)
    step_j: float = Field(ge=0)
    token_j: float = Field(ge=0)
    step_s: float = Field(gt=0)
    token_s: float = Field(ge=0)
    prompt_token_j: float = Field(default=0.0, ge=0)
    prompt_token_s: float = Field(default=0.0, ge=0)
    standard_errors: dict[str, float] = Field(
        default={}, description="By field of the curve; absent where it is unknown"
    )
    identifiable: bool = Field(description="Whether shared and single energy can be separated")
    reason: str = Field(default="", description="Why the curve cannot be identified")
    intervals: int = Field(ge=0, description="Intervals between meter readings that it was learned from")
    mean_batch: float = Field(ge=0, description="Mean number of sequences while any was running")
    mean_prompt_tokens: float = Field(default=0.0, ge=0)

    def curve(self) -> BatchCurve:
        """The curve."""
        return BatchCurve(
            idle_w=self.idle_w,
            step_j=self.step_j,
            token_j=self.token_j,
            step_s=self.step_s,
            token_s=self.token_s,
            prompt_token_j=self.prompt_token_j,
            prompt_token_s=self.prompt_token_s,
        )


class CapacityForecast(Value):
    """Endpoints that a pool will need."""

    at: UtcDatetime
    endpoints_needed: int = Field(ge=0)


class PoolCapacity(Message):
    """How many endpoints a pool needs, and which ones are to be awake."""

    pool: Identifier
    at: UtcDatetime
    valid_until: UtcDatetime = Field(description="After this every endpoint counts as awake")
    requests_per_s: float = Field(ge=0)
    in_flight: int = Field(ge=0, description="Running and waiting requests, all instances together")
    target_batch: int | None = Field(default=None, description="Sequences per endpoint; null while it is unknown")
    endpoints: int = Field(ge=1, description="Endpoints of the pool")
    endpoints_needed: int = Field(ge=0, description="Now")
    forecast: tuple[CapacityForecast, ...] = Field(default=(), description="Over the next hours, in order of time")
    awake: tuple[Identifier, ...] = Field(description="Endpoints that serve, in packing order; the others may sleep")
    reserved: dict[str, int] = Field(
        default={}, description="By endpoint with any: calls of evaluators, which routers leave out of their targets"
    )
    reason: str = Field(description="For people: why this many")
