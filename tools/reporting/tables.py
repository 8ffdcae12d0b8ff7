"""The report's tables as rows of text, and the report on a terminal.

The page (`tools.reporting.page`) shows the same summary and tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.runtime.logs import printable
from tools.reporting.folding import FEWEST_REQUESTS, MOST_GROUPS
from tools.reporting.format import (
    decimal,
    energy,
    grams,
    intensity,
    level_shares,
    levels_of,
    milliseconds,
    option_names,
    percent,
    percent_range,
    significant_digits,
    timestamp,
)
from tools.reporting.model import GroupRow, HourRow, Report
from tools.reporting.summary import ATTRIBUTED, ON_METER, compared_grams, headline, summary_lines

HIGHLIGHTS = {ON_METER: "bold green", ATTRIBUTED: "bold green", "answer quality": "bold"}


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table; the first `labels` columns are text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1


def render_tables(report: Report, console: Console, *, hours: bool = True) -> None:
    """Print the summary, and the tables of zones, hours, prompt groups and evaluations."""
    console.print(Text(printable(headline(report)), style="bold"))
    summary = Table.grid(padding=(0, 2))
    for label, text in summary_lines(report):
        summary.add_row(Text(label, style="dim"), Text(printable(text), style=HIGHLIGHTS.get(label, "")))
    console.print(summary)
    for table in tables(report, hours=hours):
        console.print()
        console.print(rich_table(table))


def rich_table(table: TextTable) -> Table:
    """A table for the terminal."""
    shown = Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for number, name in enumerate(table.columns):
        shown.add_column(name, justify="left" if number < table.labels else "right", no_wrap=number == 0)
    for row in table.rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    return shown


def tables(report: Report, *, hours: bool = True) -> tuple[TextTable, ...]:
    """All tables that have rows."""
    found = [
        capacity_table(report),
        latency_table(report),
        zone_table(report),
        limit_table(report),
        promise_table(report),
        hour_table(report) if hours else None,
        promised_hour_table(report) if hours else None,
        group_table(report),
        evaluation_table(report),
        week_table(report),
        length_table(report),
    ]
    return tuple(table for table in found if table is not None and table.rows)


def capacity_table(report: Report) -> TextTable:
    """One row per pool that serves requests: endpoints, and energy on the meters."""
    return TextTable(
        "Capacity",
        ("pool", "servers", "needed", "in use", "could sleep", "on the meter", "idle", "without calls"),
        tuple(
            (
                row.pool,
                str(row.endpoints),
                decimal(row.needed_mean),
                decimal(row.in_use_mean),
                "–" if row.could_sleep_pct is None else f"{row.could_sleep} for {percent(row.could_sleep_pct, 0)}",
                energy(row.energy_j),
                energy(row.idle_j),
                energy(row.unused_j),
            )
            for row in report.metered.pools
        ),
    )


def latency_table(report: Report) -> TextTable:
    """One row per pool whose latency or price is known."""
    return TextTable(
        "Latency and prices",
        (
            *("pool", "per token p50", "p95", "objective", "first token p50", "p95", "objective"),
            *("J per token", "basis"),
        ),
        tuple(
            (
                row.pool,
                milliseconds(row.latency.tpot_p50_ms),
                milliseconds(row.latency.tpot_p95_ms),
                milliseconds(row.tpot_objective_ms),
                milliseconds(row.latency.ttft_p50_ms),
                milliseconds(row.latency.ttft_p95_ms),
                milliseconds(row.ttft_objective_ms),
                "–" if row.price is None or row.price.token_j is None else significant_digits(row.price.token_j),
                "–" if row.price is None else row.price.basis,
            )
            for row in report.metered.pools
            if row.latency.requests or row.price is not None
        ),
    )


def zone_table(report: Report) -> TextTable:
    """One row per grid zone."""
    return TextTable(
        "Zones",
        ("zone", "g/kWh", "requests", "energy", "emitted", "saved", "saving", "95 % interval", "idle"),
        tuple(
            (
                row.zone,
                intensity(row.intensity_g_per_kwh),
                f"{row.requests:,}",
                energy(row.energy_j),
                compared_grams(row.saving.emitted_g, row.saving),
                compared_grams(row.saving.saved_g, row.saving),
                percent(row.saving.saving_pct),
                percent_range(row.saving.saving_interval),
                grams(row.idle_g),
            )
            for row in report.zones
        ),
    )


def hour_table(report: Report) -> TextTable:
    """One row per hour."""
    levels = levels_of(report)
    return TextTable(
        "Hours (UTC)",
        ("hour", "g/kWh", "requests", *levels, "g/request", "baseline", "saving", "expected quality", "bound"),
        tuple(
            (
                f"{row.start:%m-%d %H:%M}",
                " ".join(intensity(value) for value in row.intensity_g_per_kwh.values()) or "–",
                f"{row.requests:,}",
                *level_shares(row.mix, levels),
                _per_request(row.emitted_g, row),
                _per_request(row.reference_g, row),
                percent(hour_saving_pct(row)),
                percent(_percentage(row.expected_quality)),
                percent(_percentage(row.quality_bound)),
            )
            for row in report.hours
        ),
    )


def limit_table(report: Report) -> TextTable:
    """One row per model and metric: what the newest policy counts on, and what the limit costs."""
    return TextTable(
        "Quality limits of the newest policy, % of the baseline's",
        ("model", "metric", "policy", "required", "mean", "margin", "mean - margin", "one point more costs"),
        tuple(
            (
                row.model,
                row.metric,
                f"{row.policy_version}, {timestamp(row.at)}",
                percent(100.0 * row.outcome.required, 2),
                percent(100.0 * row.outcome.mean, 2),
                f"{100.0 * row.outcome.margin:.2f} points",
                percent(100.0 * (row.outcome.mean - row.outcome.margin), 2),
                f"{significant_digits(row.outcome.carbon_points_per_point, 2)} points of carbon"
                if row.outcome.carbon_points_per_point > 0.0
                else "nothing: not binding",
            )
            for row in report.limits
        ),
        labels=3,
    )


def promise_table(report: Report) -> TextTable:
    """One row per model, period and metric of promises by period."""
    return TextTable(
        "Promise by period, relative to the baseline (requests are estimated)",
        ("model", "metric", "from (UTC)", "to", "state", "requests", "promised", "kept", "difference", "rest needs"),
        tuple(
            (
                row.model,
                row.metric,
                timestamp(row.start),
                timestamp(row.end),
                "closed" if row.closed else "so far",
                f"{row.requests:,.0f}",
                percent(100.0 * row.promised, 2),
                percent(100.0 * row.kept, 2),
                f"{100.0 * (row.kept - row.promised):+.2f} points",
                percent(_percentage(row.rest), 2),
            )
            for row in report.promised_periods
        ),
        labels=5,
    )


def promised_hour_table(report: Report) -> TextTable:
    """One row per hour, model and metric of promises by period."""
    return TextTable(
        "Promise by hour (UTC)",
        ("hour", "model", "metric", "requests", "promised", "kept", "difference"),
        tuple(
            (
                f"{row.start:%m-%d %H:%M}",
                row.model,
                row.metric,
                f"{row.requests:,}",
                percent(100.0 * row.promised, 2),
                percent(100.0 * row.kept, 2),
                f"{100.0 * (row.kept - row.promised):+.2f} points",
            )
            for row in report.promised_hours
        ),
        labels=3,
    )


def group_table(report: Report) -> TextTable:
    """One row per prompt group; small ones together."""
    levels = levels_of(report)
    settled = any(row.settled_since or row.not_judged for row in report.groups)
    explained = any(row.next_option is not None for row in report.groups)
    names = option_names(report)
    title = "Prompt groups"
    if any(row.groups > 1 for row in report.groups):
        title += f" (those of fewer than {FEWEST_REQUESTS} requests, and all but the {MOST_GROUPS} largest, together)"
    return TextTable(
        title,
        (
            *("group", "main task", "requests", *levels, "energy", "saving", "95 % interval", "preference"),
            *(("next best option: all would emit more by",) if explained else ()),
            *(("settled since (UTC)", "not judged") if settled else ()),
        ),
        tuple(
            (
                row.group,
                f"{row.task} {percent(row.task_pct)}" if row.task else "",
                f"{row.requests:,}",
                *level_shares(row.mix, levels),
                energy(row.energy_j),
                percent(row.saving.saving_pct),
                percent_range(row.saving.saving_interval),
                percent(row.preference_pct),
                *((_next_option(row, names),) if explained else ()),
                *((timestamp(row.settled_since), f"{row.not_judged:,}") if settled else ()),
            )
            for row in report.groups
        ),
        labels=2,
    )


def evaluation_table(report: Report) -> TextTable:
    """One row per evaluation."""
    names = option_names(report)
    judged = dict.fromkeys(option for row in report.evaluations for option in row.preference)
    return TextTable(
        "Evaluations",
        (
            *("at (UTC)", "trigger", "g/kWh", "prompts", "inconclusive", "calls", "energy", "emitted"),
            *(f"{names.get(option, option)} preferred" for option in judged),
        ),
        tuple(
            (
                timestamp(row.at),
                row.trigger.replace("_", " "),
                intensity(row.intensity_g_per_kwh),
                str(row.prompts),
                str(row.abstentions),
                f"{row.calls:,}",
                energy(row.energy_j),
                grams(row.carbon_g),
                *(percent(_percentage(row.preference.get(option)), 0) for option in judged),
            )
            for row in report.evaluations
        ),
        labels=2,
    )


def week_table(report: Report) -> TextTable:
    """One row per week: quality out of sample."""
    return TextTable(
        "Quality out of sample, % of the baseline's",
        ("week from", "model", "metric", "evaluations", "verdicts", "quality", "95 %", "required", "promised"),
        tuple(
            (
                f"{row.start:%Y-%m-%d}",
                row.model,
                row.metric,
                str(row.evaluations),
                f"{row.prompts:,.0f}",
                percent(row.quality_pct),
                "–" if row.low_pct is None else f"{percent(row.low_pct)} to {percent(row.high_pct)}",
                percent(row.bound_pct),
                percent(row.promised_pct),
            )
            for row in report.quality_weeks
        ),
        labels=3,
    )


def length_table(report: Report) -> TextTable:
    """One row per option: its preference as judged, and at equal length."""
    names = option_names(report)
    return TextTable(
        "Preference at equal length",
        ("option", "prompts", "against baseline", "at equal length"),
        tuple(
            (
                names.get(row.option, row.option),
                f"{row.prompts:,}",
                f"{row.difference_points:+.1f} points",
                "–" if row.controlled_points is None else f"{row.controlled_points:+.1f} points",
            )
            for row in (report.judge.lengths if report.judge is not None else ())
        ),
    )


def hour_saving_pct(row: HourRow) -> float | None:
    """Saving of one hour, against its share of the counterfactual, %; None without comparable requests."""
    return 100.0 * (1.0 - row.emitted_g / row.reference_g) if row.reference_g > 0 else None


def _next_option(row: GroupRow, names: Mapping[str, str]) -> str:
    option = row.next_option
    return "" if option is None else f"{names.get(option, option)}: {grams(row.next_option_extra_g)}"


def _per_request(value: float, row: HourRow) -> str:
    return grams(value / row.compared) if row.compared else "–"


def _percentage(share: float | None) -> float | None:
    return None if share is None else 100.0 * share
