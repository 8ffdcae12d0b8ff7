"""Which prompts an evaluation takes, which answers it compares, how outcomes are counted, and the cost estimate."""

import tomllib
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.evaluator.cost import Call, Energy, Work, estimate_cost, evaluation_energy
from services.evaluator.plan import Candidate, PlanError, allocate, candidates_of, interleave, served_candidate, thin
from services.evaluator.preference import PREFERENCE
from services.evaluator.quality import tally
from shared.fleet import Fleet
from shared.messages import Footprint, ServedAnswer
from tests.support.evaluator import judged_answer, judged_prompt
from tests.support.router import MODEL, fleet_toml

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)


def fleet(*pools: str) -> Fleet:
    text = fleet_toml(["h:1"])
    for number, extra in enumerate(pools):
        text += f'[[pools]]\nname = "q{number}"\nmodel = "m"\nzone = "FR"\n{extra}\n'
        text += f'[[pools.endpoints]]\nname = "q{number}-0"\ngrpc = "h:2"\n'
    return Fleet.model_validate(tomllib.loads(text))


def test_every_level_is_compared_with_the_reference_first():
    found = candidates_of(fleet(), MODEL)
    assert [one.options for one in found] == [("p/L0",), ("p/L1",), ("p/L2",)]


def test_pools_with_the_same_weights_share_verdicts_and_alternate():
    found = candidates_of(fleet(""), MODEL)
    assert [one.options for one in found] == [("p/L0", "q0/L0"), ("p/L1", "q0/L1"), ("p/L2", "q0/L2")]
    assert [found[0].pool_for(number) for number in range(4)] == ["p", "q0", "p", "q0"]


def test_other_weights_are_compared_too():
    found = candidates_of(fleet('variant = "small"'), MODEL)
    assert [option for one in found for option in one.options] == ["p/L0", "p/L1", "p/L2", "q0/L0", "q0/L1", "q0/L2"]


def test_more_answers_than_a_judge_can_compare_are_a_plan_error():
    with pytest.raises(PlanError, match=r"9 answers to compare .* a judge can compare 8: remove"):
        candidates_of(fleet('variant = "a"', 'variant = "b"'), MODEL)


@pytest.mark.parametrize(
    ("option", "directive", "tokens", "place"),
    [
        ("q0/L1", None, 50, 1),
        ("p/L0", "", 50, 0),
        ("p/L1", None, 51, None),
        ("p/L1", "Be brief, as last week.", 50, None),
        ("gone/L1", None, 50, None),
    ],
)
def test_a_served_answer_counts_if_the_evaluator_could_have_got_it(option, directive, tokens, place):
    two = fleet("")
    text = two.directive_text(option[-2:]) if directive is None else directive
    served = ServedAnswer(option=option, directive=text, text="Yes.", completion_tokens=tokens, processing_s=1.0)
    assert served_candidate(served, candidates_of(two, MODEL), two, max_tokens=50) == place
    assert served_candidate(None, candidates_of(two, MODEL), two, max_tokens=50) is None


def test_prompts_follow_traffic_with_a_minimum_per_group():
    taken = allocate({"qa": 200, "code": 200, "rare": 200}, {"qa": 70, "code": 30, "rare": 0.5}, total=100, minimum=10)
    assert sum(taken.values()) == 100
    assert taken["rare"] == 10
    assert taken["qa"] == pytest.approx(63, abs=1)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 40), max_size=6),
    st.dictionaries(st.sampled_from("abcdefg"), st.floats(0, 100), max_size=7),
    st.integers(0, 120),
    st.integers(0, 20),
)
def test_allocation_takes_as_many_prompts_as_possible(available, traffic, total, minimum):
    taken = allocate(available, traffic, total=total, minimum=minimum)
    assert sum(taken.values()) == min(total, sum(available.values()))
    assert all(0 < number <= available[group] for group, number in taken.items())
    if total >= minimum * len(available):
        assert all(taken.get(group, 0) >= min(minimum, number) for group, number in available.items())


def test_groups_are_interleaved():
    assert interleave({"a": ["1", "2", "3"], "b": ["4"]}) == [("a", "1"), ("b", "4"), ("a", "2"), ("a", "3")]


L0, L1, L2 = Candidate("L0", ("p", "q")), Candidate("L1", ("p", "q")), Candidate("L2", ("p", "q"))
ALL = (L0, L1, L2)


def judged(winners, *, correct=()):
    """A prompt with these winners; `correct`: candidates with a correct answer, if the metric is defined."""
    return judged_prompt(
        "r",
        answers=[
            judged_answer(
                one.level,
                options=one.options,
                preference=1.0 / len(winners) if one in winners else 0.0,
                **({"correctness": float(one in correct)} if correct else {}),
            )
            for one in ALL
        ],
    )


def counted(*prompts):
    return {(one.metric, one.group, one.option): (one.successes, one.trials) for one in tally(prompts)}


def test_joint_successes_of_an_option_and_the_reference_are_counted():
    prompts = [("sums", judged([L0, L1], correct=right)) for right in ((L0, L1), (L1,), (L0,), ())]
    found = {(one.metric, one.option): one.paired for one in tally(prompts)}
    assert {one.reference for one in found.values()} == {"p/L0"}

    def both(metric):
        assert {one.successes for (name, _), one in found.items() if name == metric} == {2.0}
        return [found[metric, f"p/{level}"].both for level in ("L0", "L1", "L2")]

    assert both("correctness") == [2.0, 1.0, 0.0]
    # A shared win counts half for each, and both have it.
    assert both("preference") == [2.0, 2.0, 0.0]


def test_outcomes_with_another_reference_or_without_one_are_not_paired():
    before, now = (
        judged_prompt(
            "r", answers=[judged_answer("L0", options=(f"{pool}/L0",), won=1.0), judged_answer("L1", won=0.0)]
        )
        for pool in ("old", "p")
    )
    assert {one.option: one.paired for one in tally([("qa", before), ("qa", now)])}["p/L1"] is None
    undefined = judged_prompt("r", answers=[judged_answer("L0"), judged_answer("L1", correctness=1.0)])
    assert next(one.paired for one in tally([("qa", undefined)]) if one.metric == "correctness") is None


def test_wins_are_successes_and_every_option_has_a_trial():
    found = counted(("qa", judged([L0])), ("qa", judged([L1])), ("code", judged([L1])))
    assert found["preference", "qa", "p/L0"] == found["preference", "qa", "q/L0"] == (1.0, 2.0)
    assert found["preference", "qa", "p/L2"] == (0.0, 2.0)
    assert found["preference", "code", "p/L1"] == (1.0, 1.0)
    assert len(found) == 12


def test_the_same_answer_at_two_levels_shares_the_success():
    found = counted(("qa", judged([L1, L2])))
    assert [found["preference", "qa", f"p/{level}"][0] for level in ("L0", "L1", "L2")] == [0.0, 0.5, 0.5]


def test_another_metric_is_counted_separately():
    found = counted(("qa", judged([L0], correct=[L0, L1])), ("qa", judged([L0])))
    assert found["correctness", "qa", "p/L1"] == (1.0, 1.0)
    assert found["correctness", "qa", "p/L2"] == (0.0, 1.0)
    assert found[PREFERENCE, "qa", "p/L1"] == (0.0, 2.0)


def footprint(purpose: str, energy_j: float, tokens: int) -> Footprint:
    return Footprint(
        request_id="x", purpose=purpose, model=MODEL, group="qa", pool="p", level="L0", zone="GB", endpoint="e0",
        started_at=NOW, finished_at=NOW, processing_s=1.0, completion_tokens=tokens, energy_j=energy_j, embodied_g=0.0,
    )  # fmt: skip


def test_the_cost_is_estimated_from_earlier_evaluations_energy_per_token():
    energy = evaluation_energy(
        [footprint("evaluation", 600.0, 100), footprint("evaluation", 300.0, 50), footprint("request", 9e9, 1)]
    )
    assert energy == {("evaluation", "p"): Energy(900.0, 150)}
    work = Work([Call("evaluation", "p", 200, 2.0)])
    cost = estimate_cost(work, energy=energy, intensities={"GB": 360.0}, fleet=fleet())
    assert cost.energy_kwh == pytest.approx(1_200 / 3.6e6)
    assert cost.carbon_g == pytest.approx(1_200 / 3.6e6 * 360 + 2 * fleet().pool("p").embodied_g_per_s)
    assert (cost.generations, cost.completion_tokens, cost.processing_s) == (1, 200, 2.0)


def test_the_estimate_is_none_where_energy_or_intensity_is_unknown():
    calls = [Call("evaluation", "p", 200, 2.0), Call("judge", "p", 1, 0.1)]
    energy = {("evaluation", "p"): Energy(6.0, 1)}
    unknown = estimate_cost(Work(calls, judgements=1), energy=energy, intensities={"GB": 360.0}, fleet=fleet())
    assert (unknown.energy_kwh, unknown.carbon_g, unknown.generations, unknown.judgements) == (None, None, 1, 1)
    no_intensity = estimate_cost(Work(calls[:1]), energy=energy, intensities={}, fleet=fleet())
    assert no_intensity.energy_kwh == pytest.approx(1_200 / 3.6e6)
    assert no_intensity.carbon_g is None


GROUPS = {f"{group}{number}": group for group, size in (("a", 40), ("b", 30), ("c", 3)) for number in range(size)}


def by_number(prompt: str) -> float:
    return float(prompt[1:])


def test_prompts_of_settled_groups_are_judged_thinly_and_stand_for_the_others():
    found = thin(GROUPS, {"a", "c", "gone"}, share=0.1, minimum=20, draw=by_number)
    assert [one for one in found if one.startswith("a")] == ["a0", "a1", "a2", "a3"]
    assert {found[one] for one in found if one.startswith("a")} == {10.0}
    assert {one: found[one] for one in found if one.startswith("c")} == {"c0": 3.0}  # at least one of every group
    assert sum(found.values()) == pytest.approx(len(GROUPS))
    assert all(found[one] == 1.0 for one, group in GROUPS.items() if group == "b")


def test_without_a_settled_group_all_prompts_are_judged_and_never_fewer_than_the_minimum():
    assert thin(GROUPS, (), share=0.1, minimum=20, draw=by_number) == dict.fromkeys(GROUPS, 1.0)
    assert len(thin(GROUPS, {"a", "b", "c"}, share=0.1, minimum=20, draw=by_number)) >= 20
    assert len(thin({"a0": "a", "a1": "a"}, {"a"}, share=0.1, minimum=20, draw=by_number)) == 2


def test_counts_of_prompts_with_different_weights_have_weighted_means_and_the_effective_number_of_trials():
    won, lost = (
        judged_prompt(name, answers=[judged_answer("L0", preference=1.0 - x), judged_answer("L1", preference=x)])
        for name, x in (("w", 1.0), ("l", 0.0))
    )
    judged = [("g", replace(won, weight=3.0)), ("g", lost)]
    counts = {one.option: one for one in tally(judged)}
    assert counts["p/L1"].trials == pytest.approx(16.0 / 10.0)
    assert counts["p/L1"].successes / counts["p/L1"].trials == pytest.approx(0.75)
    assert counts["p/L1"].paired is not None
    assert counts["p/L1"].paired.successes / counts["p/L1"].trials == pytest.approx(0.25)
    thinly = {one.option: one for one in tally([("g", replace(one, weight=10.0)) for one in (won, lost)])}
    assert (thinly["p/L1"].trials, thinly["p/L1"].successes) == pytest.approx((2.0, 1.0))
