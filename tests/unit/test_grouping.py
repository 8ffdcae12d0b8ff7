"""Prompt groups learned from judged prompts: alike prompts come together, by prompts that were not seen too."""

import numpy as np
import pytest

from services.evaluator.grouping import FAMILY_GROUPS, LEAST_PROMPTS, MOST_GROUPS, TooFewPromptsError, learn_groups
from shared.grouping import PromptGroups, feature_count, features

CITIES = ("Oslo", "Lima", "Cairo", "Delhi", "Quito", "Seoul", "Tunis", "Dakar", "Hanoi", "Minsk")
ODD_TEXTS = ("", " ", "?", "a" * 100_000, "\ud800 lone", "多言語の質問です", "1 2 3\n" * 10_000)
THINGS = ("apples", "marbles", "stamps", "coins", "books", "shells", "cards", "beads", "pens", "keys")


def made(count: int, *, seed: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Questions whose brief answer is preferred, and sums whose long one is; prompts, kind, preferred, energy."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 2, count)
    prompts = [
        f"Which country is the city of {rng.choice(CITIES)} the capital of?"
        if kind == 0
        else f"Ann has {rng.integers(2, 90)} {rng.choice(THINGS)} and gives {rng.integers(1, 9)} away. How many remain?"
        for kind in kinds
    ]
    brief = rng.random(count) < np.where(kinds == 0, 0.9, 0.1)
    energy = np.column_stack([np.full(count, 8e-5), np.full(count, 3e-5)]) * rng.uniform(0.8, 1.2, (count, 2))
    return prompts, kinds, brief.astype(np.int64), energy


def test_prompts_that_react_alike_come_together_also_those_that_were_not_learned_from():
    prompts, kinds, preferred, energy = made(600, seed=1)
    learned = learn_groups(prompts, preferred, energy)
    new_prompts, new_kinds, _, _ = made(300, seed=2)
    for places, truth in ((learned.unseen, kinds), (learned.groups.places(new_prompts), new_kinds)):
        members = np.bincount(places)
        of_the_second_kind = np.bincount(places, weights=truth)[members > 0] / members[members > 0]
        assert np.all((of_the_second_kind < 0.02) | (of_the_second_kind > 0.98))


def test_what_else_is_judged_draws_groups_apart_that_preference_and_energy_do_not():
    """One word among many tells whether a brief answer is right; neither preference nor energy goes by it."""
    rng = np.random.default_rng(1)
    hard = rng.integers(0, 2, 400)
    prompts = [
        f"{' '.join(rng.choice(THINGS, 6))}: {('count', 'sort')[kind]} {' '.join(rng.choice(THINGS, 6))}"
        for kind in hard
    ]
    energy = np.tile([8e-5, 3e-5], (400, 1)) * rng.uniform(0.8, 1.2, (400, 2))
    right = np.column_stack([np.ones(400), np.where(rng.random(400) < 0.1, hard, 1 - hard)])
    right[:50] = np.nan
    preferred = rng.integers(0, 2, 400)

    def apart(judged: list[np.ndarray]) -> float:
        """How far the groups differ in what they hold of either kind; 0.5 where each holds one alone."""
        places = learn_groups(prompts, preferred, energy, judged).unseen
        members = np.bincount(places)
        return float(np.sqrt(np.average(np.square(np.bincount(places, hard) / members - 0.5), weights=members)))

    assert apart([right]) > 1.5 * apart([])


def test_prompts_whose_answers_can_be_checked_are_told_from_others_and_noise_is_not_followed():
    prompts, kinds, preferred, energy = made(600, seed=8)
    right = np.ones((600, 2))
    right[kinds == 0] = np.nan
    checkable = learn_groups(prompts, preferred, energy, [right])
    assert checkable.groups.version != learn_groups(prompts, preferred, energy).groups.version
    for place in np.unique(checkable.unseen):
        assert len(set(kinds[checkable.unseen == place])) == 1
    # Whether these can be checked is chance: the groups are by kind all the same.
    by_chance = np.ones((600, 2))
    by_chance[np.random.default_rng(1).random(600) < 0.5] = np.nan
    places = learn_groups(prompts, preferred, energy, [by_chance]).unseen
    assert all(np.mean(kinds[places == place]) in (0.0, 1.0) for place in np.unique(places))


def test_groups_near_each_other_are_of_one_family():
    prompts, kinds, preferred, energy = made(1_000, seed=10)
    learned = learn_groups(prompts, preferred, energy)
    assert set(learned.families) == set(learned.groups.names)
    assert len(set(learned.families.values())) == max(1, len(learned.families) // FAMILY_GROUPS) > 1
    for family in set(learned.families.values()):
        members = [place for place, name in enumerate(learned.groups.names) if learned.families[name] == family]
        assert len({round(kinds[learned.unseen == place].mean()) for place in members}) == 1


def test_there_are_as_many_groups_as_the_verdicts_allow():
    prompts, _, preferred, energy = made(1_000, seed=9)
    for count, least, most in ((40, 1, 1), (200, 2, 5), (1_000, 6, MOST_GROUPS)):
        learned = learn_groups(prompts[:count], preferred[:count], energy[:count])
        assert least <= len(learned.groups.names) <= most
        assert np.bincount(learned.unseen, minlength=len(learned.groups.names)).min() >= LEAST_PROMPTS


def test_one_prompt_gets_the_name_that_it_gets_among_many():
    prompts, _, preferred, energy = made(100, seed=3)
    groups = learn_groups(prompts, preferred, energy).groups
    asked = [*prompts, *ODD_TEXTS]
    assert [groups.assign(prompt) for prompt in asked] == [groups.names[place] for place in groups.places(asked)]


def test_the_version_is_that_of_what_was_learned():
    def version(seed: int) -> str:
        prompts, _, preferred, energy = made(100, seed=seed)
        return learn_groups(prompts, preferred, energy).groups.version

    assert version(4) == version(4) != version(5)


def test_too_few_prompts_are_refused():
    prompts, _, preferred, energy = made(2 * LEAST_PROMPTS - 1, seed=6)
    with pytest.raises(TooFewPromptsError, match="39 judged prompts, 40 at least"):
        learn_groups(prompts, preferred, energy)


@pytest.mark.parametrize("prompt", ODD_TEXTS)
def test_any_text_has_features(prompt):
    found = features(prompt)
    assert found.shape == (feature_count(),)
    assert np.isfinite(found).all()


def test_nothing_of_a_prompt_is_kept_but_numbers():
    prompts, _, preferred, energy = made(100, seed=7)
    groups: PromptGroups = learn_groups(prompts, preferred, energy).groups
    kept = [getattr(groups, name) for name in groups.__slots__]
    assert not any("Oslo" in str(one) for one in kept)
