"""The report's tables: zones, hours, groups, evaluations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from shared.messages import Quality
from tools.reporting.accounts import price_of
from tools.reporting.books import EvaluationSums, IntervalSums
from tools.reporting.calls import Calls, Flags, Floats, Texts, partition
from tools.reporting.grams import IntensitySeries, Site
from tools.reporting.model import EvaluationRow, GroupRow, HourRow, ZoneRow
from tools.reporting.policies import PolicyBook
from tools.reporting.preference import PREFERENCE, JudgedShares, expectation, relative_pct
from tools.reporting.savings import Comparison, Interval, Saving, SharedOut, benchmarked, estimate_saving

HOUR_S = 3600
NO_COST = EvaluationSums(calls=0, energy_j=0.0, grams=0.0)


@dataclass(frozen=True, slots=True)
class Served:
    """The requests that the report shows, with the judged quality of their option and of their reference.

    Attributes:
        reference: reference option; shape (n,).
        quality: share preferred expected of what was served; shape (n,), NaN where never judged.
        reference_quality: likewise of the reference.
    """

    calls: Calls
    reference: Texts
    quality: Floats
    reference_quality: Floats


def zone_row(
    zone: str,
    served: Served,
    *,
    saving: Saving,
    intervals: Sequence[IntervalSums],
    grid: Mapping[str, IntensitySeries],
    sites: Mapping[str, Site],
) -> ZoneRow:
    """The requests that a zone served, and what its servers used while idle."""
    here = served.calls.zone == zone
    idle_g = [interval.idle_j * price_of(interval, grid, sites) for interval in intervals]
    return ZoneRow(
        zone=zone,
        requests=int(here.sum()),
        intensity_g_per_kwh=mean_of(served.calls.intensity_g_per_kwh[here]),
        energy_j=float(served.calls.energy_j[here].sum()),
        saving=saving,
        idle_j=sum(interval.idle_j for interval in intervals),
        idle_g=float(np.nansum(idle_g)),
    )


def group_rows(served: Served, compared: Calls, comparison: Comparison) -> tuple[GroupRow, ...]:
    """The prompt groups, by name. `compared` are the calls of `comparison`."""
    calls = served.calls
    return tuple(
        GroupRow(
            group=group,
            task=task,
            task_pct=100.0 * count / len(where),
            requests=len(where),
            mix=_mix(calls.option[where]),
            energy_j=float(calls.energy_j[where].sum()),
            completion_tokens=int(calls.completion_tokens[where].sum()),
            saving=estimate_saving(comparison.where(compared.group == group)),
            preference_pct=relative_pct(served.quality[where], served.reference_quality[where]),
        )
        for (group,), where in partition(calls.group).items()
        for task, count in Counter(calls.task[where].tolist()).most_common(1)
    )


def hour_rows(served: Served, compared: Calls, comparison: Comparison, policies: PolicyBook) -> tuple[HourRow, ...]:
    """The hours with traffic, in order. `compared` are the calls of `comparison`."""
    hours, compared_hours = _hours(served.calls), _hours(compared)
    shared_out = benchmarked(comparison)
    return tuple(
        _hour_row(
            float(hour),
            served,
            here=hours == hour,
            comparison=comparison,
            compared=compared_hours == hour,
            shared_out=shared_out,
            policies=policies,
        )
        for hour in np.unique(hours)
    )


def _hour_row(
    hour: float,
    served: Served,
    *,
    here: Flags,
    comparison: Comparison,
    compared: Flags,
    shared_out: SharedOut,
    policies: PolicyBook,
) -> HourRow:
    calls = served.calls.where(here)
    quality = expectation(calls, policies, PREFERENCE)
    judged = relative_pct(served.quality[here], served.reference_quality[here])
    reference = float(shared_out.reference_g[compared].sum())
    half = None if shared_out.half_width_g is None else float(shared_out.half_width_g[compared].sum())
    inside = compared & comparison.inside
    return HourRow(
        start=moment_of(hour * HOUR_S),
        requests=len(calls),
        intensity_g_per_kwh={
            zone: mean
            for (zone,), where in partition(calls.zone).items()
            if (mean := mean_of(calls.intensity_g_per_kwh[where])) is not None
        },
        mix=_mix(calls.option),
        energy_j=float(calls.energy_j.sum()),
        completion_tokens=int(calls.completion_tokens.sum()),
        compared=int(inside.sum()),
        emitted_g=float(comparison.emitted_g[inside].sum()),
        reference_g=reference,
        reference_interval=None if half is None else Interval(max(0.0, reference - half), reference + half),
        saving=estimate_saving(comparison.where(compared)),
        expected_quality=mean_of(quality.expected),
        quality_bound=mean_of(quality.bound),
        judged_quality=None if judged is None else judged / 100.0,
    )


def evaluation_rows(qualities: Sequence[Quality], costs: Mapping[str, EvaluationSums]) -> tuple[EvaluationRow, ...]:
    """The evaluations, as they came. A failed call is in the cost too: its energy was spent."""
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


def mean_of(values: Floats) -> float | None:
    """Mean of what is known; None where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def moment_of(seconds: float) -> datetime:
    """Seconds since the Unix epoch as an instant, UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def _hours(calls: Calls) -> Floats:
    hours: Floats = np.floor(calls.started_s / HOUR_S)
    return hours


def _mix(option: Texts) -> dict[str, int]:
    return {name: len(where) for (name,), where in partition(option).items()}
