"""Power and speed of fleets by token rate, and `sprout simulate --fleet`."""

from pathlib import Path

import numpy as np
import pytest

from shared.batch_curve import MEASURED
from tests.support.simulator import grid
from tools.simulator.fleet import (
    ASLEEP_AFTER_MIN,
    WAKE_AHEAD_MIN,
    Overload,
    ServerFleet,
    load_server_fleet,
    needed_nearby,
    needed_servers,
    run_fleet,
    server_power_w,
)
from tools.simulator.outcome import Outcome
from tools.simulator.requests import SimulationInputError
from tools.simulator.what_if import NIGHT_LOAD, Plan, read_load, simulate_fleets

CURVE = "qwen3-14b-h100"
ONE = MEASURED[CURVE]
HOURS = 48


def fleet(*counts: int, max_batch: int = 256, curve: str = CURVE, zone: str | None = None) -> ServerFleet:
    servers = [{"count": count, "curve": curve, "max_batch": max_batch, "zone": zone} for count in counts]
    return ServerFleet.model_validate({"name": "mine", "servers": servers})


def outcome(*, kept: float, evaluator_tokens: float = 0.0) -> Outcome:
    """A scheme that keeps a share of 200 tokens per request."""
    hourly = np.ones(HOURS)
    return Outcome(
        zone="Z", window_start_hour=0, scheme="sprout", xi=0.1, options=("pool/L0",),
        grams=kept * hourly, base_grams=hourly, preference=hourly, bound=hourly, mix=hourly[:, None],
        processing_s=hourly, base_processing_s=hourly, g_per_kwh=hourly, tokens=200.0 * kept * hourly,
        base_tokens=200.0 * hourly, evaluator_tokens=evaluator_tokens * hourly,
    )  # fmt: skip


def figures(plan: Plan, *, kept: float = 0.3, evaluator_tokens: float = 0.0):
    zone = grid(100)
    window = zone.window(0, HOURS)
    return simulate_fleets(outcome(kept=kept, evaluator_tokens=evaluator_tokens), window, plan, {"Z": zone})


@pytest.mark.parametrize("batch", [8, 32, 128])
def test_power_follows_the_curve_at_every_rate(batch: int) -> None:
    rate = np.array([ONE.tokens_per_s(batch)])
    assert server_power_w(ONE, rate)[0] == pytest.approx(ONE.power_w(batch), rel=1e-3)


def test_a_server_without_requests_takes_its_idle_power() -> None:
    assert server_power_w(ONE, np.zeros(1))[0] == ONE.idle_w
    assert ONE.idle_w < server_power_w(ONE, np.array([1.0]))[0] < ONE.power_w(1)


def test_spreading_gives_all_servers_the_same_batch() -> None:
    run = run_fleet(fleet(3, 5), np.array([8 * ONE.tokens_per_s(20)]), dispatch="spread", targets=(64, 64))
    assert run.power_w.sum() == pytest.approx(8 * ONE.power_w(20), rel=1e-6)
    assert run.tpot_quantiles_s((0.5, 0.99)) == pytest.approx([ONE.step_time_s(20)] * 2)
    assert run.awake[0] == 8


def test_packing_fills_servers_in_order_and_the_rest_sleeps() -> None:
    tokens = np.array([2 * ONE.tokens_per_s(64) + ONE.tokens_per_s(10)])
    awake = run_fleet(fleet(2, 4), tokens, dispatch="pack", targets=(64, 64))
    asleep = run_fleet(fleet(2, 4), tokens, dispatch="pack", targets=(64, 64), sleep=True)
    working = 2 * ONE.power_w(64) + ONE.power_w(10)
    assert awake.power_w.sum() == pytest.approx(working + 3 * ONE.idle_w, rel=1e-3)
    assert asleep.power_w.sum() == pytest.approx(working + 3 * ONE.asleep_w, rel=1e-3)
    assert asleep.power_w[0, 0] == pytest.approx(2 * ONE.power_w(64), rel=1e-3)
    assert (awake.awake[0], asleep.awake[0]) == (6, 3)
    assert needed_servers(fleet(2, 4), tokens, (64, 64))[0] == 3


def test_beyond_all_targets_the_batches_grow_evenly() -> None:
    run = run_fleet(fleet(4), np.array([4 * ONE.tokens_per_s(100)]), dispatch="pack", targets=(64,))
    assert run.power_w.sum() == pytest.approx(4 * ONE.power_w(100), rel=1e-3)
    assert run.tpot_quantiles_s((0.5,))[0] == pytest.approx(ONE.step_time_s(100))


def test_servers_wake_before_they_are_needed_and_stay_awake_for_a_while() -> None:
    working = np.ones((60, 1))
    working[30] = 4.0
    awake = needed_nearby(working)[:, 0]
    assert np.flatnonzero(awake == 4.0).tolist() == list(range(30 - WAKE_AHEAD_MIN, 31 + ASLEEP_AFTER_MIN))


def test_an_overloaded_fleet_is_named() -> None:
    with pytest.raises(Overload, match=r"fleet 'mine' is overloaded: 2 servers .* about 4 such servers"):
        run_fleet(fleet(2), np.array([3.1 * ONE.tokens_per_s(256)]), dispatch="spread", targets=(64,))


def test_packing_saves_on_the_meter_what_spreading_does_not() -> None:
    spread, pack, sleep = figures(Plan(fleets=(fleet(16),)))
    assert [(one.dispatch, one.sleep) for one in (spread, pack, sleep)] == [
        ("spread", False), ("pack", False), ("pack", True),
    ]  # fmt: skip
    assert 7.0 < spread.energy_saving_pct < 14.0
    assert 60.0 < pack.energy_saving_pct < 68.0
    assert 75.0 < sleep.energy_saving_pct < 82.0
    for one in (spread, pack, sleep):
        assert one.attributed_saving_pct == pytest.approx(70.0, abs=1.0)
    full_ms = 1_000.0 * ONE.step_time_s(128)
    assert sleep.tpot_ms[2] == pytest.approx(full_ms, rel=1e-6)
    # The rest of the step under way, and one step.
    assert full_ms < sleep.ttft_ms[0] < 1.6 * full_ms < 1.9 * full_ms < sleep.ttft_ms[2] < 2.0 * full_ms
    assert sleep.awake_mean < 4.5


def test_the_default_load_fills_the_servers_to_the_peak_batch() -> None:
    (one,) = figures(Plan(fleets=(fleet(16),), dispatches=("spread",)), kept=1.0)
    peak = 16 * ONE.tokens_per_s(64) / 200.0 * 3_600.0
    assert one.requests_per_hour == pytest.approx(peak * (1.0 + NIGHT_LOAD) / 2.0, rel=0.01)
    assert one.energy_saving_pct == pytest.approx(0.0)
    assert one.saving_pct == pytest.approx(0.0)


def test_the_evaluator_counts_in_both_savings() -> None:
    plan = Plan(fleets=(fleet(4),), dispatches=("pack",), sleep=True, requests_per_hour=50_000.0)
    (without,) = figures(plan)
    (charged,) = figures(plan, evaluator_tokens=2_000_000.0)
    assert charged.energy_kwh > without.energy_kwh
    assert charged.reference_energy_kwh == without.reference_energy_kwh
    assert charged.attributed_saving_pct == pytest.approx(50.0, abs=2.0)


def test_a_latency_objective_sets_the_target() -> None:
    plan = Plan(fleets=(fleet(16),), dispatches=("pack",), sleep=False, tpot_objective_ms=25.0)
    (one,) = figures(plan)
    assert one.target_batch == (ONE.largest_batch(tpot_s=0.025),)
    assert one.tpot_ms[2] <= 25.0


def test_servers_of_another_zone_count_with_its_intensity() -> None:
    here, there = grid(100), grid(100, seed=2)
    dirty = type(there)("Y", there.begin, here.g_per_kwh * 3.0)
    plan = Plan(fleets=(fleet(8, zone="Y"),), dispatches=("spread",))
    (one,) = simulate_fleets(outcome(kept=0.3), here.window(0, HOURS), plan, {"Z": here, "Y": dirty})
    (usual,) = figures(Plan(fleets=(fleet(8),), dispatches=("spread",)))
    assert one.grams == pytest.approx(3.0 * usual.grams)
    with pytest.raises(SimulationInputError, match="zone Y, of which no trace is read"):
        simulate_fleets(outcome(kept=0.3), here.window(0, HOURS), plan, {"Z": here})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sleep": True, "dispatches": ("spread",)}, "--sleep needs --dispatch pack"),
        ({"requests_per_hour": 1.0, "peak_batch": 8}, "--requests-per-hour and --peak-batch both"),
        ({"target_batch": 8, "tpot_objective_ms": 20.0}, "--target-batch and --latency-objective both"),
        ({"target_batch": 300}, "--target-batch 300 is more than max_batch = 256"),
        ({"peak_batch": 300}, "--peak-batch 300 is more than max_batch"),
        ({"tpot_objective_ms": 5.0}, "no batch keeps --latency-objective 5 ms"),
    ],
)
def test_a_plan_that_cannot_be_kept_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SimulationInputError, match=message):
        Plan(fleets=(fleet(2),), **options)  # type: ignore[arg-type]


def test_fleets_need_different_names() -> None:
    with pytest.raises(SimulationInputError, match="two fleets are called 'mine'"):
        Plan(fleets=(fleet(1), fleet(2)))


def test_a_fleet_file_names_curves_or_gives_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "ours.toml"
    file.write_text(
        f'[[servers]]\ncount = 2\ncurve = "{CURVE}"\n'
        "[[servers]]\ncount = 1\nmax_batch = 32\nzone = 'NL'\npue = 1.2\n"
        "curve = { idle_w = 90, step_j = 3, token_j = 0.1, step_s = 0.01, token_s = 0.0001 }\n"
    )
    read = load_server_fleet(file)
    assert (read.name, read.count) == ("ours", 3)
    assert read.servers[0].curve == ONE
    assert read.servers[1].curve.step_time_s(10) == pytest.approx(0.011)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("servers = 3", "servers"),
        ("[[servers]\n", "is not valid TOML"),
        ("", "servers: Field required"),
        ('[[servers]]\ncount = 1\ncurve = "abacus"\n', "there is no curve 'abacus'; there are qwen3-14b-h100"),
        (f'[[servers]]\ncount = 0\ncurve = "{CURVE}"\n', "servers.0.count"),
        (f'[[servers]]\ncount = 1\ncurve = "{CURVE}"\ncolour = 1\n', "servers.0.colour"),
        ("[[servers]]\ncount = 1\ncurve = { step_j = 1, speed = 2 }\n", "a curve has no 'speed' here"),
        (
            "[[servers]]\ncount = 1\ncurve = { idle_w = 1, step_j = 1, token_j = 1, step_s = 0, token_s = 1 }\n",
            "'step_s' must be greater than 0",
        ),
    ],
)
def test_an_invalid_fleet_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(SimulationInputError) as error:
        load_server_fleet(file)
    assert f"--fleet {file}" in str(error.value)
    assert message in str(error.value)
    with pytest.raises(SimulationInputError, match="cannot be read"):
        load_server_fleet(tmp_path / "none.toml")


def test_a_load_file_gives_the_requests_of_each_hour(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    file.write_text("hour,requests\n" + "".join(f"{hour},{1_000 * (hour + 1)}\n" for hour in range(24)))
    plan = Plan(fleets=(fleet(4),), dispatches=("spread",), load=read_load(file))
    (one,) = figures(plan)
    assert one.requests_per_hour == pytest.approx(12_500.0)
    with pytest.raises(SimulationInputError, match=r"--load has 3 hours; it needs 24 for a day, or the 48"):
        figures(Plan(fleets=(fleet(4),), load=np.ones(3)))
    with pytest.raises(SimulationInputError, match="--load has no requests in the window"):
        figures(Plan(fleets=(fleet(4),), load=np.zeros(24)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "has no column 'hour'"),
        ("hour,requests\n0,some\n", "line 2: 'hour' and 'requests' must be numbers"),
        ("hour,requests\n1,5\n", "line 2: 'hour' must be 0"),
        ("hour,requests\n0,-5\n", "line 2: 'requests' must not be negative"),
        ("hour,requests\n0,0\n", "has no hour with requests"),
    ],
)
def test_an_invalid_load_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "load.csv"
    file.write_text(text)
    with pytest.raises(SimulationInputError, match=message):
        read_load(file)
