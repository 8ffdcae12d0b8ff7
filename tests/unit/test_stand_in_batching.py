"""In-flight batching: exact in event time, whatever the step size."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.triton.stand_in.answers import PlannedAnswer
from deploy.triton.stand_in.batching import CurveRules, InFlightBatch, RecordedRules, Sequence
from shared.batch_curve import MEASURED, BatchCurve
from tests.support.examples import examples
from tests.unit.test_batch_curve import MEASURED_ROWS

CURVE = BatchCurve(idle_w=100, step_j=4, token_j=0.5, step_s=0.01, token_s=0.001, prompt_token_j=2, prompt_token_s=0.1)


def generation(time_s=2.0, tokens=20, energy_j=100.0):
    return PlannedAnswer("x" * tokens, tokens, 5, energy_j, time_s)


def batch(**rules):
    return InFlightBatch(RecordedRules(**rules), now_s=0.0)


def curve_batch(curve=CURVE, **rules):
    return InFlightBatch(CurveRules(curve=curve, **rules), now_s=0.0)


def without_prompts(curve):
    return replace(curve, prompt_token_j=0.0, prompt_token_s=0.0)


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


def test_the_times_of_the_first_token_and_the_next_end_are_known():
    gpu = batch(slowdown=0.0)
    sequence = added(gpu)
    gpu.advance(0.05)
    assert gpu.first_token_s(sequence) == pytest.approx(0.1)
    gpu.advance(0.55)
    assert gpu.first_token_s(sequence) == pytest.approx(0.55)  # overdue: now
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
        RecordedRules(**rules)


@settings(max_examples=examples(60))
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 8), slowdown=st.floats(0, 1))
def test_every_sequence_ends_once_and_no_energy_is_lost(seed, slots, slowdown):
    chance = random.Random(seed)
    origin = 1.7e9  # as event time is: seconds since the epoch
    gpu = InFlightBatch(RecordedRules(slots=slots, slowdown=slowdown), now_s=origin)
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


def test_with_a_curve_every_step_gives_each_sequence_a_token():
    gpu = curve_batch(without_prompts(CURVE))
    long, short = added(gpu, tokens=20), added(gpu, tokens=5)
    gpu.advance(0.012 * 3)
    assert (gpu.produced(long), gpu.produced(short)) == (3, 3)
    assert gpu.energy_j == pytest.approx(3 * 5.0)
    gpu.advance(10.0)
    assert short.finished_s == pytest.approx(5 * 0.012)
    assert long.finished_s == pytest.approx(5 * 0.012 + 15 * 0.011)
    assert gpu.energy_j == pytest.approx(5 * 5.0 + 15 * 4.5)
    assert not gpu.busy


def test_a_prompt_is_read_before_the_first_step_and_slows_no_other_sequence():
    gpu = curve_batch(slots=2)
    first = added(gpu, tokens=100)
    second, third = added(gpu, at_s=1.0, tokens=10), added(gpu, at_s=1.0, tokens=10)
    gpu.advance(0.25)
    assert (gpu.produced(first), gpu.energy_j) == (0, pytest.approx(5.0))  # half of a prompt of 5 tokens
    assert gpu.first_token_s(first) == pytest.approx(0.5 + 0.011)
    assert gpu.next_change_s() == pytest.approx(0.5)
    gpu.advance(1.1)
    assert (gpu.produced(first), gpu.produced(second)) == (54, 0)
    assert gpu.running == {first, second}
    gpu.advance(100.0)
    together = 100 - 1.0 / 0.011  # tokens left to the first sequence when the second begins to decode
    assert first.finished_s == pytest.approx(1.5 + together * 0.012)
    assert second.finished_s == pytest.approx(first.finished_s + (10 - together) * 0.011)
    assert third.finished_s == pytest.approx(first.finished_s + 0.5 + 10 * 0.011)
    assert gpu.energy_j == pytest.approx(3 * 10.0 + (100 + 10 - together + 10) * 4.0 + 120 * 0.5)


def test_a_prompt_that_takes_no_time_still_takes_its_energy():
    gpu = curve_batch(replace(CURVE, prompt_token_s=0.0))
    sequence = added(gpu, tokens=1)
    assert gpu.advance(1.0) == [sequence]
    assert gpu.energy_j == pytest.approx(10.0 + 4.5)


def test_with_a_curve_a_cancelled_sequence_stops_taking_energy_while_it_reads_and_while_it_decodes():
    gpu = curve_batch(slots=1)
    reading, decoding, last = added(gpu), added(gpu), added(gpu, tokens=1)
    gpu.advance(0.25)
    gpu.cancel(reading)
    assert gpu.energy_j == pytest.approx(5.0)
    gpu.advance(0.75 + 10.5 * 0.011)
    assert gpu.produced(decoding) == 10
    gpu.cancel(decoding)
    used_j = gpu.energy_j
    assert used_j == pytest.approx(5.0 + 10.0 + 10.5 * 4.5)
    assert gpu.advance(100.0) == [last]
    assert gpu.energy_j == pytest.approx(used_j + 10.0 + 4.5)


@pytest.mark.parametrize("size", [8, 32, 128])
@pytest.mark.parametrize("name", MEASURED)
def test_power_and_speed_at_a_constant_batch_are_the_measured_ones(name, size):
    gpu = curve_batch(MEASURED[name])
    for _ in range(size):
        added(gpu, tokens=1_000_000)
    gpu.advance(60.0)
    ((power_w, tokens_per_s),) = (row for batch, row in MEASURED_ROWS[name].items() if round(batch) == size)
    assert MEASURED[name].idle_w + gpu.energy_j / 60 == pytest.approx(power_w, rel=0.03)
    assert sum(map(gpu.produced, gpu.running)) / 60 == pytest.approx(tokens_per_s, rel=0.03)


@settings(max_examples=examples(60))
@given(
    seed=st.integers(0, 2**32),
    name=st.sampled_from([*MEASURED]),
    stretch=st.sampled_from([1.0, 200.0]),
    slots=st.integers(1, 12),
)
def test_ends_and_energy_are_those_of_a_simulation_step_by_step(seed, name, stretch, slots):
    chance = random.Random(seed)
    curve = MEASURED[name].stretched(stretch)
    gpu = curve_batch(curve, slots=slots)
    sequences, left, ends = [], {}, {}
    waiting, now_s, energy_j = [], 0.0, 0.0
    for step in range(400):
        for _ in range(chance.choice((0, 0, 0, 1, 3)) if step < 200 else 0):
            sequences.append(added(gpu, at_s=now_s, tokens=chance.randint(1, 60)))
            waiting.append(sequences[-1])
        while waiting and len(left) < slots:
            admitted = waiting.pop(0)
            left[admitted] = admitted.generation.tokens
        if not left:
            now_s += chance.random()
            continue
        now_s += curve.step_time_s(len(left))
        energy_j += curve.step_energy_j(len(left))
        left = {one: tokens - 1 for one, tokens in left.items()}
        ends |= {one: now_s for one, tokens in left.items() if tokens == 0}
        left = {one: tokens for one, tokens in left.items() if tokens}
        if chance.random() < 0.3:
            gpu.advance(now_s - chance.random() * curve.step_s)
    gpu.advance(now_s * (1 + 1e-9))  # where the last step ends, but for rounding
    assert gpu.energy_j == pytest.approx(energy_j)
    for one in sequences:
        tokens = left.get(one, 0 if one in ends else one.generation.tokens)
        assert gpu.produced(one) == one.generation.tokens - tokens
    assert {one: one.finished_s for one in ends} == pytest.approx(ends)


@settings(max_examples=examples(60))
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 8))
def test_with_a_curve_the_step_size_changes_nothing_and_energy_never_falls(seed, slots):
    chance = random.Random(seed)
    origin = 1.7e9  # as event time is: seconds since the epoch
    coarse, fine = (InFlightBatch(CurveRules(curve=CURVE, slots=slots), now_s=origin) for _ in range(2))
    planned = []
    now_s = origin
    for _ in range(30):
        now_s += chance.expovariate(2.0)
        answer = PlannedAnswer("x", chance.randint(1, 300), chance.randint(1, 20), 1.0, 1.0)
        planned.append((Sequence(answer, now_s), Sequence(answer, now_s)))
        coarse.submit(planned[-1][0])
        fine.submit(planned[-1][1])
    at_s, energies = origin, []
    while fine.busy:
        at_s += chance.expovariate(5.0)
        fine.advance(at_s)
        energies.append(fine.energy_j)
        assert len(fine.running) <= slots
    coarse.advance(at_s)
    assert not coarse.busy
    assert energies == sorted(energies)
    assert fine.energy_j == pytest.approx(coarse.energy_j, rel=1e-5)
    assert [one.finished_s for one, _ in planned] == pytest.approx([one.finished_s for _, one in planned], abs=1e-4)
    prompts_j = sum(one.generation.input_tokens for one, _ in planned) * CURVE.prompt_token_j
    tokens_j = sum(one.generation.tokens for one, _ in planned) * CURVE.token_j
    assert prompts_j + tokens_j < coarse.energy_j
