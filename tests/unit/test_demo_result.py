"""The demo succeeds if every request was answered once, the energy balance is complete, and the saving is confirmed."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.support.report import (
    CONSTANT_DAY,
    PURPOSES,
    ZONE,
    interval_sums,
    made_day,
    policy_at,
    quality_at,
    snapshot_of,
)
from tools.demo.clients import Tally
from tools.demo.result import LARGEST_DISAGREEMENT_POINTS, evaluate_demo, fell_behind
from tools.reporting.collect import compute_report

SENT = 200


@pytest.fixture(scope="module")
def report():
    found = compute_report(
        snapshot_of(
            made_day(requests=SENT).records,
            metered_j=1000.0,
            purposes=PURPOSES,
            intervals=[interval_sums()],
            grid={ZONE: CONSTANT_DAY},
            policies=[policy_at(hour) for hour in range(24)],
            qualities=[quality_at(1)],
            groupings=[],
        )
    )
    balanced = replace(found.energy, metered_j=found.energy.attributed_j)
    return replace(found, energy=balanced, implied_saving_pct=found.saving.saving_pct)


@pytest.fixture
def tally():
    return Tally(answers=Counter({f"r{number}": 1 for number in range(SENT)}), policies_published=3)


def result_of(tally, report, *, sent=SENT, without_sprout=None):
    return evaluate_demo(
        planned=SENT, sent=sent, tally=tally, report=report, seconds=1.0, without_sprout=without_sprout
    )


def test_a_successful_demo_has_no_problems_and_every_figure(tally, report):
    found = result_of(tally, report)
    assert found.problems == ()
    assert found.figures["requests_answered"] == SENT
    assert found.figures["duplicates"] == 0
    assert found.figures["carbon_saving_pct"] == report.saving.saving_pct
    assert found.figures["energy_attributed_j"] == report.energy.attributed_j
    assert {
        "requests_sent", "implied_saving_pct", "energy_metered_j", "preference_pct", "evaluations",
        "policies_published", "broker",
    } <= found.figures.keys()  # fmt: skip


@pytest.mark.parametrize(("tpot_p95_ms", "behind"), [(29.0, False), (60.0, True), (None, False)])
def test_tokens_far_beyond_the_objective_mean_that_the_machine_fell_behind(report, tpot_p95_ms, behind):
    latency = replace(report.metered.latency, tpot_p95_ms=tpot_p95_ms)
    assert (
        fell_behind(replace(report, metered=replace(report.metered, latency=latency, tpot_objective_ms=30.0))) is behind
    )
    assert not fell_behind(replace(report, metered=replace(report.metered, latency=latency, tpot_objective_ms=None)))


def test_the_true_saving_is_that_of_the_meters_of_both_worlds(tally, report):
    of_day = replace(report, metered=replace(report.metered, fleet_energy_j=300.0))
    without = replace(report, metered=replace(report.metered, fleet_energy_j=1_010.0, judge_energy_j=10.0))
    figures = result_of(tally, of_day, without_sprout=without).figures
    assert figures["true_saving_on_meter_pct"] == pytest.approx(70.0)
    assert figures["reference_fleet_energy_j"] == pytest.approx(1_000.0)
    assert "true_saving_on_meter_pct" not in result_of(tally, of_day).figures
    assert {
        "saving_on_meter_pct", "saving_on_meter_interval_pct", "attributed_saving_pct",
        "attributed_saving_interval_pct", "net_of_evaluator", "fleet_energy_j", "idle_energy_j", "endpoints",
        "endpoints_needed_mean", "tpot_p95_ms", "ttft_p95_ms", "tpot_objective_ms",
    } <= figures.keys()  # fmt: skip


def test_missing_duplicate_and_failed_answers_are_reported(tally, report):
    tally.answers["r0"] += 1
    del tally.answers["r1"]
    tally.errors["no_endpoint"] += 2
    tally.dead_letters = 1
    problems = "\n".join(result_of(tally, report, sent=SENT - 1).problems)
    for problem in (
        "1 of 200 requests were not acknowledged",
        "1 requests were not answered",
        "1 requests were answered twice",
        "no_endpoint 2",
        "1 messages became dead letters",
    ):
        assert problem in problems


def test_an_incomplete_energy_balance_is_a_problem(tally, report):
    short = replace(report, energy=replace(report.energy, metered_j=report.energy.attributed_j * 1.002))
    assert "attributed energy differs" in result_of(tally, short).problems[0]
    unmetered = replace(report, energy=replace(report.energy, metered_j=0.0))
    assert result_of(tally, unmetered).problems == ("no energy was metered",)


def test_a_difference_within_the_interval_is_no_problem(tally, report):
    interval = report.saving.saving_interval
    width = max(LARGEST_DISAGREEMENT_POINTS, interval.high - interval.low)
    near, far = (replace(report, implied_saving_pct=report.saving.saving_pct + by * width) for by in (0.99, 1.01))
    assert not result_of(tally, near).problems
    assert "disagrees" in result_of(tally, far).problems[0]


def test_a_saving_that_disagrees_with_the_policies_is_a_problem(tally, report):
    elsewhere = replace(report, implied_saving_pct=report.saving.saving_pct + 60.0)
    assert "disagrees" in result_of(tally, elsewhere).problems[0]
    unknown = replace(report, implied_saving_pct=None)
    assert result_of(tally, unknown).problems == ("the saving could not be measured",)
