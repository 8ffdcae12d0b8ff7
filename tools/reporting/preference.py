"""Quality of what was served, from judged counts; and what the policies expected against what they had to keep."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from shared.messages import Policy, Quality, QualityCount
from tools.reporting.books import Regrouping
from tools.reporting.calls import Calls, Floats, Texts, partition
from tools.reporting.policies import PolicyBook

PREFERENCE = "preference"
SLACK = 2e-5
"""Below a bound by less than this is as near as the program comes to it."""


@dataclass(frozen=True, slots=True)
class JudgedShare:
    """Judged outcomes of a group under an option, all evaluations pooled; `group` is null for all groups together."""

    group: str | None
    option: str
    metric: str
    successes: float
    trials: float

    @property
    def share(self) -> float:
        """Share of successes."""
        return self.successes / self.trials


class JudgedShares:
    """Shares by metric, group and option; an option's share over all groups stands in for a group never judged."""

    def __init__(self, evaluations: Iterable[Quality], regroupings: Iterable[Regrouping] = ()) -> None:
        """Add up.

        Args:
            regroupings: the same verdicts by other groups; they say nothing new of all groups together.
        """
        pooled: dict[tuple[str, str | None, str], list[float]] = {}

        def add(group: str | None, count: QualityCount) -> None:
            sums = pooled.setdefault((count.metric, group, count.option), [0.0, 0.0])
            sums[0] += count.successes
            sums[1] += count.trials

        for quality in evaluations:
            for count in quality.counts:
                add(count.group, count)
                add(None, count)
        for regrouping in regroupings:
            for count in regrouping.counts:
                add(count.group, count)
        self._shares = {
            (metric, group, option): JudgedShare(group, option, metric, successes, trials)
            for (metric, group, option), (successes, trials) in pooled.items()
            if trials > 0
        }

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics with judged outcomes, `preference` first."""
        return tuple(sorted({metric for metric, _, _ in self._shares}, key=lambda name: (name != PREFERENCE, name)))

    def all(self) -> tuple[JudgedShare, ...]:
        """Every share of a group of its own, by metric, group and option."""
        found = [share for share in self._shares.values() if share.group is not None]
        return tuple(sorted(found, key=lambda share: (share.metric, share.group or "", share.option)))

    def of(self, metric: str, group: str, option: str) -> float:
        """The share; NaN where the option was never judged."""
        found = self._shares.get((metric, group, option))
        return self.overall(metric, option) if found is None else found.share

    def overall(self, metric: str, option: str) -> float:
        """The share over all groups; NaN where the option was never judged."""
        found = self._shares.get((metric, None, option))
        return float("nan") if found is None else found.share

    def served(self, calls: Calls, option: Texts, metric: str) -> Floats:
        """The share expected of each call, had `option` served it; shape (n,), NaN where never judged."""
        shares = np.full(len(calls), np.nan)
        for (group, name), where in partition(calls.group, option).items():
            shares[where] = self.of(metric, group, name)
        return shares


def relative_pct(served: Floats, reference: Floats) -> float | None:
    """Expected quality of what was served relative to the reference, %; null where none of it was judged."""
    known = ~np.isnan(served) & ~np.isnan(reference)
    base = float(reference[known].sum())
    return 100.0 * float(served[known].sum()) / base if base > 0 else None


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the policies in force expected of quality relative to the reference, per request; arrays of shape (n,).

    Attributes:
        expected: NaN in fallback, and where the policy is not known or does not mention the metric.
        bound: what was required, likewise.
    """

    expected: Floats
    bound: Floats


def expectation(calls: Calls, policies: PolicyBook, metric: str) -> Expectation:
    """Expected quality and its bound for every request, by the policy that it was drawn from."""
    expected, bound = np.full(len(calls), np.nan), np.full(len(calls), np.nan)
    for (model, version), where in partition(calls.model, calls.policy_version.astype(object)).items():
        policy = policies.get(model, int(version))
        if policy is not None:
            expected[where] = policy.expected_quality.get(metric, np.nan)
            bound[where] = policy.bounds.get(metric, np.nan)
    return Expectation(expected, bound)


def policies_below_bound(policies: Iterable[Policy]) -> int:
    """How many policies expected less quality than they had to keep."""
    return sum(
        any(_below(policy.expected_quality, metric, bound) for metric, bound in policy.bounds.items())
        for policy in policies
    )


def _below(expected: Mapping[str, float], metric: str, bound: float) -> bool:
    return metric in expected and expected[metric] < bound - SLACK
