"""Configuration of the ledger, from `SPROUT_LEDGER_*`."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class LedgerSettings(BaseSettings):
    """How energy is read, attributed and settled. "Wall" seconds are real time, "event" seconds the clock's."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_LEDGER_", extra="ignore")

    # Messages
    batch_records: int = Field(default=1_000, ge=1, description="Most messages written to PostgreSQL at once")
    poll_ms: int = Field(default=200, ge=1, le=5_000, description="Wait for messages before a batch is written, wall")
    retry_s: float = Field(default=1.0, gt=0, description="Pause between attempts while PostgreSQL is down, wall")

    # Meters
    scrape_interval_s: float = Field(default=5.0, gt=0, description="Between readings of a server's counters, wall")
    scrape_timeout_s: float = Field(default=3.0, gt=0, description="Timeout of reading a server's metrics, wall")

    # Settlement
    settle_interval_s: float = Field(default=2.0, ge=0.2, description="Between two settlements, wall")
    publish_interval_s: float = Field(default=0.5, gt=0, description="Between two publications of footprints, wall")
    backlog_age_s: float = Field(
        default=1_800.0, gt=0, description="Age of the oldest unsettled call at which the ledger is not ready, wall"
    )
    settle_delay_s: float = Field(
        default=120.0,
        ge=0,
        description="Age at which an interval is settled where not all routers report their running calls, event; must "
        "exceed the longest call plus its message's delay",
    )
    chunk_calls: int = Field(
        default=4_000,
        ge=100,
        description="Calls of an endpoint that are settled in one transaction: bounds the memory that settlement takes",
    )
    settle_margin_s: float = Field(
        default=2.0,
        ge=0,
        description="Longest time from the end of a call to its message in Kafka, wall; must exceed the interval "
        "between two load reports",
    )
    settle_max_wait_s: float = Field(
        default=900.0, gt=0, description="Longest wait of an endpoint's settlement for a call that is running, wall"
    )
    report_timeout_s: float = Field(
        default=10.0, gt=0, description="Age of a router's or evaluator's last load report at which it is gone, wall"
    )
    prefill_weight: float = Field(
        default=0.0, ge=0, description="Energy of a prompt token relative to a generated token"
    )
    idle_window_s: float = Field(
        default=60.0, gt=0, description="Time without calls over which idle power is averaged, event"
    )
    max_intensity_age_s: float = Field(
        default=10_800.0, gt=0, description="A carbon intensity older than this counts as unknown, event"
    )
    meter_stall_s: float = Field(
        default=15.0,
        gt=0,
        description="Time without any energy, while tokens are generated, after which a meter counts as broken, wall",
    )
    curve_half_life_days: float = Field(
        default=5.0, gt=0, description="Age at which an observation counts half in the learned power curve, event days"
    )
    stop_grace_s: float = Field(default=5.0, ge=0, description="For the last settlement on shutdown, wall")

    # Saving on the meter
    saving_interval_s: float = Field(
        default=300.0,
        gt=0,
        description="Between two publications of the saving on the meter, event; never more often than once a minute, "
        "wall",
    )
    saving_max_endpoints: int = Field(
        default=32,
        ge=0,
        description="The saving on the meter is not computed for a fleet with more endpoints: each takes 3 MB of "
        "memory meanwhile",
    )

    # Retention
    retention_days: float = Field(
        default=2.0,
        gt=0,
        description="Retention of single calls, meter readings, intervals and rejections, event days; the roll-ups "
        "by hour stay",
    )
    rollup_days: float = Field(
        default=750.0,
        gt=0,
        description="Retention of roll-ups, and of policies, qualities, prompt groups and intensities, event days",
    )
    cleaning_interval_s: float = Field(default=600.0, gt=0, description="Between two removals of old rows, wall")
