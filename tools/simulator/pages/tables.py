"""Figures of simulations in tables: means over all windows, and every window."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from tools.reporting.format import UNKNOWN, percent
from tools.reporting.tables import TextTable, rich_table
from tools.simulator.outcome import Outcome

_COLUMNS = ("saving", "preference", "correctness", "bound kept", "evaluations", "evaluator")


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
    """With the mean of the windows' errors, which their mean's is at most: all are measured on the same prompts."""
    if pct is None or not round(standard_error_pct or 0.0, 1):
        return percent(pct)
    return f"{pct:.1f} ± {standard_error_pct:.1f} %"
