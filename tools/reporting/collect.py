"""The facade of the package: reads a snapshot from a database and computes the report."""

import asyncio
from collections import Counter
from datetime import datetime

import asyncpg
import numpy as np

from shared.fleet import Fleet
from shared.metering.columns import Floats, partition
from tools.reporting.accounts import carbon_account, energy_account, sites_of
from tools.reporting.breakdown import (
    HOUR_S,
    Served,
    evaluation_rows,
    group_rows,
    hour_rows,
    mean_intensity,
    to_datetime,
    zone_row,
)
from tools.reporting.counterfactual import NO_REFERENCE, ComparableRequests, Counterfactual, references_of
from tools.reporting.decisions import limit_rows, next_options
from tools.reporting.fleet_report import metered_report
from tools.reporting.folding import fold_small_groups
from tools.reporting.frame import Calls
from tools.reporting.judging import judge_report
from tools.reporting.model import GridPoint, GroupingRow, OptionRow, QualitySummary, Report, RequestCounts, Scope
from tools.reporting.out_of_sample import quality_weeks
from tools.reporting.promise import promised_hours, promised_periods
from tools.reporting.quality import (
    PREFERENCE,
    JudgedShares,
    PolicyHistory,
    limited_metric,
    policies_below_bound,
    relative_pct,
)
from tools.reporting.query import Selection, Snapshot, read_snapshot
from tools.reporting.savings import Comparison, estimate_saving, net_of_evaluator


async def collect_report(
    database: asyncpg.Pool | str,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    model: str | None = None,
    zone: str | None = None,
    fleet: Fleet | None = None,
    stretch: float = 1.0,
) -> Report:
    """Read the ledger's tables and compute the report.

    Args:
        database: a pool, or the URL of a database to connect to.
        since: only calls that started at or after this time; timezone-aware.
        until: only calls that started before this time; timezone-aware.
        model: one logical model; the energy and carbon accounts still cover all models, as the meters do.
        zone: only calls served in this grid zone.
        fleet: the fleet file; without it the saving on the meter is unknown.
        stretch: latencies and their objectives are divided by it; for simulated servers whose steps are stretched.

    Raises:
        NoLedgerError: the ledger has not created its tables there.
        TooManyCallsError: the period is too long for one report.
        OSError, asyncpg.PostgresError, asyncpg.InterfaceError: the database is unreachable, or rejected the query.
    """
    selection = Selection(since=since, until=until, model=model, zone=zone)
    if isinstance(database, str):
        connection = await asyncpg.connect(database)
        try:
            snapshot = await read_snapshot(connection, selection, fleet, stretch=stretch)
        finally:
            await connection.close()
    else:
        async with database.acquire() as pooled:
            snapshot = await read_snapshot(pooled, selection, fleet, stretch=stretch)
    return await asyncio.to_thread(compute_report, snapshot)


def compute_report(snapshot: Snapshot) -> Report:
    """Compute the report of a snapshot. Pure."""
    weeks = quality_weeks(snapshot.policies, snapshot.qualities)  # by the groups that the policies name
    snapshot, folded = fold_small_groups(snapshot)
    selection = snapshot.selection
    sites = sites_of(snapshot.requests, snapshot.evaluations)
    counterfactual = Counterfactual(snapshot.requests, snapshot.evaluations, sites=sites, grid=snapshot.grid)
    comparable = counterfactual.compare(snapshot.requests, snapshot.distributions, snapshot.policies)
    comparison = (
        comparable.comparison
        if selection.zone is None
        else counterfactual.in_zone(comparable, snapshot.distributions, selection.zone)
    )
    served = _served(snapshot)
    published = snapshot.policies.created_between(selection.since, selection.until, selection.model)
    references = tuple(sorted(set(served.reference.tolist()) - {NO_REFERENCE}))
    zones = sorted(set(served.calls.zone.tolist()))
    saving = estimate_saving(comparison)
    return Report(
        scope=_scope(snapshot, served.calls),
        requests=_counts(snapshot, comparable, comparison, served.calls),
        options=tuple(sorted(set(served.calls.option.tolist()), key=lambda name: (name not in references, name))),
        references=references,
        saving=saving,
        net=net_of_evaluator(saving, snapshot.evaluator_g),
        metered=metered_report(snapshot),
        implied_saving_pct=_saving_from_probabilities_pct(counterfactual, comparable, comparison, snapshot),
        promised_saving_pct=_predicted_saving_pct(comparable, comparison, snapshot.policies),
        energy=energy_account(snapshot),
        carbon=carbon_account(snapshot, sites),
        quality=QualitySummary(
            preference_pct=relative_pct(served.quality, served.reference_quality, served.calls.count),
            limited_metric=served.limited_metric,
            limited_pct=relative_pct(served.limited_quality, served.limited_reference, served.calls.count),
            unjudged=int(served.calls.count[np.isnan(served.quality) | np.isnan(served.reference_quality)].sum()),
            abstentions=sum(quality.abstentions for quality in snapshot.qualities),
            prompts=sum(quality.prompts for quality in snapshot.qualities),
            judged=_judged_shares(snapshot).by_group(),
            policies_below_bound=policies_below_bound(published),
        ),
        zones=tuple(
            zone_row(
                zone,
                served,
                saving=estimate_saving(counterfactual.in_zone(comparable, snapshot.distributions, zone)),
                intervals=[interval for interval in snapshot.intervals if interval.zone == zone],
                grid=snapshot.grid,
                sites=sites,
            )
            for zone in zones
        ),
        hours=hour_rows(served, comparable.calls, comparison, snapshot.policies),
        groups=group_rows(
            served,
            comparable.calls,
            comparison,
            folded,
            settled=snapshot.policies.settled(selection.model),
            not_judged=_not_judged(snapshot),
            next_options=next_options(snapshot.policies, selection.model),
        ),
        measured=tuple(
            OptionRow(group, option, cell.calls, float(cell.mean[0]), cell.processing_s)
            for (group, option), cell in sorted(counterfactual.means.measured())
        ),
        evaluations=evaluation_rows(snapshot.qualities, snapshot.evaluation_costs),
        groupings=tuple(GroupingRow(one.version, one.learned_at, one.prompts) for one in snapshot.groupings),
        grid=_grid(snapshot),
        policies=Counter(policy.status for policy in published),
        judge=judge_report(snapshot.qualities),
        promised_periods=promised_periods(published),
        promised_hours=promised_hours(served.calls, snapshot.policies),
        quality_weeks=weeks,
        limits=limit_rows(snapshot.policies, selection.model),
    )


def _not_judged(snapshot: Snapshot) -> Counter[str]:
    """Sampled prompts that were not judged because the decision of their group is settled."""
    return sum((Counter(one.skipped_by_group) for one in snapshot.qualities), Counter[str]())


def _judged_shares(snapshot: Snapshot) -> JudgedShares:
    return JudgedShares(snapshot.qualities, (count for one in snapshot.groupings for count in one.counts))


def _served(snapshot: Snapshot) -> Served:
    """The requests that the report shows: those served in the selected zone."""
    calls = snapshot.requests
    if snapshot.selection.zone is not None:
        calls = calls.select(calls.zone == snapshot.selection.zone)
    judged = _judged_shares(snapshot)
    reference = references_of(calls, snapshot.policies)
    metric = limited_metric(snapshot.policies.by_version.values())
    return Served(
        calls=calls,
        reference=reference,
        quality=judged.expected(calls, calls.option, PREFERENCE),
        reference_quality=judged.expected(calls, reference, PREFERENCE),
        limited_metric=metric,
        limited_quality=judged.expected(calls, calls.option, metric),
        limited_reference=judged.expected(calls, reference, metric),
    )


def _saving_from_probabilities_pct(
    counterfactual: Counterfactual, comparable: ComparableRequests, comparison: Comparison, snapshot: Snapshot
) -> float | None:
    """Saving computed from the policies' probabilities and the measured means by group and option, %."""
    expected = counterfactual.expected_under_policy(comparable.calls, snapshot.distributions, snapshot.selection.zone)
    reference = counterfactual.expected_at_reference(comparable.calls, comparable.reference) * comparison.p_subset
    return _saving_pct(expected, reference)


def _predicted_saving_pct(
    comparable: ComparableRequests, comparison: Comparison, policies: PolicyHistory
) -> float | None:
    """Saving that the policies predicted when they were solved, averaged over their requests, %.

    A request that only the reference could serve counts with its own grams on both sides. A prediction covers all zones
    of a policy: None if the report covers only some of a request's options.
    """
    if np.any(comparison.p_subset < 1.0):
        return None
    calls = comparable.calls
    expected, reference = np.full(len(calls), np.nan), np.full(len(calls), np.nan)
    for (model, version), where in partition(calls.model, calls.policy_version).items():
        policy = policies.get(model, int(version))
        if policy is not None:
            expected[where] = policy.expected_g_per_request * calls.priced[where]
            reference[where] = policy.reference_g_per_request * calls.priced[where]
    certain = calls.reference_certain
    expected[certain] = reference[certain] = calls.total_g[certain]
    return _saving_pct(expected, reference)


def _saving_pct(grams: Floats, reference_g: Floats) -> float | None:
    known = ~np.isnan(grams) & ~np.isnan(reference_g)
    base = float(reference_g[known].sum())
    return 100.0 * (1.0 - float(grams[known].sum()) / base) if base > 0 else None


def _scope(snapshot: Snapshot, calls: Calls) -> Scope:
    selection = snapshot.selection
    some = len(calls) > 0
    return Scope(
        since=selection.since,
        until=selection.until,
        model=selection.model,
        zone=selection.zone,
        first=to_datetime(float(calls.first_s.min())) if some else None,
        last=to_datetime(float(calls.last_s.max())) if some else None,
        models=tuple(sorted(set(calls.model.tolist()))),
        zones=tuple(sorted(set(calls.zone.tolist()))),
        intensity_g_per_kwh=mean_intensity(calls, np.ones(len(calls), dtype=bool)),
    )


def _counts(snapshot: Snapshot, comparable: ComparableRequests, comparison: Comparison, calls: Calls) -> RequestCounts:
    zone = snapshot.selection.zone
    shown = np.ones(len(snapshot.requests), dtype=bool) if zone is None else snapshot.requests.zone == zone
    return RequestCounts(
        answered=calls.requests + snapshot.unsettled,
        settled=calls.requests,
        unsettled=snapshot.unsettled,
        shared_ids=snapshot.shared_ids,
        refused=sum(snapshot.rejections.values()),
        refused_by_code=dict(snapshot.rejections),
        compared=int(comparison.requests[comparison.in_subset].sum()),
        forced=int(comparable.forced[shown].sum()),
        unidentified=int(comparable.unidentified[shown].sum()),
        without_intensity=int(comparable.without_intensity[shown].sum()),
        fallback=int(calls.count[calls.source == "fallback"].sum()),
        switchback=int(calls.count[calls.source == "switchback"].sum()),
        prompt_tokens=int(calls.prompt_tokens.sum()),
        completion_tokens=int(calls.completion_tokens.sum()),
    )


def _grid(snapshot: Snapshot) -> tuple[GridPoint, ...]:
    """The carbon intensity of all zones during the report's time."""
    evaluated_s = [quality.evaluated_at.timestamp() for quality in snapshot.qualities]
    times_s = np.concatenate([snapshot.requests.first_s, snapshot.requests.last_s, evaluated_s])
    if not len(times_s):
        return ()
    first, last = times_s.min() - HOUR_S, times_s.max()
    return tuple(
        GridPoint(zone, to_datetime(float(at_s)), float(value), bool(estimated))
        for zone, series in sorted(snapshot.grid.items())
        for at_s, value, estimated in zip(series.at_s, series.g_per_kwh, series.estimated, strict=True)
        if first < at_s <= last
    )
