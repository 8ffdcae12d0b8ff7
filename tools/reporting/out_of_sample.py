"""Quality out of sample by week: policies scored by verdicts that they had not learned from."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from shared.messages import Quality
from shared.prequential import PoliciesInForce, QualityScore, combined
from tools.reporting.quality import PolicyHistory


@dataclass(frozen=True, slots=True)
class QualityWeek:
    """Quality of a model's policies in a week, % of the baseline's, from the evaluations of that week.

    Attributes:
        start: Monday, 0:00 UTC.
        quality_pct: None with too few verdicts; `low_pct` and `high_pct` are its 95 % interval.
        bound_pct: what the policies had to keep, and `promised_pct` the lower confidence bound that they expected:
            means over the time for which the evaluations stand. None if a policy did not limit the metric.
    """

    model: str
    metric: str
    start: datetime
    evaluations: int
    prompts: float
    quality_pct: float | None
    low_pct: float | None
    high_pct: float | None
    bound_pct: float | None
    promised_pct: float | None


def quality_weeks(policies: PolicyHistory, qualities: Iterable[Quality]) -> tuple[QualityWeek, ...]:
    """Every week with an evaluation that scores a policy, by model and metric, oldest first."""
    by_week: dict[tuple[str, str, datetime], list[QualityScore]] = defaultdict(list)
    evaluations = sorted(qualities, key=lambda one: (one.evaluated_at, one.evaluation_id))
    for model in sorted({one.model for one in evaluations}):
        in_force = PoliciesInForce()
        for policy in policies.created_between(None, None, model):
            in_force.add(policy)
        for evaluation in evaluations:
            if evaluation.model == model:
                counts = evaluation.independent_counts()
                for one in in_force.scored(evaluation.evaluation_id, counts, evaluation.evaluated_at):
                    by_week[model, one.metric, _monday(one.until)].append(one)
    return tuple(_week(*key, scores) for key, scores in sorted(by_week.items()))


def latest_week(weeks: Sequence[QualityWeek], metric: str) -> QualityWeek | None:
    """The last week with a figure of a metric."""
    known = [one for one in weeks if one.metric == metric and one.quality_pct is not None]
    return max(known, key=lambda one: one.start, default=None)


def _week(model: str, metric: str, start: datetime, scores: Sequence[QualityScore]) -> QualityWeek:
    found = combined(scores)
    seconds = sum((one.until - one.since).total_seconds() for one in scores)

    def mean_pct(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        if len(known) < len(scores):
            return None
        lengths = [(one.until - one.since).total_seconds() for one in scores]
        return 100.0 * sum(value * length for value, length in zip(known, lengths, strict=True)) / seconds

    return QualityWeek(
        model=model,
        metric=metric,
        start=start,
        evaluations=len(scores),
        prompts=sum(one.prompts for one in scores),
        quality_pct=None if found is None else 100.0 * found.estimate,
        low_pct=None if found is None else 100.0 * found.low,
        high_pct=None if found is None else 100.0 * found.high,
        bound_pct=mean_pct([one.bound for one in scores]),
        promised_pct=mean_pct([one.promised for one in scores]),
    )


def _monday(at: datetime) -> datetime:
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight - timedelta(days=at.weekday())
