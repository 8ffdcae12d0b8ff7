"""The figures of a demo, and the checks that they must pass."""

from dataclasses import dataclass

from tools.demo.clients import Tally
from tools.reporting import Report, to_json

LARGEST_IMBALANCE_PCT = 0.1
"""Largest difference of attributed and metered energy."""
LARGEST_DISAGREEMENT_POINTS = 5.0
"""Largest difference of measured and implied saving; the width of the measured interval if that is larger. The implied
saving takes one mean energy of a group and option for the whole day, although a call takes more in small batches."""


METERED_FIGURES = (
    "saving_on_meter_pct", "saving_on_meter_interval_pct", "saved_on_meter_g", "attributed_saving_pct",
    "attributed_saving_interval_pct", "attributed_saved_g", "net_of_evaluator", "fleet_energy_j", "idle_energy_j",
    "endpoints", "endpoints_needed_mean", "tpot_p95_ms", "ttft_p95_ms", "tpot_objective_ms",
)  # fmt: skip
"""Figures of the report that the demo's file has too. Latencies are those of a server that is not stretched."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The figures of `demo-report.json` and the failed checks; without problems the demo succeeded."""

    figures: dict[str, object]
    problems: tuple[str, ...]


def evaluate_demo(
    *,
    planned: int,
    sent: int,
    tally: Tally,
    report: Report,
    seconds: float,
    without_sprout: Report | None = None,
) -> DemoResult:
    """Collect the figures and run the checks.

    Args:
        planned: number of planned requests.
        sent: number of requests that Kafka acknowledged.
        seconds: wall time of the whole demo.
        without_sprout: of the same day played without Sprout.
    """
    saving, energy, interval = report.saving, report.energy, report.saving.saving_interval
    of_report = to_json(report)
    figures: dict[str, object] = {
        **{name: of_report[name] for name in METERED_FIGURES},
        **_comparison(report, without_sprout),
        "requests_sent": sent,
        "requests_answered": tally.answered,
        "requests_failed": sum(tally.errors.values()),
        "duplicates": tally.duplicates,
        "dead_letters": tally.dead_letters,
        "carbon_saving_pct": saving.saving_pct,
        "carbon_saving_interval_pct": None if interval is None else [interval.low, interval.high],
        "implied_saving_pct": report.implied_saving_pct,
        "promised_saving_pct": report.promised_saving_pct,
        "energy_attributed_j": energy.attributed_j,
        "energy_metered_j": energy.metered_j,
        "energy_idle_j": energy.idle_j,
        "energy_unattributed_j": energy.unattributed_j,
        "preference_pct": report.quality.preference_pct,
        "not_worse_pct": report.quality.not_worse_pct,
        "evaluations": len(report.evaluations),
        "evaluation_share_pct": report.carbon.evaluation_share_pct,
        "prompt_groups_learned": len(report.groupings),
        "requests_by_learned_groups": report.requests_by_learned_groups,
        "policies_published": tally.policies_published,
        "broker": "kafka",
        "seconds": round(seconds, 1),
    }
    return DemoResult(figures, tuple(_problems(planned, sent, tally, report)))


def fell_behind(report: Report) -> bool:
    """Whether tokens took so much longer than the objective that the replay's clients and services must have lagged."""
    latency_ms, objective_ms = report.metered.latency.tpot_p95_ms, report.metered.tpot_objective_ms
    return latency_ms is not None and objective_ms is not None and latency_ms > 1.3 * objective_ms


def _comparison(report: Report, without_sprout: Report | None) -> dict[str, object]:
    """What the meters showed with and without Sprout, if both worlds were played."""
    if without_sprout is None:
        return {}
    with_j, meters = report.metered.fleet_energy_j, without_sprout.metered
    # Without Sprout there would be no judge.
    without_j = meters.fleet_energy_j - meters.judge_energy_j
    return {
        "reference_fleet_energy_j": without_j,
        "true_saving_on_meter_pct": 100.0 * (1.0 - with_j / without_j) if without_j > 0 else None,
        "reference_tpot_p95_ms": without_sprout.metered.latency.tpot_p95_ms,
        "reference_ttft_p95_ms": without_sprout.metered.latency.ttft_p95_ms,
    }


def _problems(planned: int, sent: int, tally: Tally, report: Report) -> list[str]:
    failed = ", ".join(f"{code} {count}" for code, count in tally.errors.most_common())
    checks = [
        (sent != planned, f"{planned - sent} of {planned} requests were not acknowledged by Kafka"),
        (tally.answered != planned, f"{planned - tally.answered} requests were not answered"),
        (bool(tally.errors), f"requests failed: {failed}"),
        (tally.duplicates > 0, f"{tally.duplicates} requests were answered twice, although no router was stopped"),
        (tally.dead_letters > 0, f"{tally.dead_letters} messages became dead letters"),
        (report.requests.unsettled > 0, f"{report.requests.unsettled} answers have no footprint yet"),
        (not report.evaluations, "there was no evaluation, so quality is unknown and nothing could be saved"),
    ]
    return [text for found, text in checks if found] + _energy_problems(report) + _saving_problems(report)


def _energy_problems(report: Report) -> list[str]:
    imbalance = report.energy.difference_pct
    if imbalance is None:
        return ["no energy was metered"]
    if abs(imbalance) > LARGEST_IMBALANCE_PCT:
        return [f"attributed energy differs from metered energy by {imbalance:+.3f} %"]
    return []


def _saving_problems(report: Report) -> list[str]:
    measured, implied = report.saving.saving_pct, report.implied_saving_pct
    if measured is None or implied is None:
        return ["the saving could not be measured"]
    if abs(measured - implied) > _tolerance(report):
        return [f"the measured saving, {measured:.1f} %, disagrees with that implied by the policies, {implied:.1f} %"]
    return []


def _tolerance(report: Report) -> float:
    # A correct estimate lies outside half the width of its 95 % interval in 1 of 20 demos, outside the full width in
    # less than 1 of 10,000.
    interval = report.saving.saving_interval
    return max(LARGEST_DISAGREEMENT_POINTS, 0.0 if interval is None else interval.high - interval.low)
