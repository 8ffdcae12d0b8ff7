"""The report's control chart of quality: weeks, intervals, and what was required."""

from datetime import UTC, datetime, timedelta

import pytest

from shared.messages import Paired, Policy, Quality, QualityCount
from tests.support.contract import EXAMPLES
from tools.reporting.out_of_sample import latest_week, quality_weeks
from tools.reporting.quality import PolicyHistory

MONDAY = datetime(2024, 2, 5, tzinfo=UTC)
HOUR = timedelta(hours=1)


def policy(version: int, at: datetime) -> Policy:
    example = EXAMPLES["policies"]
    assert isinstance(example, Policy)
    return example.model_copy(update={"version": version, "created_at": at, "model": "m"})


def evaluation(name: str, at: datetime, *, wins: int = 20, prompts: int = 40, group: str = "g1") -> Quality:
    counts = tuple(
        QualityCount(
            group=group, option=option, metric="preference", successes=won, trials=prompts,
            paired=Paired(reference="p/L0", successes=prompts - wins, both=won if option == "p/L0" else 0),
        )
        for option, won in (("p/L0", prompts - wins), ("p/L1", wins))
    )  # fmt: skip
    example = EXAMPLES["quality"]
    assert isinstance(example, Quality)
    return example.model_copy(update={"evaluation_id": name, "model": "m", "evaluated_at": at, "counts": counts})


def test_evaluations_are_pooled_by_week_and_the_first_one_scores_no_policy():
    policies = PolicyHistory.of([policy(1, MONDAY + HOUR), policy(2, MONDAY + 30 * HOUR)])
    evaluations = [
        evaluation("first", MONDAY),
        evaluation("b", MONDAY + 60 * HOUR, wins=24),
        evaluation("a", MONDAY + 20 * HOUR),
        evaluation("next", MONDAY + 7 * 24 * HOUR + HOUR, wins=30),
        evaluation("other groups", MONDAY + 8 * 24 * HOUR, group="other"),
    ]
    first, second = quality_weeks(policies, evaluations)
    assert (first.start, first.evaluations, first.prompts) == (MONDAY, 2, 80)
    assert (second.start, second.evaluations, second.prompts) == (MONDAY + timedelta(days=7), 1, 40)
    # Half of the requests are served at each of the two options, so the mean of both outcomes is a half of all wins.
    served = (19 * 0.5 + 40 * 0.5) / 59
    assert first.quality_pct == pytest.approx(100 * served / ((19 * 0.5 + 40 * 0.4) / 59))
    assert first.low_pct < first.quality_pct < first.high_pct
    assert (first.bound_pct, first.promised_pct) == (pytest.approx(90.0), pytest.approx(95.0))
    assert latest_week([first, second], "preference") == second
    assert latest_week([first, second], "correctness") is None


def test_a_week_with_few_verdicts_has_no_figure():
    policies = PolicyHistory.of([policy(1, MONDAY)])
    (week,) = quality_weeks(policies, [evaluation("a", MONDAY + HOUR, wins=5, prompts=10)])
    assert (week.quality_pct, week.low_pct, week.prompts) == (None, None, 10)
