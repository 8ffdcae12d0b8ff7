"""The configuration of a demo: how its simulated servers are stretched, and its two worlds."""

import itertools
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deploy.local.config import StackConfig
from shared.batch_curve import MEASURED
from shared.switchback import SwitchbackSchedule
from tools.demo.day import (
    LARGEST_SLOWDOWN,
    PACES,
    BatchedServers,
    DemoDay,
    machine_slowdown,
    service_settings,
    stack_config,
)
from tools.demo.traffic import Prompt, load_at, mean_tokens, peak_load

START = datetime(2024, 2, 8, tzinfo=UTC)
DAY = DemoDay(
    model="llama-2-13b-chat", zone="SAMPLE", trace=Path("t"), workload=Path("w"), start=START, hours=24.0,
    requests=16_000, seed=1, pace=PACES["llama-2-13b-chat"], mean_tokens=87.0,
)  # fmt: skip
BATCHED = BatchedServers()


def test_at_the_peak_of_the_reference_the_servers_have_the_wanted_batch():
    curve = MEASURED[BATCHED.curve].stretched(DAY.stretch)
    peak_per_s = DAY.requests / 86_400.0 * max(load_at(hour) for hour in range(24))
    in_flight = peak_per_s * DAY.mean_tokens * curve.step_time_s(BATCHED.peak_batch)
    assert in_flight == pytest.approx(BATCHED.count * BATCHED.peak_batch, rel=0.01)
    assert in_flight / peak_per_s == pytest.approx(DAY.answer_s, rel=0.01)


def test_a_day_has_four_blocks_without_sprout_or_more():
    schedule = SwitchbackSchedule(DAY.switchback)
    minutes = [schedule.is_reference(START + timedelta(minutes=minute)) for minute in range(24 * 60)]
    assert sum(not before and now for before, now in itertools.pairwise([False, *minutes])) in (4, 5)
    assert 0.05 < sum(minutes) / len(minutes) < 0.11


def test_fewer_requests_stretch_the_steps_more():
    assert replace(DAY, requests=8_000).stretch == pytest.approx(2 * DAY.stretch)


def test_the_target_batch_keeps_the_latency_objective():
    curve = MEASURED[BATCHED.curve]
    assert BATCHED.target_batch <= curve.largest_batch(tpot_s=BATCHED.tpot_objective_ms / 1_000)


def test_the_reference_world_has_no_directives_no_packing_and_no_sleep():
    sprout = stack_config(DAY, StackConfig())
    reference = stack_config(DAY, StackConfig(), "reference")
    assert (sprout.dispatch, sprout.sleep) == ("pack", True)
    assert sprout.switchback.share > 0
    assert (reference.dispatch, reference.sleep, reference.switchback.share) == ("spread", False, 0.0)
    assert not {"optimizer", "evaluator"} & set(reference.services)
    assert (sprout.servers, sprout.stretch) == (reference.servers, reference.stretch)


def test_a_real_model_server_is_neither_stretched_nor_switched():
    day = replace(DAY, model="smollm2", pace=PACES["smollm2"])
    assert day.stretch == 1.0
    assert stack_config(day, StackConfig()).servers == 1
    assert day.switchback.share == 0.0


def test_the_peak_is_relative_to_the_mean_of_the_hours():
    assert peak_load(START, 24.0) == pytest.approx(1.5, rel=0.01)
    assert peak_load(START.replace(hour=13), 2.0) == pytest.approx(1.0, rel=0.01)


def test_every_task_counts_alike_in_the_mean_length():
    prompts = [Prompt("a", "1", 10), Prompt("a", "2", 30), Prompt("b", "3", 100), Prompt("b", "4", None)]
    assert mean_tokens(prompts) == pytest.approx(60.0)
    assert mean_tokens([Prompt("a", "1")]) == 1.0


def test_the_limit_of_the_simulated_model_does_not_depend_on_the_number_of_options():
    settings = service_settings(replace(DAY, small=True))["optimizer"]
    assert json.loads(settings["SPROUT_OPTIMIZER_XI"]) == {"not_worse": 0.1}
    assert json.loads(settings["SPROUT_OPTIMIZER_CONSTANT_BOUNDS"]) == ["not_worse"]
    assert "SPROUT_OPTIMIZER_HOLDOUT" not in settings
    assert stack_config(replace(DAY, small=True), StackConfig()).small
    assert not stack_config(replace(DAY, small=True), StackConfig(), "reference").small


def test_few_requests_of_the_real_model_have_a_large_control_group():
    pace = PACES["smollm2"]
    settings = service_settings(replace(DAY, model="smollm2", pace=pace))["optimizer"]
    assert json.loads(settings["SPROUT_OPTIMIZER_XI"]) == {"preference": 0.1}
    assert float(settings["SPROUT_OPTIMIZER_HOLDOUT"]) * pace.requests >= 30


def test_the_slowdown_of_this_machine_lies_within_its_bounds():
    assert 1.0 <= machine_slowdown(during_s=0.05) <= LARGEST_SLOWDOWN
