"""Power and speed by batch size."""

import pytest

from shared.batch_curve import MEASURED, BatchCurve

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
