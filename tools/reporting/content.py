"""The report's tables as plain rows of text, for the terminal and the page alike."""

from dataclasses import dataclass

from tools.reporting.model import HourRow, Report
from tools.reporting.savings import Saving
from tools.reporting.words import (
    apart,
    energy,
    grams,
    intensity,
    level_shares,
    levels_of,
    moment,
    option_names,
    percent,
    percent_between,
    share,
)


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table; the first `labels` columns are text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1


def summary_lines(report: Report) -> tuple[tuple[str, str], ...]:
    """What matters most, in order: label and text."""
    saving, requests, quality = report.saving, report.requests, report.quality
    return (
        ("requests", _requests_line(report)),
        ("carbon saved", _saved_line(report)),
        ("95 % interval", f"{percent_between(saving.saving_interval)}, from {saving.references:,} reference draws"),
        ("emitted", _emitted_line(saving)),
        ("implied saving", f"{percent(report.implied_saving_pct)} by the policies' probabilities"),
        ("promised saving", f"{percent(report.promised_saving_pct)} expected when the policies were solved"),
        ("not compared", _left_out_line(report)),
        ("preference", f"{percent(quality.preference_pct)} of the reference's, by judged counts{_unjudged(report)}"),
        ("quality bound", _bound_line(report)),
        ("evaluations", _evaluations_line(report)),
        ("prompt groups", _groups_line(report)),
        ("energy", _energy_line(report)),
        ("all carbon", _carbon_line(report)),
        ("tokens", f"{requests.prompt_tokens:,} read, {requests.completion_tokens:,} generated"),
    )


def tables(report: Report, *, hours: bool = True) -> tuple[TextTable, ...]:
    """Every table with rows."""
    found = [zone_table(report), hour_table(report) if hours else None, group_table(report), evaluation_table(report)]
    return tuple(table for table in found if table is not None and table.rows)


def zone_table(report: Report) -> TextTable:
    """Per zone."""
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
                percent_between(row.saving.saving_interval),
                grams(row.idle_g),
            )
            for row in report.zones
        ),
    )


def hour_table(report: Report) -> TextTable:
    """Per hour."""
    levels = levels_of(report)
    return TextTable(
        "Hours (UTC)",
        ("hour", "g/kWh", "requests", *levels, "g/request", "all-reference", "saving", "quality", "bound"),
        tuple(
            (
                f"{row.start:%m-%d %H:%M}",
                " ".join(intensity(value) for value in row.intensity_g_per_kwh.values()) or "–",
                f"{row.requests:,}",
                *level_shares(row.mix, levels),
                _per_request(row.emitted_g, row),
                _per_request(row.reference_g, row),
                percent(hour_saving_pct(row)),
                percent(None if row.expected_quality is None else 100 * row.expected_quality),
                percent(None if row.quality_bound is None else 100 * row.quality_bound),
            )
            for row in report.hours
        ),
    )


def group_table(report: Report) -> TextTable:
    """Per prompt group."""
    levels = levels_of(report)
    return TextTable(
        "Prompt groups",
        ("group", "mostly", "requests", *levels, "energy", "saving", "95 % interval", "preference"),
        tuple(
            (
                row.group,
                f"{row.task} {percent(row.task_pct)}" if row.task else "",
                f"{row.requests:,}",
                *level_shares(row.mix, levels),
                energy(row.energy_j),
                percent(row.saving.saving_pct),
                percent_between(row.saving.saving_interval),
                percent(row.preference_pct),
            )
            for row in report.groups
        ),
        labels=2,
    )


def evaluation_table(report: Report) -> TextTable:
    """Per evaluation."""
    names = option_names(report)
    judged = dict.fromkeys(option for row in report.evaluations for option in row.preference)
    return TextTable(
        "Evaluations",
        (
            *("at (UTC)", "trigger", "g/kWh", "prompts", "abstained", "calls", "energy", "emitted"),
            *(f"{names.get(option, option)} preferred" for option in judged),
        ),
        tuple(
            (
                moment(row.at),
                row.trigger.replace("_", " "),
                intensity(row.intensity_g_per_kwh),
                str(row.prompts),
                str(row.abstentions),
                f"{row.calls:,}",
                energy(row.energy_j),
                grams(row.carbon_g),
                *(percent(_hundredfold(row.preference.get(option)), 0) for option in judged),
            )
            for row in report.evaluations
        ),
        labels=2,
    )


def hour_saving_pct(row: HourRow) -> float | None:
    """Saving of an hour, against what its share of the whole counterfactual is."""
    return 100.0 * (1.0 - row.emitted_g / row.reference_g) if row.reference_g > 0 else None


def _requests_line(report: Report) -> str:
    requests = report.requests
    parts = [f"{requests.answered:,} answered"]
    if requests.refused:
        codes = ", ".join(f"{code} {count:,}" for code, count in requests.refused_by_code.items())
        parts.append(f"{requests.refused:,} refused ({codes})")
    parts.append(f"{requests.unsettled:,} not settled yet" if requests.unsettled else "all of them settled")
    return ", ".join(parts)


def _emitted_line(saving: Saving) -> str:
    emitted, reference = _compared(saving.emitted_g, saving), _compared(saving.reference_g, saving)
    return f"{emitted} against {reference} had all been served by the reference"


def _compared(value: float, saving: Saving) -> str:
    """Grams of the requests that could be compared with the reference; a dash where there are none."""
    return grams(None if saving.saving_pct is None else value)


def _saved_line(report: Report) -> str:
    saving = report.saving
    if saving.saving_pct is None:
        return "not known: no request could be compared with the reference"
    return f"{percent(saving.saving_pct)}, {grams(saving.saved_g)} not emitted"


def _left_out_line(report: Report) -> str:
    requests = report.requests
    reasons = (
        (requests.forced, "with a directive of their producer's"),
        (requests.unidentified, "under a policy that never draws the reference, so nothing is known"),
        (requests.without_intensity, "at unknown carbon intensity"),
    )
    parts = [f"{count:,} {reason}" for count, reason in reasons if count]
    fallback = f"; {requests.fallback:,} of those compared were served in fallback" if requests.fallback else ""
    return ("; ".join(parts) or "none") + fallback


def _unjudged(report: Report) -> str:
    unjudged = report.quality.unjudged
    return f"; {unjudged:,} requests under options never judged" if unjudged else ""


def _bound_line(report: Report) -> str:
    if not report.policies_published:
        return "no policy was published"
    below, published = report.quality.policies_below_bound, report.policies_published
    statuses = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in sorted(report.policies.items()))
    kept = (
        f"missed by {below:,} of {published:,} policies"
        if below
        else f"kept in expectation by all {published:,} policies"
    )
    return f"{kept} ({statuses})"


def _evaluations_line(report: Report) -> str:
    if not report.evaluations:
        return "none"
    quality, carbon = report.quality, report.carbon
    return (
        f"{len(report.evaluations)}, {quality.prompts:,} prompts, {quality.abstentions:,} abstentions, "
        f"{grams(carbon.evaluation_g + carbon.judge_g)} ({percent(carbon.evaluation_share_pct)} of the requests')"
    )


def _groups_line(report: Report) -> str:
    if not report.groupings:
        return "by task label"
    newest = report.groupings[-1]
    return (
        f"version {newest.version}, learned from {newest.prompts:,} judged prompts on {moment(newest.at)}; "
        f"{report.requests_by_learned_groups:,} requests by learned groups"
    )


def _energy_line(report: Report) -> str:
    account = report.energy
    if account.difference_pct is None:
        return "nothing was metered"
    return (
        f"{energy(account.metered_j)} metered; requests {share(account.requests_j, account.metered_j)}, evaluation "
        f"{share(account.evaluation_j + account.judge_j, account.metered_j)}, idle "
        f"{share(account.idle_j, account.metered_j)}, unattributed {share(account.unattributed_j, account.metered_j)}; "
        f"books and meters are {apart(account.difference_pct)} apart"
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


def _hundredfold(value: float | None) -> float | None:
    return None if value is None else 100.0 * value
