"""Every metered joule is attributed exactly once, whichever calls ran and in whichever order they are known."""

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.ledger.attribution import Call, Speed, attribute
from services.ledger.meters import Interval
from shared.batch_curve import MEASURED, BatchCurve
from tests.support.batched_server import Arrival, simulate

spans = st.floats(0.001, 500, allow_nan=False)
instants = st.floats(0, 1_000, allow_nan=False)
watts = st.floats(0, 1_000, allow_nan=False)
curves = st.one_of(
    st.none(),
    st.builds(
        BatchCurve,
        idle_w=watts,
        step_j=st.floats(0, 100),
        token_j=st.floats(0, 10),
        step_s=st.floats(0.001, 10),
        token_s=st.floats(0, 1),
        prompt_token_j=st.floats(0, 1),
    ),
)
speeds = st.one_of(st.none(), st.builds(Speed, st.floats(0.001, 10), st.floats(0, 1)))


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
@given(intervals(), calls(), watts, st.floats(0, 2), curves, speeds)
def test_the_parts_sum_to_what_was_metered(metered, running, idle_w, prefill, curve, speed):
    for one in attribute(metered, running, idle_power_w=idle_w, prefill_weight=prefill, curve=curve, speed=speed):
        total_j = math.fsum((*one.shares_j.values(), one.idle_j, one.unattributed_j))
        assert total_j == pytest.approx(one.interval.metered_j, rel=1e-9, abs=1e-9)
        assert one.attributed_j == pytest.approx(math.fsum(one.shares_j.values()), rel=1e-9, abs=1e-9)
        assert min((*one.shares_j.values(), one.idle_j, one.attributed_j, one.unattributed_j)) >= 0
        assert not (one.shares_j and one.unattributed_j)


@settings(deadline=None)
@given(intervals(), calls())
def test_idle_time_and_the_calls_shares_of_the_server_sum_to_the_wall_time(metered, running):
    for one in attribute(metered, running, idle_power_w=0, prefill_weight=0):
        total_s = math.fsum((*(use.server_s for use in one.uses.values()), one.idle_s))
        assert total_s == pytest.approx(one.interval.length_s, rel=1e-9, abs=1e-9)
        assert min((*(use.server_s for use in one.uses.values()), one.idle_s)) >= 0


@settings(deadline=None)
@given(intervals(), calls(), watts, st.randoms(use_true_random=False))
def test_the_order_of_calls_changes_nothing(metered, running, idle_w, random):
    shuffled = random.sample(running, len(running))
    one, other = (
        [
            (found.idle_j, found.attributed_j, found.unattributed_j, found.idle_s, found.work, found.uses)
            for found in attribute(metered, given, idle_power_w=idle_w, prefill_weight=0.1)
        ]
        for given in (running, shuffled)
    )
    assert one == other


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


SHARED = BatchCurve(idle_w=0, step_j=6.0, token_j=1.0, step_s=0.5, token_s=0.25)


def test_the_shared_part_of_a_step_goes_equally_to_the_sequences_in_it():
    # Both advance by one token a second. a: 10 steps alone, 10 with b; b: 10 with a.
    a, b = call("a", 0, 20, 20), call("b", 10, 20, 10)
    (one,) = attribute([Interval(0, 20, 150)], [a, b], idle_power_w=0, prefill_weight=0, curve=SHARED)
    assert one.work.steps == pytest.approx(20)
    assert one.work.tokens == pytest.approx(30)
    assert one.shares_j == pytest.approx({"a": 60 + 30 + 20, "b": 30 + 10})
    (half,) = attribute([Interval(0, 20, 75)], [a, b], idle_power_w=0, prefill_weight=0, curve=SHARED)
    assert half.shares_j == pytest.approx({"a": 55, "b": 20})


def test_by_tokens_the_same_calls_share_differently():
    a, b = call("a", 0, 20, 20), call("b", 10, 20, 10)
    assert shares(Interval(0, 20, 150), a, b) == pytest.approx({"a": 100, "b": 50})


def test_prompts_are_charged_while_they_are_read():
    reading = BatchCurve(idle_w=0, step_j=6.0, token_j=1.0, step_s=0.5, token_s=0.25, prompt_token_j=0.5)
    a = call("a", 0, 20, 11, prompt=100, first=10.0)
    (one,) = attribute([Interval(0, 20, 127)], [a], idle_power_w=0, prefill_weight=0, curve=reading)
    assert one.work.prompt_tokens == pytest.approx(100)
    first, second = attribute(
        [Interval(0, 9, 45), Interval(9, 20, 82)], [a], idle_power_w=0, prefill_weight=0, curve=reading
    )
    assert (first.attributed_j, second.attributed_j) == (45, 82)
    assert (first.work.steps, second.work.steps) == (0.0, pytest.approx(11))


def test_a_learned_speed_places_steps_and_tokens_where_the_batch_was_small():
    # Alone a step takes 0.75 s, in a batch of two 1 s.
    a, b = call("a", 0, 13.5, 16), call("b", 6, 12, 6)
    alone, both, again = attribute(
        [Interval(0, 6, 1), Interval(6, 12, 1), Interval(12, 13.5, 1)],
        [a, b],
        idle_power_w=0,
        prefill_weight=0,
        speed=Speed(0.5, 0.25),
    )
    assert (alone.work.steps, both.work.steps, again.work.steps) == pytest.approx((8, 6, 2))
    assert (alone.work.tokens, both.work.tokens, again.work.tokens) == pytest.approx((8, 12, 2))
    whole = [one.uses["a"] for one in (alone, both, again)]
    assert sum(use.batch_tokens for use in whole) / sum(use.steps for use in whole) == pytest.approx(22 / 16)


def test_calls_that_run_at_once_share_the_server_equally():
    a, b, c = call("a", 0, 8, 1), call("b", 2, 8, 1), call("c", 2, 4, 1)
    (one,) = attribute([Interval(0, 10, 1)], [a, b, c], idle_power_w=0, prefill_weight=0)
    thirds = 2 / 3
    assert {name: use.server_s for name, use in one.uses.items()} == pytest.approx(
        {"a": 2 + thirds + 2, "b": thirds + 2, "c": thirds}
    )
    assert one.idle_s == pytest.approx(2)


def test_attributed_energy_follows_what_each_call_cost_on_a_simulated_server():
    truth = MEASURED["qwen3-14b-h100"].stretched(100)
    trace = simulate(truth, [Arrival(100.0 * number, 50, 100) for number in range(60)], until_s=10_000.0)
    edges = [500.0 * number for number in range(21)]
    readings = trace.counter(edges)
    metered = [Interval(*span) for span in zip(edges, edges[1:], readings[1:] - readings[:-1], strict=False)]
    found = attribute(
        metered,
        trace.calls,
        idle_power_w=truth.idle_w,
        prefill_weight=0,
        curve=truth,
        speed=Speed(truth.step_s, truth.token_s),
    )
    assert sum(one.work.steps for one in found) == pytest.approx(trace.steps[-1], rel=1e-3)
    assert sum(one.attributed_j for one in found) == pytest.approx(
        truth.step_j * trace.steps[-1] + truth.token_j * 6_000, rel=1e-6
    )


def test_the_work_is_proportional_to_the_number_of_calls_and_intervals():
    def lines_run(count: int) -> int:
        metered = [Interval(number, number + 1.0, 100.0) for number in range(count)]
        running = [call(f"c{number}", 0.5 * number, 0.5 * number + 10.0, 100) for number in range(count)]
        run = 0

        def trace(frame, event, argument):
            nonlocal run
            run += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            found = attribute(metered, running, idle_power_w=10, prefill_weight=0, curve=SHARED)
        finally:
            sys.settrace(before)
        assert sum(one.attributed_j for one in found) == pytest.approx(90.0 * min(count, 0.5 * count + 10.0), rel=0.02)
        return run

    lines_run(1)  # what is done once in a process does not count
    assert lines_run(800) < 2.2 * lines_run(400)
