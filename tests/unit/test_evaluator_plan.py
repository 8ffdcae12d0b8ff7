"""Which prompts an evaluation takes, which answers it compares, what it counts and what it costs."""

import tomllib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.evaluator.counting import PREFERENCE, preference, tally
from services.evaluator.plan import Contestant, PlanError, allocate, contestants, in_turn
from services.evaluator.spending import Call, Energy, cost_of, energy_of
from shared.fleet import Fleet
from shared.messages import Footprint
from tests.support.evaluator import judged_answer, judged_prompt
from tests.support.router import MODEL, fleet_toml

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)


def fleet(*pools: str) -> Fleet:
    text = fleet_toml(["h:1"])
    for number, extra in enumerate(pools):
        text += f'[[pools]]\nname = "q{number}"\nmodel = "m"\nzone = "FR"\n{extra}\n'
        text += f'[[pools.endpoints]]\nname = "q{number}-0"\ngrpc = "h:2"\n'
    return Fleet.model_validate(tomllib.loads(text))


def test_every_level_is_compared_the_reference_first():
    found = contestants(fleet(), MODEL)
    assert [one.options for one in found] == [("p/L0",), ("p/L1",), ("p/L2",)]


def test_pools_of_the_same_weights_share_a_verdict_and_the_work():
    found = contestants(fleet(""), MODEL)
    assert [one.options for one in found] == [("p/L0", "q0/L0"), ("p/L1", "q0/L1"), ("p/L2", "q0/L2")]
    assert [found[0].pool_for(turn) for turn in range(4)] == ["p", "q0", "p", "q0"]


def test_other_weights_are_compared_with_these():
    found = contestants(fleet('variant = "small"'), MODEL)
    assert [option for one in found for option in one.options] == ["p/L0", "p/L1", "p/L2", "q0/L0", "q0/L1", "q0/L2"]


def test_more_answers_than_a_judge_can_compare_are_a_mistake_that_is_named():
    with pytest.raises(PlanError, match=r"9 answers to compare .* a judge can compare 8: take out"):
        contestants(fleet('variant = "a"', 'variant = "b"'), MODEL)


def test_prompts_follow_traffic_with_some_from_every_group():
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
def test_no_more_is_taken_than_there_is_nor_less_than_could_be(available, traffic, total, minimum):
    taken = allocate(available, traffic, total=total, minimum=minimum)
    assert sum(taken.values()) == min(total, sum(available.values()))
    assert all(0 < number <= available[group] for group, number in taken.items())
    if total >= minimum * len(available):
        assert all(taken.get(group, 0) >= min(minimum, there) for group, there in available.items())


def test_groups_take_turns():
    assert in_turn({"a": ["1", "2", "3"], "b": ["4"]}) == [("a", "1"), ("b", "4"), ("a", "2"), ("a", "3")]


L0, L1, L2 = Contestant("L0", ("p", "q")), Contestant("L1", ("p", "q")), Contestant("L2", ("p", "q"))
ALL = (L0, L1, L2)


def verdict(winners, *, correct=()):
    """A prompt on which these contestants won; and of whose answers it is known whether they are right, if given."""
    successes = preference(ALL, winners)
    return judged_prompt(
        "r",
        answers=[
            judged_answer(one.level, options=one.options, preference=success, **right)
            for one, success in zip(ALL, successes, strict=True)
            for right in ({"correctness": float(one in correct)} if correct else {},)
        ],
    )


def counted(*judged):
    return {(one.metric, one.group, one.option): (one.successes, one.trials) for one in tally(judged)}


def test_it_is_counted_how_often_an_option_succeeds_together_with_the_reference():
    judged = [("sums", verdict([L0, L1], correct=right)) for right in ((L0, L1), (L1,), (L0,), ())]
    found = {(one.metric, one.option): one.paired for one in tally(judged)}
    assert {one.reference for one in found.values()} == {"p/L0"}

    def both(metric):
        assert {one.successes for (name, _), one in found.items() if name == metric} == {2.0}
        return [found[metric, f"p/{level}"].both for level in ("L0", "L1", "L2")]

    assert both("correctness") == [2.0, 1.0, 0.0]
    # A shared win is half of one for each, and both have it.
    assert both("preference") == [2.0, 2.0, 0.0]


def test_what_was_compared_with_another_reference_or_with_none_is_not_taken_for_paired():
    before, now = (
        judged_prompt(
            "r", answers=[judged_answer("L0", options=(f"{pool}/L0",), won=1.0), judged_answer("L1", won=0.0)]
        )
        for pool in ("old", "p")
    )
    assert {one.option: one.paired for one in tally([("qa", before), ("qa", now)])}["p/L1"] is None
    untold = judged_prompt("r", answers=[judged_answer("L0"), judged_answer("L1", correctness=1.0)])
    assert next(one.paired for one in tally([("qa", untold)]) if one.metric == "correctness") is None


def test_wins_are_successes_and_every_option_had_a_trial():
    found = counted(("qa", verdict([L0])), ("qa", verdict([L1])), ("code", verdict([L1])))
    assert found["preference", "qa", "p/L0"] == found["preference", "qa", "q/L0"] == (1.0, 2.0)
    assert found["preference", "qa", "p/L2"] == (0.0, 2.0)
    assert found["preference", "code", "p/L1"] == (1.0, 1.0)
    assert len(found) == 12


def test_the_same_answer_at_two_levels_shares_the_success():
    found = counted(("qa", verdict([L1, L2])))
    assert [found["preference", "qa", f"p/{level}"][0] for level in ("L0", "L1", "L2")] == [0.0, 0.5, 0.5]


def test_another_metric_is_counted_beside():
    found = counted(("qa", verdict([L0], correct=[L0, L1])), ("qa", verdict([L0])))
    assert found["correctness", "qa", "p/L1"] == (1.0, 1.0)
    assert found["correctness", "qa", "p/L2"] == (0.0, 1.0)
    assert found[PREFERENCE, "qa", "p/L1"] == (0.0, 2.0)


def footprint(purpose: str, energy_j: float, tokens: int) -> Footprint:
    return Footprint(
        request_id="x", purpose=purpose, model=MODEL, group="qa", pool="p", level="L0", zone="GB", endpoint="e0",
        started_at=NOW, finished_at=NOW, processing_s=1.0, completion_tokens=tokens, energy_j=energy_j, embodied_g=0.0,
    )  # fmt: skip


def test_the_cost_is_estimated_from_earlier_evaluations_energy_per_token():
    book = energy_of(
        [footprint("evaluation", 600.0, 100), footprint("evaluation", 300.0, 50), footprint("request", 9e9, 1)]
    )
    assert book == {("evaluation", "p"): Energy(900.0, 150)}
    made = [Call("evaluation", "p", 200, 2.0)]
    cost = cost_of(made, judgements=0, book=book, intensities={"GB": 360.0}, fleet=fleet())
    assert cost.energy_kwh == pytest.approx(1_200 / 3.6e6)
    assert cost.carbon_g == pytest.approx(1_200 / 3.6e6 * 360 + 2 * fleet().pool("p").embodied_g_per_s)
    assert (cost.generations, cost.completion_tokens, cost.processing_s) == (1, 200, 2.0)


def test_what_cannot_be_estimated_is_not_known():
    made = [Call("evaluation", "p", 200, 2.0), Call("judge", "p", 1, 0.1)]
    book = {("evaluation", "p"): Energy(6.0, 1)}
    unknown = cost_of(made, judgements=1, book=book, intensities={"GB": 360.0}, fleet=fleet())
    assert (unknown.energy_kwh, unknown.carbon_g, unknown.generations, unknown.judgements) == (None, None, 1, 1)
    no_grid = cost_of(made[:1], judgements=0, book=book, intensities={}, fleet=fleet())
    assert no_grid.energy_kwh == pytest.approx(1_200 / 3.6e6)
    assert no_grid.carbon_g is None
