"""Configuration of the router, from `SPROUT_ROUTER_*`."""

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.router.admission import Limits
from shared.inference.attempts import RetrySettings
from shared.inference.balancer import CircuitBreakerSettings
from shared.inference.base import StreamTimeouts
from shared.inference.chat import ControlSequencePolicy


class RouterSettings(BaseSettings):
    """How requests are taken in, served and answered. "Wall" means real seconds, "event" those of the clock."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_ROUTER_", extra="ignore", env_parse_none_str="null")

    # Intake
    max_in_flight: int = Field(default=500, ge=1, le=10_000, description="Requests being served at once")
    fetch_max_records: int = Field(default=200, ge=1, description="Records taken from Kafka's buffer at once")
    commit_interval_s: float = Field(default=0.2, gt=0, le=60, description="Between two commits, wall")
    session_timeout_s: float = Field(
        default=6.0, ge=1.0, description="A router that is silent for so long is given up by the group, wall"
    )
    max_poll_interval_s: float = Field(
        default=900.0, ge=10.0, description="A router that takes no record for so long leaves the group, wall"
    )
    instance_id: str | None = Field(
        default=None, min_length=1, description="Static group membership: a restart within the session moves nothing"
    )
    rebalance_grace_s: float = Field(
        default=3.0, ge=0, description="For requests of a partition that is taken away to finish, wall"
    )
    drain_grace_s: float = Field(default=25.0, ge=0, description="For running requests to finish at a stop, wall")

    # Requests
    max_request_bytes: int = Field(default=1024 * 1024, ge=1_024, description="A larger message is refused")
    max_prompt_chars: int = Field(default=200_000, ge=1, description="A longer conversation is refused")
    control_sequences: ControlSequencePolicy = Field(
        default="break", description="Control sequences of the chat template in a prompt: break them up, or refuse"
    )
    default_deadline_s: float = Field(
        default=600.0, gt=0, description="For a request without a deadline, from its receipt, event"
    )
    default_deadline_wall_s: float = Field(
        default=30.0, gt=0, description="The default deadline is at least so far away, wall"
    )

    # Model servers
    stream_always: bool = Field(
        default=True,
        description="Stream from the model server even where the producer wants no chunks: tells the time of the first "
        "token and notices a hung server; costs processor time",
    )
    first_chunk_timeout_s: float = Field(
        default=60.0, gt=0, description="A streaming server that says nothing for so long has failed, wall"
    )
    chunk_timeout_s: float = Field(default=20.0, gt=0, description="The same between two parts of an answer, wall")
    max_attempts: int = Field(default=6, ge=1, description="Endpoints asked for one request")
    backoff_s: float = Field(default=0.05, gt=0, description="Before the second attempt; doubles, with jitter; wall")
    backoff_max_s: float = Field(default=2.0, gt=0, description="Longest pause between attempts, wall")
    cool_down_failures: int = Field(default=3, ge=1, description="In a row, before an endpoint is left alone")
    cool_down_s: float = Field(default=1.0, gt=0, description="How long it is left alone; doubles; wall")
    cool_down_max_s: float = Field(default=15.0, gt=0, description="Longest time to leave it alone, wall")
    endpoint_check_interval_s: float = Field(default=5.0, gt=0, description="Between health checks, wall")
    endpoint_check_timeout_s: float = Field(default=2.0, gt=0, description="For a health check's answer, wall")

    # Answers
    linger_ms: int = Field(default=2, ge=0, le=1_000, description="Answers that come within it share a send, wall")
    chunk_interval_ms: int = Field(
        default=50, ge=0, le=10_000, description="Between two chunks of a streamed answer; 0: every piece; wall"
    )
    sample_share: float = Field(default=0.05, ge=0, le=1, description="Of requests that become samples")

    # Decisions
    max_intensity_age_s: float | None = Field(
        default=10_800.0,
        gt=0,
        description="With older carbon data the reference is served; 'null' for no limit; event",
    )
    policy_wait_s: float = Field(
        default=10.0, ge=0, description="At the start, for the policies in force to be read before requests; wall"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cool_down_max_s < self.cool_down_s:
            raise ValueError("SPROUT_ROUTER_COOL_DOWN_MAX_S must not be below SPROUT_ROUTER_COOL_DOWN_S")
        if self.backoff_max_s < self.backoff_s:
            raise ValueError("SPROUT_ROUTER_BACKOFF_MAX_S must not be below SPROUT_ROUTER_BACKOFF_S")
        return self

    @property
    def rebalance_timeout_s(self) -> float:
        """How long the group waits in a rebalance for this router, which may first finish requests; wall."""
        return self.rebalance_grace_s + self.session_timeout_s

    @property
    def limits(self) -> Limits:
        """What is refused."""
        return Limits(
            max_request_bytes=self.max_request_bytes,
            max_prompt_chars=self.max_prompt_chars,
            default_deadline_s=self.default_deadline_s,
            default_deadline_wall_s=self.default_deadline_wall_s,
        )

    @property
    def stream_timeouts(self) -> StreamTimeouts:
        """With a model server that is silent."""
        return StreamTimeouts(self.first_chunk_timeout_s, self.chunk_timeout_s)

    @property
    def retry_rules(self) -> RetrySettings:
        """When an attempt is repeated."""
        return RetrySettings(max_attempts=self.max_attempts, backoff_s=self.backoff_s, backoff_max_s=self.backoff_max_s)

    @property
    def cool_down_rules(self) -> CircuitBreakerSettings:
        """When an endpoint is left alone."""
        return CircuitBreakerSettings(
            circuit_failures=self.cool_down_failures,
            circuit_open_s=self.cool_down_s,
            circuit_open_max_s=self.cool_down_max_s,
        )
