"""Books to report: pure arithmetic on one snapshot."""

from collections import Counter

import numpy as np

from tools.reporting.accounts import carbon_account, energy_account
from tools.reporting.books import Books
from tools.reporting.calls import Calls, Floats, partition
from tools.reporting.counterfactual import NO_REFERENCE, Comparable, Counterfactual, references_of
from tools.reporting.grams import sites_of
from tools.reporting.model import GridPoint, GroupingRow, OptionRow, QualitySummary, Report, RequestCounts, Scope
from tools.reporting.policies import PolicyBook
from tools.reporting.preference import PREFERENCE, JudgedShares, policies_below_bound, relative_pct
from tools.reporting.rows import (
    HOUR_S,
    Served,
    evaluation_rows,
    group_rows,
    hour_rows,
    mean_of,
    moment_of,
    zone_row,
)
from tools.reporting.savings import Comparison, estimate_saving


def assemble(books: Books) -> Report:
    """The report of a snapshot of the books."""
    selection = books.selection
    sites = sites_of(books.requests, books.evaluations)
    counterfactual = Counterfactual(books.requests, books.evaluations, sites=sites, grid=books.grid)
    comparable = counterfactual.comparable(books.requests, books.rows, books.policies)
    comparison = (
        comparable.comparison
        if selection.zone is None
        else counterfactual.of_zone(comparable, books.rows, selection.zone)
    )
    served = _served(books)
    published = books.policies.created_between(selection.since, selection.until, selection.model)
    references = tuple(sorted(set(served.reference.tolist()) - {NO_REFERENCE}))
    zones = sorted(set(served.calls.zone.tolist()))
    return Report(
        scope=_scope(books, served.calls),
        requests=_counts(books, comparable, comparison, served.calls),
        options=tuple(sorted(set(served.calls.option.tolist()), key=lambda name: (name not in references, name))),
        references=references,
        saving=estimate_saving(comparison),
        implied_saving_pct=_implied_saving_pct(counterfactual, comparable, comparison, books),
        promised_saving_pct=_promised_saving_pct(comparable, comparison, books.policies),
        energy=energy_account(books),
        carbon=carbon_account(books, sites),
        quality=QualitySummary(
            preference_pct=relative_pct(served.quality, served.reference_quality),
            unjudged=int(np.count_nonzero(np.isnan(served.quality) | np.isnan(served.reference_quality))),
            abstentions=sum(quality.abstentions for quality in books.qualities),
            prompts=sum(quality.prompts for quality in books.qualities),
            judged=JudgedShares(books.qualities, books.groupings).all(),
            policies_below_bound=policies_below_bound(published),
        ),
        zones=tuple(
            zone_row(
                zone,
                served,
                saving=estimate_saving(counterfactual.of_zone(comparable, books.rows, zone)),
                intervals=[interval for interval in books.intervals if interval.zone == zone],
                grid=books.grid,
                sites=sites,
            )
            for zone in zones
        ),
        hours=hour_rows(served, comparable.calls, comparison, books.policies),
        groups=group_rows(served, comparable.calls, comparison),
        measured=tuple(
            OptionRow(group, option, cell.calls, float(cell.mean[0]), float(cell.mean[1]))
            for (group, option), cell in sorted(counterfactual.means.measured())
        ),
        evaluations=evaluation_rows(books.qualities, books.evaluation_costs),
        groupings=tuple(GroupingRow(one.version, one.learned_at, one.prompts) for one in books.groupings),
        grid=_grid(books),
        policies=Counter(policy.status for policy in published),
    )


def _served(books: Books) -> Served:
    """The requests that the report shows: those served in the zone asked for."""
    calls = books.requests
    if books.selection.zone is not None:
        calls = calls.where(calls.zone == books.selection.zone)
    judged = JudgedShares(books.qualities, books.groupings)
    reference = references_of(calls, books.policies)
    return Served(
        calls=calls,
        reference=reference,
        quality=judged.served(calls, calls.option, PREFERENCE),
        reference_quality=judged.served(calls, reference, PREFERENCE),
    )


def _implied_saving_pct(
    counterfactual: Counterfactual, comparable: Comparable, comparison: Comparison, books: Books
) -> float | None:
    """Saving of the probabilities that requests were drawn with, at the measured mean of every group and option, %."""
    under = counterfactual.expected_under(comparable.calls, books.rows, books.selection.zone)
    reference = counterfactual.at_reference(comparable.calls, comparable.reference) * comparison.inside_probability
    return _saving_pct(under, reference)


def _promised_saving_pct(comparable: Comparable, comparison: Comparison, policies: PolicyBook) -> float | None:
    """Saving that the policies expected when they were solved, averaged over the requests drawn from them, %.

    A request in fallback was promised nothing: it counts with its own grams on both sides. A policy promises for all
    of its zones together: null where only some of a request's options belong to the report.
    """
    if np.any(comparison.inside_probability < 1.0):
        return None
    calls = comparable.calls
    expected, reference = np.full(len(calls), np.nan), np.full(len(calls), np.nan)
    for (model, version), where in partition(calls.model, calls.policy_version.astype(object)).items():
        policy = policies.get(model, int(version))
        if policy is not None:
            expected[where] = policy.expected_g_per_request
            reference[where] = policy.reference_g_per_request
    fallback = calls.source == "fallback"
    expected[fallback] = reference[fallback] = calls.total_g[fallback]
    return _saving_pct(expected, reference)


def _saving_pct(grams: Floats, reference_g: Floats) -> float | None:
    known = ~np.isnan(grams) & ~np.isnan(reference_g)
    base = float(reference_g[known].sum())
    return 100.0 * (1.0 - float(grams[known].sum()) / base) if base > 0 else None


def _scope(books: Books, calls: Calls) -> Scope:
    selection = books.selection
    there = len(calls) > 0
    return Scope(
        since=selection.since,
        until=selection.until,
        model=selection.model,
        zone=selection.zone,
        first=moment_of(float(calls.started_s.min())) if there else None,
        last=moment_of(float(calls.started_s.max())) if there else None,
        models=tuple(sorted(set(calls.model.tolist()))),
        zones=tuple(sorted(set(calls.zone.tolist()))),
        intensity_g_per_kwh=mean_of(calls.intensity_g_per_kwh),
    )


def _counts(books: Books, comparable: Comparable, comparison: Comparison, calls: Calls) -> RequestCounts:
    zone = books.selection.zone
    shown = np.ones(len(books.requests), dtype=bool) if zone is None else books.requests.zone == zone
    return RequestCounts(
        answered=len(calls) + books.unsettled,
        settled=len(calls),
        unsettled=books.unsettled,
        refused=sum(books.refusals.values()),
        refused_by_code=dict(books.refusals),
        compared=int(comparison.inside.sum()),
        forced=int((comparable.forced & shown).sum()),
        unidentified=int((comparable.unidentified & shown).sum()),
        without_intensity=int((comparable.without_intensity & shown).sum()),
        fallback=int(np.count_nonzero(calls.source == "fallback")),
        prompt_tokens=int(calls.prompt_tokens.sum()),
        completion_tokens=int(calls.completion_tokens.sum()),
    )


def _grid(books: Books) -> tuple[GridPoint, ...]:
    """The zones' intensity over the span of the report."""
    moments = [*books.requests.started_s.tolist(), *(quality.evaluated_at.timestamp() for quality in books.qualities)]
    if not moments:
        return ()
    first, last = min(moments) - HOUR_S, max(moments)
    return tuple(
        GridPoint(zone, moment_of(float(at_s)), float(value), bool(estimated))
        for zone, series in sorted(books.grid.items())
        for at_s, value, estimated in zip(series.at_s, series.g_per_kwh, series.estimated, strict=True)
        if first < at_s <= last
    )
