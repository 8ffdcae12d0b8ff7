"""Configuration of the ledger, from `SPROUT_LEDGER_*`."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.ledger.settlement import Rules


class LedgerSettings(BaseSettings):
    """How energy is read, attributed and settled. "Wall" means real seconds, "event" those of the clock."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_LEDGER_", extra="ignore")

    # Messages
    batch_records: int = Field(default=1_000, ge=1, description="Messages written to PostgreSQL at once, at most")
    poll_ms: int = Field(default=200, ge=1, le=5_000, description="Wait for messages before a batch is written, wall")
    retry_s: float = Field(default=1.0, gt=0, description="Between attempts while PostgreSQL is away, wall")

    # Meters
    scrape_interval_s: float = Field(default=5.0, gt=0, description="Between readings of a server's counters, wall")
    scrape_timeout_s: float = Field(default=3.0, gt=0, description="For a server's metrics to be read, wall")

    # Settlement
    settle_interval_s: float = Field(default=2.0, ge=0.2, description="Between two settlements, wall")
    settle_delay_s: float = Field(
        default=120.0,
        ge=0,
        description="Age at which an interval is settled, event: longer than the longest call and its message take",
    )
    prefill_weight: float = Field(
        default=0.0, ge=0, description="Energy of a prompt's token relative to a generated one"
    )
    idle_window_s: float = Field(
        default=60.0, gt=0, description="Quiet time over which a pool's idle power is learned, event"
    )
    max_intensity_age_s: float = Field(
        default=10_800.0, gt=0, description="An older carbon intensity is unknown, event"
    )
    stop_grace_s: float = Field(default=5.0, ge=0, description="For the last settlement at a stop, wall")

    # Keeping
    retention_days: float = Field(default=90.0, gt=0, description="Raw readings and settled calls are kept, event")
    cleaning_interval_s: float = Field(default=600.0, gt=0, description="Between two removals of old rows, wall")

    @property
    def rules(self) -> Rules:
        """How joules are attributed."""
        return Rules(prefill_weight=self.prefill_weight, idle_window_s=self.idle_window_s)
