"""Configuration of the evaluator, from `SPROUT_EVALUATOR_*`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, HttpUrl, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.evaluator.learning import LearningRules
from services.evaluator.opportunity import (
    PUBLISHED_URGENCY_PER_HOUR,
    URGENCY_PER_HOUR,
    OpportunityRules,
    Variant,
)
from shared.inference.attempts import RetrySettings
from shared.inference.balancer import CircuitBreakerSettings
from shared.runtime.secrets import read_secret


class EvaluatorSettings(BaseSettings):
    """When and how answers are judged. "Wall" means real seconds, "event" those of the clock."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_EVALUATOR_", extra="ignore", env_parse_none_str="null")

    # When
    variant: Variant = Field(default="urgency", description="urgency, or as the paper's code was published")
    zone: str | None = Field(
        default=None, min_length=1, description="Whose intensity decides; default: of each model's reference pool"
    )
    grace_h: float = Field(default=6.0, ge=0, description="No evaluation for so long after the last, event hours")
    overdue_h: float = Field(default=72.0, gt=0, description="An evaluation in any case after so long, event hours")
    urgency_per_hour: float | None = Field(
        default=None, ge=0, description="beta; default: ln 2 / 24, with variant published 0.029"
    )
    threshold_factor: float = Field(
        default=1.0, gt=0, description="Of the trailing window's mean: above it no evaluation, unless overdue"
    )
    max_intensity_age_s: float = Field(
        default=3 * 3_600.0, gt=0, description="An older intensity is no reason to evaluate, event"
    )
    retry_pause_s: float = Field(
        default=30.0, gt=0, description="After an evaluation that failed, wall; doubles with each in a row"
    )

    # Samples
    samples_per_group: int = Field(default=200, ge=1, description="Kept for each model and prompt group")
    max_sample_age_h: float = Field(
        default=7 * 24.0, gt=0, description="Prompts are deleted after so long, event hours: the retention of prompts"
    )

    # What
    prompts_per_evaluation: int = Field(default=150, ge=1, description="Most prompts in one evaluation")
    min_samples: int = Field(default=60, ge=1, description="Samples of a model before its first evaluation")
    min_prompts_per_group: int = Field(default=5, ge=0, description="From each group before traffic share counts")
    max_tokens: int = Field(default=1_024, ge=1, description="Most tokens of an answer; the request's own limit counts")

    # Prompt groups
    prompt_groups: Literal["learned", "task"] = Field(
        default="learned",
        description="Groups learned from judged prompts, once there are enough of these, or the producers' task labels",
    )
    min_judged_to_learn: int = Field(default=600, ge=40, description="Judged prompts before groups are learned")
    learn_again_share: float = Field(
        default=0.5, gt=0, description="Of the prompts learned from; so many newly judged ones have them learned anew"
    )
    max_judged_to_learn: int = Field(
        default=3_000, ge=40, description="Newest judged prompts learned from; memory and time grow with the square"
    )
    max_judged_age_h: float = Field(
        default=60 * 24.0, gt=0, description="Verdicts and the prompts' features are deleted after so long, event hours"
    )

    # Model servers
    concurrency: int = Field(default=16, ge=1, le=1_000, description="Calls at once, of all evaluations")
    call_timeout_s: float = Field(default=120.0, gt=0, description="For one call with its retries, wall")
    give_up_after: int = Field(
        default=10, ge=1, description="Prompts in a row that cannot be answered or judged: the evaluation has failed"
    )
    stream: bool = Field(
        default=False, description="Stream from the model servers: tells the time of the first token; costs processor"
    )
    first_chunk_timeout_s: float = Field(
        default=60.0, gt=0, description="A streaming server that says nothing for so long has failed, wall"
    )
    max_attempts: int = Field(default=3, ge=1, description="Endpoints asked for one call")
    endpoint_check_interval_s: float = Field(default=5.0, gt=0, description="Between health checks, wall")
    endpoint_check_timeout_s: float = Field(default=2.0, gt=0, description="For a health check's answer, wall")

    # Judge
    judge: Literal["fleet", "openai"] = Field(
        default="fleet", description="The judge pool of the fleet file, or an OpenAI-compatible server"
    )
    judge_max_tokens: int = Field(default=1, ge=1, le=16, description="A verdict is one letter")
    judge_url: HttpUrl | None = Field(default=None, description="Of the OpenAI-compatible server, up to /v1")
    judge_model: str | None = Field(default=None, min_length=1, description="Model to ask there")
    judge_api_key: SecretStr | None = Field(default=None, description="Bearer token; null: none is sent")
    judge_api_key_file: Path | None = Field(default=None, description="File that holds the token")
    judge_timeout_s: float = Field(default=30.0, gt=0, description="For one answer of that server, wall")

    # Kafka
    fetch_max_records: int = Field(default=500, ge=1, description="Samples or footprints handled at once")
    session_timeout_s: float = Field(
        default=6.0, ge=1.0, description="An evaluator that is silent for so long is given up by the group, wall"
    )
    poll_ms: int = Field(default=200, ge=1, le=10_000, description="Pause between two looks for messages, wall")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.judge == "openai" and (self.judge_url is None or self.judge_model is None):
            raise ValueError("SPROUT_EVALUATOR_JUDGE=openai needs SPROUT_EVALUATOR_JUDGE_URL and _JUDGE_MODEL")
        if self.judge_api_key is not None and self.judge_api_key_file is not None:
            raise ValueError("give SPROUT_EVALUATOR_JUDGE_API_KEY or _JUDGE_API_KEY_FILE, not both")
        if self.max_judged_to_learn < self.min_judged_to_learn:
            raise ValueError("max_judged_to_learn must not be below min_judged_to_learn")
        if self.overdue_h <= self.grace_h:
            raise ValueError(f"overdue_h ({self.overdue_h:g}) must be longer than grace_h ({self.grace_h:g})")
        if self.judge_api_key_file is not None:
            key = read_secret(self.judge_api_key_file, "SPROUT_EVALUATOR_JUDGE_API_KEY_FILE")
            self.judge_api_key = SecretStr(key)
        return self

    @property
    def opportunity_rules(self) -> OpportunityRules:
        """When it is time."""
        standard = PUBLISHED_URGENCY_PER_HOUR if self.variant == "published" else URGENCY_PER_HOUR
        return OpportunityRules(
            variant=self.variant,
            grace_h=self.grace_h,
            overdue_h=self.overdue_h,
            urgency_per_hour=standard if self.urgency_per_hour is None else self.urgency_per_hour,
        )

    @property
    def learning_rules(self) -> LearningRules | None:
        """When prompt groups are learned; null: never."""
        if self.prompt_groups == "task":
            return None
        return LearningRules(
            least=self.min_judged_to_learn, growth=self.learn_again_share, most=self.max_judged_to_learn
        )

    @property
    def retry_rules(self) -> RetrySettings:
        """When a failed call is repeated."""
        return RetrySettings(max_attempts=self.max_attempts)

    @property
    def cool_down_rules(self) -> CircuitBreakerSettings:
        """When an endpoint is left alone."""
        return CircuitBreakerSettings()
