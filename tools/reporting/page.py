"""Reports as one self-contained HTML file: style, script, plots and the plotting library are inside it.

The templates escape every text (jinja2 autoescape); plots are embedded as JSON that cannot close a script element.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from tools.reporting.format import energy, grams, percent, percent_range, relative_difference
from tools.reporting.model import Report
from tools.reporting.summary import (
    ATTRIBUTED,
    BASELINE,
    ON_METER,
    bound_summary,
    headline,
    quality_change,
    summary_lines,
)
from tools.reporting.tables import TextTable, tables

if TYPE_CHECKING:
    from tools.reporting.plots import Plot

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
    from tools.reporting.plots import plots  # noqa: PLC0415 - it loads plotly, which takes 80 MB and a second

    return _render(
        "report.html.jinja",
        title=title,
        intro=[headline(report)],
        tiles=_tiles(report),
        sections=[plots(report), *tables(report)],
        summary=summary_lines(report),
        baseline=BASELINE,
    )


def render_page(title: str, *, intro: Sequence[str], sections: Sequence["TextTable | Sequence[Plot]"]) -> str:
    """A self-contained page of tables and plots, for other tools.

    Args:
        intro: paragraphs below the title.
        sections: in order: a table, or several plots side by side.
    """
    return _render("page.html.jinja", title=title, intro=intro, sections=sections)


def _render(template: str, *, sections: Sequence["TextTable | Sequence[Plot]"], **context: Any) -> str:  # noqa: ANN401
    shown: list[dict[str, Any]] = [
        {"table": one} if isinstance(one, TextTable) else {"plots": [_embedded(plot) for plot in one]}
        for one in sections
        if isinstance(one, TextTable) or one
    ]
    from plotly.offline import get_plotlyjs  # noqa: PLC0415 - see `render_html`

    with_plots = any("plots" in section for section in shown)
    return _templates.get_template(template).render(
        sections=shown,
        css=_trusted("page.css"),
        javascript=_trusted("page.js"),
        plotly=Markup(get_plotlyjs()) if with_plots else None,
        **context,
    )


def _embedded(plot: "Plot") -> dict[str, Any]:
    return {"title": plot.title, "note": plot.note, "figure": json.loads(plot.figure.to_json())}


def _trusted(name: str) -> Markup:
    """A file of this package, not escaped."""
    return Markup(resources.files("tools.reporting").joinpath("templates", name).read_text(encoding="utf-8"))


def _tiles(report: Report) -> tuple[Tile, ...]:
    """The most important figures; gain and loss side by side."""
    net, account, requests, quality = report.net, report.energy, report.requests, report.quality
    on_meter, metered = report.metered.saving, report.metered
    difference = account.difference_pct
    change = quality_change(quality.preference_pct)
    return (
        Tile(
            ON_METER,
            grams(None if on_meter is None else on_meter.saved_g),
            "not known; see the summary"
            if on_meter is None
            else f"{energy(on_meter.saved_j)}; {percent(on_meter.saving_pct)}, 95 %: "
            f"{percent_range(on_meter.saving_interval)}; net of the evaluator",
        ),
        Tile(
            ATTRIBUTED,
            grams(None if net.saving_pct is None else net.saved_g),
            f"{percent(net.saving_pct)}, 95 %: {percent_range(net.saving_interval)}; net of the evaluator",
        ),
        Tile(
            "answer quality",
            percent(quality.preference_pct),
            f"of the baseline's preference{f', {change}' if change else ''}; {bound_summary(report)}",
        )
        if quality.not_worse_pct is None
        else Tile(
            "answers not worse",
            percent(quality.not_worse_pct),
            f"than the baseline's, by judged samples; {bound_summary(report)}",
        ),
        Tile(
            "servers needed",
            "–" if metered.endpoints_needed_mean is None else f"{metered.endpoints_needed_mean:.1f}",
            f"of {metered.endpoints}, mean over time; "
            + (f"{in_use:.1f} had work" if (in_use := metered.endpoints_in_use_mean) is not None else "use not known"),
        ),
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
