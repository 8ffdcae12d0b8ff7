"""Settings of the router, from `SPROUT_ROUTER_*`."""

from pydantic import AliasChoices, Field
from pydantic_settings import SettingsConfigDict

from shared.inference.attempts import RetrySettings
from shared.inference.balancer import CircuitBreakerSettings
from shared.inference.base import StreamTimeouts
from shared.inference.chat import ControlSequencePolicy
from shared.kafka.topic_settings import LaneFields
from shared.runtime.settings import DrawKeySettings


class RouterSettings(RetrySettings, CircuitBreakerSettings, LaneFields, DrawKeySettings):
    """How requests are consumed, served and answered. "Wall" is wall-clock time, "event" the deployment's clock."""

    model_config = SettingsConfigDict(
        env_prefix="SPROUT_ROUTER_", extra="ignore", env_parse_none_str="null", populate_by_name=True
    )

    # Consumer
    max_in_flight: int = Field(default=500, ge=1, le=10_000, description="Most requests processed at once")
    fetch_max_records: int = Field(default=200, ge=1, description="Most records fetched from Kafka at once")
    commit_interval_s: float = Field(default=0.2, gt=0, le=60, description="Between two offset commits, wall")
    session_timeout_s: float = Field(
        default=6.0, ge=1.0, description="Without a heartbeat for this long a router loses its partitions, wall"
    )
    max_poll_interval_s: float = Field(
        default=900.0, ge=10.0, description="A router that takes no record for this long leaves the group, wall"
    )
    instance_id: str | None = Field(
        default=None,
        min_length=1,
        description="Static group membership: a restart within the session timeout causes no rebalance",
    )
    rebalance_grace_s: float = Field(
        default=3.0, ge=0, description="Time for running requests of a revoked partition to finish, wall"
    )
    drain_grace_s: float = Field(default=25.0, ge=0, description="Time for running requests at shutdown, wall")

    # Fairness
    max_waiting: int = Field(
        default=32_000,
        ge=1,
        le=1_000_000,
        description="Most requests read ahead of their start, from which the next is chosen fairly; others wait in "
        "Kafka. Divided equally among the lanes",
    )
    max_waiting_bytes: int = Field(
        default=32 * 1024 * 1024,
        ge=1024 * 1024,
        description="Memory of the requests read ahead; divided equally among the lanes",
    )
    max_tenant_share: float = Field(
        default=1.0, gt=0, le=1, description="Largest part of the places (MAX_IN_FLIGHT) that one tenant may take"
    )
    max_model_share: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Largest part of the places that one model may take where the fleet has several, so that a slow "
        "one leaves some to the others",
    )
    unknown_tenant_parts: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Tenants that the fleet file does not list share so many parts of the places, by a hash of their "
        "name",
    )

    # Limits
    max_request_bytes: int = Field(default=1024 * 1024, ge=1_024, description="Larger messages are rejected")
    max_prompt_chars: int = Field(
        default=200_000, ge=1, description="Longer conversations are rejected; every turn but one counts 64 more"
    )
    max_turns: int = Field(default=1_000, ge=1, description="Conversations with more turns are rejected")
    max_in_flight_bytes: int = Field(
        default=16 * 1024 * 1024,
        ge=1024 * 1024,
        description="Estimated size of the requests processed at once; a router needs about six times this memory",
    )
    control_sequences: ControlSequencePolicy = Field(
        default="break", description="Control sequences of the chat template in a prompt: break them up, or reject it"
    )
    default_deadline_s: float = Field(
        default=600.0, gt=0, description="Time limit of a request without a deadline, from its receipt, event"
    )
    default_deadline_wall_s: float = Field(default=30.0, gt=0, description="Minimum of the default deadline, wall")

    # Model servers
    stream_always: bool = Field(
        default=True,
        description="Stream from the model server even if the client wants no chunks: measures the time to first token "
        "and detects a hung server, at the cost of processor time",
    )
    first_chunk_timeout_s: float = Field(
        default=60.0, gt=0, description="Until the first chunk of a streaming server, wall"
    )
    chunk_timeout_s: float = Field(default=20.0, gt=0, description="Between two chunks of a streaming server, wall")
    circuit_failures: int = Field(
        default=3,
        ge=1,
        description="Consecutive failures that eject an endpoint",
        validation_alias=AliasChoices("sprout_router_circuit_failures", "sprout_router_cool_down_failures"),
    )
    circuit_open_s: float = Field(
        default=1.0,
        gt=0,
        description="Time an endpoint stays ejected; doubles with every re-ejection; wall",
        validation_alias=AliasChoices("sprout_router_circuit_open_s", "sprout_router_cool_down_s"),
    )
    circuit_open_max_s: float = Field(
        default=15.0,
        gt=0,
        description="Longest time an endpoint stays ejected, wall",
        validation_alias=AliasChoices("sprout_router_circuit_open_max_s", "sprout_router_cool_down_max_s"),
    )
    endpoint_check_interval_s: float = Field(default=5.0, gt=0, description="Between two health checks, wall")
    endpoint_check_timeout_s: float = Field(default=2.0, gt=0, description="Timeout of a health check, wall")

    load_report_interval_s: float = Field(default=1.0, gt=0, description="Between two load reports, wall")

    # Responses
    linger_ms: int = Field(default=2, ge=0, le=1_000, description="How long a send waits for more messages, wall")
    chunk_interval_ms: int = Field(
        default=50, ge=0, le=10_000, description="Between two chunks of a streamed answer; 0: every token; wall"
    )
    sample_share: float = Field(default=0.05, ge=0, le=1, description="Share of requests that become samples")
    sample_answers: bool = Field(
        default=True, description="Samples carry the served answer, which the evaluator then need not generate again"
    )

    # Policies
    max_intensity_age_s: float | None = Field(
        default=10_800.0,
        gt=0,
        description="With older carbon intensities the reference serves; 'null' for no limit; event",
    )
    policy_wait_s: float = Field(
        default=10.0, ge=0, description="At startup, longest wait for current policies before requests start, wall"
    )

    @property
    def rebalance_timeout_s(self) -> float:
        """How long the group waits for this router in a rebalance, so it can finish requests; wall."""
        return self.rebalance_grace_s + self.session_timeout_s

    @property
    def stream_timeouts(self) -> StreamTimeouts:
        """Timeouts of a streaming model server."""
        return StreamTimeouts(self.first_chunk_timeout_s, self.chunk_timeout_s)
