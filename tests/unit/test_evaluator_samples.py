"""The reservoir is a uniform sample, does not depend on the order of arrival, and deletes old samples."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.evaluator.samples import ReservoirEntry, admit

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)
LONG_AGO = NOW - timedelta(days=365)


def sample(name: str, *, hours_ago: float = 0.0, evaluations: int = 0) -> ReservoirEntry:
    return replace(ReservoirEntry.new(name, NOW - timedelta(hours=hours_ago)), evaluations=evaluations)


def fill(names, *, capacity, batch=1):
    """Ids in the reservoir after all of these arrived in batches."""
    content = {}
    names = list(names)
    for start in range(0, len(names), batch):
        arrivals = [sample(name) for name in names[start : start + batch]]
        update = admit(list(content.values()), arrivals, capacity=capacity, oldest=LONG_AGO)
        content |= {one.id: one for one in arrivals if one.id in update.admitted}
        content = {name: one for name, one in content.items() if name not in update.evicted}
        assert len(content) <= capacity
    return set(content)


@given(st.lists(st.text(min_size=1, max_size=4), max_size=60), st.integers(1, 10), st.integers(1, 7), st.randoms())
def test_neither_the_order_of_arrival_nor_repetition_matters(names, capacity, batch, random):
    again = names + random.sample(names, len(names) // 2)
    random.shuffle(again)
    assert fill(names, capacity=capacity) == fill(again, capacity=capacity, batch=batch)
    assert len(fill(names, capacity=capacity)) == min(capacity, len(set(names)))


def test_early_and_late_samples_are_equally_likely_to_stay():
    kept = Counter()
    for run in range(60):
        for name in fill((f"{run}-{number}" for number in range(100)), capacity=20, batch=10):
            kept[int(name.partition("-")[2]) // 25] += 1
    assert all(abs(kept[quarter] - 300) < 75 for quarter in range(4))  # five standard deviations


def test_old_samples_are_evicted_and_not_admitted():
    old, young = sample("old", hours_ago=30), sample("young", hours_ago=1)
    update = admit([old], [young, sample("late", hours_ago=25)], capacity=5, oldest=NOW - timedelta(hours=24))
    assert update.evicted == {"old"}
    assert update.admitted == {"young"}


def test_evaluated_prompts_are_evicted_before_new_ones():
    stored = [sample(f"used-{number}", evaluations=1) for number in range(5)]
    update = admit(stored, [sample("new")], capacity=5, oldest=LONG_AGO)
    assert update.admitted == {"new"}
    assert len(update.evicted) == 1


def test_a_stored_sample_is_not_counted_again():
    update = admit([sample("a")], [sample("a"), sample("b"), sample("b")], capacity=5, oldest=LONG_AGO)
    assert (update.unseen, update.admitted, update.evicted) == (1, {"b"}, frozenset())
