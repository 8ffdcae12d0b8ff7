"""The demo succeeds only where every request was answered once, every joule is booked, and the saving is confirmed."""

from collections import Counter
from dataclasses import replace

import pytest

from deploy.demo.observer import Tally
from deploy.demo.outcome import LARGEST_DISAGREEMENT_POINTS, outcome_of
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


def outcome(tally, report, *, sent=SENT):
    return outcome_of(planned=SENT, sent=sent, tally=tally, report=report, broker="kafka", seconds=1.0)


def test_a_good_day_has_no_problems_and_every_figure(tally, report):
    found = outcome(tally, report)
    assert found.problems == ()
    assert found.figures["requests_answered"] == SENT
    assert found.figures["duplicates"] == 0
    assert found.figures["carbon_saving_pct"] == report.saving.saving_pct
    assert found.figures["energy_attributed_j"] == report.energy.attributed_j
    assert {
        "requests_sent", "implied_saving_pct", "energy_metered_j", "preference_pct", "evaluations",
        "policies_published", "broker",
    } <= found.figures.keys()  # fmt: skip


def test_what_is_missing_double_or_failed_is_named(tally, report):
    tally.answers["r0"] += 1
    del tally.answers["r1"]
    tally.errors["no_endpoint"] += 2
    tally.dead_letters = 1
    problems = "\n".join(outcome(tally, report, sent=SENT - 1).problems)
    for told in ("1 of 200 requests could not be sent", "1 requests were not answered", "1 answers came twice",
                 "no_endpoint 2", "1 messages became dead letters"):  # fmt: skip
        assert told in problems


def test_joules_that_do_not_add_up_are_a_problem(tally, report):
    short = replace(report, energy=replace(report.energy, metered_j=report.energy.attributed_j * 1.002))
    assert "attributed energy differs" in outcome(tally, short).problems[0]
    unmetered = replace(report, energy=replace(report.energy, metered_j=0.0))
    assert outcome(tally, unmetered).problems == ("no energy was metered",)


def test_what_chance_explains_is_no_problem(tally, report):
    interval = report.saving.saving_interval
    width = max(LARGEST_DISAGREEMENT_POINTS, interval.high - interval.low)
    near, far = (replace(report, implied_saving_pct=report.saving.saving_pct + by * width) for by in (0.99, 1.01))
    assert not outcome(tally, near).problems
    assert "disagrees" in outcome(tally, far).problems[0]


def test_a_saving_that_the_policies_do_not_imply_is_a_problem(tally, report):
    elsewhere = replace(report, implied_saving_pct=report.saving.saving_pct + 60.0)
    assert "disagrees" in outcome(tally, elsewhere).problems[0]
    unknown = replace(report, implied_saving_pct=None)
    assert outcome(tally, unknown).problems == ("the saving could not be measured",)
