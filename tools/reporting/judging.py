"""The judge's card in the report: how far its verdicts can be relied on, and preference at equal length."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.messages import JudgeCard, LengthSums, Quality


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """Preference of an option minus the baseline's, in points of the share of prompts.

    Attributes:
        prompts: compared prompts.
        difference_points: as judged.
        controlled_points: at equal length of the answers, extrapolated linearly in the logarithm of the length; None:
            the lengths do not vary enough.
    """

    option: str
    prompts: int
    difference_points: float
    controlled_points: float | None


@dataclass(frozen=True, slots=True)
class JudgeReport:
    """What the votes of all evaluations show of the judge. Percentages are None where there is nothing to divide.

    Attributes:
        rubrics: names of the rubrics that were used.
        comparisons: prompts whose answers were compared.
        ties_pct: comparisons without a majority; each vote counts as its share of the win.
        unreadable_pct: votes that named no answer.
        first_pct: readable votes for the first position; `first_expected_pct` without position bias.
        flips_pct: pairs of votes on the same answers in another order that named different ones;
            `flips_at_random_pct` of random votes.
        longer_pct: pairs of a better and a worse answer of different length in which the longer one was better.
        gold: comparisons of answers known to be right and wrong; `gold_pct` of them a right one won.
        checks: questions whether two texts mean the same.
        check_flips_pct: checks in both orders with different replies.
        controls: checks with a known reply; `controls_right_pct` of them had it.
        discarded: evaluations whose verdicts do not count because the judge failed, by metric.
        lengths: preference by option, as judged and at equal length.
    """

    rubrics: tuple[str, ...]
    comparisons: int
    ties_pct: float | None
    unreadable_pct: float | None
    first_pct: float | None
    first_expected_pct: float | None
    flips_pct: float | None
    flips_at_random_pct: float | None
    longer_pct: float | None
    gold: int
    gold_pct: float | None
    checks: int
    check_flips_pct: float | None
    controls: int
    controls_right_pct: float | None
    discarded: Mapping[str, int]
    lengths: tuple[LengthControlled, ...]


def judge_report(qualities: Sequence[Quality]) -> JudgeReport | None:
    """Sum the cards of evaluations; None if none has a card."""
    cards = [quality.judge for quality in qualities if quality.judge is not None]
    if not cards:
        return None
    card = sum(cards, JudgeCard())
    readable = card.votes - card.unreadable
    controls = card.controls_same + card.controls_other
    return JudgeReport(
        rubrics=tuple(sorted({quality.rubric for quality in qualities if quality.rubric is not None})),
        comparisons=card.comparisons,
        ties_pct=_pct(card.ties, card.comparisons),
        unreadable_pct=_pct(card.unreadable, card.votes),
        first_pct=_pct(card.positions.get("A", 0), readable),
        first_expected_pct=_pct(card.first_expected, readable),
        flips_pct=_pct(card.flips, card.repeats),
        flips_at_random_pct=_pct(card.flips_at_random, card.repeats),
        longer_pct=_pct(card.longer_preferred, card.length_pairs),
        gold=card.gold,
        gold_pct=_pct(card.gold_agreeing, card.gold),
        checks=card.checks,
        check_flips_pct=_pct(card.check_flips, card.check_repeats),
        controls=controls,
        controls_right_pct=_pct(controls - card.controls_same_wrong - card.controls_other_wrong, controls),
        discarded=dict(Counter(metric for quality in qualities for metric in quality.discarded)),
        lengths=length_controlled(card.lengths),
    )


def length_controlled(sums: Mapping[str, LengthSums]) -> tuple[LengthControlled, ...]:
    """Differences of preference at equal length: analysis of covariance with one slope for all options.

    Args:
        sums: by option, of x = ln(length / length of the baseline's answer) and the difference d of the outcomes.
    """
    known = {option: one for option, one in sorted(sums.items()) if one.prompts > 0}
    xx = sum(one.xx - one.x**2 / one.prompts for one in known.values())
    xd = sum(one.xd - one.x * one.d / one.prompts for one in known.values())
    # Rounding leaves a little variance where every answer has the same relative length.
    slope = xd / xx if xx > 1e-9 * max(1.0, sum(one.xx for one in known.values())) else None
    return tuple(
        LengthControlled(
            option,
            one.prompts,
            100.0 * one.d / one.prompts,
            None if slope is None else 100.0 * (one.d - slope * one.x) / one.prompts,
        )
        for option, one in known.items()
    )


def _pct(part: float, whole: float) -> float | None:
    return 100.0 * part / whole if whole > 0 else None
