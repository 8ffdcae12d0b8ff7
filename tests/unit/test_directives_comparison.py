"""A trial of directives: ratios and shares with intervals, the Pareto front, and what is worth having."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.fleet import Directive
from tools.directives.comparison import MIN_VERDICTS, Measurement, compare, wilson

PROMPTS = 100
RNG = np.random.default_rng(7)
LENGTHS = RNG.integers(50, 150, PROMPTS).astype(float)


def measured(level: str, ratio: float, *, worse: int = 0, right: int | None = None, **changes) -> Measurement:
    """A directive whose answers have a share of the reference's tokens; the first prompts' answers are worse."""
    known = np.full(PROMPTS, np.nan) if right is None else (np.arange(PROMPTS) < right).astype(float)
    return Measurement(
        **{
            "directive": Directive(level=level, text="" if level == "L0" else f"Text of {level}"),
            "tokens": LENGTHS * ratio,
            "seconds": LENGTHS * ratio / 50.0,
            "not_worse": (np.arange(PROMPTS) >= worse).astype(float),
            "right": known,
            "joules": None,
        }
        | changes
    )


REFERENCE = measured("L0", 1.0, joules=10.0)


def test_lengths_and_energy_are_relative_to_no_directive():
    (one,) = compare(REFERENCE, [measured("L1", 0.5, joules=6.0)])
    assert one.tokens_ratio == pytest.approx((0.5, 0.5, 0.5))
    assert one.tokens == pytest.approx(LENGTHS.mean() / 2)
    assert (one.joules, one.joules_ratio) == (6.0, pytest.approx(0.6))
    assert one.seconds == pytest.approx(LENGTHS.mean() / 100)


def test_without_a_meter_there_are_no_joules():
    (one,) = compare(measured("L0", 1.0), [measured("L1", 0.5)])
    assert (one.joules, one.joules_ratio) == (None, None)


def test_the_interval_of_the_ratio_is_that_of_a_ratio_of_means():
    noisy = LENGTHS * RNG.uniform(0.2, 0.8, PROMPTS)
    (one,) = compare(REFERENCE, [measured("L1", 1.0, tokens=noisy)])
    ratio = noisy.sum() / LENGTHS.sum()
    error = (noisy - ratio * LENGTHS).std() / math.sqrt(PROMPTS) / LENGTHS.mean()  # delta method
    assert one.tokens_ratio.value == pytest.approx(ratio)
    assert one.tokens_ratio.high - one.tokens_ratio.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_prompts_without_a_verdict_do_not_count():
    not_worse = np.array([1.0, 0.0] * 20 + [np.nan] * 60)
    (one,) = compare(REFERENCE, [measured("L1", 0.5, not_worse=not_worse)])
    assert (one.verdicts, one.not_worse.value) == (40, 0.5)


def test_right_answers_are_compared_on_prompts_where_both_are_rated():
    (one,) = compare(measured("L0", 1.0, right=80), [measured("L1", 0.5, right=70)])
    assert (one.right, one.rated) == (0.7, PROMPTS)
    assert one.right_change.value == pytest.approx(-0.1)
    assert -0.2 < one.right_change.low < -0.1 < one.right_change.high < 0.0
    (unknown,) = compare(REFERENCE, [measured("L1", 0.5, right=70)])
    assert (unknown.right, unknown.right_change, unknown.rated) == (None, None, 0)


def test_a_directive_is_worth_having_if_no_other_is_shorter_and_no_worse():
    brief, beaten, long, shortest = compare(
        REFERENCE,
        [
            measured("L1", 0.5, worse=5),
            measured("L2", 0.6, worse=30),
            measured("L3", 1.1),
            measured("L4", 0.1, worse=60),
        ],
    )
    assert [one.advice for one in (brief, beaten, long, shortest)] == ["worth it", "beaten", "not shorter", "worth it"]
    assert (brief.beaten_by, beaten.beaten_by, long.beaten_by) == ((), ("L1",), ("L0",))
    assert (brief.front_share, beaten.front_share) == (1.0, 0.0)


def test_of_two_directives_that_differ_by_chance_none_is_recommended():
    noise = LENGTHS * RNG.uniform(0.3, 0.7, PROMPTS)
    found = compare(REFERENCE, [measured("L1", 1.0, tokens=noise), measured("L2", 1.0, tokens=noise[::-1])])
    assert [one.advice for one in found] == ["unclear", "unclear"]
    assert [one.front_share for one in found] == pytest.approx([0.5, 0.5], abs=0.1)


def test_a_directive_that_a_mix_of_others_replaces_is_named():
    mixed, least = compare(REFERENCE, [measured("L1", 0.9, worse=10), measured("L2", 0.2, worse=20)])
    assert mixed.better_mix == ("L0", "L2")
    assert least.better_mix is None


@pytest.mark.parametrize("verdicts", [0, MIN_VERDICTS - 1])
def test_nothing_is_recommended_from_few_verdicts(verdicts):
    not_worse = np.where(np.arange(PROMPTS) < verdicts, 1.0, np.nan)
    (one,) = compare(REFERENCE, [measured("L1", 0.5, not_worse=not_worse)])
    assert one.advice == "too few verdicts"
    assert (one.not_worse is None) == (verdicts == 0)


def test_empty_answers_without_a_directive_cannot_be_compared_with():
    with pytest.raises(ValueError, match="no tokens"):
        compare(measured("L0", 0.0), [measured("L1", 0.5)])


def test_a_result_is_a_json_document():
    (one,) = compare(REFERENCE, [measured("L1", 0.5, worse=10)])
    document = one.to_json()
    assert (document["level"], document["advice"], document["not_worse"]) == ("L1", "worth it", 0.9)
    assert document["tokens_ratio_interval"] == pytest.approx([0.5, 0.5])
    assert document["right_change"] is None


def test_wilsons_interval_agrees_with_a_published_value():
    assert wilson(81, 263) == pytest.approx((0.308, 0.2553, 0.3662), abs=1e-3)  # Newcombe 1998, table I


@given(trials=st.integers(1, 1_000), data=st.data())
def test_wilsons_interval_contains_the_share(trials, data):
    share = wilson(data.draw(st.integers(0, trials)), trials)
    assert 0.0 <= share.low <= share.value + 1e-12
    assert share.value - 1e-12 <= share.high <= 1.0
