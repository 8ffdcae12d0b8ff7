"""Reports as one self-contained HTML file: style, script, plots and the plotting library are inside it.

The templates escape every text (jinja2 autoescape); plots are embedded as JSON that cannot close a script element.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tools.reporting.format import energy, grams, percent, percent_range, relative_difference
from tools.reporting.model import Report
from tools.reporting.plots import Plot, plots
from tools.reporting.tables import (
    BASELINE,
    TextTable,
    bound_summary,
    headline,
    quality_change,
    summary_lines,
    tables,
)

TITLE = "Sprout: carbon report"

_templates = Environment(loader=PackageLoader("tools.reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True)


@dataclass(frozen=True, slots=True)
class Tile:
    """A key figure: label, value and detail."""

    label: str
    value: str
    detail: str


def render_html(report: Report, *, title: str = TITLE) -> str:
    """The page of a report, about 5 MB, nearly all of it the plotting library; it loads nothing else."""
    return _render(
        "report.html.jinja",
        title=title,
        intro=[headline(report)],
        tiles=_tiles(report),
        sections=[plots(report), *tables(report)],
        summary=summary_lines(report),
        baseline=BASELINE,
    )


def render_page(title: str, *, intro: Sequence[str], sections: Sequence[TextTable | Sequence[Plot]]) -> str:
    """A self-contained page of tables and plots, for other tools.

    Args:
        intro: paragraphs below the title.
        sections: in order: a table, or several plots side by side.
    """
    return _render("page.html.jinja", title=title, intro=intro, sections=sections)


def _render(template: str, *, sections: Sequence[TextTable | Sequence[Plot]], **context: Any) -> str:  # noqa: ANN401
    shown: list[dict[str, Any]] = [
        {"table": one} if isinstance(one, TextTable) else {"plots": [_embedded(plot) for plot in one]}
        for one in sections
        if isinstance(one, TextTable) or one
    ]
    with_plots = any("plots" in section for section in shown)
    return _templates.get_template(template).render(
        sections=shown,
        css=_trusted("page.css"),
        javascript=_trusted("page.js"),
        plotly=Markup(get_plotlyjs()) if with_plots else None,
        **context,
    )


def _embedded(plot: Plot) -> dict[str, Any]:
    return {"title": plot.title, "note": plot.note, "figure": json.loads(plot.figure.to_json())}


def _trusted(name: str) -> Markup:
    """A file of this package, not escaped."""
    return Markup(resources.files("tools.reporting").joinpath("templates", name).read_text(encoding="utf-8"))


def _tiles(report: Report) -> tuple[Tile, ...]:
    """The most important figures; gain and loss side by side."""
    saving, account, requests, quality = report.saving, report.energy, report.requests, report.quality
    known = saving.saving_pct is not None
    difference = account.difference_pct
    change = quality_change(quality.preference_pct)
    return (
        Tile("carbon saved", percent(saving.saving_pct), f"95 %: {percent_range(saving.saving_interval)}"),
        Tile(
            "answer quality",
            percent(quality.preference_pct),
            f"of the baseline's preference{f', {change}' if change else ''}; {bound_summary(report)}",
        ),
        Tile("grams saved", grams(saving.saved_g if known else None), f"{grams(saving.emitted_g)} emitted"),
        Tile(
            "saving by policies",
            percent(report.implied_saving_pct),
            f"from probabilities; {percent(report.promised_saving_pct)} predicted",
        ),
        Tile("requests", f"{requests.answered:,}", f"{requests.refused:,} rejected, {requests.unsettled:,} unsettled"),
        Tile(
            "energy difference",
            "–" if difference is None else relative_difference(difference).replace("under", "<"),
            f"accounted to metered; {energy(account.metered_j)} metered",
        ),
    )
