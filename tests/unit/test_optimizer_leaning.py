"""How much a group leans on the whole."""

import random

import pytest

from services.optimizer.leaning import LEAST, MOST, leaning

USUAL = 20.0


def drawn(rates: list[float], trials: int, *, seed: int = 1) -> list[tuple[float, float]]:
    chance = random.Random(seed)
    return [(float(sum(chance.random() < rate for _ in range(trials))), float(trials)) for rate in rates]


def test_the_weight_of_the_prior_that_groups_were_drawn_from_is_found():
    chance = random.Random(7)
    rates = [chance.betavariate(0.4 * 30, 0.6 * 30) for _ in range(400)]
    assert leaning(drawn(rates, 100), usual=USUAL) == pytest.approx(30.0, rel=0.15)


def test_groups_that_differ_lean_little_and_groups_that_differ_by_chance_lean_much():
    assert leaning(drawn([0.05, 0.95] * 8, 200), usual=USUAL) < 4.0
    assert leaning(drawn([0.4] * 16, 200), usual=USUAL) > 60.0


@pytest.mark.parametrize(
    "outcomes", [[], [(3.0, 9.0)], [(0.0, 50.0), (0.0, 50.0)], [(9.0, 9.0), (9.0, 9.0)], [(0.0, 0.0), (1.0, 2.0)]]
)
def test_where_groups_cannot_tell_the_usual_is_taken(outcomes):
    assert leaning(outcomes, usual=USUAL) == USUAL


def test_two_small_groups_hardly_move_it():
    assert leaning([(2.0, 6.0), (4.0, 6.0)], usual=USUAL) == pytest.approx(USUAL, rel=0.35)


def test_a_group_that_was_hardly_judged_does_not_tell_how_groups_differ():
    """Two of two beside 500 of a thousand: a chance, which it were not for groups of the mean size."""
    assert leaning([(500.0, 1_000.0), (2.0, 2.0)], usual=USUAL) == pytest.approx(USUAL, rel=0.1)


def test_it_stays_within_its_limits_and_can_be_switched_off():
    assert leaning(drawn([0.0, 1.0] * 20, 1_000), usual=USUAL) == LEAST
    assert leaning(drawn([0.3] * 60, 3_000), usual=1e6) == MOST
    assert leaning(drawn([0.1, 0.9] * 20, 100), usual=0.0) == 0.0
