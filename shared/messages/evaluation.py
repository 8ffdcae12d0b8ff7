"""Topics `samples`, `usage` and `quality`: the evaluator's prompts, its own calls on model servers, its results.

`JudgeCard` is how the judge of an evaluation voted: counts that add up over prompts and evaluations.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field

from shared.messages.base import Identifier, Level, Message, RequestMessage, UtcDatetime, Value, Zone
from shared.messages.generation import ChatMessage, ReferenceAnswer, SamplingParameters

MAX_SERVED_CHARS: Final = 32_000


class LengthSums(Value):
    """Sums over compared prompts, for the dependence of an option's preference on the length of its answers.

    x = ln(length of the option's answer / length of the reference's), d = the option's outcome minus the reference's.
    """

    prompts: int = Field(default=0, ge=0)
    x: float = 0.0
    xx: float = 0.0
    d: float = 0.0
    xd: float = 0.0

    def __add__(self, other: Self) -> "LengthSums":
        return LengthSums(**_sums(self, other))


class JudgeCard(Value):
    """Counts of a judge's votes and checks."""

    votes: int = Field(default=0, ge=0, description="Comparisons of all answers to a prompt in one order")
    unreadable: int = Field(default=0, ge=0, description="Votes that named no answer")
    positions: dict[str, int] = Field(default={}, description="Votes by the letter that they named")
    first_expected: float = Field(default=0.0, ge=0, description="Votes for A if the position had no influence")
    comparisons: int = Field(default=0, ge=0, description="Prompts whose answers were compared")
    ties: int = Field(default=0, ge=0, description="Comparisons without a majority")
    repeats: int = Field(
        default=0,
        ge=0,
        description="Pairs of votes on the same answers in different orders, of those that are always asked",
    )
    flips: int = Field(default=0, ge=0, description="Of these, pairs that named different answers")
    flips_at_random: float = Field(default=0.0, ge=0, description="The same, if votes were drawn at random")
    length_pairs: int = Field(default=0, ge=0, description="Pairs of answers of different length, one of them better")
    longer_preferred: int = Field(default=0, ge=0, description="Of these, pairs whose longer answer was better")
    gold: int = Field(
        default=0, ge=0, description="Comparisons of right with wrong answers, known without the judge, and no tie"
    )
    gold_agreeing: int = Field(default=0, ge=0, description="Of these, comparisons in which a right answer won")
    checks: int = Field(default=0, ge=0, description="Questions whether two texts mean the same")
    checks_yes: int = Field(default=0, ge=0)
    checks_open: int = Field(default=0, ge=0, description="Replies that the question has no particular answer")
    checks_unreadable: int = Field(default=0, ge=0, description="Replies of another form")
    check_repeats: int = Field(default=0, ge=0, description="Pairs of checks of the same answers in both orders")
    check_flips: int = Field(default=0, ge=0, description="Of these, pairs with different replies")
    controls_same: int = Field(default=0, ge=0, description="Control checks of a text with itself")
    controls_same_wrong: int = Field(default=0, ge=0, description="Of these, checks with the reply no")
    controls_other: int = Field(default=0, ge=0, description="Control checks with an unrelated text")
    controls_other_wrong: int = Field(default=0, ge=0, description="Of these, checks with the reply yes")
    lengths: dict[str, LengthSums] = Field(default={}, description="By option; lengths in characters")

    def __add__(self, other: Self) -> "JudgeCard":
        return JudgeCard(**_sums(self, other))


def _sums(first: Value, second: Value) -> dict[str, Any]:
    return {name: _sum(getattr(first, name), getattr(second, name)) for name in type(first).model_fields}


def _sum(first: Any, second: Any) -> Any:  # noqa: ANN401 - numbers, messages or mappings of these
    if isinstance(first, Mapping):
        both = {**first, **second}
        return {key: _sum(first[key], second[key]) if key in first and key in second else both[key] for key in both}
    return first + second


PromptHash = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
"""Keyed hash of a conversation: the same prompt in another request has the same."""

PromptHashes = dict[Identifier, tuple[PromptHash, ...]]
"""By prompt group: the hash of each judged prompt, once for every verdict on it."""

DirectiveHashes = dict[Level, Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]]
"""By level: hash of its directive's text, see `Fleet.directive_hashes`."""


class ServedAnswer(Value):
    """The answer that a sampled request got, so that the evaluator need not generate it again."""

    option: str = Field(description="`<pool>/<level>`")
    directive: str = Field(description="Text of the level's directive at that time; empty for no directive")
    text: str = Field(max_length=MAX_SERVED_CHARS, repr=False)
    completion_tokens: int = Field(ge=0)
    processing_s: float = Field(ge=0, description="From sending the request to the last token, event time")


class Sample(RequestMessage):
    """A prompt kept for evaluation."""

    model: Identifier
    group: Identifier
    task: str | None = None
    tenant: str | None = None
    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    sampling: SamplingParameters = Field(default_factory=SamplingParameters)
    reference: ReferenceAnswer = None
    served: ServedAnswer | None = Field(
        default=None,
        description="null: the answer was cut off by a deadline or a cancellation, is too long, or is not to be stored",
    )
    sampled_at: UtcDatetime


class UsageRecord(Message):
    """A call of the evaluator on a model server; the ledger attributes energy to it as it does to a request."""

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
    """Results of an option and the reference (baseline, no directive) on the same prompts."""

    reference: str = Field(description="`<pool>/<level>`")
    successes: float = Field(ge=0, description="Of the reference, on these prompts")
    both: float = Field(
        ge=0,
        description="Sum over the prompts of the smaller of the two successes; for correctness: prompts that both "
        "answered correctly",
    )


class QualityCount(Value):
    """Judged outcomes of one prompt group under one option, for one metric."""

    group: Identifier
    option: str = Field(description="`<pool>/<level>`")
    metric: Identifier = Field(description="`preference`, `correctness`, ...")
    successes: float = Field(ge=0, description="Answers preferred (ties may count as half), or correct")
    trials: float = Field(ge=0, description="Prompts with a verdict")
    paired: Paired | None = Field(default=None, description="null where it is not known for all of these prompts")

    def scaled(self, factor: float) -> "QualityCount":
        """The same rates of another number of prompts."""
        paired = self.paired and self.paired.model_copy(
            update={"successes": factor * self.paired.successes, "both": factor * self.paired.both}
        )
        update = {"successes": factor * self.successes, "trials": factor * self.trials, "paired": paired}
        return self.model_copy(update=update)


class EvaluationCost(Value):
    """The work of an evaluation; its energy and carbon are in the footprints with the evaluation's id."""

    generations: int = Field(ge=0)
    reused: int = Field(default=0, ge=0, description="Served answers that were judged without generating them again")
    judgements: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    processing_s: float = Field(ge=0)
    energy_kwh: float | None = Field(
        default=None,
        ge=0,
        description="Estimate from the footprints of earlier evaluations; null before the first",
    )
    carbon_g: float | None = Field(
        default=None, ge=0, description="The same estimate, at the carbon intensity of that time"
    )


class Quality(Message):
    """The result of one evaluation of one model."""

    evaluation_id: Identifier
    model: Identifier
    evaluated_at: UtcDatetime
    trigger: str = Field(
        description="What started the evaluation: low_intensity, local_minimum, overdue, first, requested"
    )
    intensity_g_per_kwh: float | None = Field(default=None, ge=0, description="Of the evaluator's zone at that time")
    counts: tuple[QualityCount, ...]
    prompt_hashes: PromptHashes = Field(
        default={},
        description="By group: a keyed hash of each judged conversation, once per verdict; verdicts on the same "
        "conversation are not independent. Empty from earlier evaluators",
    )
    prompts: int = Field(ge=0, description="Prompts evaluated")
    abstentions: int = Field(ge=0, description="Prompts without a usable verdict")
    skipped: int = Field(
        default=0, ge=0, description="Sampled prompts that were not judged: the decision of their group is settled"
    )
    skipped_by_group: dict[Identifier, int] = Field(
        default={}, description="The same by prompt group; empty from earlier evaluators"
    )
    directives: DirectiveHashes = Field(
        default={},
        description="By level: hash of the directive's text that was compared; where a reader's fleet has another text "
        "for one of these levels, the evaluation does not count. Empty from earlier evaluators",
    )
    judge: JudgeCard | None = Field(default=None, description="How the judge voted; null from earlier evaluators")
    rubric: Identifier | None = Field(default=None, description="Judge's rubric: `default`, or a hash of its text")
    discarded: dict[str, str] = Field(
        default={}, description="Metrics whose outcomes do not count because the judge failed, with the reason"
    )
    cost: EvaluationCost

    def independent_counts(self) -> tuple[QualityCount, ...]:
        """The counts with as many trials as independent prompts would have had the same standard error.

        With n_i verdicts on prompt i of a group these are (sum n_i)^2 / (sum n_i^2) prompts (Kish's effective sample
        size): a prompt's verdicts are taken for copies of each other.
        """
        factors = {}
        for group, hashes in self.prompt_hashes.items():
            verdicts = Counter(hashes).values()
            factors[group] = sum(verdicts) / max(sum(n * n for n in verdicts), 1)
        return tuple(one.scaled(factors.get(one.group, 1.0)) for one in self.counts)
