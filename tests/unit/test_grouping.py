"""Features of prompts, clustering of judged prompts, and assignment of prompts that were not judged."""

from collections.abc import Sequence

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from services.evaluator.clusters import (
    GROUPS_PER_FAMILY,
    MAX_GROUPS,
    MAX_TASKS,
    MIN_GROUP_PROMPTS,
    RIDGE_PENALTY,
    TOPICS,
    TooFewPromptsError,
    fit_scaling,
    learn_groups,
    predictions,
    principal_components,
    scaled_matrix,
    topics,
)
from shared.grouping import HASHED, SHAPE_FEATURES, PromptFeatures, PromptGroups, extract_features

CITIES = ("Oslo", "Lima", "Cairo", "Delhi", "Quito", "Seoul", "Tunis", "Dakar", "Hanoi", "Minsk")
ODD_TEXTS = ("", " ", "?", "a" * 100_000, "\ud800 lone", "多言語の質問です", "1 2 3\n" * 10_000)
THINGS = ("apples", "marbles", "stamps", "coins", "books", "shells", "cards", "beads", "pens", "keys")


def made(count: int, *, seed: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Questions with a preferred brief answer, sums with a preferred long one: (prompts, kinds, preferred, energy)."""
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


@pytest.fixture(scope="module")
def thousand():
    """A thousand prompts, and what is learned from all of them."""
    prompts, kinds, preferred, energy = made(1_000, seed=10)
    return prompts, kinds, preferred, energy, learn_groups(prompts, preferred, energy)


def test_groups_separate_prompts_with_different_outcomes_also_those_that_were_not_judged():
    prompts, kinds, preferred, energy = made(400, seed=1)
    learned = learn_groups(prompts, preferred, energy)
    new_prompts, new_kinds, _, _ = made(300, seed=2)
    for places, truth in ((learned.leave_one_out, kinds), (learned.groups.assign_all(new_prompts), new_kinds)):
        members = np.bincount(places)
        of_the_second_kind = np.bincount(places, weights=truth)[members > 0] / members[members > 0]
        assert np.all((of_the_second_kind < 0.02) | (of_the_second_kind > 0.98))


def test_other_metrics_separate_prompts_that_preference_and_energy_do_not():
    """One of many words decides whether a brief answer is correct; preference and energy do not depend on it."""
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

    def separation(other_metrics: list[np.ndarray]) -> float:
        """Deviation of the share of hard prompts between groups; 0.5 if every group contains one kind only."""
        places = learn_groups(prompts, preferred, energy, other_metrics).leave_one_out
        members = np.bincount(places)
        return float(np.sqrt(np.average(np.square(np.bincount(places, hard) / members - 0.5), weights=members)))

    assert separation([right]) > 1.5 * separation([])


def test_groups_separate_prompts_by_coverage_of_a_metric_but_not_by_noise():
    prompts, kinds, preferred, energy = made(300, seed=8)
    right = np.ones((300, 2))
    right[kinds == 0] = np.nan
    checkable = learn_groups(prompts, preferred, energy, [right])
    assert checkable.groups.version != learn_groups(prompts, preferred, energy).groups.version
    for place in np.unique(checkable.leave_one_out):
        assert len(set(kinds[checkable.leave_one_out == place])) == 1
    # Random coverage is ignored: the groups still follow the kinds.
    random_coverage = np.ones((300, 2))
    random_coverage[np.random.default_rng(1).random(300) < 0.5] = np.nan
    places = learn_groups(prompts, preferred, energy, [random_coverage]).leave_one_out
    assert all(np.mean(kinds[places == place]) in (0.0, 1.0) for place in np.unique(places))


def test_neighbouring_groups_form_a_family(thousand):
    _, kinds, _, _, learned = thousand
    assert set(learned.families) == set(learned.groups.names)
    assert len(set(learned.families.values())) == max(1, len(learned.families) // GROUPS_PER_FAMILY) > 1
    for family in set(learned.families.values()):
        members = [place for place, name in enumerate(learned.groups.names) if learned.families[name] == family]
        assert len({round(kinds[learned.leave_one_out == place].mean()) for place in members}) == 1


def test_the_number_of_groups_grows_with_the_verdicts(thousand):
    prompts, _, preferred, energy, of_all = thousand
    few, some = (learn_groups(prompts[:count], preferred[:count], energy[:count]) for count in (40, 200))
    for learned, least, most in ((few, 1, 1), (some, 2, 5), (of_all, 6, MAX_GROUPS)):
        assert least <= len(learned.groups.names) <= most
        assert np.bincount(learned.leave_one_out, minlength=len(learned.groups.names)).min() >= MIN_GROUP_PROMPTS


def test_a_prompt_alone_gets_the_same_group_as_among_others():
    prompts, _, preferred, energy = made(100, seed=3)
    groups = learn_groups(prompts, preferred, energy).groups
    asked = [*prompts, *ODD_TEXTS]
    assert [groups.assign(prompt) for prompt in asked] == [groups.names[place] for place in groups.assign_all(asked)]


def test_the_version_is_a_hash_of_the_model():
    def version(seed: int) -> str:
        prompts, _, preferred, energy = made(100, seed=seed)
        return learn_groups(prompts, preferred, energy).groups.version

    assert version(4) == version(4) != version(5)


@pytest.mark.parametrize("distinct", [2, 3, 10])
def test_learning_is_deterministic_also_with_few_distinct_prompts(distinct):
    texts = made(100, seed=4)[0]
    prompts = (list(dict.fromkeys(texts))[:distinct] * 300)[:300]
    rng = np.random.default_rng(1)
    preferred = rng.integers(0, 2, 300)
    energy = np.tile([8e-5, 3e-5], (300, 1)) * rng.uniform(0.8, 1.2, (300, 2))
    first, second = (learn_groups(prompts, preferred, energy) for _ in range(2))
    assert first.groups.version == second.groups.version
    assert np.array_equal(first.leave_one_out, second.leave_one_out)


def test_topics_are_the_principal_components_of_the_features():
    features = [extract_features(prompt) for prompt in made(60, seed=7)[0]]
    matrix = scaled_matrix(features, fit_scaling(features))
    judged = topics(principal_components(matrix), matrix).judged
    dense = matrix.toarray()
    centred = dense - dense.mean(axis=0)
    scores = PCA(TOPICS, svd_solver="full").fit_transform(dense) / np.sqrt(centred.var(axis=0).sum())
    assert judged.shape == scores.shape
    # A component is determined up to its sign, and its coordinates are centred.
    assert np.allclose(judged @ judged.T, scores @ scores.T, atol=1e-8)
    assert np.allclose(judged.mean(axis=0), 0.0, atol=1e-9)


def test_reactions_are_predicted_without_the_prompts_own_verdict():
    prompts, _, preferred, _ = made(60, seed=7)
    features = [extract_features(prompt) for prompt in prompts]
    components = principal_components(scaled_matrix(features, fit_scaling(features)))
    outcome = np.eye(2)[preferred]
    found = predictions(components, [outcome], []).judged[:, 0]
    design = np.hstack([components.judged, np.ones((60, 1))])
    target = outcome[:, 0] - outcome[:, 0].mean()
    others = [np.delete(np.arange(60), place) for place in range(60)]
    expected = np.array(
        [
            design[place]
            @ Ridge(RIDGE_PENALTY, fit_intercept=False, solver="cholesky").fit(design[kept], target[kept]).coef_
            for place, kept in enumerate(others)
        ]
    )
    assert np.corrcoef(found, expected)[0, 1] == pytest.approx(1.0, abs=1e-9)


def labelled(count: int, *, seed: int, labels: Sequence[str]):
    """Prompts of two kinds, alternately; the labels are given in turn, two prompts each, whatever the kind."""
    prompts, _, preferred, energy = made(count, seed=seed)
    tasks = [labels[number // 2 % len(labels)] or None for number in range(count)]
    return learn_groups(prompts, preferred, energy, (), tasks), prompts, tasks


def test_prompts_with_different_labels_are_in_different_groups():
    learned, prompts, tasks = labelled(400, seed=11, labels=("support", "search"))
    names = [learned.groups.names[place] for place in learned.leave_one_out]
    of_label = {label: {name for name, task in zip(names, tasks, strict=True) if task == label} for label in set(tasks)}
    assert not of_label["support"] & of_label["search"]
    assert all(len(found) > 1 for found in of_label.values())  # the text still counts
    assert learned.groups.assign(prompts[0], "support") in of_label["support"]
    assert learned.groups.assign(prompts[0], "search") in of_label["search"]
    assigned = learned.groups.assign_all(prompts, tasks)
    assert np.mean(assigned == learned.leave_one_out) > 0.95


def test_prompts_without_a_label_or_with_an_unknown_one_are_grouped_by_their_text():
    learned, prompts, tasks = labelled(400, seed=12, labels=("support", "search", ""))
    unlabelled = [prompt for prompt, task in zip(prompts, tasks, strict=True) if task is None]
    groups = [learned.groups.assign(prompt) for prompt in unlabelled]
    assert len(set(groups)) > 1
    assert groups == [learned.groups.assign(prompt, "a label of tomorrow") for prompt in unlabelled]


def test_the_number_of_labels_is_bounded_and_rare_ones_count_as_none():
    many, _, _ = labelled(MIN_GROUP_PROMPTS * (MAX_TASKS + 8), seed=13, labels=[f"t{n}" for n in range(MAX_TASKS + 8)])
    assert len(many.groups.task_scores) == MAX_TASKS
    assert len(many.groups.names) <= MAX_GROUPS
    rare, _, _ = labelled(200, seed=13, labels=[f"t{n}" for n in range(100)])
    single, _, _ = labelled(200, seed=13, labels=["only"])
    assert rare.groups.task_scores == single.groups.task_scores == {}
    assert rare.groups.version == single.groups.version


def test_too_few_prompts_are_rejected():
    prompts, _, preferred, energy = made(2 * MIN_GROUP_PROMPTS - 1, seed=6)
    with pytest.raises(TooFewPromptsError, match="39 judged prompts, at least 40"):
        learn_groups(prompts, preferred, energy)


def test_identical_prompts_form_one_group():
    learned = learn_groups(["Why?"] * 50, np.zeros(50, dtype=np.int64), np.full((50, 2), 1e-5))
    assert len(learned.groups.names) == 1
    assert learned.groups.assign("Why?") == learned.groups.names[0]


@pytest.mark.parametrize("prompt", ODD_TEXTS)
def test_any_text_has_finite_features(prompt):
    found = extract_features(prompt)
    assert found.shape.shape == (SHAPE_FEATURES,)
    assert found.buckets.shape == found.counts.shape
    assert np.all(np.diff(found.buckets) > 0)
    assert found.buckets.max() < HASHED
    assert np.isfinite(found.shape).all()
    assert (found.counts > 0).all()


@pytest.mark.parametrize("prompt", [*ODD_TEXTS, "How many of the 12 apples remain?"])
def test_features_survive_storage(prompt):
    found = extract_features(prompt)
    stored = PromptFeatures.from_bytes(found.to_bytes())
    for name in PromptFeatures.__slots__:
        assert np.array_equal(getattr(stored, name), getattr(found, name))


def test_groups_contain_no_text_of_the_prompts():
    prompts, _, preferred, energy = made(100, seed=7)
    groups: PromptGroups = learn_groups(prompts, preferred, energy).groups
    kept = [getattr(groups, name) for name in groups.__slots__]
    assert not any("Oslo" in str(one) for one in kept)
