"""The reservoir is a fair choice, does not depend on the order of arrival, and forgets what it must."""

from collections import Counter
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.evaluator.reservoir import Held, admit, drawn

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)
LONG_AGO = NOW - timedelta(days=365)


def sample(name: str, *, hours_ago: float = 0.0, evaluations: int = 0) -> Held:
    one = drawn(name, NOW - timedelta(hours=hours_ago))
    return Held(one.request_id, one.sampled_at, one.draw, evaluations)


def fill(names, *, capacity, held=(), batch=1):
    """The reservoir after all of these arrived, some at a time."""
    content = {one.request_id: one for one in held}
    names = list(names)
    for start in range(0, len(names), batch):
        arrivals = [sample(name) for name in names[start : start + batch]]
        decision = admit(list(content.values()), arrivals, capacity=capacity, oldest=LONG_AGO)
        content |= {one.request_id: one for one in arrivals if one.request_id in decision.admitted}
        content = {name: one for name, one in content.items() if name not in decision.evicted}
        assert len(content) <= capacity
    return set(content)


@given(st.lists(st.text(min_size=1, max_size=4), max_size=60), st.integers(1, 10), st.integers(1, 7), st.randoms())
def test_neither_the_order_of_arrival_nor_repetition_matters(names, capacity, batch, random):
    again = names + random.sample(names, len(names) // 2)
    random.shuffle(again)
    assert fill(names, capacity=capacity) == fill(again, capacity=capacity, batch=batch)
    assert len(fill(names, capacity=capacity)) == min(capacity, len(set(names)))


def test_early_and_late_samples_are_kept_alike():
    kept = Counter()
    for run in range(60):
        for name in fill((f"{run}-{number}" for number in range(100)), capacity=20, batch=10):
            kept[int(name.partition("-")[2]) // 25] += 1
    assert all(abs(kept[quarter] - 300) < 75 for quarter in range(4))  # five standard deviations


def test_what_is_too_old_goes_and_is_not_let_in():
    old, young = sample("old", hours_ago=30), sample("young", hours_ago=1)
    decision = admit([old], [young, sample("late", hours_ago=25)], capacity=5, oldest=NOW - timedelta(hours=24))
    assert decision.evicted == {"old"}
    assert decision.admitted == {"young"}


def test_evaluated_prompts_yield_to_fresh_ones():
    held = [sample(f"used-{number}", evaluations=1) for number in range(5)]
    decision = admit(held, [sample("fresh")], capacity=5, oldest=LONG_AGO)
    assert decision.admitted == {"fresh"}
    assert len(decision.evicted) == 1


def test_a_sample_that_is_held_counts_no_second_time():
    decision = admit([sample("a")], [sample("a"), sample("b"), sample("b")], capacity=5, oldest=LONG_AGO)
    assert (decision.fresh, decision.admitted, decision.evicted) == (1, {"b"}, frozenset())
