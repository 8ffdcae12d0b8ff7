"""Topics `samples`, `usage` and `quality`: what the evaluator learns from, spends, and finds."""

from typing import Literal

from pydantic import Field

from shared.messages.base import Identifier, Level, Message, UtcDatetime, Value, Zone
from shared.messages.requests import ChatMessage, SamplingParameters


class Sample(Message):
    """A prompt kept aside for the evaluator."""

    request_id: Identifier
    model: Identifier
    group: Identifier
    task: str | None = None
    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    sampling: SamplingParameters = Field(default_factory=SamplingParameters)
    sampled_at: UtcDatetime


class UsageRecord(Message):
    """A call on a model server that no producer asked for; the ledger attributes energy to it as to a request."""

    id: Identifier
    purpose: Literal["evaluation", "judge"]
    evaluation_id: Identifier
    model: Identifier
    pool: Identifier
    level: Level
    zone: Zone
    endpoint: Identifier
    group: Identifier
    started_at: UtcDatetime
    first_token_at: UtcDatetime | None = None
    finished_at: UtcDatetime
    prompt_tokens: int | None = Field(default=None, ge=0)
    completion_tokens: int = Field(ge=0)


class Paired(Value):
    """How an option and the reference did on the same prompts."""

    reference: str = Field(description="`<pool>/<level>`")
    successes: float = Field(ge=0, description="the reference's, on these prompts")
    both: float = Field(
        ge=0,
        description="sum over the prompts of the lesser success: of right answers, on how many prompts both were right",
    )


class QualityCount(Value):
    """Judged outcomes of one prompt group under one option, for one metric."""

    group: Identifier
    option: str = Field(description="`<pool>/<level>`")
    metric: Identifier = Field(description="`preference`, `correctness`, ...")
    successes: float = Field(ge=0, description="preferred (ties may be shared), or correct, answers")
    trials: float = Field(ge=0, description="prompts with a verdict")
    paired: Paired | None = Field(default=None, description="Null: not known, or not of all these prompts")


class EvaluationCost(Value):
    """The work of an evaluation; its joules and grams are in the footprints that carry the evaluation's id."""

    generations: int = Field(ge=0)
    judgements: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    processing_s: float = Field(ge=0)
    energy_kwh: float | None = Field(
        default=None,
        ge=0,
        description="Estimate from the footprints of earlier evaluations; null before the first",
    )
    carbon_g: float | None = Field(default=None, ge=0, description="The same estimate at the intensity in force")


class Quality(Message):
    """The outcome of one evaluation of one model."""

    evaluation_id: Identifier
    model: Identifier
    evaluated_at: UtcDatetime
    trigger: str = Field(description="Why the evaluator ran: local_minimum, overdue, first, requested")
    intensity_g_per_kwh: float | None = Field(default=None, ge=0, description="Of the evaluator's zone when it ran")
    counts: tuple[QualityCount, ...]
    prompts: int = Field(ge=0, description="Prompts evaluated")
    abstentions: int = Field(ge=0, description="Prompts without a usable verdict")
    cost: EvaluationCost
