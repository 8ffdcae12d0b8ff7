"""Every metered joule is attributed exactly once, whichever calls ran and in whichever order they are known."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.ledger.attribution import Call, attribute
from services.ledger.meters import Interval

spans = st.floats(0.001, 500, allow_nan=False)
instants = st.floats(0, 1_000, allow_nan=False)
watts = st.floats(0, 1_000, allow_nan=False)


@st.composite
def intervals(draw: st.DrawFn) -> list[Interval]:
    end_s, made = draw(instants), []
    for length_s in draw(st.lists(spans, min_size=1, max_size=6)):
        made.append(Interval(end_s, end_s + length_s, draw(st.floats(0, 1e9))))
        end_s += length_s
    return made


@st.composite
def calls(draw: st.DrawFn) -> list[Call]:
    made = []
    for number in range(draw(st.integers(0, 8))):
        started_s = draw(instants)
        length_s = draw(st.one_of(st.just(0.0), spans))
        first = draw(st.one_of(st.none(), st.floats(0, 1).map(lambda share: started_s + share * length_s)))  # noqa: B023
        tokens = draw(st.integers(0, 4_000)), draw(st.integers(0, 4_000))
        made.append(Call(f"c{number}", started_s, first, started_s + length_s, *tokens))
    return made


def call(name: str, started_s: float, finished_s: float, tokens: int, *, prompt: int = 0, first: float | None = None):
    return Call(name, started_s, first, finished_s, prompt, tokens)


@settings(deadline=None)
@given(intervals(), calls(), watts, st.floats(0, 2))
def test_the_parts_sum_to_what_was_metered(metered, running, idle_w, prefill):
    for one in attribute(metered, running, idle_power_w=idle_w, prefill_weight=prefill):
        total_j = math.fsum((*one.shares_j.values(), one.idle_j, one.unattributed_j))
        assert total_j == pytest.approx(one.interval.metered_j, rel=1e-9, abs=1e-9)
        assert one.attributed_j == pytest.approx(math.fsum(one.shares_j.values()), rel=1e-9, abs=1e-9)
        assert min((*one.shares_j.values(), one.idle_j, one.attributed_j, one.unattributed_j)) >= 0
        assert not (one.shares_j and one.unattributed_j)


@settings(deadline=None)
@given(intervals(), calls(), watts, st.randoms(use_true_random=False))
def test_the_order_of_calls_changes_nothing(metered, running, idle_w, random):
    shuffled = random.sample(running, len(running))
    assert attribute(metered, running, idle_power_w=idle_w, prefill_weight=0.1) == attribute(
        metered, shuffled, idle_power_w=idle_w, prefill_weight=0.1
    )


@settings(deadline=None)
@given(intervals(), calls())
def test_a_call_gets_energy_only_from_intervals_it_ran_in(metered, running):
    for one in attribute(metered, running, idle_power_w=0, prefill_weight=0):
        inside = {c.id for c in running if c.runs_in(one.interval.started_s, one.interval.finished_s)}
        assert set(one.shares_j) == inside


def shares(metered: Interval, *running: Call, idle_w: float = 0.0, prefill: float = 0.0) -> dict[str, float]:
    (one,) = attribute([metered], running, idle_power_w=idle_w, prefill_weight=prefill)
    return dict(one.shares_j)


def test_energy_beyond_idle_is_shared_by_generated_tokens():
    found = shares(Interval(0, 10, 1_000), call("a", 1, 4, 30), call("b", 2, 9, 10), idle_w=20)
    assert found == pytest.approx({"a": 600, "b": 200})


def test_only_tokens_inside_the_interval_count():
    assert shares(Interval(10, 20, 300), call("a", 5, 15, 20), call("b", 11, 12, 20)) == pytest.approx(
        {"a": 100, "b": 200}
    )


def test_tokens_are_spread_after_the_first_token_and_the_prompt_before_it():
    # The first of its 40 tokens was made in the quarter of a second before it arrived.
    waiting = call("a", 0, 20, 40, prompt=100, first=10.25)
    other = call("b", 0, 10, 10)
    assert shares(Interval(0, 10, 100), waiting, other) == pytest.approx({"a": 0, "b": 100})
    assert shares(Interval(0, 10, 100), waiting, other, prefill=0.1025) == pytest.approx({"a": 50, "b": 50})


def test_calls_without_a_token_in_the_interval_share_it_by_running_time():
    found = shares(Interval(0, 10, 100), call("a", 0, 12, 1, first=12), call("b", 5, 15, 1, first=15))
    assert found == pytest.approx({"a": 100 * 10 / 15, "b": 100 * 5 / 15})


def test_without_calls_energy_beyond_idle_is_unattributed():
    (one,) = attribute([Interval(0, 10, 700)], [], idle_power_w=50, prefill_weight=0)
    assert (one.idle_j, one.unattributed_j) == (500, 200)
    (one,) = attribute([Interval(0, 10, 300)], [], idle_power_w=50, prefill_weight=0)
    assert (one.idle_j, one.unattributed_j) == (300, 0)
