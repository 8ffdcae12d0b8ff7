"""Configuration of the optimizer, from `SPROUT_OPTIMIZER_*`."""

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AliasChoices, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.messages.base import Probability

Promise = Literal["hourly", "period"]
"""What keeps the quality limits: every hour, or the mean over a period."""

_HOUR_S = 3_600.0
_PREFIX = "SPROUT_OPTIMIZER_"


def _renamed(new: str, old: str) -> Any:  # noqa: ANN401 - Field() takes any default
    """Both names of an environment variable; the old one works until the next release."""
    return AliasChoices(f"{_PREFIX}{new}".lower(), f"{_PREFIX}{old}".lower())


class OptimizerSettings(BaseSettings):
    """Objective, estimates and schedule of the optimizer.

    "Wall" marks real time, "event" the time of the messages and of the configured clock.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="ignore", populate_by_name=True)

    # Quality limits
    xi: dict[str, Probability] = Field(
        default={"preference": 0.1},
        min_length=1,
        description='Maximum relative quality loss by metric, JSON: {"preference": 0.1}. The full loss is tolerated at '
        "the highest carbon intensity of the trailing window, none at the lowest. The evaluator judges preference, "
        "not_worse and correctness; counts of any other metric must come from another producer on the topic `quality`, "
        "and until there are enough of them the baseline (no directive) is served",
    )
    constant_bounds: frozenset[str] = Field(
        default=frozenset(),
        description='Metrics of xi whose full loss is tolerated at every carbon intensity: JSON ["correctness"]',
    )
    floors: dict[str, Probability] = Field(
        default={},
        description="Minimum quality of every prompt group, relative to the baseline's, by metric of xi: JSON",
    )
    promise: Promise = Field(
        default="hourly",
        description="hourly: every hour keeps the quality limits; period: the mean over a period keeps the mean of the "
        "hourly limits, so that clean hours pay for dirty ones",
    )
    period_days: int = Field(
        default=30,
        ge=1,
        le=92,
        description="Length of that period: 1 (midnight to midnight, UTC), 7 (from Monday), 30, or other whole days",
    )
    hourly_floors: dict[str, Probability] = Field(
        default={},
        description="With a promise by period: minimum quality of every single hour, relative to the baseline's, by "
        'metric of xi: JSON {"preference": 0.9}; other metrics have none',
    )
    confidence_z: float = Field(
        default=1.0,
        ge=0,
        le=10,
        validation_alias=_renamed("CONFIDENCE_Z", "CAUTION"),
        description="Safety margin of a quality limit in standard errors of the quality of all traffic, where one "
        "metric is limited (1: the limit holds with 84 % confidence, 1.645: with 95 %; 0: no margin); with several "
        "metrics each takes more, so that all limits hold together with the same confidence (1.41 with two)",
    )
    confidence_z_by_metric: dict[str, float] = Field(
        default={},
        validation_alias=_renamed("CONFIDENCE_Z_BY_METRIC", "CAUTIONS"),
        description='The safety margin of single metrics, however many are limited: JSON {"correctness": 0.5}',
    )
    max_extra_confidence_z: float = Field(
        default=1.0,
        ge=0,
        description="Most that is added to a metric's safety margin, in standard errors, while evaluations miss its "
        "promised quality more often than 5 %; 0: the margin is never widened",
    )
    holdout: Probability | Literal["auto"] = Field(
        default="auto",
        description="Share of every group's traffic that is always served by the baseline (control group); auto: as "
        "small as HOLDOUT_HALF_WIDTH_PCT allows",
    )
    holdout_half_width_pct: float = Field(
        default=2.0, gt=0, description="Wanted half-width of the 95 % interval of a day's attributed saving, in points"
    )
    holdout_minimum: Probability = Field(default=0.001, gt=0, description="The smallest holdout that auto chooses")
    holdout_maximum: Probability = Field(default=0.05, gt=0, description="The largest holdout that auto chooses")
    validity_h: float = Field(
        default=3.0,
        gt=0,
        le=168,
        description="Lifetime of a policy, event; after it routers serve the baseline. Readers refuse more than a week",
    )

    # Carbon intensity
    max_intensity_age_s: float = Field(
        default=7_200.0,
        gt=0,
        description="Age of the latest carbon intensity from which the mean of the same hour of earlier days replaces "
        "it, event",
    )
    window_h: float = Field(default=720.0, gt=0, description="Trailing window of k0_min and k0_max, event")
    range_percentile: float = Field(
        default=1.0,
        ge=0,
        lt=50,
        description="k0_min and k0_max are this percentile of the window and the opposite one; 0: the extremes",
    )
    min_window_hours: int = Field(
        default=24, ge=2, description="Hours with a value in the window before any quality loss is tolerated"
    )

    # Estimates of energy, time and traffic
    footprint_half_life_h: float = Field(default=24.0, gt=0, description="Half-life of energy and time, event")
    traffic_half_life_requests: float = Field(
        default=250.0, ge=0, description="Half-life of the groups' shares of the traffic, in requests"
    )
    traffic_half_life_h: float = Field(
        default=1.0, gt=0, description="Shortest half-life of these shares, which change by the hour, event"
    )
    rate_half_life_requests: float = Field(default=50.0, ge=0, description="Half-life of the request rate, in requests")
    rate_half_life_h: float = Field(default=1.0, gt=0, description="Shortest half-life of the request rate, event")
    longest_half_life_h: float = Field(
        default=24.0, gt=0, description="Longest half-life of shares and rate, however few requests arrive, event"
    )
    pseudo_requests: float = Field(
        default=10.0,
        gt=0,
        description="Prior weight, in requests, of the multiplicative model in each group's energy and time",
    )
    min_requests: float = Field(
        default=10.0, gt=0, description="Effective requests of an option, over all groups, before it may be used"
    )
    min_group_requests: float = Field(
        default=1.0, ge=0, description="Effective requests of a group before it gets probabilities of its own"
    )
    max_groups: int = Field(default=64, ge=1, le=1_000, description="Groups with probabilities of their own, at most")

    # Estimates of quality
    quality_half_life_h: float = Field(default=2_160.0, gt=0, description="Half-life of a judged prompt, event")
    pseudo_trials: float = Field(
        default=20.0,
        gt=0,
        description="Prior weight, in judged prompts, of the pooled mean in each group's quality, until the data "
        "determine it (empirical Bayes)",
    )
    prior_trials: float = Field(
        default=2.0, gt=0, description="Weight, in judged prompts, of the prior that an option changes nothing"
    )
    sampling_unit: Literal["prompt", "request"] = Field(
        default="prompt",
        description="What standard errors count. prompt: different judged prompts, because traffic brings new prompts; "
        "request: every verdict, for traffic that keeps repeating the same prompts as often as the samples do",
    )
    min_trials: float = Field(
        default=20.0, gt=0, description="Effective judged prompts of an option, over all groups, before it may be used"
    )

    # Prior from an earlier fleet
    prior_file: Path | None = Field(
        default=None, description="File with the estimates of an earlier fleet: sprout policy export-prior"
    )
    prior_requests: float = Field(
        default=50.0,
        gt=0,
        le=10_000,
        description="What that prior counts as: requests of every option, and as many judged prompts in all, or fewer "
        "if it is uncertain",
    )

    # When to solve and to publish
    estimates_interval_min: float = Field(
        default=30.0, gt=0, description="Minutes between two checks for changed estimates, event"
    )
    evaluation_interval_s: float = Field(
        default=15.0,
        gt=0,
        description="Seconds between two such checks while footprints of a new evaluation may still arrive, event",
    )
    evaluation_window_min: float = Field(
        default=15.0,
        ge=0,
        description="Minutes after a new evaluation in which its footprints may still arrive, event",
    )
    estimates_change: float = Field(
        default=0.05,
        gt=0,
        description="Change of the estimates that triggers a solve: relative for energy and time, absolute for quality "
        "and traffic shares",
    )
    probability_change: float = Field(
        default=0.01, ge=0, description="Change of a probability that makes a policy worth publishing"
    )
    carbon_change: float = Field(
        default=0.05,
        ge=0,
        description="Relative change of the expected grams per request that makes a policy worth publishing",
    )
    bound_change: float = Field(
        default=0.005, ge=0, description="Change of a quality limit that makes a policy worth publishing"
    )

    # Capacity
    capacity_interval_s: float = Field(default=1.0, gt=0, description="Time between two plans of the endpoints, wall")
    capacity_margin: float = Field(
        default=2.0,
        ge=0,
        description="Spare places on the endpoints, in standard deviations of the number of running requests (its "
        "square root)",
    )
    capacity_dwell_min: float = Field(
        default=10.0, ge=0, description="Minutes that an endpoint stays awake after it was last needed, event"
    )
    wake_lead_s: float = Field(
        default=300.0,
        ge=0,
        description="How long before it is needed an endpoint wakes, event: at least the time to load the model",
    )
    capacity_validity_min: float = Field(
        default=10.0,
        gt=0,
        le=7 * 24 * 60,
        description="Lifetime of a plan, event; after it every endpoint counts as awake",
    )
    capacity_validity_s: float = Field(default=15.0, gt=0, description="Shortest lifetime of a plan, wall")
    capacity_shortest_s: float = Field(
        default=2.0, ge=0, description="Shortest dwell, lead and averaging time of a plan, wall; matters in replays"
    )
    forecast_h: int = Field(default=6, ge=0, le=24, description="Hours that the endpoints needed are forecast for")
    profile_half_life_h: float = Field(
        default=72.0, gt=0, description="Half-life of the arrivals by hour of day, event"
    )
    load_half_life_min: float = Field(
        default=15.0, gt=0, description="Half-life of the present load: arrivals and requests in flight, event"
    )
    load_expiry_s: float = Field(
        default=5.0, gt=0, description="A router or evaluator that has not reported its load for so long is gone, wall"
    )

    # Processing
    loop_interval_s: float = Field(
        default=0.25,
        gt=0,
        validation_alias=_renamed("LOOP_INTERVAL_S", "TURN_INTERVAL_S"),
        description="Shortest time between two passes of the solve loop, wall",
    )
    state_wait_s: float = Field(
        default=10.0,
        ge=0,
        description="At startup, how long to wait for the compacted topics to be read before solving, wall",
    )
    check_interval_min: float = Field(
        default=5.0, gt=0, description="Minutes between two passes of the solve loop when no message arrives, event"
    )
    batch_records: int = Field(default=2_000, ge=1, description="Footprints counted in one transaction, at most")
    batch_interval_s: float = Field(default=0.25, ge=0, description="Pause between two batches of footprints, wall")
    remembered_footprints: int = Field(
        default=100_000, ge=1_000, description="Ids of counted footprints kept, so that a redelivered one is ignored"
    )
    retry_pause_s: float = Field(default=1.0, gt=0, description="Pause before PostgreSQL is tried again, wall")

    @model_validator(mode="after")
    def _holdout_limits_are_ordered(self) -> Self:
        if self.holdout_minimum > self.holdout_maximum:
            raise ValueError(
                f"{_PREFIX}HOLDOUT_MINIMUM {self.holdout_minimum:g} is larger than {_PREFIX}HOLDOUT_MAXIMUM "
                f"{self.holdout_maximum:g}: lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _metrics_are_in_xi(self) -> Self:
        named = {
            "FLOORS": self.floors.keys(),
            "HOURLY_FLOORS": self.hourly_floors.keys(),
            "CONSTANT_BOUNDS": self.constant_bounds,
        }
        for name, metrics in named.items():
            if unknown := sorted(metrics - self.xi.keys()):
                raise ValueError(
                    f"{_PREFIX}{name} names {', '.join(unknown)}, which {_PREFIX}XI does not: add it there "
                    "(1.0 sets no limit on all traffic)"
                )
        return self

    @model_validator(mode="after")
    def _promise_is_stated(self) -> Self:
        if self.promise == "period" and "xi" not in self.model_fields_set:
            raise ValueError(
                f"{_PREFIX}PROMISE=period needs {_PREFIX}XI: the loss that the promise tolerates, by metric, such as "
                '{"preference": 0.05}; {"preference": 0} promises none'
            )
        if self.hourly_floors and self.promise != "period":
            raise ValueError(
                f"{_PREFIX}HOURLY_FLOORS needs {_PREFIX}PROMISE=period: an hourly promise is {_PREFIX}XI itself"
            )
        return self

    def confidence_z_of(self, metric: str) -> float:
        """Standard errors taken off the mean of a metric that is limited by itself."""
        return self.confidence_z_by_metric.get(metric, self.confidence_z)

    @property
    def validity(self) -> timedelta:
        """Lifetime of a policy, event time."""
        return timedelta(hours=self.validity_h)

    @property
    def renewal(self) -> timedelta:
        """A policy is renewed when it is valid for no longer than this, event time."""
        return timedelta(hours=self.validity_h / 3.0)

    @property
    def estimates_interval(self) -> timedelta:
        """Time between two checks for changed estimates, event time."""
        return timedelta(minutes=self.estimates_interval_min)

    @property
    def evaluation_interval(self) -> timedelta:
        """The same while footprints of a new evaluation may still arrive, event time."""
        return timedelta(seconds=self.evaluation_interval_s)

    @property
    def evaluation_window(self) -> timedelta:
        """Time after a new evaluation in which its footprints may still arrive, event time."""
        return timedelta(minutes=self.evaluation_window_min)

    @property
    def footprint_half_life_s(self) -> float:
        """Half-life of the estimates of energy and time, event seconds."""
        return self.footprint_half_life_h * _HOUR_S

    @property
    def profile_half_life_s(self) -> float:
        """Half-life of the arrivals by hour of day, event seconds."""
        return self.profile_half_life_h * _HOUR_S

    @property
    def quality_half_life_s(self) -> float:
        """Half-life of a judged prompt, event seconds."""
        return self.quality_half_life_h * _HOUR_S
