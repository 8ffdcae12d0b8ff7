"""The judge's card: what the votes show of a judge, and when they stop counting."""

import math
from itertools import product

import pytest
from prometheus_client import CollectorRegistry

from services.evaluator.card import card_of_outcomes, card_of_votes, check_fault, comparison_fault
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.preference import Comparison
from services.evaluator.settings import EvaluatorSettings
from shared.messages import JudgeCard, LengthSums, Quality
from tests.support.contract import EXAMPLES

SETTINGS = EvaluatorSettings()
ANSWERS = ("a long answer", "a short one", "no")
OPTIONS = ("p/L0", "p/L1", "p/L2")


def card_of(*choices: int | None, answers: tuple[str, ...] = ANSWERS) -> JudgeCard:
    comparison = Comparison(answers)
    orders = comparison.orders()
    return card_of_votes(orders, choices, tie=comparison.verdict(orders, choices).is_tie)


def test_votes_are_counted_by_position_and_compared_with_each_other():
    # The first answer in every order; the same position in every order.
    agreeing, locked = card_of(0, 2, 1), card_of(0, 0, 0)
    assert (agreeing.repeats, agreeing.flips, agreeing.ties) == (1, 0, 0)
    assert (locked.repeats, locked.flips, locked.ties) == (1, 1, 1)
    both = agreeing + locked
    assert both.positions == {"A": 4, "B": 1, "C": 1}
    assert (both.votes, both.comparisons, both.first_expected) == (6, 2, pytest.approx(2.0))
    assert both.flips_at_random == pytest.approx(4 / 3)
    unread = card_of(0, None, None)
    assert (unread.votes, unread.unreadable, unread.repeats) == (3, 2, 0)
    assert card_of(answers=("same", "same")) == JudgeCard()


def test_random_votes_flip_as_often_as_expected_of_random_votes():
    cards = [card_of(*choices) for choices in product(range(3), repeat=3)]
    total = sum(cards, JudgeCard())
    assert total.flips == pytest.approx(total.flips_at_random)


def test_outcomes_show_the_preference_for_length_and_agreement_with_a_known_right_answer():
    card = card_of_outcomes(OPTIONS, ("the answer is 4", "so 4", "5"), (0.0, 1.0, 0.0), "4")
    assert (card.length_pairs, card.longer_preferred) == (2, 1)
    assert (card.gold, card.gold_agreeing) == (1, 1)
    assert card.lengths["p/L1"] == LengthSums(
        prompts=1, x=math.log(4 / 15), xx=math.log(4 / 15) ** 2, d=1.0, xd=math.log(4 / 15)
    )
    wrong = card_of_outcomes(OPTIONS, ("so 4", "so 4", "5"), (0.0, 0.0, 1.0), "4")
    assert (wrong.gold, wrong.gold_agreeing) == (1, 0)
    for reference, preference in ((None, (1.0, 0.0, 0.0)), ("four men", (1.0, 0.0, 0.0)), ("4", (0.5, 0.0, 0.5))):
        assert card_of_outcomes(OPTIONS, ("so 4", "so 4", "5"), preference, reference).gold == 0
    assert card_of_outcomes(OPTIONS, ("4", "4", "4"), (1.0, 0.0, 0.0), "4").gold == 0


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (sum((card_of(0, 2, 1) for _ in range(20)), JudgeCard()), None),
        (sum((card_of(0, 0, 0) for _ in range(20)), JudgeCard()), "100% of the votes named the same position"),
        (sum((card_of(0, 0, 0) for _ in range(19)), JudgeCard()), None),
        (sum((card_of(None, None, None) for _ in range(20)), JudgeCard()), "100% of 60 votes named no answer"),
        (sum((card_of(0, 0, 1) + card_of(0, 2, 1) for _ in range(20)), JudgeCard()), None),
        (sum((card_of(0, 0, 1) for _ in range(20)), JudgeCard()), "150% as often as random ones"),
    ],
)
def test_the_votes_of_a_judge_that_names_a_position_or_no_answer_do_not_count(card, reason):
    found = comparison_fault(card, SETTINGS)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (JudgeCard(checks=100, checks_yes=100), None),
        (JudgeCard(checks=100, checks_unreadable=51), "51% of 100 replies are neither yes nor no"),
        (JudgeCard(controls_same=5, controls_same_wrong=3), "the same as itself in 3 of 5 control checks"),
        (JudgeCard(controls_other=8, controls_other_wrong=8), "an unrelated text to mean the same in 8 of 8"),
        (JudgeCard(controls_other=4, controls_other_wrong=4), None),
        (JudgeCard(), None),
    ],
)
def test_the_checks_of_a_judge_that_always_says_the_same_do_not_count(card, reason):
    found = check_fault(card, SETTINGS)
    assert found is None if reason is None else reason in found


def test_the_thresholds_are_settings():
    card = sum((card_of(0, 0, 0) for _ in range(20)), JudgeCard())
    assert comparison_fault(card, EvaluatorSettings(judge_max_flips=1.6)) is None


def test_a_card_adds_up_and_survives_a_message():
    card = card_of(0, 2, 1) + card_of_outcomes(OPTIONS, ("the answer is 4", "so 4", "5"), (0.0, 1.0, 0.0), "4")
    assert card + JudgeCard() == card == JudgeCard() + card
    assert (card + card).lengths["p/L2"].prompts == 2
    quality = EXAMPLES["quality"].model_copy(update={"judge": card})
    assert Quality.model_validate_json(quality.model_dump_json()).judge == card
    assert EXAMPLES["quality"].judge is None


def test_the_card_is_counted_in_metrics():
    registry = CollectorRegistry()
    metrics = EvaluatorMetrics(registry)
    metrics.count_card(card_of(0, 0, 0) + JudgeCard(checks=4, checks_yes=1, checks_open=1, gold=3, gold_agreeing=2))

    def value(name, **labels):
        return registry.get_sample_value(f"sprout_evaluator_judge_{name}_total", labels)

    assert value("pairs", kind="repeat", outcome="flipped") == 1.0
    assert value("comparisons", outcome="tie") == 1.0
    assert value("checks", reply="no") == 2.0
    assert value("gold", agreeing="yes") == 2.0
