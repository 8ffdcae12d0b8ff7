"""The report as dataclasses. The field names are keys of the JSON document, and columns of the CSV files."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from tools.reporting.decisions import LimitRow
from tools.reporting.judging import JudgeReport
from tools.reporting.meter_model import Metered
from tools.reporting.out_of_sample import QualityWeek
from tools.reporting.promise import PromisedHour, PromisedPeriod
from tools.reporting.quality import NOT_WORSE, JudgedShare
from tools.reporting.savings import Interval, NetSaving, Saving


@dataclass(frozen=True, slots=True)
class Scope:
    """The selection of the report; None means all.

    Attributes:
        first, last: start of the first and last settled request; None if there is none.
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
    """Requests of clients.

    Attributes:
        answered: answered by a model server.
        settled: answered, and their energy is attributed.
        unsettled: answered, but their energy is not attributed yet; in no other figure.
        shared_ids: answered requests of the last days whose id another one has; None: too many to count.
        refused: rejected with an error code.
        refused_by_code: by error code.
        compared: included in the saving.
        forced: excluded from the saving because the client chose the directive.
        unidentified: excluded because the policy could not choose the reference.
        without_intensity: excluded because the carbon intensity is unknown.
        fallback: served by the reference without a valid policy; compared, with a saving of 0.
        switchback: served by the reference in a reference block of the switchback; compared, with a saving of 0.
    """

    answered: int
    settled: int
    unsettled: int
    shared_ids: int | None
    refused: int
    refused_by_code: Mapping[str, int]
    compared: int
    forced: int
    unidentified: int
    without_intensity: int
    fallback: int
    switchback: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class EnergyAccount:
    """How the metered energy was used, J. Always for all models: a meter does not distinguish them.

    Attributes:
        metered_j: from the raw counters within the settled time, resets considered.
        requests_j, evaluation_j, judge_j: footprints of requests, of the evaluator's generations, and of the judge.
        idle_j: idle power of the servers.
        unattributed_j: energy without a known call.
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
        """All accounted energy: calls, idle and unattributed."""
        return self.requests_j + self.evaluation_j + self.judge_j + self.idle_j + self.unattributed_j + self.unsettled_j

    @property
    def difference_pct(self) -> float | None:
        """Accounted minus metered energy, % of the metered; None if nothing was metered."""
        if self.metered_j <= 0:
            return None
        return 100.0 * (self.attributed_j - self.metered_j) / self.metered_j


@dataclass(frozen=True, slots=True)
class CarbonAccount:
    """Carbon of all metered energy, gCO2eq. Energy without a known intensity is reported, not estimated.

    Attributes:
        requests_g, evaluation_g, judge_g: operational and embodied carbon of the calls.
        idle_g: of idle energy, and embodied carbon of the servers' time without calls.
        unattributed_g: of energy without a known call.
        embodied_g: the embodied part of all carbon.
        unpriced_j: energy at unknown intensity, J; in none of the grams.
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
        """Sum of all uses."""
        return self.requests_g + self.evaluation_g + self.judge_g + self.idle_g + self.unattributed_g

    @property
    def evaluation_share_pct(self) -> float | None:
        """Carbon of evaluations and judge, % of the requests' carbon."""
        return 100.0 * (self.evaluation_g + self.judge_g) / self.requests_g if self.requests_g > 0 else None


@dataclass(frozen=True, slots=True)
class QualitySummary:
    """Quality of the answers served.

    Attributes:
        preference_pct: preference rate of the served options relative to the reference, from all judged counts.
        limited_metric: preference, or not_worse if the policies limit only that; `limited_pct` is its value for the
            served options relative to the reference, likewise.
        unjudged: requests served at an option that was never judged; not in `preference_pct`.
        abstentions: judged prompts without a conclusive judgment.
        prompts: judged prompts.
        judged: counts by metric, group and option.
        policies_below_bound: policies that expected a quality below their bound.
    """

    preference_pct: float | None
    limited_metric: str
    limited_pct: float | None
    unjudged: int
    abstentions: int
    prompts: int
    judged: tuple[JudgedShare, ...]
    policies_below_bound: int

    @property
    def not_worse_pct(self) -> float | None:
        """Share of the served answers that are not worse than the reference's, %; None if it is not limited."""
        return self.limited_pct if self.limited_metric == NOT_WORSE else None

    @property
    def bound_kept(self) -> bool:
        """Whether every policy expected to meet its bounds."""
        return self.policies_below_bound == 0


@dataclass(frozen=True, slots=True)
class ZoneRow:
    """Requests served in one zone, and its idle energy."""

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
        reference_g: their grams at the reference: the doubly robust total, allocated to the hours in proportion to the
            groups' mean energy at the hour's intensity.
        reference_interval: the interval of the total, allocated likewise.
        saving: the doubly robust estimate from only this hour's requests; wide with few reference calls.
        expected_quality: quality relative to the reference that the active policies expected; None if unknown.
        quality_bound: the quality that they had to meet.
        judged_quality: quality of the served options, from the judged counts.
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
    """Requests of one prompt group, or of all small ones together.

    Attributes:
        task: the most frequent task label; empty if most requests have none, or if few requests have it.
        task_pct: share of its requests with that label.
        groups: number of groups that are counted here.
        settled_since: since when further verdicts would not change the group's option, by the newest policy; None: they
            might, or several groups are counted here.
        not_judged: sampled prompts that were not judged for that reason.
        next_option: the best option that the newest policy does not choose; None: there is none, it is not known, or
            several groups are counted here.
        next_option_extra_g: gCO2eq by which all traffic would emit more for one more request with it.
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
    groups: int = 1
    settled_since: datetime | None = None
    not_judged: int = 0
    next_option: str | None = None
    next_option_extra_g: float | None = None


@dataclass(frozen=True, slots=True)
class OptionRow:
    """Mean energy (J) and time (s) of the calls of a group at an option."""

    group: str
    option: str
    calls: int
    energy_j: float
    processing_s: float


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One evaluation; `preference` is the share preferred by option, over all groups."""

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


@dataclass(frozen=True, slots=True)
class GroupingRow:
    """A version of learned prompt groups, and the number of judged prompts it was learned from."""

    version: str
    at: datetime
    prompts: int


@dataclass(frozen=True, slots=True)
class GridPoint:
    """Carbon intensity of a zone at one time."""

    zone: str
    at: datetime
    intensity_g_per_kwh: float
    estimated: bool


@dataclass(frozen=True, slots=True)
class Report:
    """How much carbon was saved, at which quality, and how the energy was used.

    Attributes:
        options: all options served, reference first.
        references: reference options.
        saving: attributed: what the requests emitted, against the baseline; the evaluator is not subtracted.
        net: the same less the evaluator's grams.
        metered: saving on the meter, capacity and latency of the whole fleet.
        implied_saving_pct: computed from the policies' probabilities and the measured means by group and option.
        promised_saving_pct: predicted by the policies when they were solved.
        measured: mean energy and time by group and option.
        policies: number of policies published in the period, by status.
        judge: what is known of the judge; None: no evaluation says it.
        promised_periods, promised_hours: the account of promises by period; empty with hourly promises.
        quality_weeks: quality by verdicts that the policies had not learned from.
        limits: the quality limits of the newest policies.
    """

    scope: Scope
    requests: RequestCounts
    options: tuple[str, ...]
    references: tuple[str, ...]
    saving: Saving
    net: NetSaving
    metered: Metered
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
    judge: JudgeReport | None = None
    promised_periods: tuple[PromisedPeriod, ...] = ()
    promised_hours: tuple[PromisedHour, ...] = ()
    quality_weeks: tuple[QualityWeek, ...] = ()
    limits: tuple[LimitRow, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing was answered, rejected or evaluated in the period."""
        return self.requests.answered == 0 and self.requests.refused == 0 and not self.evaluations

    @property
    def requests_by_learned_groups(self) -> int:
        """Number of requests assigned to a learned prompt group."""
        learned = tuple(f"{one.version}." for one in self.groupings)
        return sum(row.requests for row in self.groups if row.group.startswith(learned))

    @property
    def policies_published(self) -> int:
        """Number of policies of any status."""
        return sum(self.policies.values())
