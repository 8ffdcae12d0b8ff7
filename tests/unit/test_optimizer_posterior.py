"""Quality as it is believed: differences from the reference, and how far they can be counted on."""

import math
import operator
import random
from statistics import fmean

import pytest

from services.optimizer.differences import Judged
from services.optimizer.posterior import Posterior, PosteriorRules

REF, BRIEF = "p/L0", "p/L1"
RULES = PosteriorRules(pseudo_trials=20.0, prior_trials=2.0, min_trials=20.0, caution=1.0)


def group(right: int, brief: int, both: int, trials: int) -> dict[str, Judged]:
    return {REF: Judged(right, trials, right, trials), BRIEF: Judged(brief, trials, both, trials)}


def margin(posterior: Posterior, name: str, weights: dict[str, float]) -> float:
    return posterior.mean(name, BRIEF) - posterior.counted_on(name, BRIEF, posterior.spread(weights))


def test_answers_that_are_right_and_wrong_together_tell_more_than_their_shares():
    weights = {"sums": 1.0}
    alike = Posterior({"sums": group(500, 490, 485, 1_000)}, REF, RULES)
    apart = Posterior({"sums": group(500, 490, 250, 1_000)}, REF, RULES)
    unpaired = Posterior({"sums": {REF: Judged(500, 1_000), BRIEF: Judged(490, 1_000)}}, REF, RULES)
    assert alike.mean("sums", BRIEF) == pytest.approx(0.49, abs=1e-4)
    # 20 of 1,000 prompts differ, or about half of them: the standard error of a mean difference of 0.01.
    assert margin(alike, "sums", weights) == pytest.approx(math.sqrt(0.02 / 1_000), rel=0.05)
    assert margin(apart, "sums", weights) == pytest.approx(math.sqrt(0.49 / 1_000), rel=0.05)
    # Where it is not known how they go together, they are taken for independent: 245 of 1,000 both right.
    assert margin(unpaired, "sums", weights) == pytest.approx(margin(apart, "sums", weights), rel=0.02)


def test_counts_with_and_without_pairs_add_up():
    before, since = Judged(50, 100), Judged(50, 100, 45, 100)
    mixed = Posterior({"a": {REF: Judged(100, 200), BRIEF: before + since}}, REF, RULES)
    paired = Posterior({"a": group(100, 100, 90, 200)}, REF, RULES)
    unpaired = Posterior({"a": group(100, 100, 50, 200)}, REF, RULES)
    squared = [margin(one, "a", {"a": 1.0}) ** 2 for one in (paired, mixed, unpaired)]
    assert squared[1] == pytest.approx(fmean((squared[0], squared[2])), rel=0.01)


def test_a_group_with_few_judged_prompts_takes_the_difference_of_the_whole_and_keeps_its_own_level():
    judged = {f"g{n}": group(800, 700, 650, 1_000) for n in range(8)}
    judged["new"] = group(1, 0, 0, 2)
    posterior = Posterior(judged, REF, RULES)
    reference = posterior.mean("new", REF)
    assert 0.5 < reference < 0.8
    assert posterior.mean("new", BRIEF) == pytest.approx(reference - 0.1, abs=0.02)
    assert posterior.mean("unheard-of", BRIEF) == pytest.approx(0.7, abs=0.01)


def test_the_margins_of_all_groups_make_up_that_of_all_traffic():
    chance = random.Random(5)
    judged = {f"g{n}": group(60, 40 + n, 30, 60 + 20 * n) for n in range(12)}
    posterior = Posterior(judged, REF, RULES)
    drawn = {name: chance.random() for name in judged}
    weights = {name: one / sum(drawn.values()) for name, one in drawn.items()}
    effect = posterior._effects[BRIEF]
    own, _, common = zip(*(effect.deviations(name) for name in judged), strict=True)
    shares = weights.values()
    expected = math.hypot(*map(operator.mul, own, shares), sum(map(operator.mul, common, shares)))
    borne = sum(weight * margin(posterior, name, weights) for name, weight in weights.items())
    assert borne == pytest.approx(expected)
    # Twelve doubts cancel out in part; a single group bears its own.
    single = margin(posterior, "g3", {"g3": 1.0})
    assert borne < 0.5 * single
    assert single == pytest.approx(math.hypot(*effect.deviations("g3")))


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


@pytest.mark.parametrize("trials", [12, 150])
def test_what_is_counted_on_holds_as_often_as_its_standard_deviations_promise(trials):
    """Groups drawn at random, two answers to every prompt, each right or wrong; all traffic served briefly."""
    chance = random.Random(trials)
    groups, kept, caution = 16, [], 1.645
    rules = PosteriorRules(pseudo_trials=20.0, prior_trials=2.0, min_trials=20.0, caution=caution)
    for _ in range(300):
        judged, truth = {}, {}
        for place in range(groups):
            right, lost, gained = chance.uniform(0.3, 0.8), chance.uniform(0.02, 0.3), chance.uniform(0.0, 0.15)
            truth[f"g{place}"] = (1 - right) * gained - right * lost
            first = [chance.random() < right for _ in range(trials)]
            second = [chance.random() < ((1 - lost) if one else gained) for one in first]
            both = sum(one and other for one, other in zip(first, second, strict=True))
            judged[f"g{place}"] = group(sum(first), sum(second), both, trials)
        posterior = Posterior(judged, REF, rules)
        weights = dict.fromkeys(judged, 1.0 / groups)
        spread = posterior.spread(weights)
        counted = fmean(posterior.counted_on(name, BRIEF, spread) - posterior.mean(name, REF) for name in judged)
        kept.append(counted <= fmean(truth.values()))
    assert 0.92 <= fmean(kept) <= 0.99


def test_without_evidence_there_is_no_quality_and_no_doubt():
    posterior = Posterior({}, REF, RULES)
    assert not posterior.suffices(BRIEF)
    assert posterior.mean("a", BRIEF) == 0.0
    assert posterior.counted_on("a", BRIEF, posterior.spread({"a": 1.0})) == 0.0
    certain = Posterior({"a": group(100, 100, 100, 100)}, REF, RULES)
    assert certain.counted_on("a", BRIEF, certain.spread({"a": 1.0})) == pytest.approx(1.0)
