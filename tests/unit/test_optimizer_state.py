"""Estimates by learned groups: from the version's own data on, without counts by other groups."""

import math
import random
import tomllib
from datetime import timedelta
from statistics import fmean

import pytest

from services.optimizer.costs import Consumption, ResourceUse
from services.optimizer.estimates import Estimates, estimate
from services.optimizer.settings import OptimizerSettings
from services.optimizer.state import OptimizerState, QualityCounts
from shared.fleet import Fleet
from shared.messages import (
    EvaluationCost,
    GroupEvidence,
    GroupTaken,
    PackedArray,
    Paired,
    PromptGrouping,
    Quality,
    QualityCount,
)
from tests.support.grouping import NOW
from tests.support.router import MODEL, fleet_toml

FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
SETTINGS = OptimizerSettings(confidence_z=0.0)
LEVELS = ("p/L0", "p/L1", "p/L2")
NO_COST = EvaluationCost(generations=0, judgements=0, completion_tokens=0, processing_s=0.0)
LATER = NOW + timedelta(hours=1)


def counts(group: str, won: tuple[float, float, float], trials: float = 100.0) -> tuple[QualityCount, ...]:
    return tuple(
        QualityCount(group=group, option=option, metric="preference", successes=one, trials=trials)
        for option, one in zip(LEVELS, won, strict=True)
    )


def evaluation(name: str, *found: tuple[QualityCount, ...], at=NOW) -> Quality:
    return Quality(
        evaluation_id=name, model=MODEL, evaluated_at=at, trigger="first", prompts=100, abstentions=0, cost=NO_COST,
        counts=tuple(count for one in found for count in one),
    )  # fmt: skip


def grouping(version: str | None = "v", **changes) -> PromptGrouping:
    taken = {"v.00": (9e-5, 8e-5, 7e-5), "v.01": (5e-5, 2e-5, 1e-5)}
    made = {
        "model": MODEL,
        "version": version,
        "learned_at": NOW,
        "prompts": 400,
        "names": ("v.00", "v.01"),
        "features": 1,
        "arrays": {"weights": PackedArray(dtype="<f4", shape=(0,), data="")},
        "traffic": {"v.00": 0.25, "v.01": 0.75},
        "evidence": [GroupEvidence(evaluated_at=NOW, counts=counts("v.00", (90, 5, 5)) + counts("v.01", (20, 30, 50)))],
        "taken": [
            GroupTaken(group=group, option=option, requests=100, energy_kwh=100 * kwh, processing_s=100.0)
            for group, row in taken.items()
            for option, kwh in zip(LEVELS, row, strict=True)
        ],
    }
    return PromptGrouping.model_validate(made | changes)


def state(*groupings: PromptGrouping, evaluations=(), consumption: Consumption | None = None) -> OptimizerState:
    found = OptimizerState(FLEET, SETTINGS)
    if consumption is not None:
        found.consumption[MODEL] = consumption
    for one in groupings:
        found.update_grouping(one)
    found.recount(evaluations)
    return found


def estimated(found: OptimizerState, now) -> Estimates:
    made = estimate(
        found.consumption_of(MODEL),
        found.counts_of(MODEL),
        options=FLEET.options_of(MODEL),
        reference=FLEET.reference_of(MODEL),
        settings=SETTINGS,
        now_s=now.timestamp(),
        equivalent=FLEET.same_as_reference(MODEL),
    )
    assert made is not None
    return made


def test_what_was_judged_of_other_texts_does_not_count():
    known = FLEET.directive_hashes
    other = {**known, "L1": "f" * 16}
    row = counts("qa", (50, 25, 25))
    wrong = evaluation("wrong", row, at=LATER).model_copy(update={"directives": other})
    for directives in (known, {}, {level: known[level] for level in ("L0", "L1")}, {**known, "L9": "f" * 16}):
        right = evaluation("right", row).model_copy(update={"directives": directives})
        found = state(evaluations=[right, wrong])
        assert found.latest_evaluation(MODEL) == right
        assert found.counts_of(MODEL).model("preference", "p/L0", NOW.timestamp()).trials("p/L1") == pytest.approx(100)
    assert state(evaluations=[wrong]).latest_evaluation(MODEL) is None


def test_groups_stay_without_what_was_judged_of_other_texts():
    known = FLEET.directive_hashes
    for directives, trials in ((known, 200.0), ({**known, "L2": "f" * 16}, 0.0)):
        found = state(grouping(directives=directives))
        assert found.group_version(MODEL) == "v"
        assert found.consumption_of(MODEL).traffic.keys() == {"v.00", "v.01"}
        assert bool(found.consumption_of(MODEL).cells) is (trials > 0)
        model = found.counts_of(MODEL).model("preference", "p/L0", NOW.timestamp())
        assert model.trials("p/L1") == pytest.approx(trials)


def traffic(**requests: float) -> Consumption:
    consumption = Consumption()
    for group, number in requests.items():
        consumption.add(
            group,
            "p/L0",
            ResourceUse(number, number * 6e-5, number),
            at_s=LATER.timestamp(),
            settings=SETTINGS,
            traffic=number,
        )
    return consumption


def test_a_version_gives_estimates_before_any_request_names_its_groups():
    found = estimated(state(grouping()), NOW)
    assert found.weights == pytest.approx({"v.00": 0.25, "v.01": 0.75})
    assert found.ineligible == {}
    assert found.groups["v.00"]["p/L0"].energy_kwh == pytest.approx(9e-5, rel=0.05)
    assert found.groups["v.01"]["p/L2"].quality["preference"] > found.groups["v.00"]["p/L2"].quality["preference"]


def test_counts_by_other_groups_are_contained_in_the_version_and_not_counted_again():
    before = evaluation("e1", counts("qa", (0, 0, 100), trials=100))
    with_it = estimated(state(grouping(), evaluations=[before]), NOW)
    assert with_it == estimated(state(grouping()), NOW)


def test_evaluations_and_requests_that_name_the_groups_are_added():
    since = evaluation("e2", counts("v.01", (100, 0, 0)), at=LATER)
    consumption = traffic(**{"v.00": 9_000.0, "v.01": 1_000.0, "qa": 5_000.0})
    found = estimated(state(grouping(), evaluations=[since], consumption=consumption), LATER)
    assert found.weights["v.00"] == pytest.approx(0.9, abs=0.01)
    assert found.groups.keys() == {"v.00", "v.01"}
    assert found.groups["v.01"]["p/L0"].trials == pytest.approx(200, rel=0.01)


def test_energy_of_options_comes_from_other_groups_if_the_version_has_none():
    consumption = Consumption()
    for option, kwh in zip(LEVELS, (6e-5, 3e-5, 1.5e-5), strict=True):
        taken = ResourceUse(100.0, 100 * kwh, 100.0)
        consumption.add("qa", option, taken, at_s=NOW.timestamp(), settings=SETTINGS, traffic=0.0)
    found = estimated(state(grouping(taken=()), consumption=consumption), NOW)
    assert found.ineligible == {}
    assert found.groups.keys() == {"v.00", "v.01"}
    row = found.groups["v.00"]
    assert row["p/L1"].energy_kwh / row["p/L0"].energy_kwh == pytest.approx(0.5, rel=0.05)


def test_a_version_carries_the_tokens_of_its_judged_answers():
    tokens = {"v.00": (300.0, 200.0, 100.0), "v.01": (90.0, 40.0, 20.0)}
    taken = [
        GroupTaken(
            group=group, option=option, requests=100, energy_kwh=1e-3, processing_s=100.0, completion_tokens=100 * each
        )
        for group, row in tokens.items()
        for option, each in zip(LEVELS, row, strict=True)
    ]
    totals = state(grouping(taken=taken)).consumption_of(MODEL).totals(NOW.timestamp(), SETTINGS)
    used = totals["v.01"]["p/L1"]
    assert (used.token_requests, used.completion_tokens, used.prompt_requests) == (100.0, 4_000.0, 0.0)
    older = state(grouping()).consumption_of(MODEL).totals(NOW.timestamp(), SETTINGS)
    assert older["v.01"]["p/L1"].token_requests == 0.0


def test_the_newest_version_is_used_and_one_without_a_version_returns_to_task_labels():
    withdrawn = grouping(None, learned_at=LATER, names=(), arrays={}, evidence=(), taken=(), traffic={})
    found = state(grouping(), consumption=traffic(qa=100.0))
    assert found.group_version(MODEL) == "v"
    assert found.update_grouping(withdrawn)
    assert not found.update_grouping(grouping())
    found.recount([evaluation("e1", counts("qa", (50, 25, 25)))])
    assert found.group_version(MODEL) is None
    estimates = estimated(found, LATER)
    assert estimates.weights == {"qa": 1.0}


def test_a_group_is_shrunk_towards_its_family():
    """Brief answers win in one family and lose in the other; of each a group comes with one prompt that was judged."""
    names = [f"v.{place:02}" for place in range(8)]
    won = {"first": (20.0, 60.0, 20.0), "second": (60.0, 20.0, 20.0)}
    families = {name: "first" if place < 4 else "second" for place, name in enumerate(names)}
    known = [count for name in names for count in counts(name, won[families[name]])]
    few = [count for name in ("v.08", "v.09") for count in counts(name, (0.4, 0.4, 0.2), 1.0)]
    families |= {"v.08": "first", "v.09": "second"}
    made = grouping(
        names=(*names, "v.08", "v.09"),
        families=families,
        traffic=dict.fromkeys(families, 0.1),
        evidence=[GroupEvidence(evaluated_at=NOW, counts=(*known, *few))],
    )
    consumption = Consumption()
    for name in families:
        for option in LEVELS:
            taken = ResourceUse(20.0, 1e-3, 20.0)
            consumption.add(name, option, taken, at_s=NOW.timestamp(), settings=SETTINGS, traffic=taken.requests)
    found = estimated(state(made, consumption=consumption), NOW).groups
    change = {
        name: row["p/L1"].quality["preference"] - row["p/L0"].quality["preference"] for name, row in found.items()
    }
    assert change["v.08"] > 0.2
    assert change["v.09"] < -0.2


def judged_again(verdicts: list[str], *, at=NOW, trials: float | None = None) -> Quality:
    """An evaluation with one verdict for each name of a prompt, all of them on group "a"."""
    found = counts("a", (0.5, 0.3, 0.2), trials=trials or len(verdicts))
    hashes = tuple(f"{int(name, 36):012x}" for name in verdicts)
    return evaluation(f"e{at}", found, at=at).model_copy(update={"prompt_hashes": {"a": hashes}})


def effective_trials(*evaluations: Quality, now=NOW) -> float:
    found = QualityCounts(evaluations, settings=SETTINGS)
    return found.model("preference", "p/L0", now.timestamp()).trials("p/L0")


def test_verdicts_on_the_same_prompt_count_as_one_prompt():
    assert effective_trials(judged_again(["a", "b", "c", "d"])) == pytest.approx(4.0)
    assert effective_trials(judged_again(["a", "a", "b", "b", "c", "c"])) == pytest.approx(3.0)
    # (3 + 1 + 1)^2 / (3^2 + 1 + 1)
    assert effective_trials(judged_again(["a", "a", "a", "b", "c"])) == pytest.approx(25.0 / 11.0)


def test_a_prompt_of_an_earlier_evaluation_is_recognised():
    later = judged_again(["a", "b", "e"], at=LATER)
    before = judged_again(["a", "b", "c"])
    # Prompts a and b were judged twice, c and e once.
    expected = pytest.approx(36.0 / 10.0, rel=0.01)
    assert effective_trials(before, later, now=LATER) == expected
    assert effective_trials(later, before, now=LATER) == expected


def test_repeated_verdicts_age_as_single_ones_do():
    half_life = timedelta(hours=SETTINGS.quality_half_life_h)
    repeated = judged_again(["a", "a", "b", "b"])
    assert effective_trials(repeated, now=NOW + half_life) == pytest.approx(1.0)
    # Half of the first verdict is left, and the second is new: together one prompt.
    again = judged_again(["a"], at=NOW + half_life)
    assert effective_trials(judged_again(["a"]), again, now=NOW + half_life) == pytest.approx(1.0)


def test_evaluations_without_hashes_are_taken_for_different_prompts():
    assert effective_trials(evaluation("e", counts("a", (0.5, 0.3, 0.2), trials=7))) == pytest.approx(7.0)


def test_where_traffic_repeats_its_prompts_every_verdict_counts():
    settings = OptimizerSettings(sampling_unit="request")
    counted = QualityCounts([judged_again(["a", "a", "b", "b"])], settings=settings)
    assert counted.model("preference", "p/L0", NOW.timestamp()).trials("p/L0") == pytest.approx(4.0)


def test_means_keep_the_frequencies_of_the_prompts():
    model = QualityCounts([judged_again(["a", "a", "a", "b"])], settings=SETTINGS).model(
        "preference", "p/L0", NOW.timestamp()
    )
    plain = QualityCounts([judged_again(["a", "b", "c", "d"])], settings=SETTINGS).model(
        "preference", "p/L0", NOW.timestamp()
    )
    assert model.mean("a", "p/L0") == pytest.approx(plain.mean("a", "p/L0"))


def test_a_version_of_the_groups_carries_which_prompts_were_judged_again():
    evidence = [
        GroupEvidence(evaluated_at=NOW, counts=counts("v.00", (9, 5, 6), trials=20), prompt_hashes=hashes)
        for hashes in ({}, {"v.00": tuple(f"{n % 10:012x}" for n in range(20))})
    ]
    all_different, repeated = (
        state(grouping(evidence=[one])).counts_of(MODEL).model("preference", "p/L0", NOW.timestamp())
        for one in evidence
    )
    assert repeated.trials("p/L0") == pytest.approx(all_different.trials("p/L0") / 2.0)


def repeated_verdicts(groups: int, prompts: int, chance: random.Random) -> tuple[dict[str, float], Quality]:
    """The true effect of brief answers by group, and an evaluation with 2.5 verdicts a prompt on average.

    A prompt suits brief answers or does not; one verdict in ten goes the other way.
    """
    truth, found, hashes = {}, [], {}
    for place in range(groups):
        name, gained, lost = f"g{place}", chance.uniform(0.0, 0.2), chance.uniform(0.05, 0.35)
        sums = {"right": 0.0, "brief": 0.0, "both": 0.0}
        verdicts: list[str] = []
        for prompt in range(prompts):
            right = chance.random() < 0.5
            brief = chance.random() < ((1.0 - lost) if right else gained)
            for _ in range(chance.choice((1, 2, 3, 4))):
                first, second = (one ^ (chance.random() < 0.1) for one in (right, brief))
                sums["right"] += first
                sums["brief"] += second
                sums["both"] += first and second
                verdicts.append(f"{place * prompts + prompt:012x}")
        truth[name] = 0.8 * (0.5 * gained - 0.5 * lost)
        hashes[name] = tuple(verdicts)
        for option, won, both in (("p/L0", "right", "right"), ("p/L1", "brief", "both")):
            paired = Paired(reference="p/L0", successes=sums["right"], both=sums[both])
            found.append(
                QualityCount(
                    group=name, option=option, metric="correctness", successes=sums[won], trials=len(verdicts),
                    paired=paired,
                )
            )  # fmt: skip
    return truth, evaluation("e", tuple(found)).model_copy(update={"prompt_hashes": hashes})


@pytest.mark.statistical
@pytest.mark.parametrize(("moved", "least"), [(1.0, 0.92), (0.5, 0.88)])
def test_the_95_percent_lower_confidence_bound_holds_as_often_as_it_says_with_repeated_prompts(moved, least):
    """The groups with the best estimates are served briefly, as the program would choose them."""
    chance = random.Random(5)
    kept: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(300):
        truth, found = repeated_verdicts(8, 40, chance)
        for recognised, found_kept in kept.items():
            counted = found if recognised else found.model_copy(update={"prompt_hashes": {}})
            model = QualityCounts([counted], settings=SETTINGS).model("correctness", "p/L0", NOW.timestamp())
            effect = {name: model.mean(name, "p/L1") - model.mean(name, "p/L0") for name in truth}
            best = sorted(effect, key=lambda name: -effect[name])[: int(len(truth) * moved)]
            error = model.overall_standard_error("p/L1", dict.fromkeys(best, 1.0 / len(best)))
            found_kept.append(
                fmean(effect[name] for name in best) - 1.645 * error <= fmean(truth[name] for name in best)
            )
    assert least <= fmean(kept[True]) <= 0.995
    # Taken for independent, the verdicts promise too much.
    assert fmean(kept[False]) < fmean(kept[True]) - 0.04


def test_the_counts_of_one_evaluation_are_scaled_to_independent_prompts():
    scored = judged_again(["a", "a", "b", "b"]).independent_counts()
    assert [one.trials for one in scored] == pytest.approx([2.0, 2.0, 2.0])
    assert math.isclose(scored[0].successes / scored[0].trials, 0.5 / 4.0)
