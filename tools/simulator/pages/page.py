"""A simulation as one HTML file that needs nothing else."""

from collections.abc import Sequence

from tools.reporting.page import render_page as render
from tools.reporting.plots import Plot
from tools.simulator.outcome import Outcome
from tools.simulator.pages.figures import figures
from tools.simulator.pages.tables import means_table, windows_table

TITLE = "Sprout: simulation"


def render_page(outcomes: Sequence[Outcome]) -> str:
    """The page; see `tools.reporting.page`."""
    zones = sorted({one.zone for one in outcomes})
    hours = len(outcomes[0].grams)
    about = f"{len(zones)} zones ({', '.join(zones)}), windows of {hours} hours, {len(outcomes)} runs"
    plots = [Plot(*one) for one in figures(outcomes)]
    return render(
        TITLE,
        intro=[about, *_remarks(outcomes)],
        sections=[means_table(outcomes), plots, windows_table(outcomes)],
    )


def _remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """What the figures do not tell by themselves."""
    found = []
    if any(error for one in outcomes for error in one.standard_errors.values()):
        found.append("± is one standard error of a quality: how far it would vary with other prompts to measure it on.")
    if hours := sum(sum(one.fallbacks.values()) for one in outcomes):
        reasons = sorted({reason for one in outcomes for reason in one.fallbacks})
        found.append(f"In {hours:,} hours of all runs only the reference could be served: {'; '.join(reasons)}.")
    if unknown := sum(1 for one in outcomes if one.notes):
        found.append(f"{unknown} runs lack figures; summary.json says why.")
    return found
