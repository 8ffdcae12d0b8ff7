"""Configuration of the optimizer, from `SPROUT_OPTIMIZER_*`."""

from datetime import timedelta
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.optimizer.caution import Caution
from services.optimizer.consumption import Memory
from services.optimizer.estimates import EstimateRules
from services.optimizer.planning import Aims
from services.optimizer.posterior import PosteriorRules
from services.optimizer.quality import QualityRules
from services.optimizer.triggers import TriggerRules
from shared.messages.base import Probability

_HOUR_S = 3_600.0


class OptimizerSettings(BaseSettings):
    """What is aimed at, what is believed, when it is solved. "Wall" means real time, "event" that of the clock."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_OPTIMIZER_", extra="ignore")

    # Aims
    xi: dict[str, Probability] = Field(
        default={"preference": 0.1},
        min_length=1,
        description='Largest relative quality loss by metric, on the dirtiest grid: JSON {"preference": 0.1}; '
        "the evaluator judges preference; another metric needs counts from elsewhere on the topic `quality`, and until "
        "there are enough the reference is served",
    )
    constant_bounds: frozenset[str] = Field(
        default=frozenset(),
        description="Metrics of xi whose loss is tolerated at all times, not only on the dirtiest grid: JSON "
        '["correctness"]',
    )
    floors: dict[str, Probability] = Field(
        default={},
        description="Least quality of every group, relative to the reference's, by metric of xi: JSON",
    )
    holdout: Probability = Field(default=0.05, description="Share of every group's traffic kept on the reference")
    validity_h: float = Field(
        default=3.0, gt=0, description="Without a newer policy the reference is served after so long, event"
    )

    # The grid
    max_intensity_age_s: float = Field(
        default=7_200.0, gt=0, description="After this the same hour's trailing mean stands in, event"
    )
    window_h: float = Field(default=720.0, gt=0, description="Trailing window of k0_min and k0_max, event")
    min_window_hours: int = Field(
        default=24, ge=2, description="Hours with a value in the window before any loss of quality is tolerated"
    )

    # Energy, time and traffic
    footprint_half_life_h: float = Field(default=24.0, gt=0, description="Of energy and time, event")
    traffic_half_life_h: float = Field(
        default=1.0, gt=0, description="Of the groups' shares of the traffic, which change with the hour, event"
    )
    rate_half_life_h: float = Field(default=1.0, gt=0, description="Of the request rate, event")
    pseudo_requests: float = Field(
        default=10.0, gt=0, description="Requests that the whole counts as, in each group's energy and time"
    )
    min_requests: float = Field(
        default=10.0, gt=0, description="Effective requests of an option, in all groups, before it may be used"
    )
    min_group_requests: float = Field(
        default=1.0, ge=0, description="Effective requests of a group before it gets probabilities of its own"
    )
    max_groups: int = Field(default=64, ge=1, le=1_000, description="Groups with probabilities of their own")

    # Quality
    quality_half_life_h: float = Field(default=720.0, gt=0, description="Of a judged prompt, event")
    pseudo_trials: float = Field(
        default=20.0,
        gt=0,
        description="Judged prompts that the whole counts as, in each group's quality, until the groups tell",
    )
    prior_trials: float = Field(default=2.0, gt=0, description="Judged prompts that the weak prior counts as")
    min_trials: float = Field(
        default=20.0, gt=0, description="Effective judged prompts of an option, in all groups, before it may be used"
    )
    caution: float = Field(
        default=1.645,
        ge=0,
        description="Standard deviations of all traffic's quality by which less than its mean is counted on, where one "
        "metric is bound; of two each takes 1.19 times as many, so that both hold as often as one would at 1.645",
    )
    cautions: dict[str, float] = Field(
        default={}, description='The same by metric, whatever else is bound: JSON {"correctness": 0.5}'
    )

    # When
    estimates_interval_min: float = Field(default=30.0, gt=0, description="Between two looks at the estimates, event")
    estimates_change: float = Field(
        default=0.05,
        gt=0,
        description="Relative of energy or time, absolute of a quality or traffic share, that calls for a solve",
    )
    probability_change: float = Field(default=0.01, ge=0, description="Of any option, that calls for publishing")
    carbon_change: float = Field(
        default=0.05, ge=0, description="Relative, of the expected grams per request, that calls for publishing"
    )
    bound_change: float = Field(default=0.005, ge=0, description="Of any bound, that calls for publishing")

    # The shell
    turn_interval_s: float = Field(default=0.25, gt=0, description="Between two looks at what has come in, wall")
    state_wait_s: float = Field(
        default=10.0, ge=0, description="At the start, for what is in force to be read before policies are made; wall"
    )
    check_interval_min: float = Field(
        default=5.0, gt=0, description="Between two looks when nothing comes in: at validity and ages; event"
    )
    batch_records: int = Field(default=2_000, ge=1, description="Footprints counted in one transaction, at most")
    batch_interval_s: float = Field(default=0.25, ge=0, description="Between two batches of footprints, wall")
    remembered_footprints: int = Field(
        default=100_000, ge=1_000, description="Counted footprints whose ids are kept, so that none counts twice"
    )
    retry_pause_s: float = Field(default=1.0, gt=0, description="Before PostgreSQL is tried again, wall")

    @model_validator(mode="after")
    def _metrics_are_measured(self) -> Self:
        for name, metrics in (("FLOORS", self.floors.keys()), ("CONSTANT_BOUNDS", self.constant_bounds)):
            if unknown := sorted(metrics - self.xi.keys()):
                raise ValueError(
                    f"SPROUT_OPTIMIZER_{name} names {', '.join(unknown)}, which SPROUT_OPTIMIZER_XI does not: add it "
                    "there (1.0 sets no bound on the whole)"
                )
        return self

    @property
    def _caution(self) -> Caution:
        return Caution(self.caution, self.cautions)

    @property
    def aims(self) -> Aims:
        """What the operator wants."""
        return Aims(
            xi=self.xi,
            constant_bounds=self.constant_bounds,
            floors=self.floors,
            caution=self._caution,
            holdout=self.holdout,
            validity=timedelta(hours=self.validity_h),
        )

    @property
    def estimate_rules(self) -> EstimateRules:
        """How evidence becomes estimates."""
        return EstimateRules(
            memory=Memory(
                half_life_s=self.footprint_half_life_h * _HOUR_S,
                traffic_half_life_s=self.traffic_half_life_h * _HOUR_S,
                rate_half_life_s=self.rate_half_life_h * _HOUR_S,
                max_groups=self.max_groups,
            ),
            quality=QualityRules(
                half_life_s=self.quality_half_life_h * _HOUR_S,
                posterior=PosteriorRules(
                    pseudo_trials=self.pseudo_trials,
                    prior_trials=self.prior_trials,
                    min_trials=self.min_trials,
                ),
                caution=self._caution,
            ),
            pseudo_requests=self.pseudo_requests,
            min_requests=self.min_requests,
            min_group_requests=self.min_group_requests,
            floors=frozenset(self.floors),
        )

    @property
    def trigger_rules(self) -> TriggerRules:
        """When something is material."""
        return TriggerRules(
            estimates_interval=timedelta(minutes=self.estimates_interval_min),
            estimates_change=self.estimates_change,
            probability_change=self.probability_change,
            carbon_change=self.carbon_change,
            bound_change=self.bound_change,
            renewal=timedelta(hours=self.validity_h / 3.0),
        )
