"""The judge in the report: its card, and preference at equal length."""

import pytest

from shared.messages import JudgeCard, LengthSums
from tests.support.report import policy_at, quality_at, record_of, snapshot_of
from tools.reporting.collect import compute_report
from tools.reporting.judging import length_controlled
from tools.reporting.summary import summary_lines


def test_the_judges_card_is_summed_over_evaluations_and_discarded_verdicts_are_named():
    card = JudgeCard(
        votes=30, unreadable=3, positions={"A": 18, "B": 9}, first_expected=9.0, comparisons=10, ties=1, repeats=25,
        flips=5, flips_at_random=15.0, length_pairs=8, longer_preferred=6, gold=4, gold_agreeing=3, controls_same=3,
        controls_other=2, controls_other_wrong=1,
    )  # fmt: skip
    qualities = [
        quality_at(1).model_copy(update={"judge": card, "rubric": "default"}),
        quality_at(2).model_copy(update={"judge": card, "rubric": "1a2b3c4d", "discarded": {"correctness": "why"}}),
        quality_at(3),
    ]
    report = compute_report(snapshot_of([record_of("a")], qualities=qualities, policies=[policy_at(0)]))
    judge = report.judge
    assert judge is not None
    assert (judge.comparisons, judge.ties_pct, judge.unreadable_pct) == (20, 10.0, 10.0)
    assert (judge.first_pct, judge.first_expected_pct) == pytest.approx((100 * 18 / 27, 100 / 3))
    assert (judge.flips_pct, judge.flips_at_random_pct, judge.longer_pct) == (20.0, 60.0, 75.0)
    assert (judge.gold_pct, judge.controls, judge.controls_right_pct) == (75.0, 10, 80.0)
    (line,) = [text for label, text in summary_lines(report) if label == "judge"]
    for part in ("first position 66.7 % (fair 33.3 %)", "rubric 1a2b3c4d, default", "correctness did not count in 1"):
        assert part in line
    assert compute_report(snapshot_of([record_of("a")], qualities=[quality_at(1)])).judge is None


def test_preference_at_equal_length_removes_a_linear_taste_for_length():
    # d = 0.2 * x + the option's own difference, x varies within the options.
    def sums(own: float, *lengths: float) -> LengthSums:
        outcomes = [own + 0.2 * x for x in lengths]
        return LengthSums(
            prompts=len(lengths), x=sum(lengths), xx=sum(x * x for x in lengths), d=sum(outcomes),
            xd=sum(x * d for x, d in zip(lengths, outcomes, strict=True)),
        )  # fmt: skip

    first, second = length_controlled({"p/L1": sums(0.1, -1.0, -0.5), "p/L2": sums(-0.05, -2.0, -1.0, -1.5)})
    assert (first.difference_points, first.controlled_points) == pytest.approx((-5.0, 10.0))
    assert (second.difference_points, second.controlled_points) == pytest.approx((-35.0, -5.0))
    (same,) = length_controlled({"p/L1": sums(0.1, -1.0, -1.0)})
    assert same.controlled_points is None
    assert length_controlled({"p/L1": LengthSums()}) == ()
