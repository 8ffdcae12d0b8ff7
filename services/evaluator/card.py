"""The judge's card: what is known of a judge from its own votes, and when they no longer count. Pure functions.

See `docs/decisions/0037-correctness-and-the-judges-card.md`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Final

from services.evaluator.answers import known_outcomes
from services.evaluator.judges import LETTERS, majority
from services.evaluator.settings import EvaluatorSettings
from shared.messages import JudgeCard, LengthSums

MIN_COMPARISONS: Final = 20
"""Compared prompts, or checks, below which a judge is not rated."""

MIN_CONTROLS: Final = 5
"""Control checks of one kind below which a judge is not rated by them."""


def card_of_votes(orders: Sequence[Sequence[int]], choices: Sequence[int | None], *, tie: bool) -> JudgeCard:
    """Card of the votes on one prompt.

    Args:
        orders: of the distinct answers, as they were shown; empty: the judge was not asked. Only the first ones are
            always asked, so only they are compared with each other: the others are asked because votes differ.
        choices: for each order, the position that was named; None: none.
        tie: the votes had no majority.
    """
    if not orders:
        return JudgeCard()
    answers = len(orders[0])
    readable = [position for position in choices if position is not None]
    asked_always = zip(orders, choices[: majority(answers)], strict=False)
    pairs = list(combinations((order[position] for order, position in asked_always if position is not None), 2))
    return JudgeCard(
        votes=len(choices),
        unreadable=len(choices) - len(readable),
        positions={LETTERS[position]: count for position, count in sorted(Counter(readable).items())},
        first_expected=len(readable) / answers,
        comparisons=1,
        ties=int(tie),
        repeats=len(pairs),
        flips=sum(first != second for first, second in pairs),
        flips_at_random=len(pairs) * (1.0 - 1.0 / answers),
    )


def card_of_outcomes(
    options: Sequence[str], answers: Sequence[str], preference: Sequence[float], reference: str | None
) -> JudgeCard:
    """Card of one prompt's preference: how it depends on length, and whether it agrees with a known right answer.

    Args:
        options: the candidates, the reference option first.
        answers: their texts.
        preference: their outcomes.
        reference: the right answer; None: unknown.
    """
    lengths = [max(1, len(answer.strip())) for answer in answers]
    pairs = [
        (lengths[one] > lengths[other])
        for one in range(len(answers))
        for other in range(len(answers))
        if preference[one] > preference[other] and lengths[one] != lengths[other]
    ]
    right = None if reference is None else known_outcomes(answers, reference)
    winners = {index for index, outcome in enumerate(preference) if outcome == max(preference)}
    rated = right is not None and len(set(right)) == 2 and len({right[index] for index in winners}) == 1
    return JudgeCard(
        length_pairs=len(pairs),
        longer_preferred=sum(pairs),
        gold=int(rated),
        gold_agreeing=int(rated and right is not None and right[min(winners)]),
        lengths={
            option: _length_sums(math.log(length / lengths[0]), outcome - preference[0])
            for option, length, outcome in zip(options[1:], lengths[1:], preference[1:], strict=True)
        },
    )


def comparison_fault(card: JudgeCard, settings: EvaluatorSettings) -> str | None:
    """Why the votes of an evaluation do not count; None: they do."""
    if card.comparisons < MIN_COMPARISONS:
        return None
    unreadable = card.unreadable / card.votes
    if unreadable > settings.judge_max_unreadable:
        return f"{unreadable:.0%} of {card.votes} votes named no answer"
    flips = card.flips / card.flips_at_random if card.flips_at_random > 0.0 else 0.0
    if flips > settings.judge_max_flips:
        most = max(card.positions.values(), default=0) / max(1, card.votes - card.unreadable)
        return (
            f"votes on the same answers in another order differ {flips:.0%} as often as random ones; "
            f"{most:.0%} of the votes named the same position"
        )
    return None


def check_fault(card: JudgeCard, settings: EvaluatorSettings) -> str | None:
    """Why the checks of meaning of an evaluation do not count; None: they do."""
    if card.checks >= MIN_COMPARISONS and card.checks_unreadable / card.checks > settings.judge_max_unreadable:
        return f"{card.checks_unreadable / card.checks:.0%} of {card.checks} replies are neither yes nor no"
    for asked, wrong, what in (
        (card.controls_same, card.controls_same_wrong, "denied that a text means the same as itself"),
        (card.controls_other, card.controls_other_wrong, "found an unrelated text to mean the same"),
    ):
        if asked >= MIN_CONTROLS and wrong / asked > settings.judge_max_wrong_controls:
            return f"the judge {what} in {wrong} of {asked} control checks"
    return None


def _length_sums(x: float, d: float) -> LengthSums:
    return LengthSums(prompts=1, x=x, xx=x * x, d=d, xd=x * d)
