"""The learned curve: found again from readings and calls of a simulated server, or named as not identifiable."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from services.ledger.attribution import Work
from services.ledger.curve import CallSample, CurveState, Estimate, IntervalSample, LeastSquares
from services.ledger.endpoint import EndpointState, IdlePower, OpenCall, settle_endpoint
from services.ledger.meters import Reading
from services.ledger.settings import LedgerSettings
from shared.batch_curve import MEASURED, BatchCurve
from tests.support.batched_server import DAY_S, Arrival, Trace, diurnal, poisson_arrivals, simulate

SETTINGS = LedgerSettings()
QWEN = MEASURED["qwen3-14b-h100"]
ENERGY, SPEED = ("idle_w", "step_j", "token_j"), ("step_s", "token_s")


@dataclass(frozen=True)
class Noise:
    """Errors of readings: of their time, and of the counter."""

    time_s: float = 0.0
    energy_j: float = 0.0
    seed: int = 0


def settle_all(
    trace: Trace, *, until_s: float, every_s: float, batch: int = 4, noise: Noise | None = None, **state: object
) -> CurveState:
    """Settle a server's day as the ledger does, some intervals at a time."""
    times = np.arange(0.0, until_s + 1e-9, every_s)
    counter = trace.counter(times)
    if noise is not None:
        draw = np.random.default_rng(noise.seed)
        times = times + draw.normal(0, noise.time_s, times.size).clip(-every_s / 3, every_s / 3)
        counter = np.maximum.accumulate(counter + draw.normal(0, noise.energy_j, times.size))
    waiting = sorted(trace.calls, key=lambda call: call.started_s, reverse=True)
    curve, idle, opened = CurveState(), IdlePower(), {}
    for start in range(0, times.size - 1, batch):
        readings = [
            Reading(float(at_s), {"g": float(energy_j)})
            for at_s, energy_j in zip(times[start : start + batch + 1], counter[start : start + batch + 1], strict=True)
        ]
        while waiting and waiting[-1].started_s <= readings[-1].at_s:
            call = waiting.pop()
            opened[call.id] = OpenCall(call)
        result = settle_endpoint(
            EndpointState(
                readings, list(opened.values()), metered_from_s=-1.0, learned=idle, curve=curve, **state
            ),
            SETTINGS,
        )  # fmt: skip
        curve, idle = CurveState.model_validate_json(result.curve.model_dump_json()), result.learned
        for one in result.calls:
            if one.finished:
                del opened[one.id]
            else:
                opened[one.id] = OpenCall(opened[one.id].call, one.used, accounted=True, partial=one.partial)
    return curve


def a_day(curve: BatchCurve, *, mean_batch: float, seed: int, tokens: float = 150.0) -> Trace:
    rate = mean_batch / (curve.step_time_s(mean_batch) * tokens * 1.2)
    arrivals = poisson_arrivals(diurnal(rate), 1.9 * rate, until_s=DAY_S, seed=seed, tokens=(tokens, 0.6))
    return simulate(curve, arrivals)


def assert_close(found: Estimate, truth: BatchCurve, names: Sequence[str], *, within: float) -> None:
    for name in names:
        assert getattr(found.curve, name) == pytest.approx(getattr(truth, name), rel=within), name


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.statistical) for seed in (1, 2))])
@pytest.mark.parametrize(
    ("name", "stretch", "mean_batch"),
    [("qwen3-14b-h100", 300, 5), ("llama-3.1-8b-h100", 300, 6), ("llama-3.3-70b-4xh100", 100, 3)],
)
def test_after_a_day_a_curve_is_known_within_five_percent(name, stretch, mean_batch, seed):
    truth = MEASURED[name].stretched(stretch)
    trace = a_day(truth, mean_batch=mean_batch, seed=seed)
    found = settle_all(trace, until_s=DAY_S, every_s=300.0).estimate(idle_power_w=None)
    assert found.identifiable, found.reason
    assert_close(found, truth, (*ENERGY, *SPEED), within=0.05)
    assert found.curve.prompt_token_j < 0.05 * truth.token_j


@pytest.mark.parametrize("seed", range(2))
def test_a_busy_server_with_a_configured_idle_power_is_learned_despite_inexact_readings(seed):
    truth = QWEN.stretched(300)
    trace = a_day(truth, mean_batch=25, seed=seed)
    noise = Noise(time_s=5.0, energy_j=200.0, seed=seed)
    state = settle_all(trace, until_s=DAY_S, every_s=300.0, noise=noise, idle_power_w=truth.idle_w)
    found = state.estimate(idle_power_w=truth.idle_w)
    assert found.identifiable, found.reason
    assert_close(found, truth, ("step_j", "token_j", *SPEED), within=0.05)
    assert 20 < found.mean_batch < 35
    assert 85 < found.mean_prompt_tokens < 95


def test_calls_longer_than_the_time_between_readings_and_shorter_ones_are_both_learned_from():
    seconds = replace(QWEN, prompt_token_s=0.0001)
    tide, until_s = 1_000.0, 2_000.0
    for truth, every_s, tokens in ((seconds, 5.0, 150.0), (seconds.stretched(20), 5.0, 150.0)):
        rate = 3.0 / (truth.step_time_s(3.0) * tokens * 1.2)
        arrivals = poisson_arrivals(
            lambda at_s, rate=rate: rate * (1.0 - 0.9 * math.cos(2 * math.pi * at_s / tide)),
            1.9 * rate,
            until_s=until_s,
            seed=3,
            tokens=(tokens, 0.5),
        )
        trace = simulate(truth, arrivals, until_s=until_s)
        found = settle_all(trace, until_s=until_s, every_s=every_s, batch=1).estimate(idle_power_w=None)
        assert found.identifiable, found.reason
        assert_close(found, truth, (*ENERGY, *SPEED, "prompt_token_s"), within=0.05)


def test_the_energy_of_prompts_is_told_from_that_of_tokens():
    truth = replace(QWEN, prompt_token_j=0.03, prompt_token_s=0.0001).stretched(300)
    trace = a_day(truth, mean_batch=5, seed=1)
    found = settle_all(trace, until_s=DAY_S, every_s=300.0).estimate(idle_power_w=None)
    assert found.identifiable, found.reason
    assert_close(found, truth, (*ENERGY, *SPEED, "prompt_token_s"), within=0.05)
    assert found.curve.prompt_token_j == pytest.approx(truth.prompt_token_j, rel=0.15)


@pytest.mark.statistical
def test_the_stated_errors_cover_the_truth():
    truth = replace(QWEN, prompt_token_j=0.02).stretched(300)
    errors = []
    for seed in range(9):
        trace = a_day(truth, mean_batch=8, seed=seed)
        noise = Noise(time_s=10.0, energy_j=500.0, seed=seed)
        found = settle_all(trace, until_s=DAY_S, every_s=300.0, batch=8, noise=noise).estimate(idle_power_w=None)
        errors += [
            (getattr(found.curve, name) - getattr(truth, name)) / found.standard_errors[name]
            for name in (*ENERGY, *SPEED)
        ]
    covered = np.mean(np.abs(errors) <= 2.0)
    assert covered >= 0.9


def closed_loop(concurrency: int, *, tokens: int, until_s: float, truth: BatchCurve) -> list[Arrival]:
    """Arrivals of clients that send the next prompt when the last one is answered; always the same batch."""
    length_s = tokens * truth.step_time_s(concurrency)
    return [
        Arrival(number * length_s / concurrency + turn * length_s, 50, tokens)
        for number in range(concurrency)
        for turn in range(int(until_s / length_s))
    ]


@pytest.mark.parametrize("concurrency", [1, 8])
def test_at_a_constant_batch_the_curve_is_not_identifiable(concurrency):
    truth = QWEN.stretched(100)
    trace = simulate(
        truth, sorted(closed_loop(concurrency, tokens=100, until_s=DAY_S, truth=truth), key=lambda one: one.at_s)
    )
    found = settle_all(trace, until_s=DAY_S, every_s=300.0, idle_power_w=100.0).estimate(idle_power_w=100.0)
    assert not found.identifiable
    assert found.reason.startswith(f"the batch was always about {concurrency}.")


def test_without_idle_time_idle_power_is_not_identifiable_unless_it_is_given():
    truth = QWEN.stretched(300)
    trace = a_day(truth, mean_batch=40, seed=0)
    state = settle_all(trace, until_s=DAY_S, every_s=300.0)
    assert state.estimate(idle_power_w=None).reason == "no idle time was seen"
    known = state.estimate(idle_power_w=truth.idle_w)
    assert known.identifiable
    assert_close(known, truth, (*ENERGY, *SPEED), within=0.05)
    assert "idle_w" not in known.standard_errors
    one = EndpointState([Reading(0, {})], [], curve=state)
    assert not one.estimate().identifiable
    assert replace(one, pool_idle_w=truth.idle_w).estimate().curve == known.curve


def test_few_intervals_are_named_as_the_reason():
    truth = QWEN.stretched(300)
    trace = a_day(truth, mean_batch=20, seed=0)
    assert settle_all(trace, until_s=1_200.0, every_s=300.0).estimate(idle_power_w=None) is None
    found = settle_all(trace, until_s=DAY_S / 4, every_s=1_800.0).estimate(idle_power_w=None)
    assert not found.identifiable
    assert found.reason.startswith("too few intervals: ")


def test_a_sleeping_server_is_not_taken_for_an_idle_one():
    truth = QWEN.stretched(300)
    trace = a_day(truth, mean_batch=3, seed=2)
    # The model is unloaded for the first and the last five hours: nobody asks for it then.
    asleep = ((0.0, 18_000.0), (68_400.0, DAY_S))
    calls = [one for one in trace.calls if one.started_s > 18_600.0 and one.finished_s < 67_800.0]
    awake = simulate(
        truth,
        [
            Arrival(one.started_s, one.prompt_tokens, one.completion_tokens)
            for one in sorted(calls, key=lambda c: c.started_s)
        ],
    )
    grid = np.unique(np.concatenate((awake.times_s, [18_000.0, 68_400.0])))
    slept_s = sum(np.clip(grid, since_s, until_s) - since_s for since_s, until_s in asleep)
    saved = Trace(awake.calls, grid, awake.counter(grid) - (truth.idle_w - 10.0) * slept_s, np.zeros_like(grid))

    def kept(since_s: float, until_s: float) -> bool:
        return all(until_s <= since or since_s >= until for since, until in asleep)

    aware = settle_all(saved, until_s=DAY_S, every_s=300.0, kept_awake=kept).estimate(idle_power_w=None)
    assert aware.identifiable, aware.reason
    assert_close(aware, truth, (*ENERGY, *SPEED), within=0.05)


def test_what_was_learned_long_ago_is_forgotten():
    def intervals(idle_w: float) -> list[IntervalSample]:
        return [
            IntervalSample(
                100.0, 100.0 - steps * 0.5, idle_w * 100.0 + 3.0 * steps + 0.5 * steps * batch,
                Work(steps, steps * batch, 50.0),
            )
            for batch in (1, 4, 9)
            for steps in range(20, 120, 10)
        ]  # fmt: skip

    calls = [CallSample(0.5 + 0.01 * batch, batch, 100, 10 * batch, 1.0) for batch in range(1, 40)]
    state = CurveState().learned([], calls, until_s=0.0, half_life_s=1_000.0)
    state = state.learned(intervals(200.0), [], until_s=10.0, half_life_s=1_000.0)
    assert state.estimate(idle_power_w=None).curve.idle_w == pytest.approx(200.0, rel=1e-6)
    state = state.learned(intervals(80.0), [], until_s=20_000.0, half_life_s=1_000.0)
    assert state.estimate(idle_power_w=None).curve.idle_w == pytest.approx(80.0, rel=1e-3)


def test_a_negative_coefficient_becomes_zero_and_the_others_are_fitted_again():
    rows = [(1.0, x, 5.0 - 0.5 * x) for x in (1.0, 2.0, 3.0)]
    found = LeastSquares.empty(2).with_rows(rows, [1.0] * 3).solve()
    assert found.values == (pytest.approx(4.0), 0.0)


def test_where_no_coefficient_can_be_positive_all_are_zero():
    found = LeastSquares.empty(2).with_rows([(1.0, x, -x) for x in (1.0, 2.0, 4.0)], [1.0] * 3).solve()
    assert found.values == (0.0, 0.0)
    assert LeastSquares.empty(2).solve().errors == (math.inf, math.inf)


def test_a_direction_that_was_not_observed_has_an_infinite_error():
    rows = [(float(x), 2.0 * x, 3.0 * x) for x in range(1, 9)]
    found = LeastSquares.empty(2).with_rows(rows, [1.0] * len(rows)).solve()
    assert found.errors == (math.inf, math.inf)
    assert found.values[0] + 2.0 * found.values[1] == pytest.approx(3.0)
