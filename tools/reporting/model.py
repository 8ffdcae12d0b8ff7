"""What a report says, as plain values: the command line prints them, draws them, or writes them as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from tools.reporting.preference import JudgedShare
from tools.reporting.savings import Interval, Saving


@dataclass(frozen=True, slots=True)
class Scope:
    """What the report is about; null means all.

    Attributes:
        first: when the first settled request began; null where there is none.
        last: when the last one did.
        intensity_g_per_kwh: mean over the requests.
    """

    since: datetime | None
    until: datetime | None
    model: str | None
    zone: str | None
    first: datetime | None
    last: datetime | None
    models: tuple[str, ...]
    zones: tuple[str, ...]
    intensity_g_per_kwh: float | None


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """Producers' requests.

    Attributes:
        answered: with an answer from a model server.
        unsettled: answered, but energy not attributed yet; they are in no other figure.
        refused: answered with an error code instead.
        refused_by_code: by error code.
        compared: in the saving.
        forced: not in the saving: the producer chose the directive.
        unidentified: not in the saving: the policy never drew the reference.
        without_intensity: not in the saving: the grid's intensity is unknown.
        fallback: served by the reference for want of a valid policy; compared, with a saving of 0.
    """

    answered: int
    settled: int
    unsettled: int
    refused: int
    refused_by_code: Mapping[str, int]
    compared: int
    forced: int
    unidentified: int
    without_intensity: int
    fallback: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class EnergyAccount:
    """Where the metered joules went. Never limited to a model: a meter does not know which one it measures.

    Attributes:
        metered_j: from the raw counters, last less first reading of each within the settled span, restarts allowed for.
        requests_j: footprints of requests; likewise the evaluator's generations and the judge.
        idle_j: power of servers that nothing ran on.
        unattributed_j: what no known call explains.
        unsettled_j: attributed to calls that are not settled yet.
    """

    metered_j: float
    requests_j: float
    evaluation_j: float
    judge_j: float
    idle_j: float
    unattributed_j: float
    unsettled_j: float

    @property
    def attributed_j(self) -> float:
        """Everything that the books explain: calls, idle, and what is booked as unexplained."""
        return self.requests_j + self.evaluation_j + self.judge_j + self.idle_j + self.unattributed_j + self.unsettled_j

    @property
    def difference_pct(self) -> float | None:
        """How far the books are from the meters, % of the meters; null where nothing was metered."""
        if self.metered_j <= 0:
            return None
        return 100.0 * (self.attributed_j - self.metered_j) / self.metered_j


@dataclass(frozen=True, slots=True)
class CarbonAccount:
    """Grams of everything that ran, gCO2eq; joules without a known intensity are counted, not guessed.

    Attributes:
        requests_g: operational and embodied; likewise the evaluator's generations and the judge.
        idle_g: of idle power.
        unattributed_g: of the energy that no known call explains.
        embodied_g: the embodied part of the calls' grams.
        unpriced_j: energy at unknown intensity, in none of the grams.
    """

    requests_g: float
    evaluation_g: float
    judge_g: float
    idle_g: float
    unattributed_g: float
    embodied_g: float
    unpriced_j: float

    @property
    def total_g(self) -> float:
        """All grams."""
        return self.requests_g + self.evaluation_g + self.judge_g + self.idle_g + self.unattributed_g

    @property
    def evaluation_share_pct(self) -> float | None:
        """Grams of evaluating, % of the requests' grams."""
        return 100.0 * (self.evaluation_g + self.judge_g) / self.requests_g if self.requests_g > 0 else None


@dataclass(frozen=True, slots=True)
class QualitySummary:
    """Quality of what was served.

    Attributes:
        preference_pct: expected preference of what was served relative to the reference, from all judged counts.
        unjudged: requests served under an option that was never judged; not in `preference_pct`.
        judged: pooled counts by metric, group and option.
        policies_below_bound: policies that counted on less quality than they had to keep.
    """

    preference_pct: float | None
    unjudged: int
    abstentions: int
    prompts: int
    judged: tuple[JudgedShare, ...]
    policies_below_bound: int

    @property
    def bound_kept(self) -> bool:
        """Whether every policy expected to keep its bound."""
        return self.policies_below_bound == 0


@dataclass(frozen=True, slots=True)
class ZoneRow:
    """Requests served in one zone."""

    zone: str
    requests: int
    intensity_g_per_kwh: float | None
    energy_j: float
    saving: Saving
    idle_j: float
    idle_g: float


@dataclass(frozen=True, slots=True)
class HourRow:
    """One hour of traffic.

    Attributes:
        intensity_g_per_kwh: mean over the hour's requests, by zone.
        mix: requests by option.
        emitted_g: grams of the compared requests.
        reference_g: the same at the reference: shape over the hours by the means of the groups at the hour's own
            intensity, level by the doubly robust total, to which the hours sum.
        reference_interval: the total's interval, shared out likewise.
        saving: the doubly robust estimate from this hour's requests alone; wide where few drew the reference.
        expected_quality: counted on by the policies in force, relative to the reference; null where none tells.
        quality_bound: what they had to keep.
        judged_quality: of what was served, from the judged counts.
    """

    start: datetime
    requests: int
    intensity_g_per_kwh: Mapping[str, float]
    mix: Mapping[str, int]
    energy_j: float
    completion_tokens: int
    compared: int
    emitted_g: float
    reference_g: float
    reference_interval: Interval | None
    saving: Saving
    expected_quality: float | None
    quality_bound: float | None
    judged_quality: float | None


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Requests of one prompt group.

    Attributes:
        task: the label that most of its requests carry; empty where most carry none.
        task_pct: share of its requests with that label.
    """

    group: str
    task: str
    task_pct: float
    requests: int
    mix: Mapping[str, int]
    energy_j: float
    completion_tokens: int
    saving: Saving
    preference_pct: float | None


@dataclass(frozen=True, slots=True)
class OptionRow:
    """Measured means of a group under an option: joules, seconds and tokens of a call."""

    group: str
    option: str
    calls: int
    energy_j: float
    processing_s: float


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One evaluation."""

    evaluation_id: str
    model: str
    at: datetime
    trigger: str
    intensity_g_per_kwh: float | None
    prompts: int
    abstentions: int
    calls: int
    energy_j: float
    carbon_g: float
    preference: Mapping[str, float]
    """Share preferred by option, all groups together."""


@dataclass(frozen=True, slots=True)
class GroupingRow:
    """A version of prompt groups that was learned."""

    version: str
    at: datetime
    prompts: int


@dataclass(frozen=True, slots=True)
class GridPoint:
    """Intensity of a zone at an instant."""

    zone: str
    at: datetime
    intensity_g_per_kwh: float
    estimated: bool


@dataclass(frozen=True, slots=True)
class Report:
    """How much carbon was saved, at which quality, and where every joule went.

    Attributes:
        options: every option that was served, reference first.
        references: reference options.
        implied_saving_pct: from the policies' probabilities and the measured means of every group and option.
        promised_saving_pct: what the policies themselves expected when they were solved.
        policies: how many were published in the period, by status.
    """

    scope: Scope
    requests: RequestCounts
    options: tuple[str, ...]
    references: tuple[str, ...]
    saving: Saving
    implied_saving_pct: float | None
    promised_saving_pct: float | None
    energy: EnergyAccount
    carbon: CarbonAccount
    quality: QualitySummary
    zones: tuple[ZoneRow, ...]
    hours: tuple[HourRow, ...]
    groups: tuple[GroupRow, ...]
    measured: tuple[OptionRow, ...]
    evaluations: tuple[EvaluationRow, ...]
    groupings: tuple[GroupingRow, ...]
    grid: tuple[GridPoint, ...]
    policies: Mapping[str, int]

    @property
    def empty(self) -> bool:
        """Whether nothing was answered or evaluated in the period."""
        return self.requests.answered == 0 and self.requests.refused == 0 and not self.evaluations

    @property
    def requests_by_learned_groups(self) -> int:
        """Requests that a learned prompt group was found for."""
        learned = tuple(f"{one.version}." for one in self.groupings)
        return sum(row.requests for row in self.groups if row.group.startswith(learned))

    @property
    def policies_published(self) -> int:
        """Policies of every status."""
        return sum(self.policies.values())
