"""In-flight batching: exact in event time, whatever the step size."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.triton.stand_in.answers import PlannedAnswer
from deploy.triton.stand_in.batching import BatchRules, InFlightBatch, Sequence


def generation(time_s=2.0, tokens=20, energy_j=100.0):
    return PlannedAnswer("x" * tokens, tokens, 5, energy_j, time_s)


def batch(**rules):
    return InFlightBatch(BatchRules(**rules), now_s=0.0)


def added(to, at_s=0.0, **changes):
    sequence = Sequence(generation(**changes), at_s)
    to.submit(sequence)
    return sequence


def test_a_sequence_that_runs_alone_takes_its_recorded_time_and_energy_token_by_token():
    gpu = batch()
    sequence = added(gpu)
    for tenth in range(1, 20):
        assert gpu.advance(tenth / 10) == []
        assert gpu.produced(sequence) == tenth
        assert gpu.energy_j == pytest.approx(tenth * 5.0)
    assert gpu.advance(2.0) == [sequence]
    assert (sequence.finished_s, gpu.produced(sequence)) == (2.0, 20)
    assert gpu.energy_j == pytest.approx(100.0)
    assert not gpu.busy


def test_a_step_of_any_size_gives_the_same_ends():
    gpu = batch(slowdown=0.1)
    sequences = [added(gpu, at_s=at) for at in (0.0, 0.5, 0.7)]
    assert gpu.advance(1_000.0) == sequences
    fine = batch(slowdown=0.1)
    others = [added(fine, at_s=at) for at in (0.0, 0.5, 0.7)]
    for step in range(10_000):
        fine.advance(step / 100)
    assert [one.finished_s for one in others] == pytest.approx([one.finished_s for one in sequences])
    assert fine.energy_j == pytest.approx(gpu.energy_j)


def test_each_further_sequence_slows_all_of_them():
    gpu = batch(slowdown=0.5)
    sequences = [added(gpu), added(gpu), added(gpu)]
    gpu.advance(100.0)
    assert [one.finished_s for one in sequences] == pytest.approx([4.0, 4.0, 4.0])  # 2 s x (1 + 0.5 x 2)


def test_beyond_the_slots_sequences_wait_in_a_fifo_queue():
    gpu = batch(slots=2, slowdown=0.0)
    sequences = [added(gpu) for _ in range(5)]
    gpu.advance(1.0)
    assert [gpu.produced(one) for one in sequences] == [10, 10, 0, 0, 0]
    gpu.advance(100.0)
    assert [one.finished_s for one in sequences] == pytest.approx([2.0, 2.0, 4.0, 4.0, 6.0])


def test_by_default_a_requests_energy_does_not_depend_on_the_batch_size():
    gpu = batch(slowdown=0.3)
    for at in (0.0, 0.1, 0.2, 5.0):
        added(gpu, at_s=at)
    gpu.advance(1_000.0)
    assert gpu.energy_j == pytest.approx(400.0)


def test_running_sequences_can_share_energy():
    gpu = batch(slowdown=0.0, shared_energy=0.6)
    added(gpu), added(gpu)
    gpu.advance(10.0)
    assert gpu.energy_j == pytest.approx(2 * 100.0 * (0.4 + 0.6 / 2))


def test_a_cancelled_sequence_stops_taking_energy_and_frees_its_slot():
    gpu = batch(slots=1)
    first, second = added(gpu), added(gpu)
    gpu.advance(0.5)
    gpu.cancel(first)
    used = gpu.energy_j
    assert used == pytest.approx(25.0)
    assert gpu.advance(10.0) == [second]
    assert second.finished_s == pytest.approx(2.5)
    assert gpu.energy_j == pytest.approx(used + 100.0)
    assert first.finished_s is None


def test_a_sequence_that_is_cancelled_while_it_waits_never_runs():
    gpu = batch(slots=1)
    first, second = added(gpu), added(gpu)
    gpu.advance(0.1)
    gpu.cancel(second)
    assert gpu.advance(10.0) == [first]
    assert gpu.energy_j == pytest.approx(100.0)
    gpu.cancel(first)  # too late: nothing happens
    assert not first.cancelled


def test_the_times_of_the_next_token_and_the_next_end_are_known():
    gpu = batch(slowdown=0.0)
    sequence = added(gpu)
    gpu.advance(0.55)
    assert gpu.next_token_s(sequence, after=5) == pytest.approx(0.6)
    assert gpu.next_token_s(sequence, after=2) == pytest.approx(0.55)  # overdue: now
    assert gpu.next_end_s() == pytest.approx(2.0)


def test_an_arrival_before_the_simulated_time_counts_as_an_arrival_now():
    gpu = batch()
    gpu.advance(10.0)
    late = added(gpu, at_s=3.0)
    gpu.advance(20.0)
    assert late.finished_s == pytest.approx(12.0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [({"slots": 0}, "'slots'"), ({"slowdown": -1.0}, "'slowdown'"), ({"shared_energy": 1.5}, "'shared_energy'")],
)
def test_invalid_parameters_are_rejected(rules, message):
    with pytest.raises(ValueError, match=message):
        BatchRules(**rules)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 8), slowdown=st.floats(0, 1))
def test_every_sequence_ends_once_and_no_energy_is_lost(seed, slots, slowdown):
    chance = random.Random(seed)
    origin = 1.7e9  # as event time is: seconds since the epoch
    gpu = InFlightBatch(BatchRules(slots=slots, slowdown=slowdown), now_s=origin)
    now, sequences, finished = origin, [], []
    for _ in range(40):
        now += chance.expovariate(2.0)
        sequences.append(
            Sequence(generation(chance.uniform(0.01, 5), chance.randint(1, 300), chance.uniform(1, 2000)), now)
        )
        gpu.submit(sequences[-1])
        finished += gpu.advance(now + chance.uniform(-1, 3))
        assert len(gpu.running) <= slots
    before = gpu.energy_j
    finished += gpu.advance(origin + 1e6)
    assert sorted(map(id, finished)) == sorted(map(id, sequences))
    assert gpu.energy_j >= before
    assert gpu.energy_j == pytest.approx(sum(one.generation.energy_j for one in sequences), rel=1e-5)
    assert all(one.finished_s >= one.arrived_s + one.generation.time_s - 1e-5 for one in sequences)
