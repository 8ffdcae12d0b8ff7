"""Estimated quality: shrinkage weights, differences from the reference, and their standard errors."""

import math
import random
from statistics import fmean

import pytest

from services.optimizer.quality import (
    MAX_WEIGHT,
    MIN_WEIGHT,
    Outcomes,
    PairedDifferences,
    PooledDifferences,
    QualityModel,
    shrinkage_weight,
)
from services.optimizer.settings import OptimizerSettings

REF, BRIEF, OTHER = "p/L0", "p/L1", "q/L0"
SETTINGS = OptimizerSettings(pseudo_trials=20.0, prior_trials=2.0, min_trials=20.0)
DEFAULT = 20.0


def of_reference(right: float, trials: float) -> Outcomes:
    return Outcomes(right, trials, trials, right, right, right)


def paired(brief: float, right: float, both: float, trials: float) -> Outcomes:
    return Outcomes(brief, trials, trials, brief, right, both)


def group(right: int, brief: int, both: int, trials: int) -> dict[str, Outcomes]:
    return {REF: of_reference(right, trials), BRIEF: paired(brief, right, both, trials)}


def standard_error(model: QualityModel, name: str, option: str = BRIEF) -> float:
    """Standard deviation of a group's difference from the reference."""
    return math.hypot(*model.standard_errors(name, option))


def of_all(model: QualityModel, groups) -> float:
    return model.overall_standard_error(BRIEF, equal(groups))


def equal(names) -> dict[str, float]:
    return dict.fromkeys(names, 1.0 / len(names))


def test_answers_that_are_right_and_wrong_together_give_a_smaller_standard_error():
    alike = QualityModel({"sums": group(500, 490, 485, 1_000)}, REF, SETTINGS)
    apart = QualityModel({"sums": group(500, 490, 245, 1_000)}, REF, SETTINGS)
    assert alike.mean("sums", BRIEF) == pytest.approx(0.49, abs=1e-4)
    # 20 of 1,000 prompts differ, or half of them: the standard error of a mean difference of 0.01.
    assert standard_error(alike, "sums") == pytest.approx(math.sqrt(0.02 / 1_000), rel=0.05)
    assert standard_error(apart, "sums") == pytest.approx(math.sqrt(0.5 / 1_000), rel=0.05)


def test_unpaired_outcomes_are_assumed_to_exclude_each_other_as_far_as_they_can():
    """This holds for preference: one answer is preferred."""
    judged = {"a": {REF: Outcomes(500, 1_000), BRIEF: Outcomes(490, 1_000)}}
    unknown = QualityModel(judged, REF, SETTINGS)
    known = QualityModel({"a": group(500, 490, 0, 1_000)}, REF, SETTINGS)
    for model in (unknown, known):
        assert model.mean("a", BRIEF) == pytest.approx(0.49, abs=1e-4)
        assert standard_error(model, "a") == pytest.approx(math.sqrt(0.99 / 1_000), rel=0.05)


def test_counts_with_and_without_pairs_add_up():
    mixed = {"a": {REF: of_reference(100, 200), BRIEF: Outcomes(50, 100) + paired(50, 50, 45, 100)}}
    squared = [
        standard_error(QualityModel(judged, REF, SETTINGS), "a") ** 2
        for judged in ({"a": group(100, 100, 90, 200)}, mixed, {"a": group(100, 100, 0, 200)})
    ]
    assert squared[1] == pytest.approx(fmean((squared[0], squared[2])), rel=0.02)


def test_an_option_is_compared_on_the_prompts_that_it_was_judged_on():
    """The reference did badly on other prompts, before the option was added; on the same prompts it is better."""
    reference = of_reference(400, 1_000) + of_reference(400, 500)
    model = QualityModel({"a": {REF: reference, BRIEF: paired(350, 400, 330, 500)}}, REF, SETTINGS)
    assert model.mean("a", BRIEF) - model.mean("a", REF) == pytest.approx(-0.1, abs=0.002)
    elsewhere = QualityModel({"a": {REF: of_reference(900, 1_000)}, "b": {BRIEF: Outcomes(100, 1_000)}}, REF, SETTINGS)
    assert not elsewhere.is_sufficient(BRIEF)


def test_without_an_observed_difference_the_standard_error_is_not_zero():
    """None of 50 prompts was lost; 3 in 100 may be."""
    model = QualityModel({"a": group(50, 50, 50, 50)}, REF, SETTINGS)
    assert standard_error(model, "a") == pytest.approx(math.sqrt(0.02 / 50), rel=0.1)
    one_each = QualityModel({f"g{n}": group(1, n % 2, n % 2, 1) for n in range(24)}, REF, SETTINGS)
    assert of_all(one_each, [f"g{n}" for n in range(24)]) > 0.1


def test_equivalent_options_have_no_standard_error():
    judged = {"a": group(50, 40, 30, 100) | {OTHER: Outcomes(50, 100)}}
    model = QualityModel(judged, REF, SETTINGS, equivalent=(REF, OTHER))
    assert model.is_sufficient(OTHER)
    assert model.mean("a", OTHER) == model.mean("a", REF)
    assert standard_error(model, "a", OTHER) == 0.0


def test_a_group_with_few_judged_prompts_gets_the_overall_difference_and_keeps_its_own_baseline():
    judged = {f"g{n}": group(800, 700, 650, 1_000) for n in range(8)}
    judged["new"] = group(1, 0, 0, 2)
    model = QualityModel(judged, REF, SETTINGS)
    reference = model.mean("new", REF)
    assert 0.5 < reference < 0.8
    assert model.mean("new", BRIEF) == pytest.approx(reference - 0.1, abs=0.02)
    assert model.mean("unknown group", BRIEF) == pytest.approx(0.7, abs=0.01)


def test_a_new_group_is_estimated_from_its_family_rather_than_from_all_groups():
    """Brief answers are worse for sums and better for questions; one group of each kind has few judged prompts."""
    judged = {f"sum{n}": group(600, 300, 250, 1_000) for n in range(6)}
    judged |= {f"question{n}": group(500, 600, 450, 1_000) for n in range(6)}
    judged |= {"new sum": group(2, 2, 2, 3), "new question": group(2, 2, 2, 3)}
    families = {name: "sums" if "sum" in name else "questions" for name in judged}
    model = QualityModel(judged, REF, SETTINGS, families=families)

    def change(name: str) -> float:
        return model.mean(name, BRIEF) - model.mean(name, REF)

    assert change("new sum") == pytest.approx(-0.3, abs=0.05)
    assert change("new question") == pytest.approx(0.1, abs=0.05)
    without = QualityModel(judged, REF, SETTINGS)
    assert without.mean("new sum", BRIEF) == pytest.approx(without.mean("new question", BRIEF))


def test_standard_errors_of_single_groups_partly_cancel_out():
    judged = {f"g{n}": group(60, 40 + n, 30, 60 + 20 * n) for n in range(12)}
    pooled = PooledDifferences(
        {name: PairedDifferences.between(row[BRIEF], row[REF]) for name, row in judged.items()}, {},
        pseudo_trials=SETTINGS.pseudo_trials, prior_trials=SETTINGS.prior_trials,
    )  # fmt: skip
    model = QualityModel(judged, REF, SETTINGS)
    weights = {name: (place + 1) / 78 for place, name in enumerate(judged)}
    assert all(model.standard_errors(name, BRIEF) == pooled.standard_errors(name) for name in judged)
    errors = [[weight * one for one in pooled.standard_errors(name)] for name, weight in weights.items()]
    own, _, common = zip(*errors, strict=True)
    together = model.overall_standard_error(BRIEF, weights)
    assert together == pytest.approx(math.hypot(*own, sum(common)))
    single = standard_error(model, "g3")
    assert together < 0.5 * single
    assert model.overall_standard_error(BRIEF, {"g3": 1.0}) == pytest.approx(single)


def test_the_standard_error_of_an_option_is_independent_of_other_options():
    judged = {f"g{n}": group(60, 55, 50, 100) for n in range(24)}
    alone = of_all(QualityModel(judged, REF, SETTINGS), judged)
    judged["g0"] = judged["g0"] | {"p/L2": paired(1, 1, 1, 1)}
    assert of_all(QualityModel(judged, REF, SETTINGS), judged) == pytest.approx(alone)


TWELVE_EACH, MANY_EACH, UNEVEN = [12] * 16, [150] * 16, [1_000, *[10] * 23]
FAMILIES, UNEVEN_FAMILIES = [20] * 24, [500, 10, 10, 10, 10, 10] * 4


def drawn(sizes: list[int], to_a_family: int, chance: random.Random) -> tuple[dict[str, float], QualityModel]:
    """Groups drawn at random: the true effect of brief answers, and the estimates from `sizes` judged prompts."""
    families = {f"g{n}": f"f{n // to_a_family}" for n in range(len(sizes))}
    of_family = {family: chance.uniform(-0.05, 0.05) for family in sorted({*families.values()})}
    judged, truth = {}, {}
    for place, size in enumerate(sizes):
        name = f"g{place}"
        right, gained = chance.uniform(0.3, 0.8), chance.uniform(0.0, 0.15)
        lost = chance.uniform(0.05, 0.3) + of_family[families[name]]
        truth[name] = (1 - right) * gained - right * lost
        first = [chance.random() < right for _ in range(size)]
        second = [chance.random() < ((1 - lost) if one else gained) for one in first]
        both = sum(one and other for one, other in zip(first, second, strict=True))
        judged[name] = group(sum(first), sum(second), both, size)
    return truth, QualityModel(judged, REF, SETTINGS, families=families)


# How much groups differ is estimated too, badly if few groups of a family have many judged prompts.
DRAWS = pytest.mark.parametrize(
    ("sizes", "to_a_family", "unlike"),
    [
        (TWELVE_EACH, 16, False), (MANY_EACH, 16, False), (UNEVEN, 24, False), (FAMILIES, 6, False),
        (UNEVEN_FAMILIES, 6, True),
    ],
    ids=["few", "many", "uneven", "families", "uneven families"],
)  # fmt: skip


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("moved", "least", "least_unlike"), [(1.0, 0.9, 0.84), (5 / 6, 0.9, 0.84), (1 / 2, 0.86, 0.78)]
)
@DRAWS
def test_the_95_percent_lower_confidence_bound_holds_nearly_as_often_as_it_says(
    sizes, to_a_family, unlike, moved, least, least_unlike
):
    """The groups with the best estimates are served briefly, as the program would choose them."""
    chance = random.Random(len(sizes))
    kept = []
    for _ in range(300):
        truth, model = drawn(sizes, to_a_family, chance)
        estimated = {name: model.mean(name, BRIEF) - model.mean(name, REF) for name in truth}
        best = sorted(estimated, key=lambda name: -estimated[name])[: int(len(estimated) * moved)]
        lower_bound = fmean(estimated[name] for name in best) - 1.645 * of_all(model, best)
        kept.append(lower_bound <= fmean(truth[name] for name in best))
    assert (least_unlike if unlike else least) <= fmean(kept) <= 0.99


def test_without_judged_prompts_the_quality_is_zero():
    model = QualityModel({}, REF, SETTINGS)
    assert not model.is_sufficient(BRIEF)
    assert not model.is_sufficient(REF)
    assert model.mean("a", BRIEF) == 0.0
    assert model.overall_standard_error(BRIEF, {"a": 1.0}) == 0.0


def outcomes_of(rates: list[float], trials: int, *, seed: int = 1) -> list[tuple[float, float]]:
    chance = random.Random(seed)
    return [(float(sum(chance.random() < rate for _ in range(trials))), float(trials)) for rate in rates]


def test_the_weight_of_the_prior_that_groups_were_drawn_from_is_estimated():
    chance = random.Random(7)
    rates = [chance.betavariate(0.4 * 30, 0.6 * 30) for _ in range(400)]
    assert shrinkage_weight(outcomes_of(rates, 100), default=DEFAULT) == pytest.approx(30.0, rel=0.15)


def test_groups_that_differ_are_shrunk_little_and_groups_that_differ_by_chance_much():
    assert shrinkage_weight(outcomes_of([0.05, 0.95] * 8, 200), default=DEFAULT) < 4.0
    assert shrinkage_weight(outcomes_of([0.4] * 16, 200), default=DEFAULT) > 60.0


@pytest.mark.parametrize(
    "outcomes", [[], [(3.0, 9.0)], [(0.0, 50.0), (0.0, 50.0)], [(9.0, 9.0), (9.0, 9.0)], [(0.0, 0.0), (1.0, 2.0)]]
)
def test_without_information_on_how_groups_differ_the_default_is_used(outcomes):
    assert shrinkage_weight(outcomes, default=DEFAULT) == DEFAULT


def test_two_small_groups_hardly_change_it():
    assert shrinkage_weight([(2.0, 6.0), (4.0, 6.0)], default=DEFAULT) == pytest.approx(DEFAULT, rel=0.35)


def test_a_group_with_few_judged_prompts_says_little_about_how_groups_differ():
    """2 of 2 beside 500 of 1,000 may be chance, which it would not be for two groups of the mean size."""
    assert shrinkage_weight([(500.0, 1_000.0), (2.0, 2.0)], default=DEFAULT) == pytest.approx(DEFAULT, rel=0.1)


def test_it_stays_within_its_limits_and_can_be_turned_off():
    assert shrinkage_weight(outcomes_of([0.0, 1.0] * 20, 1_000), default=DEFAULT) == MIN_WEIGHT
    assert shrinkage_weight(outcomes_of([0.3] * 60, 3_000), default=1e6) == MAX_WEIGHT
    assert shrinkage_weight(outcomes_of([0.1, 0.9] * 20, 100), default=0.0) == 0.0
