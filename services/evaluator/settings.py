"""Configuration of the evaluator, from `SPROUT_EVALUATOR_*`."""

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import AliasChoices, Field, HttpUrl, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from services.evaluator.opportunity import OpportunityRules, Variant
from shared.inference.attempts import RetrySettings
from shared.inference.balancer import CircuitBreakerSettings
from shared.runtime.database import RETRY_PAUSE_S
from shared.runtime.settings import DrawKeySettings, read_secret

MIN_TOKEN_CHARS: Final = 16
"""Minimum length of a token, which somebody could otherwise guess."""


MAX_RUBRIC_CHARS: Final = 4_000


class EvaluatorSettings(OpportunityRules, RetrySettings, CircuitBreakerSettings, DrawKeySettings):
    """When and how answers are judged. "Wall" means real seconds, "event" those of the clock."""

    model_config = SettingsConfigDict(
        env_prefix="SPROUT_EVALUATOR_",
        extra="ignore",
        env_ignore_empty=True,
        env_parse_none_str="null",
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    # When
    variant: Variant = Field(
        default="low_intensity",
        validation_alias=AliasChoices("sprout_evaluator_opportunity_rule", "sprout_evaluator_variant"),
        description="Rule that decides when to evaluate: low_intensity (in the lowest fifth of the trailing week), "
        "urgency (the paper's text) or published (the paper's code)",
    )
    zone: str | None = Field(
        default=None,
        min_length=1,
        description="Zone whose carbon intensity decides; default: the zone of each model's reference pool",
    )
    threshold_factor: float = Field(
        default=1.0,
        gt=0,
        description="No evaluation above this multiple of the rule's threshold (mean of the trailing window, or "
        "highest of the lowest fifth of the trailing week), unless overdue",
    )
    max_intensity_age_s: float = Field(
        default=3 * 3_600.0, gt=0, description="An older intensity triggers no evaluation, event"
    )
    reference_block_margin_s: float = Field(
        default=600.0,
        ge=0,
        description="No evaluation starts in a reference block (switchback) or this long before one, event",
    )
    retry_pause_s: float = Field(
        default=30.0, gt=0, description="Pause after a failed evaluation, wall; doubles with each failure in a row"
    )

    # Samples
    samples_per_group: int = Field(default=200, ge=1, description="Samples kept per model and prompt group")
    samples_per_model: int = Field(
        default=5_000, ge=1, description="Samples kept per model over all groups, divided by the groups' traffic"
    )
    max_sample_age_h: float = Field(
        default=7 * 24.0, gt=0, description="Retention of prompts: samples are deleted at this age, event hours"
    )

    # What
    prompts_per_evaluation: int = Field(default=500, ge=1, description="Maximum number of prompts in one evaluation")
    max_carbon_share: float | None = Field(
        default=0.02,
        gt=0,
        description="Ceiling of the evaluator's carbon as a share of the requests' in the last 7 days, except for the "
        "first evaluation and those that a person requests; null: no ceiling",
    )
    quality_half_life_h: float = Field(
        default=2_160.0,
        gt=0,
        description="Half-life of a judged prompt in the optimizer, event: what a verdict is worth",
    )
    settled_share: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Share of the prompts that are judged in groups in which further verdicts would change nothing; "
        "1: all",
    )
    min_samples: int = Field(default=60, ge=1, description="Samples of a model required for its first evaluation")
    min_prompts_per_group: int = Field(
        default=5, ge=0, description="Prompts taken from each group before the rest is divided by traffic share"
    )
    max_tokens: int = Field(
        default=1_024, ge=1, description="Maximum tokens of an answer, unless the request sets a lower limit"
    )

    # Prompt groups
    prompt_groups: Literal["learned", "task"] = Field(
        default="learned",
        description="learned: groups learned from judged prompts, once there are enough; task: task labels",
    )
    min_judged_to_learn: int = Field(
        default=600, ge=40, description="Different judged prompts required to learn groups"
    )
    prompts_per_group: int = Field(
        default=40, ge=15, description="Different judged prompts for each learned group, until there are 12 groups"
    )
    relearn_growth: float = Field(
        default=0.5,
        gt=0,
        validation_alias=AliasChoices("sprout_evaluator_relearn_growth", "sprout_evaluator_learn_again_share"),
        description="Groups are learned again after new judged prompts of this share of the previous training set",
    )
    max_judged_to_learn: int = Field(
        default=3_000,
        ge=40,
        description="Newest judged prompts that groups are learned from",
    )
    max_judged: int = Field(
        default=50_000,
        ge=40,
        description="Newest judged prompts that count, each in its group; the evaluator needs about 4 KB for each",
    )
    max_judged_age_h: float = Field(
        default=360 * 24.0,
        gt=0,
        description="Retention of verdicts and prompt features: deleted at this age, event hours; the optimizer "
        "halves a verdict's weight every 90 days",
    )

    # Model servers
    concurrency: int = Field(default=16, ge=1, le=1_000, description="Concurrent calls, over all evaluations")
    call_timeout_s: float = Field(default=120.0, gt=0, description="Timeout of one call including retries, wall")
    max_consecutive_failures: int = Field(
        default=10,
        ge=1,
        validation_alias=AliasChoices("sprout_evaluator_max_consecutive_failures", "sprout_evaluator_give_up_after"),
        description="Consecutive prompts without an answer or a verdict after which the evaluation fails",
    )
    stream: bool = Field(
        default=False,
        description="Stream from the model servers: measures the time to the first token, needs more CPU time",
    )
    first_chunk_timeout_s: float = Field(
        default=60.0, gt=0, description="A streaming server that sends nothing for this long has failed, wall"
    )
    max_attempts: int = Field(default=3, ge=1, description="Endpoints tried for one call")
    endpoint_check_interval_s: float = Field(default=5.0, gt=0, description="Interval of health checks, wall")
    endpoint_check_timeout_s: float = Field(default=2.0, gt=0, description="Timeout of a health check, wall")

    load_report_interval_s: float = Field(default=1.0, gt=0, description="Between two load reports, wall")

    # Judge
    judge: Literal["fleet", "openai"] = Field(
        default="fleet", description="fleet: the judge pool of the fleet file; openai: an OpenAI-compatible server"
    )
    judge_max_tokens: int = Field(default=1, ge=1, le=16, description="Maximum tokens of a vote, which is one letter")
    judge_url: HttpUrl | None = Field(default=None, description="Base URL of the OpenAI-compatible server, with /v1")
    judge_model: str | None = Field(default=None, min_length=1, description="Model of the OpenAI-compatible server")
    judge_api_key: SecretStr | None = Field(default=None, description="Bearer token; null: none is sent")
    judge_api_key_file: Path | None = Field(default=None, description="File that contains the token")
    judge_timeout_s: float = Field(default=30.0, gt=0, description="Timeout of one request to that server, wall")

    rubric: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_RUBRIC_CHARS,
        description="What makes an answer the best one, in sentences for the judge; default: correct and helpful",
    )
    rubric_file: Path | None = Field(default=None, description="File that contains the rubric")
    correctness: Literal["off", "exact", "bounded", "always"] = Field(
        default="bounded",
        description="Metric correctness. exact: with a number or a letter as reference, without a judge; bounded: the "
        "judge decides the rest while the current policy limits correctness; always: it always does",
    )
    not_worse: Literal["off", "bounded", "always"] = Field(
        default="bounded",
        description="Metric not_worse, whether an answer is at least as good as the reference option's. bounded: the "
        "judge compares the pairs while the current policy limits not_worse; always: it always does",
    )
    judge_max_unreadable: float = Field(
        default=0.5, ge=0, le=1, description="Share of unreadable replies above which the judge's verdicts do not count"
    )
    judge_max_flips: float = Field(
        default=0.9,
        ge=0,
        description="Votes on the same answers in another order differ this often, relative to random votes: above it "
        "they do not count",
    )
    judge_max_wrong_controls: float = Field(
        default=0.5, ge=0, le=1, description="Share of wrong control checks above which checks of meaning do not count"
    )

    # POST /evaluations
    http_token: SecretStr | None = Field(
        default=None, min_length=MIN_TOKEN_CHARS, description="Bearer token of POST /evaluations; null: it is off"
    )
    http_token_file: Path | None = Field(default=None, description="File that contains the token")

    # Kafka and PostgreSQL
    fetch_max_records: int = Field(default=500, ge=1, description="Maximum samples or footprints per batch")
    session_timeout_s: float = Field(default=6.0, ge=1.0, description="Session timeout of the consumer group, wall")
    database_retry_pause_s: float = Field(
        default=RETRY_PAUSE_S, gt=0, description="Pause before a batch is redelivered that could not be stored, wall"
    )
    poll_ms: int = Field(default=200, ge=1, le=10_000, description="Poll interval, wall")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.judge == "openai" and (self.judge_url is None or self.judge_model is None):
            raise ValueError("SPROUT_EVALUATOR_JUDGE=openai needs SPROUT_EVALUATOR_JUDGE_URL and _JUDGE_MODEL")
        if self.max_judged_to_learn < self.min_judged_to_learn:
            raise ValueError("max_judged_to_learn must not be below min_judged_to_learn")
        if self.max_judged < self.max_judged_to_learn:
            raise ValueError("max_judged must not be below max_judged_to_learn")
        if self.overdue_h <= self.min_gap_h:
            raise ValueError(f"overdue_h ({self.overdue_h:g}) must be longer than grace_h ({self.min_gap_h:g})")
        return self

    @model_validator(mode="after")
    def _read_files(self) -> Self:
        if self.judge_api_key_file is not None:
            if self.judge_api_key is not None:
                raise ValueError("set SPROUT_EVALUATOR_JUDGE_API_KEY or _JUDGE_API_KEY_FILE, not both")
            key = read_secret(self.judge_api_key_file, "SPROUT_EVALUATOR_JUDGE_API_KEY_FILE")
            self.judge_api_key = SecretStr(key)
        if self.http_token_file is not None:
            if self.http_token is not None:
                raise ValueError("set SPROUT_EVALUATOR_HTTP_TOKEN or SPROUT_EVALUATOR_HTTP_TOKEN_FILE, not both")
            token = read_secret(self.http_token_file, "SPROUT_EVALUATOR_HTTP_TOKEN_FILE")
            if len(token) < MIN_TOKEN_CHARS:
                raise ValueError(f"SPROUT_EVALUATOR_HTTP_TOKEN_FILE needs {MIN_TOKEN_CHARS} characters or more")
            self.http_token = SecretStr(token)
        if self.rubric_file is not None:
            if self.rubric is not None:
                raise ValueError("set SPROUT_EVALUATOR_RUBRIC or SPROUT_EVALUATOR_RUBRIC_FILE, not both")
            self.rubric = read_secret(self.rubric_file, "SPROUT_EVALUATOR_RUBRIC_FILE").strip()
            if not 0 < len(self.rubric) <= MAX_RUBRIC_CHARS:
                raise ValueError(f"SPROUT_EVALUATOR_RUBRIC_FILE needs 1 to {MAX_RUBRIC_CHARS} characters")
        return self
