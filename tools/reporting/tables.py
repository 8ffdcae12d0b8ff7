"""The report's tables as rows of text, and the report on a terminal.

The page (`tools.reporting.page`) shows the same summary and tables.
"""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.runtime.printable import printable
from tools.reporting.format import (
    energy,
    grams,
    intensity,
    level_shares,
    levels_of,
    option_names,
    percent,
    percent_range,
    relative_difference,
    share,
    timestamp,
)
from tools.reporting.model import HourRow, Report
from tools.reporting.savings import Saving

BASELINE = "baseline (no directive)"
"""How texts for people call the reference option."""
HIGHLIGHTS = {"carbon saved": "bold green", "answer quality": "bold"}


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


def headline(report: Report) -> str:
    """The models, zones and period of the report."""
    scope = report.scope
    models = ", ".join(scope.models) or scope.model or "no model"
    zones = ", ".join(scope.zones) or scope.zone or "no zone"
    return f"{models} in {zones}, {timestamp(scope.first)} to {timestamp(scope.last)} UTC"


def summary_lines(report: Report) -> tuple[tuple[str, str], ...]:
    """Label and text of the key figures, gain and loss first."""
    saving, requests = report.saving, report.requests
    return (
        ("requests", _requests_line(report)),
        ("carbon saved", _saved_line(report)),
        (
            "95 % interval",
            f"{percent_range(saving.saving_interval)}, from {saving.references:,} requests randomly given the baseline",
        ),
        ("answer quality", _quality_line(report)),
        ("emitted", _emitted_line(saving)),
        ("evaluations", _evaluations_line(report)),
        ("saving by policies", _policies_line(report)),
        ("not compared", _excluded_line(report)),
        ("quality bound", _bound_line(report)),
        ("prompt groups", _groups_line(report)),
        ("energy", _energy_line(report)),
        ("all carbon", _carbon_line(report)),
        ("tokens", f"{requests.prompt_tokens:,} in prompts, {requests.completion_tokens:,} generated"),
    )


def tables(report: Report, *, hours: bool = True) -> tuple[TextTable, ...]:
    """All tables that have rows."""
    found = [zone_table(report), hour_table(report) if hours else None, group_table(report), evaluation_table(report)]
    return tuple(table for table in found if table is not None and table.rows)


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
                _compared(row.saving.emitted_g, row.saving),
                _compared(row.saving.saved_g, row.saving),
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


def group_table(report: Report) -> TextTable:
    """One row per prompt group."""
    levels = levels_of(report)
    return TextTable(
        "Prompt groups",
        ("group", "main task", "requests", *levels, "energy", "saving", "95 % interval", "preference"),
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


def hour_saving_pct(row: HourRow) -> float | None:
    """Saving of one hour, against its share of the counterfactual, %; None without comparable requests."""
    return 100.0 * (1.0 - row.emitted_g / row.reference_g) if row.reference_g > 0 else None


def quality_change(preference_pct: float | None) -> str:
    """Gain or loss of quality against the baseline, such as `5.6 % worse`; empty if unknown.

    Args:
        preference_pct: preference rate relative to the baseline, %.
    """
    if preference_pct is None:
        return ""
    change = preference_pct - 100.0
    if abs(change) < 0.05:
        return "no change"
    return f"{percent(abs(change))} {'better' if change > 0 else 'worse'}"


def bound_summary(report: Report) -> str:
    """Whether all policies expected to meet the quality bound, in two words."""
    if not report.policies_published:
        return "no policy"
    return "bound met" if report.quality.bound_kept else "bound missed"


def _requests_line(report: Report) -> str:
    requests = report.requests
    parts = [f"{requests.answered:,} answered"]
    if requests.refused:
        codes = ", ".join(f"{code} {count:,}" for code, count in requests.refused_by_code.items())
        parts.append(f"{requests.refused:,} rejected ({codes})")
    parts.append(f"{requests.unsettled:,} not settled yet" if requests.unsettled else "all settled")
    return ", ".join(parts)


def _saved_line(report: Report) -> str:
    saving = report.saving
    if saving.saving_pct is None:
        return f"not known: no request can be compared with the {BASELINE}"
    return (
        f"{percent(saving.saving_pct)} ({grams(saving.saved_g)}) compared with the {BASELINE}; "
        "the evaluator's carbon is not subtracted"
    )


def _quality_line(report: Report) -> str:
    quality = report.quality
    if quality.preference_pct is None:
        return "not known: no served option was judged"
    change = quality_change(quality.preference_pct)
    unjudged = f"; {quality.unjudged:,} requests were served at options never judged" if quality.unjudged else ""
    return (
        f"preferred {percent(quality.preference_pct)} as often as the baseline ({change}), by judged samples{unjudged}"
    )


def _emitted_line(saving: Saving) -> str:
    emitted, reference = _compared(saving.emitted_g, saving), _compared(saving.reference_g, saving)
    return f"{emitted}, estimated {reference} if the baseline had served every request"


def _policies_line(report: Report) -> str:
    return (
        f"{percent(report.implied_saving_pct)} computed from the policies' probabilities, "
        f"{percent(report.promised_saving_pct)} predicted when the policies were solved"
    )


def _compared(value: float, saving: Saving) -> str:
    """Grams of the comparable requests; a dash if there are none."""
    return grams(None if saving.saving_pct is None else value)


def _excluded_line(report: Report) -> str:
    requests = report.requests
    reasons = (
        (requests.forced, "with a directive chosen by the client"),
        (requests.unidentified, "under a policy that never chooses the baseline, so the saving cannot be estimated"),
        (requests.without_intensity, "at unknown carbon intensity"),
    )
    parts = [f"{count:,} {reason}" for count, reason in reasons if count]
    fallback = f"; {requests.fallback:,} of the compared requests were served in fallback" if requests.fallback else ""
    return ("; ".join(parts) or "none") + fallback


def _bound_line(report: Report) -> str:
    if not report.policies_published:
        return "no policy was published"
    published = report.policies_published
    met = published - report.quality.policies_below_bound
    statuses = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in sorted(report.policies.items()))
    return f"{met:,} of {published:,} policies expected to meet it ({statuses})"


def _evaluations_line(report: Report) -> str:
    if not report.evaluations:
        return "none"
    quality, carbon = report.quality, report.carbon
    emitted = grams(carbon.evaluation_g + carbon.judge_g)
    return (
        f"{len(report.evaluations)} with {quality.prompts:,} prompts, {quality.abstentions:,} inconclusive; "
        f"they emitted {emitted} ({percent(carbon.evaluation_share_pct)} of the requests' carbon)"
    )


def _groups_line(report: Report) -> str:
    if not report.groupings:
        return "by task label"
    newest = report.groupings[-1]
    return (
        f"version {newest.version}, learned from {newest.prompts:,} judged prompts on {timestamp(newest.at)}; "
        f"{report.requests_by_learned_groups:,} requests in learned groups"
    )


def _energy_line(report: Report) -> str:
    account = report.energy
    if account.difference_pct is None:
        return "nothing was metered"
    return (
        f"{energy(account.metered_j)} metered; requests {share(account.requests_j, account.metered_j)}, evaluation "
        f"{share(account.evaluation_j + account.judge_j, account.metered_j)}, idle "
        f"{share(account.idle_j, account.metered_j)}, unattributed {share(account.unattributed_j, account.metered_j)}; "
        f"accounted and metered energy differ by {relative_difference(account.difference_pct)}"
    )


def _carbon_line(report: Report) -> str:
    carbon = report.carbon
    unpriced = f"; {energy(carbon.unpriced_j)} at unknown intensity" if carbon.unpriced_j > 0 else ""
    return (
        f"{grams(carbon.total_g)}: requests {grams(carbon.requests_g)}, evaluation "
        f"{grams(carbon.evaluation_g + carbon.judge_g)}, idle {grams(carbon.idle_g)}, unattributed "
        f"{grams(carbon.unattributed_g)}; {grams(carbon.embodied_g)} of it embodied{unpriced}"
    )


def _per_request(value: float, row: HourRow) -> str:
    return grams(value / row.compared) if row.compared else "–"


def _percentage(share: float | None) -> float | None:
    return None if share is None else 100.0 * share
