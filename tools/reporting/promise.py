"""The account of promises by period in the report: promised and kept, by period and by hour.

By period it is the optimizer's own account, as its policies publish it. By hour it is what the policies that served the
hour's requests promised and expected, weighted by the requests.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from shared.messages import PeriodAccount, Policy
from shared.metering.columns import partition
from tools.reporting.frame import Calls
from tools.reporting.quality import PolicyHistory, policy_expectation

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class PromisedPeriod:
    """One metric of one model in one period; qualities are relative to the reference's.

    Attributes:
        closed: whether the period has ended; its account is complete.
        requests: booked so far, estimated by the request rate.
        promised, kept: means over the requests.
        rest: mean that is needed in the rest of the period; None once it is closed.
        shortfall: what is missing in the rest, at most.
    """

    model: str
    metric: str
    start: datetime
    end: datetime
    closed: bool
    requests: float
    promised: float
    kept: float
    rest: float | None = None
    shortfall: float = 0.0


@dataclass(frozen=True, slots=True)
class PromisedHour:
    """One metric of one model in one hour; means over the hour's requests, relative to the reference's quality."""

    model: str
    metric: str
    start: datetime
    requests: int
    promised: float
    kept: float


def promised_periods(policies: Iterable[Policy]) -> tuple[PromisedPeriod, ...]:
    """The newest account of every period, by model, time and metric; none of hourly promises."""
    found: dict[tuple[str, datetime, str], PromisedPeriod] = {}

    def add(policy: Policy, account: PeriodAccount, *, closed: bool) -> None:
        promise = policy.promise
        for metric, promised in account.promised.items():
            found[policy.model, account.start, metric] = PromisedPeriod(
                policy.model,
                metric,
                account.start,
                account.end,
                closed,
                account.requests,
                promised,
                account.kept[metric],
                None if closed or promise is None else promise.rest.get(metric),
                0.0 if closed or promise is None else promise.shortfall,
            )

    for policy in sorted(policies, key=lambda one: one.version):
        if policy.promise is not None:
            if policy.promise.previous is not None:
                add(policy, policy.promise.previous, closed=True)
            add(policy, policy.promise.current, closed=False)
    return tuple(found[key] for key in sorted(found))


def promised_hours(calls: Calls, policies: PolicyHistory) -> tuple[PromisedHour, ...]:
    """One row per model, metric and hour with requests that a policy with a promise by period served."""
    history = PolicyHistory.of(policy for policy in policies.by_version.values() if policy.promise is not None)
    if not len(history):
        return ()
    rows = []
    hours = np.floor(calls.started_s / HOUR_S).astype(np.int64).astype(object)
    for metric in sorted({metric for policy in history.by_version.values() for metric in policy.bounds}):
        quality = policy_expectation(calls, history, metric)
        known = ~np.isnan(quality.expected) & ~np.isnan(quality.bound)
        for (model, hour), where in partition(calls.model, hours).items():
            here = where[known[where]]
            if requests := int(calls.count[here].sum()):
                promised, kept = (
                    float(values[here] @ calls.count[here]) / requests for values in (quality.bound, quality.expected)
                )
                start = datetime.fromtimestamp(float(hour) * HOUR_S, UTC)
                rows.append(PromisedHour(model, metric, start, requests, promised, kept))
    return tuple(sorted(rows, key=lambda row: (row.start, row.model, row.metric)))
