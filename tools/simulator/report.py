"""Shows simulations: a table for a terminal, and a self-contained HTML page with plots."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from shared.pools import Dispatch
from tools.reporting.format import UNKNOWN, percent
from tools.reporting.page import render_page as render
from tools.reporting.tables import TextTable, rich_table
from tools.simulator.figures import figures
from tools.simulator.outcome import Outcome
from tools.simulator.what_if import FleetFigures

TITLE = "Sprout: simulation"

_COLUMNS = ("saving", "preference", "correctness", "bound kept", "evaluations", "evaluator")


def render_page(outcomes: Sequence[Outcome], fleets: Sequence[Sequence[FleetFigures]] = ()) -> str:
    """The page; see `tools.reporting.page`.

    Args:
        outcomes: of all runs.
        fleets: of every run, its figures on fleets; empty: none were simulated.
    """
    zones = sorted({one.zone for one in outcomes})
    hours = len(outcomes[0].grams)
    about = f"{len(zones)} zones ({', '.join(zones)}), windows of {hours} hours, {len(outcomes)} runs"
    return render(
        TITLE,
        intro=[about, *_remarks(outcomes)],
        sections=[*fleet_tables(outcomes, fleets), means_table(outcomes), figures(outcomes), windows_table(outcomes)],
    )


def _remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """Explanations of the figures."""
    found = []
    if any(error for one in outcomes for error in one.standard_errors.values()):
        found.append("± is one standard error of a quality, over samples of prompts to measure it on.")
    if hours := sum(sum(one.fallbacks.values()) for one in outcomes):
        reasons = sorted({reason for one in outcomes for reason in one.fallbacks})
        found.append(f"In {hours:,} hours of all runs only the reference could be served: {'; '.join(reasons)}.")
    if unknown := sum(1 for one in outcomes if one.notes):
        found.append(f"{unknown} runs lack figures; summary.json says why.")
    return found


def print_summary(outcomes: Sequence[Outcome], console: Console, fleets: Sequence[Sequence[FleetFigures]] = ()) -> None:
    """Print the means over all windows."""
    console.print(rich_table(means_table(outcomes)))
    for table in fleet_tables(outcomes, fleets):
        console.print(rich_table(table))


def fleet_tables(outcomes: Sequence[Outcome], fleets: Sequence[Sequence[FleetFigures]]) -> list[TextTable]:
    """By fleet, scheme, xi and dispatch: the means over zones and windows; no table without fleets."""
    grouped: dict[tuple[str, str, float, Dispatch, bool], list[FleetFigures]] = {}
    for outcome, of_run in zip(outcomes, fleets, strict=bool(fleets)):
        for one in of_run:
            grouped.setdefault((one.fleet, outcome.scheme, outcome.xi, one.dispatch, one.sleep), []).append(one)
    if not grouped:
        return []
    rows = tuple(
        (fleet, scheme, f"{xi:g}", f"{dispatch}, sleep" if sleep else dispatch, *_fleet_figures(found))
        for (fleet, scheme, xi, dispatch, sleep), found in grouped.items()
    )
    columns = (
        "fleet", "scheme", "xi", "dispatch", "kgCO2eq", "kgCO2eq saved", "saving on the meter", "energy",
        "attributed saving", "ms per token, p50 / p95 / p99", "ms to the first token",
        "servers needed, mean / peak", "awake",
    )  # fmt: skip
    return [TextTable("What the meters of the fleet would show, means over all windows", columns, rows, labels=4)]


def _fleet_figures(found: Sequence[FleetFigures]) -> tuple[str, ...]:
    def mean_percent(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        return percent(fmean(known) if known else None)

    grams, reference = fmean([one.grams for one in found]), fmean([one.reference_grams for one in found])
    return (
        f"{grams / 1_000.0:,.1f}",
        f"{(reference - grams) / 1_000.0:,.1f}",
        mean_percent([one.saving_pct for one in found]),
        mean_percent([one.energy_saving_pct for one in found]),
        mean_percent([one.attributed_saving_pct for one in found]),
        _means([one.tpot_ms for one in found]),
        _means([one.ttft_ms for one in found]),
        f"{fmean([one.needed_mean for one in found]):.1f} / {max(one.needed_peak for one in found)}",
        f"{fmean([one.awake_mean for one in found]):.1f} of {found[0].servers}",
    )


def _means(quantiles: Sequence[tuple[float, float, float]]) -> str:
    return " / ".join(f"{fmean(values):.1f}" for values in zip(*quantiles, strict=True))


def means_table(outcomes: Sequence[Outcome]) -> TextTable:
    """By scheme and xi: the means over zones and windows."""
    grouped: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.scheme, outcome.xi), []).append(outcome.summary())
    rows = tuple((scheme, f"{xi:g}", f"{len(found)}", *_figures(found)) for (scheme, xi), found in grouped.items())
    return TextTable("Means over all windows", ("scheme", "xi", "windows", *_COLUMNS), rows)


def windows_table(outcomes: Sequence[Outcome]) -> TextTable:
    """Every zone, window, scheme and xi."""
    rows = tuple(
        (one.zone, f"{one.window_start_hour}", one.scheme, f"{one.xi:g}", *_figures([one.summary()]))
        for one in outcomes
    )
    return TextTable("Every window", ("zone", "from hour", "scheme", "xi", *_COLUMNS), rows, labels=3)


def _figures(found: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    def mean(name: str) -> float | None:
        values = [one[name] for one in found if one[name] is not None]
        return fmean(values) if values else None

    evaluations = mean("evaluations")
    return (
        percent(mean("carbon_saving_pct")),
        _measured(mean("preference_pct"), mean("preference_se_pct")),
        _measured(mean("correctness_pct"), mean("correctness_se_pct")),
        percent(mean("hours_bound_kept_pct")),
        UNKNOWN if evaluations is None else f"{evaluations:.0f}",
        percent(mean("evaluator_share_pct"), 2),
    )


def _measured(pct: float | None, standard_error_pct: float | None) -> str:
    """With the mean of the windows' standard errors, an upper limit for their mean: all use the same prompts."""
    if pct is None or not round(standard_error_pct or 0.0, 1):
        return percent(pct)
    return f"{pct:.1f} ± {standard_error_pct:.1f} %"
