"""The report's plots, as plotly figures. The page sets the colours of text and grid, to match its theme."""

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from tools.reporting.format import option_names
from tools.reporting.model import HourRow, Report
from tools.reporting.quality import NOT_WORSE
from tools.reporting.savings import Interval
from tools.reporting.summary import BASELINE
from tools.reporting.tables import hour_saving_pct

GREEN, AMBER, RED, BLUE, GREY, PURPLE = "#2f9e5b", "#e0a030", "#d1495b", "#3a7ebf", "#8b949e", "#8e6bbf"
LEVELS = (GREY, "#7fc796", GREEN, BLUE, PURPLE, AMBER, RED)
"""Colours of the options, reference first."""
HEIGHT = 320


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot with its title, and a note on how to read it."""

    title: str
    note: str
    figure: go.Figure


def intensity_figure(report: Report) -> go.Figure:
    """Carbon intensity by zone; evaluations are marked."""
    figure = blank_figure("gCO₂eq per kWh")
    colours = (AMBER, BLUE, PURPLE, RED)
    for number, zone in enumerate(sorted({point.zone for point in report.grid})):
        points = [point for point in report.grid if point.zone == zone]
        figure.add_scatter(
            x=[point.at for point in points],
            y=[point.intensity_g_per_kwh for point in points],
            name=zone,
            mode="lines",
            line={"shape": "hv", "width": 2.5, "color": colours[number % len(colours)]},
        )
    marked = [row for row in report.evaluations if row.intensity_g_per_kwh is not None]
    if marked:
        figure.add_scatter(
            x=[row.at for row in marked],
            y=[row.intensity_g_per_kwh for row in marked],
            name="evaluation",
            mode="markers",
            marker={"symbol": "diamond", "size": 11, "color": GREEN, "line": {"width": 1.5, "color": "white"}},
            text=[f"{row.trigger.replace('_', ' ')}, {row.prompts} prompts" for row in marked],
            hovertemplate="%{text}<br>%{y:.0f} g/kWh<extra>evaluation</extra>",
        )
    figure.update_yaxes(rangemode="tozero")
    return figure


def power_figure(report: Report) -> go.Figure:
    """Power of the serving endpoints, and the power predicted without Sprout; reference blocks are shaded."""
    metered = report.metered
    figure = blank_figure("kW" if _in_kw(report) else "W")
    scale = 1_000.0 if _in_kw(report) else 1.0
    for block in metered.blocks:
        figure.add_vrect(x0=block.start, x1=block.end, fillcolor=AMBER, opacity=0.25, line_width=0, layer="below")
    if any(point.without_w is not None for point in metered.power):
        figure.add_scatter(
            x=[point.at for point in metered.power],
            y=[None if point.without_w is None else point.without_w / scale for point in metered.power],
            name="without Sprout, predicted",
            mode="lines",
            line={"color": GREY, "width": 2, "dash": "dash"},
            hovertemplate="%{y:.3g}",
        )
    figure.add_scatter(
        x=[point.at for point in metered.power],
        y=[None if point.power_w is None else point.power_w / scale for point in metered.power],
        name="on the meters",
        mode="lines",
        line={"color": GREEN, "width": 2},
        hovertemplate="%{y:.3g}",
    )
    figure.update_yaxes(rangemode="tozero")
    return figure


def _in_kw(report: Report) -> bool:
    return any((point.power_w or 0.0) >= 10_000 for point in report.metered.power)


def mix_figure(report: Report) -> go.Figure:
    """Share of every option by hour, stacked."""
    figure = blank_figure("share of requests, %")
    names = option_names(report)
    for number, option in enumerate(report.options):
        figure.add_bar(
            x=[_middle(row) for row in report.hours],
            y=[100.0 * row.mix.get(option, 0) / row.requests for row in report.hours],
            name=names[option],
            marker={"color": LEVELS[number % len(LEVELS)], "line": {"width": 0}},
            hovertemplate="%{y:.0f} %",
        )
    figure.update_layout(barmode="stack", bargap=0.08)
    figure.update_yaxes(range=[0, 100])
    return figure


def grams_figure(report: Report) -> go.Figure:
    """Grams per request: emitted, and estimated for the baseline with its interval."""
    figure = blank_figure("mgCO₂eq per request")
    rows = [row for row in report.hours if row.compared]
    hours = [_middle(row) for row in rows]
    banded = [row for row in rows if row.reference_interval is not None]
    if banded:
        high = [_mg(row.reference_interval.high, row) for row in banded if row.reference_interval]
        low = [_mg(row.reference_interval.low, row) for row in banded if row.reference_interval]
        around = [_middle(row) for row in banded]
        figure.add_scatter(
            x=[*around, *reversed(around)],
            y=[*high, *reversed(low)],
            name="95 % interval",
            fill="toself",
            fillcolor="rgba(139,148,158,0.22)",
            line={"width": 0},
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=hours,
        y=[_mg(row.reference_g, row) for row in rows],
        name=f"{BASELINE}, estimated",
        mode="lines",
        line={"color": GREY, "width": 2.5, "dash": "dash"},
        hovertemplate="%{y:.3g} mg",
    )
    figure.add_scatter(
        x=hours,
        y=[_mg(row.emitted_g, row) for row in rows],
        name="emitted, measured",
        mode="lines+markers",
        line={"color": GREEN, "width": 2.5},
        customdata=[hour_saving_pct(row) for row in rows],
        hovertemplate="%{y:.3g} mg, saving %{customdata:.0f} %",
    )
    figure.update_yaxes(rangemode="tozero")
    return figure


def quality_figure(report: Report) -> go.Figure:
    """Quality relative to the baseline: expected by the policies, from judged samples, and the bound."""
    figure = blank_figure(f"{_metric_name(report)}, % of the baseline's")
    lines: tuple[tuple[str, list[float | None], dict[str, Any]], ...] = (
        ("quality bound", [row.quality_bound for row in report.hours], {"color": RED, "dash": "dot", "shape": "hvh"}),
        ("expected by the policies", [row.expected_quality for row in report.hours], {"color": BLUE}),
        (
            "served, from judged samples",
            [row.judged_quality for row in report.hours],
            {"color": GREEN, "dash": "dash"},
        ),
    )
    for name, values, line in lines:
        if any(value is not None for value in values):
            figure.add_scatter(
                x=[_middle(row) for row in report.hours],
                y=[None if value is None else 100.0 * value for value in values],
                name=name,
                mode="lines",
                line={"width": 2.5, **line},
                hovertemplate="%{y:.1f} %",
            )
    return figure


def _metric_name(report: Report) -> str:
    return {NOT_WORSE: "share of answers not worse"}.get(report.quality.limited_metric, report.quality.limited_metric)


def energy_figure(report: Report) -> go.Figure:
    """The metered energy, and its uses."""
    account = report.energy
    parts = (
        ("requests", account.requests_j, GREEN),
        ("evaluation", account.evaluation_j, BLUE),
        ("judge", account.judge_j, PURPLE),
        ("idle", account.idle_j, GREY),
        ("unattributed", account.unattributed_j, RED),
        ("not settled yet", account.unsettled_j, AMBER),
    )
    figure = blank_figure("")
    figure.add_bar(
        y=["metered"],
        x=[account.metered_j / 3600.0],
        name="metered",
        orientation="h",
        marker={"color": "#b08968"},
        hovertemplate="%{x:.4g} Wh",
    )
    for name, joules, colour in parts:
        if joules > 0:
            figure.add_bar(
                y=["used for"],
                x=[joules / 3600.0],
                name=name,
                orientation="h",
                marker={"color": colour},
                hovertemplate="%{x:.4g} Wh",
            )
    figure.update_layout(barmode="stack", hovermode="closest", bargap=0.45)
    figure.update_xaxes(title={"text": "Wh"}, type="linear")
    figure.update_yaxes(categoryorder="array", categoryarray=["used for", "metered"])
    return figure


def group_figure(report: Report) -> go.Figure:
    """By prompt group: the saving with its interval, over the shares of the options."""
    figure = blank_figure("")
    names = option_names(report)
    rows = list(reversed(report.groups))
    groups = [row.group for row in rows]
    for number, option in enumerate(report.options):
        figure.add_bar(
            y=groups,
            x=[100.0 * row.mix.get(option, 0) / row.requests for row in rows],
            name=names[option],
            orientation="h",
            marker={"color": LEVELS[number % len(LEVELS)]},
            hovertemplate="%{x:.0f} %",
        )
    known = [row for row in rows if row.saving.saving_pct is not None]
    figure.add_scatter(
        y=[row.group for row in known],
        x=[row.saving.saving_pct for row in known],
        name="saving",
        mode="markers",
        marker={"symbol": "diamond", "size": 11, "color": AMBER, "line": {"width": 1.5, "color": "white"}},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [_reach(row.saving.saving_interval, row.saving.saving_pct, upper=True) for row in known],
            "arrayminus": [_reach(row.saving.saving_interval, row.saving.saving_pct, upper=False) for row in known],
            "color": AMBER,
            "thickness": 2,
        },
        hovertemplate="%{x:.1f} %",
    )
    figure.update_layout(barmode="stack", hovermode="closest", bargap=0.35, height=max(HEIGHT, 110 + 42 * len(rows)))
    figure.update_xaxes(title={"text": "share of requests, and saving, %"}, type="linear", range=[0, 100])
    return figure


def week_figure(report: Report) -> go.Figure:
    """Control chart: quality out of sample by week with its interval, and what was required."""
    figure = blank_figure("% of the baseline's")
    known = [row for row in report.quality_weeks if row.quality_pct is not None]
    for number, (model, metric) in enumerate(dict.fromkeys((row.model, row.metric) for row in known)):
        rows = [row for row in known if (row.model, row.metric) == (model, metric)]
        colour = (GREEN, BLUE, PURPLE, AMBER)[number % 4]
        figure.add_scatter(
            x=[row.start for row in rows],
            y=[row.quality_pct for row in rows],
            name=f"{metric}, {model}",
            mode="markers",
            marker={"size": 10, "color": colour},
            error_y={
                "type": "data",
                "array": [(row.high_pct or 0.0) - (row.quality_pct or 0.0) for row in rows],
                "arrayminus": [(row.quality_pct or 0.0) - (row.low_pct or 0.0) for row in rows],
                "color": colour,
            },
            hovertemplate="%{y:.1f} %",
        )
        figure.add_scatter(
            x=[row.start for row in rows],
            y=[row.bound_pct for row in rows],
            name=f"required, {metric}",
            mode="lines+markers",
            line={"color": colour, "dash": "dot"},
            hovertemplate="%{y:.1f} %",
        )
    return figure


def plots(report: Report) -> list[Plot]:
    """Every plot for which the report has data."""
    found: list[Plot] = []
    if report.metered.power:
        note = "Of the servers that serve requests. Shaded: reference blocks, in which they serve without Sprout."
        found.append(Plot("Power of the fleet", note, power_figure(report)))
    if report.grid:
        found.append(Plot("Carbon intensity", "Of the grid; diamonds are evaluations.", intensity_figure(report)))
    if report.hours:
        found += [
            Plot("Directive mix", f"Share of every option by hour; the {BASELINE} is grey.", mix_figure(report)),
            Plot("Grams per request", f"Emitted, and if the {BASELINE} had served all.", grams_figure(report)),
            Plot("Quality", f"Judged {_metric_name(report)} relative to the {BASELINE}.", quality_figure(report)),
        ]
    if any(row.quality_pct is not None for row in report.quality_weeks):
        note = "By week, from verdicts that the policies had not learned from, with 95 % intervals."
        found.append(Plot("Quality out of sample", note, week_figure(report)))
    if report.energy.metered_j > 0 or report.energy.attributed_j > 0:
        found.append(Plot("Energy", "Metered energy and its uses.", energy_figure(report)))
    if report.groups:
        found.append(
            Plot("Prompt groups", "Shares of the options, and saving with its interval.", group_figure(report))
        )
    return found


def blank_figure(y_title: str) -> go.Figure:
    """A figure without data and without text and grid colours."""
    return go.Figure(
        layout={
            "height": HEIGHT,
            "margin": {"l": 56, "r": 16, "t": 8, "b": 40},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "hovermode": "x unified",
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
            "yaxis": {"title": {"text": y_title}, "automargin": True},
            "xaxis": {"automargin": True},
            "template": "none",
        }
    )


def _middle(row: HourRow) -> str:
    """The middle of the hour, as ISO 8601."""
    return f"{row.start:%Y-%m-%dT%H}:30:00"


def _mg(grams: float, row: HourRow) -> float:
    return 1000.0 * grams / row.compared


def _reach(interval: Interval | None, value: float | None, *, upper: bool) -> float:
    if interval is None or value is None:
        return 0.0
    return interval.high - value if upper else value - interval.low
