"""Topics `policies` and `prompt-groups`: the probabilities of the options, and the learned groups they are for."""

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.messages.base import Identifier, Message, Probability, UtcDatetime, Value
from shared.messages.evaluation import DirectiveHashes, PromptHashes, QualityCount

PolicyStatus = Literal["optimal", "floors_dropped", "capacity_dropped", "reference"]
"""`floors_dropped` and `capacity_dropped` occur in policies of earlier releases only."""

PROBABILITY_TOLERANCE = 1e-6


class OptionEstimate(Value):
    """The optimizer's estimates for one option and one group when it solved the program."""

    energy_kwh: float = Field(ge=0)
    processing_s: float = Field(ge=0)
    server_s: float | None = Field(
        default=None, ge=0, description="Server time, for embodied carbon; null: processing_s, as in older policies"
    )
    quality: dict[str, float] = Field(description="Expected, by metric")
    doubt: dict[str, tuple[float, float, float]] = Field(
        default={},
        description="By metric: standard errors of the difference from the reference (baseline, no directive), of the "
        "group's own component, its family's and that of all groups; absent for a metric without uncertainty",
    )
    group_quality: dict[str, float] = Field(
        default={}, description="By metric with a group floor: lower confidence bound of this group's quality"
    )
    trials: float = Field(default=0.0, ge=0, description="Effective judged prompts behind the quality")
    requests: float = Field(default=0.0, ge=0, description="Effective requests behind energy and time")


class OptionInputs(Value):
    """What one option costs, whatever the group."""

    pool: Identifier
    g_per_kwh: float = Field(ge=0, description="PUE times the carbon intensity of the pool's zone")
    embodied_g_per_s: float = Field(ge=0, description="k1 of the pool")


class PoolPrice(Value):
    """What a token costs in a pool, J, and why.

    `average`: energy per token at the target batch, idle power included, because capacity follows the load. `marginal`:
    energy of one more token, because the servers run anyway. `attributed`: the energy attributed to calls so far,
    because no curve of the pool is known.
    """

    basis: Literal["average", "marginal", "attributed"]
    batch: float | None = Field(default=None, ge=0, description="Sequences per endpoint that the price is for")
    token_j: float | None = Field(default=None, ge=0, description="Per generated token; null where attributed")
    prompt_token_j: float | None = Field(default=None, ge=0, description="Per token of a prompt")
    server_token_s: float | None = Field(
        default=None, ge=0, description="Server time per generated token, for embodied carbon; null where attributed"
    )
    server_prompt_token_s: float | None = Field(default=None, ge=0, description="Server time per token of a prompt")
    meter_token_j: float | None = Field(
        default=None,
        ge=0,
        description="All that the meter shows at this batch per generated token, idle power included: how much of it "
        "one token less saves, `token_j` says",
    )
    reason: str


class LaterHoursInputs(Value):
    """Later hours of the period with similar carbon intensities."""

    share: Probability = Field(description="Of the requests that are still to come in the period")
    g_per_kwh: dict[str, float] = Field(description="By option: PUE times the carbon intensity of the pool's zone")


class PeriodAccount(Value):
    """What was promised to the requests of a period and what was kept: means over them, relative to the reference."""

    start: UtcDatetime
    end: UtcDatetime
    requests: float = Field(ge=0, description="Requests that were booked so far; estimated by the request rate")
    promised: dict[str, float] = Field(description="By metric: mean of what the hourly promise would require")
    kept: dict[str, float] = Field(description="By metric: mean of the lower confidence bounds that were served")


class PeriodPromise(Value):
    """A promise by period: its account when the policy was made, and what it leaves for the rest of the period."""

    current: PeriodAccount
    previous: PeriodAccount | None = Field(default=None, description="The period before, closed")
    rest: dict[str, float] = Field(
        description="By metric: mean quality needed in the rest of the period, relative to the reference; above 1 to "
        "make up for what was served so far"
    )
    hourly_floors: dict[str, Probability] = Field(default={}, description="By metric: required in every single hour")
    shortfall: float = Field(default=0.0, ge=0, description="By how much `rest` cannot be kept, at most")


class LimitOutcome(Value):
    """A quality limit in the solution of the program; every quality is relative to the reference.

    With a promise by period it is the limit on the rest of the period.
    """

    required: float
    mean: float = Field(description="Estimated quality of all traffic under the policy")
    margin: float = Field(ge=0, description="Safety margin: standard errors that are taken off the mean")
    carbon_points_per_point: float = Field(
        ge=0,
        description="Shadow price: rise of the expected carbon, in points of the reference's, for one more point of "
        "quality; 0 if the limit is not binding",
    )


class PolicyInputs(Value):
    """The inputs of the program."""

    solved_for: UtcDatetime = Field(description="Event time of the inputs")
    intensity_g_per_kwh: dict[str, float] = Field(description="k by zone")
    k0_zone: str = Field(description="Zone whose intensity sets the bounds")
    k0_g_per_kwh: float = Field(ge=0)
    k0_min_g_per_kwh: float = Field(ge=0, description="Over the trailing window")
    k0_max_g_per_kwh: float = Field(ge=0, description="Over the trailing window")
    xi: dict[str, float] = Field(description="By metric: largest relative quality loss tolerated")
    weights: dict[str, Probability] = Field(description="Share of the traffic, by group")
    families: dict[str, str] = Field(default={}, description="By group: its family of similar groups")
    cautions: dict[str, float] = Field(
        default={},
        description="By metric: confidence level as a number of standard errors that the quality of all traffic is "
        "lowered by",
    )
    estimates: dict[str, dict[str, OptionEstimate]] = Field(description="By group, then option")
    holdout: Probability = Field(description="Minimum probability of the reference in every group")
    saving_half_width_pct: float | None = Field(
        default=None,
        ge=0,
        description="Expected half-width of the 95 % interval of a day's attributed saving, points; null: not known",
    )
    options: dict[str, OptionInputs] = Field(
        default={}, description="By option that has a known price; empty in policies of the first release"
    )
    prices: dict[str, PoolPrice] = Field(
        default={}, description="By pool; the energy in `estimates` follows from it. Empty in older policies"
    )
    floors: dict[str, Probability] = Field(
        default={}, description="Minimum quality of every group relative to the reference's, by metric"
    )
    capacities: dict[str, float] = Field(default={}, description="Concurrent requests by pool with a limit")
    requests_per_s: float = Field(default=0.0, ge=0, description="Request rate that capacities are compared with")
    later: tuple[LaterHoursInputs, ...] = Field(
        default=(), description="With a promise by period: the hours that the options were chosen together with"
    )
    later_weights: dict[str, Probability] = Field(
        default={}, description="By group: share of the traffic in the `later` hours; empty: `weights`"
    )
    traffic_requests: float | None = Field(
        default=None, gt=0, description="Effective requests that `weights` were counted from; null in older policies"
    )


class Policy(Message):
    """Probabilities of every option for every prompt group of one model."""

    model: Identifier
    version: int = Field(ge=1, description="Increases by one with every policy of the model")
    group_version: str | None = Field(default=None, description="Version of the learned groups; null: task labels")
    created_at: UtcDatetime
    valid_until: UtcDatetime = Field(description="After this the router serves the reference")
    status: PolicyStatus
    overload: float = Field(
        default=0.0, ge=0, description="Share by which the load exceeds the pools' capacities, evenly; 0: they suffice"
    )
    reason: str = Field(description="What triggered it, the limits, and what is missing")
    reference: str = Field(description="Baseline option (no directive): served without a policy, and to the holdout")
    groups: dict[str, dict[str, Probability]] = Field(description="By group, then option")
    overall: dict[str, Probability] = Field(description="Probabilities for a group that is not in `groups`, by option")
    bounds: dict[str, float] = Field(
        description="By metric: required quality, relative to the reference. With a promise by period this hour is "
        "credited with it, and may be served below or above"
    )
    promise: PeriodPromise | None = Field(
        default=None, description="Promise by period; null: every hour keeps the bounds by itself"
    )
    expected_quality: dict[str, float] = Field(
        description="By metric: lower confidence bound of the quality, relative to the reference. With a promise by "
        "period the margin is this hour's part of the margin of the rest of the period"
    )
    expected_g_per_request: float = Field(ge=0)
    reference_g_per_request: float = Field(
        ge=0, description="The same traffic, all of it served by the reference option"
    )
    margin_g_per_request: float | None = Field(
        default=None,
        ge=0,
        description="Grams per request that the safety margins of the quality limits cost; null in older policies",
    )
    settled: dict[str, UtcDatetime] = Field(
        default={},
        description="By group: since when every policy found that further verdicts in it would change neither its "
        "option nor, noticeably, the safety margin; empty in older policies",
    )
    limits: dict[str, LimitOutcome] = Field(
        default={}, description="By metric; empty in older policies, and while the reference serves all requests"
    )
    extra_g: dict[str, dict[str, float]] = Field(
        default={},
        description="Why each group has its options. By group, then option: grams by which all traffic emits more for "
        "one more request with it, the quality that it loses made up for in other groups; 0: in use. Empty as `limits`",
    )
    inputs: PolicyInputs

    @model_validator(mode="after")
    def _rows_are_distributions(self) -> Self:
        for name, row in [("overall", self.overall), *self.groups.items()]:
            total = sum(row.values())
            if abs(total - 1.0) > PROBABILITY_TOLERANCE:
                raise ValueError(f"probabilities of {name!r} must sum to 1, got {total:.6f}")
        return self

    def row(self, group: str) -> dict[str, float]:
        """Probabilities by option for a prompt group; the overall ones for an unknown group."""
        return self.groups.get(group, self.overall)


class PackedArray(Value):
    """An array: little-endian bytes in C order, compressed with zlib, in base64."""

    dtype: Literal["<f2", "<f4", "<f8", "<i8"]
    shape: tuple[int, ...]
    data: str = Field(repr=False)


class GroupEvidence(Value):
    """The counts of one day's evaluations, by learned group."""

    evaluated_at: UtcDatetime = Field(description="Event time from which the counts are discounted")
    counts: tuple[QualityCount, ...]
    prompt_hashes: PromptHashes = Field(default={}, description="As in `quality`")


class GroupTaken(Value):
    """Energy, time and tokens of the judged answers of one group under one option."""

    group: Identifier
    option: str = Field(description="`<pool>/<level>`")
    requests: float = Field(gt=0)
    energy_kwh: float = Field(ge=0)
    processing_s: float = Field(ge=0)
    completion_tokens: float | None = Field(default=None, ge=0, description="Null in older messages")


class PromptGrouping(Message):
    """A version of a model's prompt groups; routers use it once a policy refers to it.

    It contains the counts of all judged prompts re-aggregated by the new groups, so a reader needs no earlier counts.
    Without a version there are no learned groups: a request's group is its task label.
    """

    model: Identifier
    version: Identifier | None = Field(description="Name of the version; null: no learned groups any more")
    learned_at: UtcDatetime
    prompts: int = Field(default=0, ge=0, description="Number of judged prompts the groups were learned from")
    names: tuple[Identifier, ...] = Field(default=(), description="Names of the groups; unique across versions")
    families: dict[str, Identifier] = Field(
        default={}, description="By group: its family of similar groups; empty: all are of one family"
    )
    features: int = Field(default=0, ge=0, description="Version of the prompt features")
    classifier: int = Field(default=1, ge=1, description="Version of the classifier that finds a prompt's group")
    arrays: dict[str, PackedArray] = Field(default={}, description="Parameters of the classifier, see shared/grouping")
    task_scores: dict[Identifier, tuple[float, ...]] = Field(
        default={},
        description="By task label: what it adds to the score of each group, in the order of `names`; other labels add "
        "nothing",
    )
    traffic: dict[str, Probability] = Field(default={}, description="By group: share of the sampled traffic")
    evidence: tuple[GroupEvidence, ...] = Field(default=(), description="Oldest first")
    taken: tuple[GroupTaken, ...] = ()
    directives: DirectiveHashes = Field(
        default={}, description="As in `quality`; with other texts neither `evidence` nor `taken` counts"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.version is not None and not (self.names and self.arrays):
            raise ValueError("a version of prompt groups must carry 'names' and 'arrays'")
        return self
