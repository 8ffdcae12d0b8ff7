"""Breakdowns of the report: one row per zone, hour, prompt group and evaluation."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from shared.messages import Quality
from shared.metering.columns import Flags, Floats, Indices, IntensitySeries, Texts, partition
from tools.reporting.accounts import Site, grams_per_joule
from tools.reporting.decisions import NextOption
from tools.reporting.folding import FEWEST_REQUESTS, FoldedGroups
from tools.reporting.frame import Calls
from tools.reporting.model import EvaluationRow, GroupRow, HourRow, ZoneRow
from tools.reporting.quality import (
    PREFERENCE,
    JudgedShares,
    PolicyExpectation,
    PolicyHistory,
    policy_expectation,
    relative_pct,
)
from tools.reporting.query import EvaluationSums, IntervalSums
from tools.reporting.savings import Allocation, Comparison, Interval, Saving, allocate_total, estimate_saving

HOUR_S = 3600
NO_COST = EvaluationSums(calls=0, energy_j=0.0, grams=0.0)


@dataclass(frozen=True, slots=True)
class Served:
    """The requests that the report shows, with the quality of their option and of their reference.

    Attributes:
        calls: the requests.
        reference: reference option; shape `(calls,)`.
        quality: expected share preferred of the served option; shape `(calls,)`, NaN if never judged.
        reference_quality: likewise of the reference.
        limited_metric: the metric that is shown by the hour, and `limited_quality`, `limited_reference` by this metric.
    """

    calls: Calls
    reference: Texts
    quality: Floats
    reference_quality: Floats
    limited_metric: str
    limited_quality: Floats
    limited_reference: Floats


def zone_row(
    zone: str,
    served: Served,
    *,
    saving: Saving,
    intervals: Sequence[IntervalSums],
    grid: Mapping[str, IntensitySeries],
    sites: Mapping[str, Site],
) -> ZoneRow:
    """The requests served in a zone, and the idle energy of its servers."""
    here = served.calls.zone == zone
    idle_g = [interval.idle_j * grams_per_joule(interval, grid, sites) for interval in intervals]
    return ZoneRow(
        zone=zone,
        requests=int(served.calls.count[here].sum()),
        intensity_g_per_kwh=mean_intensity(served.calls, here),
        energy_j=float(served.calls.energy_j[here].sum()),
        saving=saving,
        idle_j=sum(interval.idle_j for interval in intervals),
        idle_g=float(np.nansum(idle_g)),
    )


def group_rows(
    served: Served,
    compared: Calls,
    comparison: Comparison,
    folded: FoldedGroups,
    *,
    settled: Mapping[str, datetime],
    not_judged: Mapping[str, int],
    next_options: Mapping[str, NextOption],
) -> tuple[GroupRow, ...]:
    """One row per prompt group, ordered by name, the row of folded groups last.

    Args:
        compared: the calls of `comparison`.
        settled: since when the groups are settled whose decision is.
        not_judged: sampled prompts that were not judged for that reason, by group.
        next_options: the best option that is not chosen, by group.
    """
    calls = served.calls
    rows = tuple(
        GroupRow(
            group=group,
            task=task if named else "",
            task_pct=100.0 * count / int(calls.count[where].sum()) if named else 0.0,
            requests=int(calls.count[where].sum()),
            mix=_mix(calls.option[where], calls.count[where]),
            energy_j=float(calls.energy_j[where].sum()),
            completion_tokens=int(calls.completion_tokens[where].sum()),
            saving=estimate_saving(comparison.select(compared.group == group)),
            preference_pct=relative_pct(served.quality[where], served.reference_quality[where], calls.count[where]),
            groups=len(folded.names) if group == folded.label else 1,
            settled_since=settled.get(group),
            not_judged=not_judged.get(group, 0),
            next_option=next_option.option,
            next_option_extra_g=next_option.extra_g,
        )
        for (group,), where in partition(calls.group).items()
        for next_option in (next_options.get(group, NextOption()),)
        for task, count in Counter(_mix(calls.task[where], calls.count[where])).most_common(1)
        for named in (task == group or count >= FEWEST_REQUESTS,)
    )
    return tuple(sorted(rows, key=lambda row: row.groups > 1))


def hour_rows(served: Served, compared: Calls, comparison: Comparison, policies: PolicyHistory) -> tuple[HourRow, ...]:
    """One row per hour with requests, in order of time. `compared` are the calls of `comparison`."""
    compared_in = _by_hour(compared)
    allocation = allocate_total(comparison)
    quality = policy_expectation(served.calls, policies, served.limited_metric)
    nothing = np.zeros(0, dtype=np.intp)
    return tuple(
        _hour_row(
            hour,
            served,
            here=here,
            comparison=comparison,
            compared=compared_in.get(hour, nothing),
            allocation=allocation,
            quality=quality,
        )
        for hour, here in _by_hour(served.calls).items()
    )


def _hour_row(
    hour: float,
    served: Served,
    *,
    here: Indices,
    comparison: Comparison,
    compared: Indices,
    allocation: Allocation,
    quality: PolicyExpectation,
) -> HourRow:
    calls = served.calls.select(here)
    judged = relative_pct(served.limited_quality[here], served.limited_reference[here], calls.count)
    reference = float(allocation.reference_g[compared].sum())
    half = None if allocation.half_width_g is None else float(allocation.half_width_g[compared].sum())
    counted = compared[comparison.in_subset[compared]]
    return HourRow(
        start=to_datetime(hour * HOUR_S),
        requests=calls.requests,
        intensity_g_per_kwh={
            zone: mean
            for (zone,), where in partition(calls.zone).items()
            if (mean := mean_intensity(calls, where)) is not None
        },
        mix=_mix(calls.option, calls.count),
        energy_j=float(calls.energy_j.sum()),
        completion_tokens=int(calls.completion_tokens.sum()),
        compared=int(comparison.requests[counted].sum()),
        emitted_g=float(comparison.emitted_g[counted].sum()),
        reference_g=reference,
        reference_interval=None if half is None else Interval(max(0.0, reference - half), reference + half),
        saving=estimate_saving(comparison.select(compared)),
        expected_quality=known_mean(quality.expected[here], calls.count),
        quality_bound=known_mean(quality.bound[here], calls.count),
        judged_quality=None if judged is None else judged / 100.0,
    )


def evaluation_rows(qualities: Sequence[Quality], costs: Mapping[str, EvaluationSums]) -> tuple[EvaluationRow, ...]:
    """One row per evaluation. Its cost includes failed calls."""
    rows = []
    for quality in qualities:
        shares = JudgedShares([quality])
        cost = costs.get(quality.evaluation_id, NO_COST)
        options = sorted({count.option for count in quality.counts if count.metric == PREFERENCE})
        pooled = {option: shares.overall(PREFERENCE, option) for option in options}
        rows.append(
            EvaluationRow(
                evaluation_id=quality.evaluation_id,
                model=quality.model,
                at=quality.evaluated_at,
                trigger=quality.trigger,
                intensity_g_per_kwh=quality.intensity_g_per_kwh,
                prompts=quality.prompts,
                abstentions=quality.abstentions,
                calls=cost.calls,
                energy_j=cost.energy_j,
                carbon_g=cost.grams,
                preference={option: share for option, share in pooled.items() if not np.isnan(share)},
            )
        )
    return tuple(rows)


def known_mean(values: Floats, count: NDArray[np.int64]) -> float | None:
    """Mean over the calls of the cells whose value is not NaN; None if all are."""
    known = ~np.isnan(values) & (count > 0)
    return float(values[known] @ count[known] / count[known].sum()) if known.any() else None


def mean_intensity(calls: Calls, where: Flags | Indices) -> float | None:
    """Mean carbon intensity of the priced calls of some cells; None without one."""
    priced = int(calls.priced[where].sum())
    return float(calls.intensity[where].sum()) / priced if priced else None


def to_datetime(seconds: float) -> datetime:
    """Seconds since the Unix epoch as a UTC time."""
    return datetime.fromtimestamp(seconds, UTC)


def _by_hour(calls: Calls) -> dict[float, Indices]:
    """Indices of the cells by hour since the Unix epoch, in order of time."""
    hours = np.floor(calls.started_s / HOUR_S)
    order = np.argsort(hours, kind="stable")
    found, starts = np.unique(hours[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True)) if len(hours) else {}


def _mix(option: Texts, count: NDArray[np.int64]) -> dict[str, int]:
    return {name: int(count[where].sum()) for (name,), where in partition(option).items()}
