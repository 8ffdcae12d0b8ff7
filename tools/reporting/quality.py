"""Quality of the answers served, from judged samples; and the policies, with the quality they expected."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from shared.messages import Policy, Quality, QualityCount
from shared.metering.columns import Floats, Texts, partition
from tools.reporting.frame import Calls

PREFERENCE = "preference"
CORRECTNESS = "correctness"
NOT_WORSE = "not_worse"
BOUND_TOLERANCE = 2e-5
"""A quality below its bound by less than this meets it within the solver's tolerance."""


@dataclass(frozen=True, slots=True)
class PolicyHistory:
    """All published policies, by model and version."""

    by_version: Mapping[tuple[str, int], Policy]

    @classmethod
    def of(cls, policies: Iterable[Policy]) -> "PolicyHistory":
        """Build the history."""
        ordered = sorted(policies, key=lambda policy: (policy.model, policy.version))
        return cls({(policy.model, policy.version): policy for policy in ordered})

    def __len__(self) -> int:
        return len(self.by_version)

    def get(self, model: str, version: int) -> Policy | None:
        """One policy; None if unknown."""
        return self.by_version.get((model, version))

    def reference_of(self, model: str, version: int) -> str | None:
        """The reference option of a policy; of the model's latest policy if that one is unknown."""
        policy = self.get(model, version)
        if policy is not None:
            return policy.reference
        known = [policy for (name, _), policy in self.by_version.items() if name == model]
        return known[-1].reference if known else None

    def settled(self, model: str | None) -> dict[str, datetime]:
        """Groups whose decision is settled by the newest policy of each model, with the time since when."""
        return {group: since for policy in self.newest(model) for group, since in policy.settled.items()}

    def newest(self, model: str | None) -> list[Policy]:
        """The newest policy of each model, or of one."""
        return list({name: policy for (name, _), policy in self.by_version.items() if model in (None, name)}.values())

    def created_between(self, since: datetime | None, until: datetime | None, model: str | None) -> list[Policy]:
        """The policies published in [since, until)."""
        return [
            policy
            for policy in self.by_version.values()
            if (since is None or policy.created_at >= since)
            and (until is None or policy.created_at < until)
            and (model is None or policy.model == model)
        ]


@dataclass(frozen=True, slots=True)
class PolicyExpectation:
    """Quality relative to the reference that the policies expected; arrays of shape `(calls,)`.

    Attributes:
        expected: NaN in fallback, and if the policy is unknown or lacks the metric.
        bound: required quality, likewise.
    """

    expected: Floats
    bound: Floats


def policy_expectation(calls: Calls, policies: PolicyHistory, metric: str) -> PolicyExpectation:
    """Expected quality and quality bound of every call, from the policy that chose its option."""
    expected, bound = np.full(len(calls), np.nan), np.full(len(calls), np.nan)
    for (model, version), where in partition(calls.model, calls.policy_version).items():
        policy = policies.get(model, int(version))
        if policy is not None:
            expected[where] = policy.expected_quality.get(metric, np.nan)
            bound[where] = policy.bounds.get(metric, np.nan)
    return PolicyExpectation(expected, bound)


def limited_metric(policies: Iterable[Policy]) -> str:
    """The metric whose quality is shown by the hour: preference, or not_worse if the policies limit only that."""
    limited = {metric for policy in policies for metric in policy.bounds}
    return NOT_WORSE if NOT_WORSE in limited and PREFERENCE not in limited else PREFERENCE


def policies_below_bound(policies: Iterable[Policy]) -> int:
    """Number of policies that expected a quality below one of their bounds.

    With a promise by period a single hour has only its floors, and the rest of the period must not fall short.
    """
    return sum(_is_below_bound(policy) for policy in policies)


def _is_below_bound(policy: Policy) -> bool:
    promise, expected = policy.promise, policy.expected_quality
    if promise is not None and promise.shortfall > BOUND_TOLERANCE:
        return True
    bounds = policy.bounds if promise is None else promise.hourly_floors
    return any(expected.get(metric, bound) < bound - BOUND_TOLERANCE for metric, bound in bounds.items())


@dataclass(frozen=True, slots=True)
class JudgedShare:
    """Judged outcomes of a group and option, summed over evaluations. The field names are keys of the JSON report.

    Attributes:
        group: None for all groups together.
    """

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
    """Shares of successes by metric, group and option; for a group never judged, the option's overall share."""

    def __init__(self, evaluations: Iterable[Quality], reaggregated: Iterable[QualityCount] = ()) -> None:
        """Sum the counts.

        Args:
            reaggregated: counts of earlier evaluations by new prompt groups. They are the same judgments, so they do
                not count towards the overall shares.
        """
        sums: dict[tuple[str, str | None, str], list[float]] = {}

        def add(group: str | None, count: QualityCount) -> None:
            pair = sums.setdefault((count.metric, group, count.option), [0.0, 0.0])
            pair[0] += count.successes
            pair[1] += count.trials

        for quality in evaluations:
            for count in quality.counts:
                add(count.group, count)
                add(None, count)
        for count in reaggregated:
            add(count.group, count)
        self._shares = {
            (metric, group, option): JudgedShare(group, option, metric, successes, trials)
            for (metric, group, option), (successes, trials) in sums.items()
            if trials > 0
        }

    def by_group(self) -> tuple[JudgedShare, ...]:
        """The shares of single groups, ordered by metric, group and option."""
        found = [share for share in self._shares.values() if share.group is not None]
        return tuple(sorted(found, key=lambda share: (share.metric, share.group or "", share.option)))

    def share(self, metric: str, group: str, option: str) -> float:
        """The share of a group; NaN if the option was never judged."""
        found = self._shares.get((metric, group, option))
        return self.overall(metric, option) if found is None else found.share

    def overall(self, metric: str, option: str) -> float:
        """The share over all groups; NaN if the option was never judged."""
        found = self._shares.get((metric, None, option))
        return float("nan") if found is None else found.share

    def expected(self, calls: Calls, option: Texts, metric: str) -> Floats:
        """The share expected of each call if `option` had served it; shapes `(calls,)`, NaN if never judged."""
        shares = np.full(len(calls), np.nan)
        for (group, name), where in partition(calls.group, option).items():
            shares[where] = self.share(metric, group, name)
        return shares


def relative_pct(served: Floats, reference: Floats, count: NDArray[np.int64]) -> float | None:
    """Expected quality of the served options relative to the reference, %; None if nothing was judged.

    Args:
        served, reference: expected shares; shape `(cells,)`, NaN if unknown.
        count: number of calls.
    """
    known = ~np.isnan(served) & ~np.isnan(reference)
    base = float(reference[known] @ count[known])
    return 100.0 * float(served[known] @ count[known]) / base if base > 0 else None
