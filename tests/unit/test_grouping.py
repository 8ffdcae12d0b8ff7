"""Prompt groups learned from judged prompts: alike prompts come together, by prompts that were not seen too."""

import numpy as np
import pytest

from services.evaluator.grouping import LEAST_PROMPTS, TooFewPromptsError, learn_groups
from shared.grouping import PromptGroups, feature_count, features

CITIES = ("Oslo", "Lima", "Cairo", "Delhi", "Quito", "Seoul", "Tunis", "Dakar", "Hanoi", "Minsk")
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
        usual = np.bincount(places).argmax()
        # What leaves the usual group, where doubt leaves a prompt, is of the one kind that reacts otherwise.
        apart = truth[places != usual]
        assert len(apart) > 0.1 * len(truth)
        assert np.mean(apart) > 0.95
        assert np.mean(truth[places == usual]) < 0.5


def test_one_prompt_gets_the_name_that_it_gets_among_many():
    prompts, _, preferred, energy = made(100, seed=3)
    groups = learn_groups(prompts, preferred, energy).groups
    places = groups.places(prompts)
    assert [groups.assign(prompt) for prompt in prompts[:20]] == [groups.names[place] for place in places[:20]]


def test_the_version_is_that_of_what_was_learned():
    def version(seed: int) -> str:
        prompts, _, preferred, energy = made(100, seed=seed)
        return learn_groups(prompts, preferred, energy).groups.version

    assert version(4) == version(4) != version(5)


def test_too_few_prompts_are_refused():
    prompts, _, preferred, energy = made(2 * LEAST_PROMPTS - 1, seed=6)
    with pytest.raises(TooFewPromptsError, match="39 judged prompts, 40 at least"):
        learn_groups(prompts, preferred, energy)


@pytest.mark.parametrize("prompt", ["", " ", "?", "a" * 100_000, "\ud800 lone", "多言語の質問です", "1 2 3\n" * 10_000])
def test_any_text_has_features(prompt):
    found = features(prompt)
    assert found.shape == (feature_count(),)
    assert np.isfinite(found).all()


def test_nothing_of_a_prompt_is_kept_but_numbers():
    prompts, _, preferred, energy = made(100, seed=7)
    groups: PromptGroups = learn_groups(prompts, preferred, energy).groups
    kept = [getattr(groups, name) for name in groups.__slots__]
    assert not any("Oslo" in str(one) for one in kept)
