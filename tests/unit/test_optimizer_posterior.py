"""Quality as it is believed: differences from the reference, and how far they can be counted on."""

import math
import random
from statistics import fmean

import pytest

from services.optimizer.differences import Difference, Effect, Judged
from services.optimizer.posterior import Posterior, PosteriorRules
from services.optimizer.settings import OptimizerSettings

REF, BRIEF, OTHER = "p/L0", "p/L1", "q/L0"
RULES = PosteriorRules(pseudo_trials=20.0, prior_trials=2.0, min_trials=20.0)


def of_reference(right: float, trials: float) -> Judged:
    return Judged(right, trials, trials, right, right, right)


def paired(brief: float, right: float, both: float, trials: float) -> Judged:
    return Judged(brief, trials, trials, brief, right, both)


def group(right: int, brief: int, both: int, trials: int) -> dict[str, Judged]:
    return {REF: of_reference(right, trials), BRIEF: paired(brief, right, both, trials)}


def deviation(posterior: Posterior, name: str, option: str = BRIEF) -> float:
    """Standard deviation of a group's difference from the reference."""
    return math.hypot(*posterior.doubt(name, option))


def of_all(posterior: Posterior, groups) -> float:
    return posterior.doubt_of_all(BRIEF, equal(groups))


def equal(names) -> dict[str, float]:
    return dict.fromkeys(names, 1.0 / len(names))


def test_answers_that_are_right_and_wrong_together_tell_more_than_their_shares():
    alike = Posterior({"sums": group(500, 490, 485, 1_000)}, REF, RULES)
    apart = Posterior({"sums": group(500, 490, 245, 1_000)}, REF, RULES)
    assert alike.mean("sums", BRIEF) == pytest.approx(0.49, abs=1e-4)
    # 20 of 1,000 prompts differ, or half of them: the standard error of a mean difference of 0.01.
    assert deviation(alike, "sums") == pytest.approx(math.sqrt(0.02 / 1_000), rel=0.05)
    assert deviation(apart, "sums") == pytest.approx(math.sqrt(0.5 / 1_000), rel=0.05)


def test_what_is_not_known_to_go_together_is_taken_to_exclude_each_other_as_far_as_it_can():
    """So it is with preferred answers, of which there is one."""
    judged = {"a": {REF: Judged(500, 1_000), BRIEF: Judged(490, 1_000)}}
    unknown = Posterior(judged, REF, RULES)
    known = Posterior({"a": group(500, 490, 0, 1_000)}, REF, RULES)
    for posterior in (unknown, known):
        assert posterior.mean("a", BRIEF) == pytest.approx(0.49, abs=1e-4)
        assert deviation(posterior, "a") == pytest.approx(math.sqrt(0.99 / 1_000), rel=0.05)


def test_counts_with_and_without_pairs_add_up():
    mixed = {"a": {REF: of_reference(100, 200), BRIEF: Judged(50, 100) + paired(50, 50, 45, 100)}}
    squared = [
        deviation(Posterior(judged, REF, RULES), "a") ** 2
        for judged in ({"a": group(100, 100, 90, 200)}, mixed, {"a": group(100, 100, 0, 200)})
    ]
    assert squared[1] == pytest.approx(fmean((squared[0], squared[2])), rel=0.02)


def test_an_option_is_compared_on_the_prompts_that_it_was_judged_on():
    """The reference did badly before the option came, on other prompts; on the same ones it is the better."""
    reference = of_reference(400, 1_000) + of_reference(400, 500)
    posterior = Posterior({"a": {REF: reference, BRIEF: paired(350, 400, 330, 500)}}, REF, RULES)
    assert posterior.mean("a", BRIEF) - posterior.mean("a", REF) == pytest.approx(-0.1, abs=0.002)
    elsewhere = Posterior({"a": {REF: of_reference(900, 1_000)}, "b": {BRIEF: Judged(100, 1_000)}}, REF, RULES)
    assert not elsewhere.suffices(BRIEF)


def test_no_difference_seen_is_not_no_difference():
    """Of 50 prompts none was lost; 3 in 100 may be."""
    posterior = Posterior({"a": group(50, 50, 50, 50)}, REF, RULES)
    assert deviation(posterior, "a") == pytest.approx(math.sqrt(0.02 / 50), rel=0.1)
    one_each = Posterior({f"g{n}": group(1, n % 2, n % 2, 1) for n in range(24)}, REF, RULES)
    assert of_all(one_each, [f"g{n}" for n in range(24)]) > 0.1


def test_the_same_answers_elsewhere_are_not_doubted():
    judged = {"a": group(50, 40, 30, 100) | {OTHER: Judged(50, 100)}}
    posterior = Posterior(judged, REF, RULES, same=(REF, OTHER))
    assert posterior.suffices(OTHER)
    assert posterior.mean("a", OTHER) == posterior.mean("a", REF)
    assert deviation(posterior, "a", OTHER) == 0.0


def test_a_group_with_few_judged_prompts_takes_the_difference_of_the_whole_and_keeps_its_own_level():
    judged = {f"g{n}": group(800, 700, 650, 1_000) for n in range(8)}
    judged["new"] = group(1, 0, 0, 2)
    posterior = Posterior(judged, REF, RULES)
    reference = posterior.mean("new", REF)
    assert 0.5 < reference < 0.8
    assert posterior.mean("new", BRIEF) == pytest.approx(reference - 0.1, abs=0.02)
    assert posterior.mean("unheard-of", BRIEF) == pytest.approx(0.7, abs=0.01)


def test_a_family_lends_what_the_whole_does_not_know():
    """Sums lose by brief answers, questions win by them; of either kind a group comes that was hardly judged."""
    judged = {f"sum{n}": group(600, 300, 250, 1_000) for n in range(6)}
    judged |= {f"question{n}": group(500, 600, 450, 1_000) for n in range(6)}
    judged |= {"new sum": group(2, 2, 2, 3), "new question": group(2, 2, 2, 3)}
    families = {name: "sums" if "sum" in name else "questions" for name in judged}
    posterior = Posterior(judged, REF, RULES, families=families)

    def change(name: str) -> float:
        return posterior.mean(name, BRIEF) - posterior.mean(name, REF)

    assert change("new sum") == pytest.approx(-0.3, abs=0.05)
    assert change("new question") == pytest.approx(0.1, abs=0.05)
    without = Posterior(judged, REF, RULES)
    assert without.mean("new sum", BRIEF) == pytest.approx(without.mean("new question", BRIEF))


def test_doubts_about_single_groups_cancel_out_in_part():
    judged = {f"g{n}": group(60, 40 + n, 30, 60 + 20 * n) for n in range(12)}
    effect = Effect(
        {name: Difference.between(row[BRIEF], row[REF]) for name, row in judged.items()}, {},
        pseudo_trials=RULES.pseudo_trials, prior_trials=RULES.prior_trials,
    )  # fmt: skip
    posterior = Posterior(judged, REF, RULES)
    weights = {name: (place + 1) / 78 for place, name in enumerate(judged)}
    assert all(posterior.doubt(name, BRIEF) == effect.deviations(name) for name in judged)
    doubts = [[weight * one for one in effect.deviations(name)] for name, weight in weights.items()]
    own, _, common = zip(*doubts, strict=True)
    together = posterior.doubt_of_all(BRIEF, weights)
    assert together == pytest.approx(math.hypot(*own, sum(common)))
    single = deviation(posterior, "g3")
    assert together < 0.5 * single
    assert posterior.doubt_of_all(BRIEF, {"g3": 1.0}) == pytest.approx(single)


def test_what_is_known_of_an_option_does_not_hang_on_another():
    judged = {f"g{n}": group(60, 55, 50, 100) for n in range(24)}
    alone = of_all(Posterior(judged, REF, RULES), judged)
    judged["g0"] = judged["g0"] | {"p/L2": paired(1, 1, 1, 1)}
    assert of_all(Posterior(judged, REF, RULES), judged) == pytest.approx(alone)


TWELVE_EACH, MANY_EACH, UNEVEN = [12] * 16, [150] * 16, [1_000, *[10] * 23]
FAMILIES, UNEVEN_FAMILIES = [20] * 24, [500, 10, 10, 10, 10, 10] * 4


def drawn(sizes: list[int], to_a_family: int, chance: random.Random) -> tuple[dict[str, float], Posterior]:
    """Groups drawn at random: what a brief answer changes in truth, and what is believed of two answers to so many
    prompts each.
    """
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
    return truth, Posterior(judged, REF, RULES, families=families)


# How much groups differ is itself estimated, badly where few of them were judged much, in families.
DRAWS = pytest.mark.parametrize(
    ("sizes", "to_a_family", "unlike"),
    [
        (TWELVE_EACH, 16, False), (MANY_EACH, 16, False), (UNEVEN, 24, False), (FAMILIES, 6, False),
        (UNEVEN_FAMILIES, 6, True),
    ],
    ids=["few", "many", "uneven", "families", "uneven families"],
)  # fmt: skip


@pytest.mark.parametrize(
    ("moved", "least", "least_unlike"), [(1.0, 0.9, 0.84), (5 / 6, 0.9, 0.84), (1 / 2, 0.86, 0.78)]
)
@DRAWS
def test_what_is_counted_on_holds_as_often_as_the_default_caution_promises(
    sizes, to_a_family, unlike, moved, least, least_unlike
):
    """The groups of which most is believed are served briefly, as a program would choose them."""
    chance = random.Random(len(sizes))
    caution = OptimizerSettings().caution
    kept = []
    for _ in range(300):
        truth, posterior = drawn(sizes, to_a_family, chance)
        believed = {name: posterior.mean(name, BRIEF) - posterior.mean(name, REF) for name in truth}
        best = sorted(believed, key=lambda name: -believed[name])[: int(len(believed) * moved)]
        counted_on = fmean(believed[name] for name in best) - caution * of_all(posterior, best)
        kept.append(counted_on <= fmean(truth[name] for name in best))
    assert (least_unlike if unlike else least) <= fmean(kept) <= 0.99


def test_without_evidence_there_is_no_quality():
    posterior = Posterior({}, REF, RULES)
    assert not posterior.suffices(BRIEF)
    assert not posterior.suffices(REF)
    assert posterior.mean("a", BRIEF) == 0.0
    assert posterior.doubt_of_all(BRIEF, {"a": 1.0}) == 0.0
