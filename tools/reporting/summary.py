"""The report's key figures as lines of text, for the terminal and the page."""

from tools.reporting.capacity import PoolRow
from tools.reporting.format import (
    decimal,
    energy,
    grams,
    grams_range,
    milliseconds,
    option_names,
    percent,
    percent_range,
    relative_difference,
    share,
    significant_digits,
    timestamp,
)
from tools.reporting.model import Report
from tools.reporting.out_of_sample import latest_week
from tools.reporting.quality import CORRECTNESS
from tools.reporting.savings import Saving

BASELINE = "baseline (no directive)"
"""How texts for people call the reference option."""
ON_METER = "saving on the meter"
ATTRIBUTED = "attributed saving"


def headline(report: Report) -> str:
    """The models, zones and period of the report."""
    scope = report.scope
    models = ", ".join(scope.models) or scope.model or "no model"
    zones = ", ".join(scope.zones) or scope.zone or "no zone"
    return f"{models} in {zones}, {timestamp(scope.first)} to {timestamp(scope.last)} UTC"


def summary_lines(report: Report) -> tuple[tuple[str, str], ...]:
    """Label and text of the key figures, gain and loss first."""
    saving, requests, metered = report.saving, report.requests, report.metered
    lines = (
        ("requests", _requests_line(report)),
        (ON_METER, _on_meter_line(report)),
        (ATTRIBUTED, _attributed_line(report)),
        ("why they differ", metered.explanation),
        ("pools left out", "; ".join(f"{pool}: {reason}" for pool, reason in metered.excluded_pools.items())),
        ("readings", "; ".join(metered.notes)),
        ("capacity", "; ".join(_capacity(row) for row in metered.pools if row.pool not in metered.excluded_pools)),
        ("latency", _latency_line(report)),
        ("price of a token", "; ".join(_price(row) for row in metered.pools if row.price is not None)),
        ("carbon saved", _saved_line(report)),
        (
            "95 % interval",
            f"{percent_range(saving.saving_interval)}, from {saving.references:,} requests randomly given the baseline",
        ),
        ("answer quality", _quality_line(report)),
        ("out of sample", _out_of_sample_line(report)),
        ("right answers", _correctness_line(report)),
        ("judge", _judge_line(report)),
        ("emitted", _emitted_line(saving)),
        ("evaluations", _evaluations_line(report)),
        ("saving by policies", _policies_line(report)),
        ("not compared", _excluded_line(report)),
        ("quality bound", _bound_line(report)),
        ("promise", _promise_line(report)),
        ("prompt groups", _groups_line(report)),
        ("energy", _energy_line(report)),
        ("all carbon", _carbon_line(report)),
        ("tokens", f"{requests.prompt_tokens:,} in prompts, {requests.completion_tokens:,} generated"),
    )
    return tuple((label, text) for label, text in lines if text)


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
    if requests.shared_ids:
        parts.append(f"{requests.shared_ids:,} share their id with another, each counted by its record")
    return ", ".join(parts)


def _on_meter_line(report: Report) -> str:
    found = report.metered.saving
    if found is None:
        return f"not known: {report.metered.reason}"
    blocks = report.metered.reference_blocks
    return (
        f"{grams(found.saved_g)} and {energy(found.saved_j)} saved (95 %: {grams_range(found.saved_g_interval)}), "
        f"{percent(found.saving_pct)} of what the meters would have shown (95 %: "
        f"{percent_range(found.saving_interval)}), net of the evaluator; from {blocks} reference blocks in "
        f"{significant_digits(found.hours)} h"
    )


def _attributed_line(report: Report) -> str:
    net = report.net
    if net.saving_pct is None:
        return f"not known: no request can be compared with the {BASELINE}"
    return (
        f"{grams(net.saved_g)} saved (95 %: {grams_range(net.saved_interval)}), {percent(net.saving_pct)} of the "
        f"requests' carbon (95 %: {percent_range(net.saving_interval)}), net of the evaluator "
        f"({grams(net.evaluator_g)})"
    )


def _capacity(row: PoolRow) -> str:
    if row.needed_mean is None:
        remedy = "set target_batch, or tpot_objective_ms with dispatch = pack"
        reason = remedy if row.target_batch is None else "no meter reading"
        return f"{row.pool}: endpoints needed are not known ({reason})"
    asleep = (
        f"{row.could_sleep} of {row.endpoints} servers could have slept {percent(row.could_sleep_pct, 0)} of the time"
        if row.could_sleep
        else f"none of {row.endpoints} servers could have slept"
    )
    return (
        f"{row.pool}: {asleep}; {row.needed_mean:.1f} needed on average at {row.target_batch:.0f} requests each, "
        f"{decimal(row.in_use_mean)} had work; {energy(row.unused_j)} went to servers without a call"
    )


def _latency_line(report: Report) -> str:
    with_sprout, without = report.metered.latency, report.metered.reference_latency
    if with_sprout.tpot_p95_ms is None and with_sprout.ttft_p95_ms is None:
        return ""
    objective = report.metered.tpot_objective_ms
    parts = [
        f"{milliseconds(with_sprout.tpot_p50_ms)} per output token, {milliseconds(with_sprout.tpot_p95_ms)} p95"
        + ("" if objective is None else f" (objective {milliseconds(objective)})"),
        f"first token after {milliseconds(with_sprout.ttft_p50_ms)}, {milliseconds(with_sprout.ttft_p95_ms)} p95",
    ]
    if without.requests:
        parts.append(
            f"in reference blocks {milliseconds(without.tpot_p95_ms)} per token and "
            f"{milliseconds(without.ttft_p95_ms)} to the first token, p95"
        )
    return "; ".join(parts)


def _price(row: PoolRow) -> str:
    if row.price is None:
        return ""
    each = "" if row.price.token_j is None else f" {significant_digits(row.price.token_j)} J,"
    text = f"{row.pool}:{each} {row.price.basis} ({row.price.reason})"
    if row.price.basis == "marginal" and row.brevity_pct is not None:
        text += (
            f". Its servers run anyway, so the shorter answers took about {percent(row.brevity_pct, 0)} off its meter: "
            "for more, let capacity follow the load (dispatch = pack, sleep)"
        )
    return text


def _saved_line(report: Report) -> str:
    saving = report.saving
    if saving.saving_pct is None:
        return f"not known: no request can be compared with the {BASELINE}"
    return (
        f"{percent(saving.saving_pct)} ({grams(saving.saved_g)}) compared with the {BASELINE}, attributed, before the "
        "evaluator's carbon is subtracted"
    )


def _quality_line(report: Report) -> str:
    quality = report.quality
    if quality.preference_pct is None:
        return "not known: no served option was judged"
    change = quality_change(quality.preference_pct)
    unjudged = f"; {quality.unjudged:,} requests were served at options never judged" if quality.unjudged else ""
    known = quality.not_worse_pct
    not_worse = "" if known is None else f"{percent(known)} of the answers not worse than the baseline's; "
    return (
        f"{not_worse}preferred {percent(quality.preference_pct)} as often as the baseline ({change}), by judged "
        f"samples{unjudged}"
    )


def _correctness_line(report: Report) -> str:
    """Share of right answers by option over all judged prompts; empty if correctness was not judged."""
    sums: dict[str, list[float]] = {}
    for one in report.quality.judged:
        if one.metric == CORRECTNESS:
            pair = sums.setdefault(one.option, [0.0, 0.0])
            pair[0] += one.successes
            pair[1] += one.trials
    names = option_names(report)
    return ", ".join(
        f"{names[option]} {share(right, trials)} of {trials:,.0f}" for option, (right, trials) in sums.items()
    )


def _out_of_sample_line(report: Report) -> str:
    """Quality of the last week by verdicts that the policies had not learned from; empty if it is not known."""
    parts = []
    for metric in sorted({one.metric for one in report.quality_weeks}):
        week = latest_week(report.quality_weeks, metric)
        if week is not None:
            bound = "" if week.bound_pct is None else f", at least {percent(week.bound_pct)} required"
            parts.append(
                f"{metric} {percent(week.quality_pct)} of the {BASELINE}'s (95 %: {percent(week.low_pct)} to "
                f"{percent(week.high_pct)}{bound}) by {week.prompts:,.0f} verdicts that the policies had not learned "
                f"from, week of {week.start:%Y-%m-%d}"
            )
    return "; ".join(parts)


def _judge_line(report: Report) -> str:
    """The judge's card in short: what to look at before its verdicts are relied on."""
    judge = report.judge
    if judge is None or judge.comparisons == 0:
        return ""
    parts = [
        f"{judge.comparisons:,} comparisons, {percent(judge.ties_pct)} ties",
        f"{percent(judge.unreadable_pct)} of the votes unreadable",
        f"first position {percent(judge.first_pct)} (fair {percent(judge.first_expected_pct)})",
        f"other vote in another order {percent(judge.flips_pct)} (random {percent(judge.flips_at_random_pct)})",
        f"longer answer preferred {percent(judge.longer_pct)}",
    ]
    if judge.gold:
        parts.append(f"a right answer won {percent(judge.gold_pct)} of {judge.gold:,} comparisons with wrong ones")
    if judge.controls:
        parts.append(f"{percent(judge.controls_right_pct)} of {judge.controls:,} control checks right")
    if judge.rubrics not in ((), ("default",)):
        parts.append(f"rubric {', '.join(judge.rubrics)}")
    parts += [f"{metric} did not count in {count} evaluations" for metric, count in sorted(judge.discarded.items())]
    return "; ".join(parts)


def _emitted_line(saving: Saving) -> str:
    emitted, reference = compared_grams(saving.emitted_g, saving), compared_grams(saving.reference_g, saving)
    return f"{emitted}, estimated {reference} if the baseline had served every request"


def _policies_line(report: Report) -> str:
    return (
        f"{percent(report.implied_saving_pct)} computed from the policies' probabilities, "
        f"{percent(report.promised_saving_pct)} predicted when the policies were solved"
    )


def compared_grams(value: float, saving: Saving) -> str:
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


def _promise_line(report: Report) -> str:
    """The newest period of every metric; empty with hourly promises."""
    newest = {(row.model, row.metric): row for row in report.promised_periods}
    return "; ".join(
        f"{row.metric} {percent(100.0 * row.kept, 2)} kept of {percent(100.0 * row.promised, 2)} promised, "
        f"{row.start:%Y-%m-%d} to {row.end:%Y-%m-%d}"
        + (", closed" if row.closed else f" so far; the rest needs {percent(100.0 * (row.rest or 0.0), 2)}")
        + (f", of which {percent(100.0 * row.shortfall, 2)} cannot be kept" if row.shortfall else "")
        for row in newest.values()
    )


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
