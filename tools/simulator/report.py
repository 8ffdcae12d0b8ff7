"""Shows simulations: a table for a terminal, and a self-contained HTML page with plots."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from tools.reporting.format import UNKNOWN, percent
from tools.reporting.page import render_page as render
from tools.reporting.tables import TextTable, rich_table
from tools.simulator.figures import figures
from tools.simulator.outcome import Outcome

TITLE = "Sprout: simulation"

_COLUMNS = ("saving", "preference", "correctness", "bound kept", "evaluations", "evaluator")


def render_page(outcomes: Sequence[Outcome]) -> str:
    """The page; see `tools.reporting.page`."""
    zones = sorted({one.zone for one in outcomes})
    hours = len(outcomes[0].grams)
    about = f"{len(zones)} zones ({', '.join(zones)}), windows of {hours} hours, {len(outcomes)} runs"
    return render(
        TITLE,
        intro=[about, *_remarks(outcomes)],
        sections=[means_table(outcomes), figures(outcomes), windows_table(outcomes)],
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


def print_summary(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the means over all windows."""
    console.print(rich_table(means_table(outcomes)))


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
