"""The paper's figures for a simulation."""

from collections.abc import Callable, Sequence
from statistics import fmean

import plotly.graph_objects as go

from tools.reporting.plots import AMBER, BLUE, GREEN, GREY, LEVELS, PURPLE, RED, Plot, blank_figure
from tools.simulator.outcome import Outcome

COLOURS = {
    "base": GREY, "co2_opt": RED, "model_opt": AMBER, "sprout_sta": "#9ecae1", "sprout": BLUE, "sprout_task": "#7fc796",
    "sprout_context": GREEN, "oracle": PURPLE,
}  # fmt: skip
ZONES = (BLUE, AMBER, GREEN, PURPLE, RED, GREY)
SHOWN_HOURS = 168
"""Hours of a window that are plotted: a week."""


def figures(outcomes: Sequence[Outcome]) -> list[Plot]:
    """Every figure that has data."""
    usual = max({one.xi for one in outcomes}, key=lambda xi: len([one for one in outcomes if one.xi == xi]))
    mine = [one for one in outcomes if one.xi == usual or one.scheme in ("base", "co2_opt")]
    found = [
        (
            "Saving by zone",
            f"Carbon saving net of the evaluator's, % of BASE's; xi = {usual:g}, mean over windows.",
            _by_zone(mine, _saving),
        ),
        ("Preference by zone", "Relative to the reference's, %.", _by_zone(mine, _preference)),
    ]
    if len({one.window_start_hour for one in mine}) > 1:
        found.append(
            ("Seasons", "Saving against preference: one point per scheme and window, mean over zones.", _seasons(mine))
        )
    if len({one.xi for one in outcomes}) > 1:
        found.append(("Pareto front over xi", "Saving against preference, a curve per zone.", _front(outcomes)))
    drawn = _drawn(mine)
    if drawn is not None:
        where = f"{drawn.scheme} in {drawn.zone}, the window's first week"
        found += [
            ("Directive mix", f"{where}; the reference is grey.", _mix(drawn)),
            ("Carbon intensity", f"{where}; diamonds are evaluations.", _intensity(drawn)),
        ]
    if any(one.evaluator_grams.any() for one in mine):
        found.append(("Evaluator", "Its carbon, % of BASE's; mean over windows.", _by_zone(mine, _evaluator)))
    found.append(
        ("Throughput", "Requests that an hour of a GPU serves one after the other, % of BASE's.", _throughput(mine))
    )
    return [Plot(*one) for one in found]


def _saving(one: Outcome) -> float | None:
    return one.saving_pct


def _preference(one: Outcome) -> float | None:
    return one.preference_pct


def _evaluator(one: Outcome) -> float | None:
    return one.evaluator_share_pct


def _mean(value: Callable[[Outcome], float | None], outcomes: Sequence[Outcome]) -> float | None:
    """Mean over the outcomes in which it is known; None (a gap in the plot) if it is known in none."""
    known = [found for one in outcomes if (found := value(one)) is not None]
    return fmean(known) if known else None


def _named(outcomes: Sequence[Outcome], name: Callable[[Outcome], str]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(name(one), []).append(one)
    return found


def _by_zone(outcomes: Sequence[Outcome], value: Callable[[Outcome], float | None]) -> go.Figure:
    figure = blank_figure("%")
    for scheme, rows in _named(outcomes, lambda one: one.scheme).items():
        by_zone = _named(rows, lambda one: one.zone)
        figure.add_bar(
            x=list(by_zone),
            y=[_mean(value, found) for found in by_zone.values()],
            name=scheme,
            marker={"color": COLOURS[scheme]},
            hovertemplate="%{y:.2f} %",
        )
    figure.update_layout(barmode="group")
    return figure


def _seasons(outcomes: Sequence[Outcome]) -> go.Figure:
    figure = blank_figure("preference, % of the reference's")
    for scheme, rows in _named(outcomes, lambda one: one.scheme).items():
        by_start = _named(rows, lambda one: f"from hour {one.window_start_hour}")
        figure.add_scatter(
            x=[_mean(_saving, found) for found in by_start.values()],
            y=[_mean(_preference, found) for found in by_start.values()],
            text=list(by_start),
            name=scheme,
            mode="markers",
            marker={"size": 11, "color": COLOURS[scheme]},
            hovertemplate="%{text}: %{x:.1f} % saved, preference %{y:.1f} %",
        )
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(title={"text": "carbon saving, %"})
    return figure


def _front(outcomes: Sequence[Outcome]) -> go.Figure:
    figure = blank_figure("preference, % of the reference's")
    by_scheme = _named(outcomes, lambda one: one.scheme)
    scheme = next((name for name in ("sprout_context", "sprout_task", "sprout") if name in by_scheme), None)
    for number, (zone, rows) in enumerate(_named(by_scheme.get(scheme or "", []), lambda one: one.zone).items()):
        by_xi = sorted(_named(rows, lambda one: f"{one.xi:.6f}").items())
        figure.add_scatter(
            x=[_mean(_saving, found) for _, found in by_xi],
            y=[_mean(_preference, found) for _, found in by_xi],
            text=[f"xi {float(xi):g}" for xi, _ in by_xi],
            name=f"{scheme}, {zone}",
            mode="lines+markers",
            line={"color": ZONES[number % len(ZONES)], "width": 2.5},
            hovertemplate="%{text}: %{x:.1f} % saved, preference %{y:.1f} %",
        )
    for name, symbol in (("oracle", "star"), ("sprout_sta", "x"), ("sprout", "circle-open")):
        rows = by_scheme.get(name, []) if name != scheme else []
        if rows:
            figure.add_scatter(
                x=[_saving(one) for one in rows],
                y=[_preference(one) for one in rows],
                text=[f"{one.zone} from hour {one.window_start_hour}, xi {one.xi:g}" for one in rows],
                name=name,
                mode="markers",
                marker={"symbol": symbol, "size": 9, "color": COLOURS[name]},
                hovertemplate="%{text}: %{x:.1f} % saved, preference %{y:.1f} %",
            )
    figure.update_layout(hovermode="closest", height=420)
    figure.update_xaxes(title={"text": "carbon saving, %"})
    return figure


def _drawn(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The outcome whose hours are plotted."""
    for scheme in ("sprout_context", "sprout_task", "sprout"):
        found = [one for one in outcomes if one.scheme == scheme]
        if found:
            return max(found, key=lambda one: float(one.g_per_kwh.std()))
    return None


def _mix(one: Outcome) -> go.Figure:
    figure = blank_figure("share of requests, %")
    for number, option in enumerate(one.options):
        figure.add_bar(
            y=[float(value) for value in 100.0 * one.mix[:SHOWN_HOURS, number]],
            name=option.rpartition("/")[2],
            marker={"color": LEVELS[number % len(LEVELS)], "line": {"width": 0}},
            hovertemplate="%{y:.0f} %",
        )
    figure.update_layout(barmode="stack", bargap=0.0)
    figure.update_xaxes(title={"text": "hour"})
    figure.update_yaxes(range=[0, 100])
    return figure


def _intensity(one: Outcome) -> go.Figure:
    figure = blank_figure("gCO₂eq per kWh")
    values = [float(value) for value in one.g_per_kwh[:SHOWN_HOURS]]
    figure.add_scatter(y=values, name=one.zone, mode="lines", line={"shape": "hv", "width": 2.5, "color": AMBER})
    hours = [hour for hour in one.evaluation_hours if hour < SHOWN_HOURS]
    figure.add_scatter(
        x=hours,
        y=[values[hour] for hour in hours],
        name="evaluation",
        mode="markers",
        marker={"symbol": "diamond", "size": 10, "color": GREEN},
    )
    figure.update_xaxes(title={"text": "hour"})
    figure.update_yaxes(rangemode="tozero")
    return figure


def _throughput(outcomes: Sequence[Outcome]) -> go.Figure:
    by_scheme = _named(outcomes, lambda one: one.scheme)
    seconds = {scheme: fmean(float(one.processing_s.mean()) for one in rows) for scheme, rows in by_scheme.items()}
    # Every outcome has BASE's time, whether BASE itself was simulated or not.
    base = {scheme: fmean(float(one.base_processing_s.mean()) for one in rows) for scheme, rows in by_scheme.items()}
    figure = blank_figure("%")
    figure.add_bar(
        x=list(seconds),
        y=[100.0 * base[scheme] / one for scheme, one in seconds.items()],
        marker={"color": [COLOURS[scheme] for scheme in seconds]},
        text=[f"{3600.0 / one:,.0f}/h" for one in seconds.values()],
        hovertemplate="%{y:.0f} %, %{text}<extra></extra>",
    )
    return figure
