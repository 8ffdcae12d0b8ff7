"""Settings of the gateway, from `SPROUT_GATEWAY_*`."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class GatewaySettings(BaseSettings):
    """How HTTP requests are accepted, published and answered. "Wall" is wall-clock time, "event" the deployment's."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_GATEWAY_", extra="ignore")

    deadline_s: float = Field(
        default=600.0, gt=0, le=86_400, description="Time limit of a request, from its receipt, wall"
    )
    publish_timeout_s: float = Field(
        default=5.0, gt=0, description="Longest wait for Kafka to take a request, wall; then the client gets 503"
    )
    first_reply_wait_s: float = Field(
        default=5.0,
        ge=0,
        description="Longest wait for the first part of a stream before its headers are sent, wall; headers that are "
        "sent earlier cannot say what Sprout decided",
    )
    keep_alive_s: float = Field(default=10.0, gt=0, description="Between two comments of a silent stream, wall")
    silence_s: float = Field(
        default=25.0, gt=0, description="A stream that began and is silent for this long ends with an error, wall"
    )
    send_timeout_s: float = Field(
        default=30.0, gt=0, description="A client that takes nothing for this long is disconnected, wall"
    )
    max_open_requests: int = Field(default=2_000, ge=1, description="Requests at once; further ones get 429")
    max_body_bytes: int = Field(
        default=1024 * 1024 - 65_536, ge=1_024, description="Larger JSON bodies get 413: a Kafka message holds 1 MiB"
    )
    poll_ms: int = Field(default=3, ge=1, le=1_000, description="How often replies are read from Kafka, wall")
    linger_ms: int = Field(default=2, ge=0, le=1_000, description="How long a send waits for more messages, wall")
    require_key: bool = Field(
        default=True, description="False: requests need no API key; only behind something that authenticates"
    )
    key_cache_s: float = Field(
        default=5.0, ge=0, description="How long a key is accepted without asking PostgreSQL again, wall"
    )
    admission_timeout_s: float = Field(
        default=2.0, gt=0, description="Longest wait for PostgreSQL to admit a request, wall"
    )
    serve_without_database: bool = Field(
        default=False,
        description="While PostgreSQL is unavailable: true: known keys are served without limits, false: they get 503",
    )
    lease_s: float = Field(
        default=15.0, gt=0, description="A gateway that dies has its requests counted as open for this long, wall"
    )
    max_unwritten_requests: int = Field(
        default=20_000, ge=1, description="Finished requests that are kept until PostgreSQL takes them"
    )
    footprint_days: float = Field(
        default=7.0, gt=0, description="How long the footprint of a single request is kept, event days"
    )
    usage_days: float = Field(default=750.0, ge=62, description="How long sums by hour and month are kept, event days")
    max_file_bytes: int = Field(default=200_000_000, ge=1_024, description="Larger uploads get 413")
    max_stored_bytes: int = Field(
        default=10_000_000_000, ge=1_024, description="A tenant whose files are larger in total uploads no more"
    )
    file_retention_days: float = Field(
        default=30.0, gt=0, le=3_650, description="Files and ended batches are removed after this time, event"
    )
    max_batch_lines: int = Field(default=50_000, ge=1, le=1_000_000, description="Of one batch")
    batches_at_once: int = Field(default=4, ge=1, le=100, description="Batches that one gateway works on at once")
    batch_in_flight: int = Field(
        default=200, ge=1, le=10_000, description="Published requests of batches without an answer yet, of one gateway"
    )
    batch_request_s: float = Field(
        default=3_600.0,
        gt=0,
        le=86_400,
        description="Time limit of one request of a batch, after which it is published again, wall",
    )
    batch_defer_s: float = Field(
        default=300.0,
        ge=1,
        le=86_400,
        description="After which time a batch that waits for a carbon budget looks for it again at the latest, wall",
    )
    batch_lease_s: float = Field(
        default=20.0, ge=1, le=600, description="How long a batch waits for a gateway that died, wall"
    )
    batch_lane: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$",
        description="Topic of the requests of batches, without its prefix: one of the routers' lanes. Default: "
        "requests-batch, or requests if SPROUT_ROUTER_LANES is set here and has no requests-batch",
    )
