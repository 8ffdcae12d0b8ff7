"""Power and speed by batch size."""

import numpy as np
import pytest

from shared.batch_curve import MEASURED, BatchCurve, mean_curve

MEASURED_ROWS = {
    # Power (W) and tokens per second by batch size: ML.ENERGY leaderboard v3, vLLM, bfloat16.
    "qwen3-14b-h100": {7.9869: (443.0, 627.4), 31.9233: (493.9, 2023.2), 127.7131: (572.1, 4474.4)},
    "llama-3.1-8b-h100": {7.98: (486.4, 1069.6), 31.9: (559.7, 3391.1), 127.7: (669.2, 7036.5)},
    "llama-3.3-70b-4xh100": {7.98: (1787.4, 464.6), 31.9: (1895.6, 1517.6), 127.7: (2351.3, 3895.4)},
}


@pytest.mark.parametrize("name", MEASURED)
def test_measured_curves_agree_with_their_measurements(name: str) -> None:
    for batch, (power_w, tokens_per_s) in MEASURED_ROWS[name].items():
        assert MEASURED[name].power_w(batch) == pytest.approx(power_w, rel=0.03)
        assert MEASURED[name].tokens_per_s(batch) == pytest.approx(tokens_per_s, rel=0.03)


def test_a_token_costs_less_in_a_larger_batch() -> None:
    curve = MEASURED["qwen3-14b-h100"]
    assert curve.average_token_j(8) > 2.5 * curve.average_token_j(32) > 4 * curve.average_token_j(128)
    assert curve.power_w(0) == curve.idle_w


def test_the_largest_batch_keeps_the_objectives() -> None:
    curve = BatchCurve(idle_w=100, step_j=1, token_j=0.1, step_s=0.010, token_s=0.0001, prompt_token_s=0.0001)
    assert curve.largest_batch(tpot_s=0.020) == 100
    assert curve.step_time_s(100) == pytest.approx(0.020)
    assert curve.largest_batch(tpot_s=0.020, ttft_s=0.025, prompt_tokens=100) == 50
    assert curve.largest_batch(tpot_s=None, ttft_s=0.012) == 20
    assert curve.largest_batch(tpot_s=0.009) == 0
    with pytest.raises(ValueError, match="tpot_s"):
        curve.largest_batch(tpot_s=None)


def test_a_stretched_curve_has_the_same_power() -> None:
    curve = MEASURED["llama-3.1-8b-h100"]
    slow = curve.stretched(200.0)
    assert slow.power_w(40) == pytest.approx(curve.power_w(40))
    assert slow.tokens_per_s(40) == pytest.approx(curve.tokens_per_s(40) / 200)


@pytest.mark.parametrize("field", ["idle_w", "step_j", "token_s"])
def test_a_negative_number_is_rejected(field: str) -> None:
    values = {"idle_w": 1.0, "step_j": 1.0, "token_j": 1.0, "step_s": 1.0, "token_s": 1.0} | {field: -1.0}
    with pytest.raises(ValueError, match=field):
        BatchCurve(**values)


def occupancy(rate: float, *, duration_s: float, extra: float, seed: int) -> tuple[float, float, float, float]:
    """Energy and tokens of a simulated server, and what `extra` of its requests, drawn at random, add to both.

    Requests arrive at random and stay for exponential times, so that their number is Poisson distributed.
    """
    rng = np.random.default_rng(seed)
    number = rng.poisson(rate * duration_s)
    starts, stays = rng.uniform(0.0, duration_s, number), rng.exponential(1.0, number)
    kept = rng.uniform(size=number) >= extra

    def measured(chosen: np.ndarray) -> tuple[float, float]:
        times = np.concatenate([starts[chosen], starts[chosen] + stays[chosen]])
        changes = np.repeat([1, -1], chosen.sum())
        order = np.argsort(times)
        running, spans = np.cumsum(changes[order])[:-1], np.diff(times[order])
        curve = MEASURED["qwen3-14b-h100"]
        known = range(int(running.max()) + 1)
        power, speed = np.array([curve.power_w(n) for n in known]), np.array([curve.tokens_per_s(n) for n in known])
        return float(spans @ power[running]), float(spans @ speed[running])

    (all_j, all_tokens), (kept_j, kept_tokens) = measured(np.ones(number, dtype=bool)), measured(kept)
    return all_j, all_tokens, all_j - kept_j, all_tokens - kept_tokens


@pytest.mark.parametrize("mean", [0.3, 4.0, 40.0])
def test_the_marginal_energy_of_a_token_agrees_with_a_simulated_server(mean: float) -> None:
    curve = MEASURED["qwen3-14b-h100"]
    duration_s, extra = 60_000.0 / mean, 0.02
    joules, tokens, more_j, more_tokens = occupancy(mean, duration_s=duration_s, extra=extra, seed=3)
    assert curve.poisson_power_w(mean) == pytest.approx(joules / duration_s, rel=0.02)
    assert curve.poisson_tokens_per_s(mean) == pytest.approx(tokens / duration_s, rel=0.02)
    assert curve.marginal_token_j(mean * (1 - extra / 2)) == pytest.approx(more_j / more_tokens, rel=0.03)


def test_one_more_token_is_a_step_of_its_own_on_an_idle_server_and_shares_the_steps_of_a_busy_one() -> None:
    curve = MEASURED["qwen3-14b-h100"]
    assert curve.marginal_token_j(0.0) == pytest.approx(curve.step_j + curve.token_j)
    limit = curve.token_j - curve.step_j * curve.token_s / curve.step_s
    assert curve.marginal_token_j(200.0) == pytest.approx(limit)
    marginal = [curve.marginal_token_j(mean) for mean in (0.0, 0.1, 1.0, 3.0, 10.0, 1_000.0)]
    assert marginal == sorted(marginal, reverse=True)
    for mean in (1.0, 10.0, 100.0):
        assert curve.marginal_token_j(mean) < curve.average_token_j(mean)
    with pytest.raises(ValueError, match="negative"):
        curve.marginal_token_j(-1.0)


def test_the_mean_curve_is_the_mean_of_every_field() -> None:
    curve = MEASURED["qwen3-14b-h100"]
    mean = mean_curve([curve, curve.stretched(3.0)])
    assert (mean.step_s, mean.idle_w) == pytest.approx((2.0 * curve.step_s, curve.idle_w))
    with pytest.raises(ValueError, match="at least one"):
        mean_curve([])
