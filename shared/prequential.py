"""Quality out of sample: verdicts score the policies that served before they were learned from.

A quality that is computed from the verdicts that chose the policy is too high: the program prefers options that look
good by chance. So every evaluation scores, before the optimizer learns from it, the policies active since the
evaluation before it (prequential evaluation, Dawid 1984). The verdicts are independent of these policies.

The served quality is A = sum over groups g and options o of w[g] x[g,o] p[g,o], with the traffic w and the
probabilities x of the policies and the success rates p of the fresh verdicts; B is the same for the reference, and the
figure is R = A / B. Its variance is that of a ratio of means, stratified by group. See
docs/decisions/0042-quality-out-of-sample.md.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import NormalDist
from typing import Final

from shared.messages import Policy, QualityCount

CONFIDENCE: Final = 0.95
MIN_PROMPTS: Final = 20
"""Judged prompts below which a figure has no interval, and is not shown."""

MAX_INTERVAL: Final = timedelta(days=7)
"""Longest time that an evaluation stands for: its prompts are at most that old."""

PROMISED_MISSES: Final = 0.05
"""Share of evaluations that may miss what the policies promised. With a margin of one standard error an honest promise
is missed by no more, unless evaluations have more than four times the prompts that the policy had learned from."""

_PRIOR_PROMPTS: Final = 5.0
"""Weight of the mean variance of all groups in a group's own, in prompts: few prompts may all agree by chance."""

_ROUNDING: Final = 1e-6
_SMALLEST_TAIL: Final = 1e-15

Served = Mapping[str, Mapping[str, float]]
"""Share of the traffic by prompt group, then option; sums to 1."""


@dataclass(frozen=True, slots=True)
class QualityScore:
    """What one evaluation says of the policies that served before it, for one metric.

    Attributes:
        since, until: time in which they were active; `until` is the evaluation's.
        promised: lower confidence bound that the policies expected, and `bound` what they had to meet; means over the
            time, relative to the reference; None if a policy does not limit the metric.
        prompts: with a verdict.
        served, reference: A and B.
        served_variance, reference_variance, covariance: of A and B.
    """

    evaluation_id: str
    model: str
    metric: str
    since: datetime
    until: datetime
    promised: float | None
    bound: float | None
    prompts: float
    served: float
    reference: float
    served_variance: float
    reference_variance: float
    covariance: float


@dataclass(frozen=True, slots=True)
class QualityInterval:
    """Quality relative to the reference, with a two-sided interval of confidence `CONFIDENCE`."""

    estimate: float
    standard_error: float
    prompts: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.estimate - _deviate(0.5 + CONFIDENCE / 2.0) * self.standard_error

    @property
    def high(self) -> float:
        """Upper end."""
        return self.estimate + _deviate(0.5 + CONFIDENCE / 2.0) * self.standard_error


class PoliciesInForce:
    """Policies of one model since its last evaluation, with the times for which they were active."""

    def __init__(self) -> None:
        self._policies: list[Policy] = []
        self._since: datetime | None = None

    def add(self, policy: Policy) -> None:
        """A policy replaces the active one when it is made."""
        if not self._policies or policy.created_at >= self._policies[-1].created_at:
            self._policies.append(policy)
            self._since = self._since or policy.created_at

    def scored(self, evaluation_id: str, counts: Sequence[QualityCount], at: datetime) -> list[QualityScore]:
        """Score the policies by an evaluation at a time, one score per metric; they start again from then on.

        Policies made after that time may have learned from it. None is scored if the time is not after the first one
        or the last evaluation, or for what was longer than `MAX_INTERVAL` ago.
        """
        if self._since is None or at <= self._since:
            return []
        since = max(self._since, at - MAX_INTERVAL)
        ends = [*(one.created_at for one in self._policies[1:]), at]
        in_force = [
            (policy, min(end, at) - max(policy.created_at, since))
            for policy, end in zip(self._policies, ends, strict=True)
            if policy.created_at < at and end > since
        ]
        before = [policy for policy in self._policies if policy.created_at < at]
        self._policies = self._policies[len(before) - 1 :]
        self._since = at
        return score(evaluation_id, counts, in_force, since=since, until=at)


def served_shares(in_force: Iterable[tuple[Policy, timedelta]]) -> Served:
    """Mean traffic by group and option under several policies, each weighted by its time."""
    shares: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    total = 0.0
    for policy, length in in_force:
        seconds = length.total_seconds()
        total += seconds
        for group, weight in (policy.inputs.weights or dict.fromkeys(policy.groups, 0.0)).items():
            for option, probability in policy.row(group).items():
                shares[group][option] += seconds * weight * probability
    return {g: {o: share / total for o, share in row.items()} for g, row in shares.items()} if total > 0.0 else {}


def score(
    evaluation_id: str,
    counts: Sequence[QualityCount],
    in_force: Sequence[tuple[Policy, timedelta]],
    *,
    since: datetime,
    until: datetime,
) -> list[QualityScore]:
    """Score policies by verdicts that they had not learned from, one score per metric.

    Metrics without a verdict in a group that has traffic under the policies have no score; nor has an evaluation whose
    prompt groups these policies did not know.

    Args:
        counts: of the evaluation.
        in_force: the policies, each with the time for which it was active.
        since, until: that time.
    """
    known = {count.group for count in counts}
    usable = [(policy, length) for policy, length in in_force if known & policy.inputs.weights.keys()]
    if not usable:
        return []
    served, reference = served_shares(usable), usable[-1][0].reference
    seconds = sum(length.total_seconds() for _, length in usable)

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        if len(known) < len(usable):
            return None
        return sum(v * length.total_seconds() for v, (_, length) in zip(known, usable, strict=True)) / seconds

    prompts: dict[str, float] = defaultdict(float)
    for count in counts:
        prompts[count.group] = max(prompts[count.group], count.trials)
    found = []
    for metric in sorted({count.metric for count in counts}):
        of_metric = [count for count in counts if count.metric == metric]
        moments = _moments(of_metric, served, reference, prompts)
        if moments is not None:
            promised = mean([policy.expected_quality.get(metric) for policy, _ in usable])
            bound = mean([policy.bounds.get(metric) for policy, _ in usable])
            found.append(
                QualityScore(
                    evaluation_id, usable[-1][0].model, metric, since, until, promised, bound,
                    sum(count.trials for count in of_metric if count.option == reference), *moments,
                )
            )  # fmt: skip
    return found


def combined(scores: Sequence[QualityScore]) -> QualityInterval | None:
    """The figure of several evaluations of one metric, each weighted by the time that it stands for.

    Returns:
        None with fewer than `MIN_PROMPTS`, or if the reference never succeeded.
    """
    seconds = [(one.until - one.since).total_seconds() for one in scores]
    weights = [length / sum(seconds) for length in seconds]
    served = sum(w * one.served for w, one in zip(weights, scores, strict=True))
    reference = sum(w * one.reference for w, one in zip(weights, scores, strict=True))
    prompts = sum(one.prompts for one in scores)
    if prompts < MIN_PROMPTS or reference <= 0.0:
        return None
    ratio = served / reference
    variance = sum(
        w**2 * (one.served_variance - 2.0 * ratio * one.covariance + ratio**2 * one.reference_variance)
        for w, one in zip(weights, scores, strict=True)
    )
    return QualityInterval(ratio, math.sqrt(max(variance, 0.0)) / reference, prompts)


def excess_of_misses(missed: int, scored: int) -> float:
    """By how much more evaluations missed what was promised than chance explains, in standard errors; 0 if not.

    The probability of so many misses or more, if each had the probability `PROMISED_MISSES`, is expressed as a normal
    deviate; that of a probability of 5 % is taken off, so that chance alone exceeds 0 in at most 5 % of all cases.
    """
    tail = sum(
        math.comb(scored, k) * PROMISED_MISSES**k * (1.0 - PROMISED_MISSES) ** (scored - k)
        for k in range(missed, scored + 1)
    )
    return max(0.0, _deviate(1.0 - max(tail, _SMALLEST_TAIL)) - _deviate(CONFIDENCE)) if tail < 1.0 else 0.0


def is_missed(one: QualityScore) -> bool:
    """Whether an evaluation shows, with 95 % confidence, a quality below what the policies promised."""
    found = combined([one])
    if found is None or one.promised is None:
        return False
    return found.estimate + _deviate(CONFIDENCE) * found.standard_error < one.promised


def _moments(
    counts: Sequence[QualityCount], served: Served, reference: str, prompts: Mapping[str, float]
) -> tuple[float, float, float, float, float] | None:
    """A, B, their variances and covariance; None if a group has no usable count.

    With outcomes y in [0, 1], y^2 <= y; and the probabilities x of the options are a distribution, so by Jensen the
    square of a prompt's mean outcome is at most the mean of its squared outcomes. Both make the variances no smaller.
    """
    by_group: dict[str, dict[str, QualityCount]] = defaultdict(dict)
    for count in counts:
        by_group[count.group][count.option] = count
    parts = []
    for group, row in served.items():
        found, base = by_group.get(group, {}), by_group.get(group, {}).get(reference)
        if base is None or base.trials <= 0.0 or any(x > 0.0 and o not in found for o, x in row.items()):
            continue
        traffic = sum(row.values())
        x = {option: share / traffic for option, share in row.items() if share > 0.0} if traffic > 0.0 else {}
        if x:
            # A limit on all traffic weights a group by the share of its prompts for which the metric is defined.
            parts.append((traffic * base.trials / prompts[group], base.trials, *_group_moments(x, found, base)))
    total = sum(part[0] for part in parts)
    if total <= 0.0:
        return None
    trials = sum(part[1] for part in parts)
    pooled = [(sum(n * part[k] for part in parts for n in [part[1]]) / trials) for k in (4, 5, 6)]
    served_mean = reference_mean = 0.0
    sums = [0.0, 0.0, 0.0]
    for weight, n, a, b, *variances in parts:
        w = weight / total
        served_mean += w * a
        reference_mean += w * b
        for k, (own, of_all) in enumerate(zip(variances, pooled, strict=True)):
            shrunk = (n * own + _PRIOR_PROMPTS * of_all) / (n + _PRIOR_PROMPTS)
            sums[k] += w**2 * shrunk / max(n - 1.0, 1.0)
    return served_mean, reference_mean, sums[0], sums[1], sums[2]


def _group_moments(
    x: Mapping[str, float], found: Mapping[str, QualityCount], base: QualityCount
) -> tuple[float, float, float, float, float]:
    """Means of served and reference outcomes in a group, their variances and covariance, of a single prompt."""
    n, of_reference = base.trials, base.successes / base.trials
    mean = both = 0.0
    for option, probability in x.items():
        count = found[option]
        mean += probability * count.successes / count.trials
        if option == base.option:
            both += probability * of_reference
        elif count.paired is not None and count.paired.reference == base.option:
            both += probability * count.paired.both / count.trials
    square = mean
    if abs(sum(count.successes / count.trials for count in found.values()) - 1.0) < _ROUNDING:
        # The outcomes are shares of one win: the square of a prompt's mean outcome is at most their mean of x^2.
        square = sum(probability**2 * found[o].successes / found[o].trials for o, probability in x.items())
    unseen = 1.0 / (n + 2.0) ** 2
    return (
        mean,
        of_reference,
        max(square - mean**2, 0.0) + unseen,
        max(of_reference - of_reference**2, 0.0) + unseen,
        both - mean * of_reference,
    )


def _deviate(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
