"""The checks of the drills of the services: what is lost, doubled or wrong in sum is found, and nothing else is."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from shared.messages import CarbonIntensity, EvaluationCost, Footprint, IntensityPoint, Quality
from tests.drills.consistency import (
    BookedCall,
    BookedInterval,
    evaluation_problems,
    footprint_problems,
    intensity_problems,
    policy_problems,
    sum_problems,
)
from tests.support.messages import policy

START = datetime(2024, 2, 1, tzinfo=UTC)
WINDOW = timedelta(minutes=10)


def at(seconds):
    return START + timedelta(seconds=seconds)


def call(name, *, begin=1.0, end=9.0, energy_j=40.0, partial=False):
    return BookedCall(
        id=name,
        endpoint="e",
        started_at=at(begin),
        finished_at=at(end),
        completion_tokens=5,
        energy_j=energy_j,
        partial=partial,
    )


def interval(begin, end, **joules):
    values = {"metered_j": 100.0, "attributed_j": 80.0, "idle_j": 15.0, "unattributed_j": 5.0, "restarted": False}
    return BookedInterval(endpoint="e", started_at=at(begin), finished_at=at(end), **values | joules)


def footprint(record):
    return Footprint(
        request_id=f"id of {record}", record=record, purpose="request", model="m", group="g", pool="p", level="L0",
        zone="Z", endpoint="e", started_at=START, finished_at=START, processing_s=0.0, completion_tokens=5,
        energy_j=40.0, embodied_g=0.0,
    )  # fmt: skip


def quality(name):
    cost = EvaluationCost(generations=0, judgements=0, completion_tokens=0, processing_s=0.0)
    return Quality(
        evaluation_id=name, model="m", evaluated_at=START, trigger="requested", counts=(), prompts=0, abstentions=0,
        cost=cost,
    )  # fmt: skip


def intensity(*times):
    *history, latest = [IntensityPoint(at=at(one), intensity_g_per_kwh=100.0 + one) for one in times]
    return CarbonIntensity(zone="Z", latest=latest, history=tuple(history), source="test", published_at=START)


def test_one_footprint_for_every_complete_call_is_no_problem():
    calls = [call("a"), call("b"), call("c", partial=True)]
    footprints = [footprint("a"), footprint("b")]
    assert footprint_problems(footprints, calls, answered={"a", "c"}) == []


@pytest.mark.parametrize(
    ("published", "booked", "problem"),
    [
        (["a", "b"], ["a"], "1 footprints published that the ledger does not have (b)"),
        (["a"], ["a", "b"], "1 complete footprints not published (b)"),
        (["a"], ["a", "a"], "1 calls booked twice (a)"),
        ([], [], "1 answered requests unknown to the ledger (a)"),
    ],
)
def test_a_footprint_that_is_lost_or_doubled_is_found(published, booked, problem):
    found = footprint_problems([footprint(one) for one in published], [call(one) for one in booked], answered={"a"})
    assert found == [problem]


def test_a_repeated_footprint_must_be_the_same():
    again = footprint("a").model_copy(update={"energy_j": 41.0})
    assert footprint_problems([footprint("a")] * 2, [call("a")], answered={"a"}) == []
    assert footprint_problems([footprint("a"), again], [call("a")], answered={"a"}) == [
        "1 footprints published with different values (a)"
    ]


def test_a_partial_footprint_is_not_published():
    found = footprint_problems([footprint("a")], [call("a", partial=True)], answered={"a"})
    assert found == ["1 partial footprints published (a)"]


def test_joules_that_add_up_are_no_problem():
    assert sum_problems([call("a"), call("b")], [interval(0, 5), interval(5, 10, attributed_j=0.0, idle_j=95.0)]) == []


def test_joules_that_do_not_add_up_and_gaps_are_found():
    found = sum_problems([call("a")], [interval(0, 5, idle_j=14.0), interval(6, 10, attributed_j=0.0, idle_j=95.0)])
    assert found == [
        "e: the joules of the parts are 199.000, not 200.000",
        "e: the joules of the calls are 40.000, not 80.000",
        "e: 1 gaps between intervals",
    ]


def test_a_call_that_a_restart_of_the_meter_touches_must_be_partial():
    during = interval(5, 10, restarted=True)
    touched = call("a", end=6.0, energy_j=160.0)
    assert sum_problems([touched], [interval(0, 5), during]) == [
        "1 calls not partial although their meter was restarted (a)"
    ]
    assert sum_problems([replace(touched, partial=True)], [interval(0, 5), during]) == []
    before = call("a", end=4.0, energy_j=160.0)
    assert sum_problems([before], [interval(0, 5), during]) == []


def test_a_call_with_tokens_and_no_energy_must_be_partial():
    free = call("b", energy_j=0.0)
    assert sum_problems([call("a", energy_j=80.0), free], [interval(0, 10)]) == [
        "1 calls with tokens and 0 J that are not partial (b)"
    ]
    assert sum_problems([call("a", energy_j=80.0), replace(free, partial=True)], [interval(0, 10)]) == []


def test_versions_of_policies_increase_and_the_newest_is_valid():
    made = [policy({"L0": 1.0}, version=version, now=START, valid_s=60.0) for version in (1, 2, 2, 5)]
    assert policy_problems([made[0], made[1], made[3]], now=at(30)) == []
    assert policy_problems(made, now=at(30)) == ["1 policies of m whose version does not increase (2)"]
    assert policy_problems(made[:2], now=at(60)) == ["the newest policy of m has expired"]
    assert policy_problems([], now=START) == ["no policy was published"]


def test_every_finished_evaluation_is_published_once():
    assert evaluation_problems([quality("a"), quality("b")], ["b", "a"]) == []
    assert evaluation_problems([quality("a"), quality("a"), quality("c")], ["a", "b"]) == [
        "1 finished evaluations not published (b)",
        "1 evaluations published that are not finished (c)",
        "1 evaluations published twice (a)",
    ]


def test_the_window_of_carbon_intensities_only_moves_on():
    assert intensity_problems([intensity(0, 2), intensity(0, 2, 4), intensity(4, 700)], window=WINDOW) == []
    assert intensity_problems([intensity(0, 2), intensity(0, 2)], window=WINDOW) == [
        "1 carbon intensities of Z published twice"
    ]
    assert intensity_problems([intensity(0, 2), intensity(4, 6)], window=WINDOW) == [
        "1 carbon intensities of Z with a shorter window"
    ]
    assert intensity_problems([intensity(0, 2), intensity(0)], window=WINDOW) == [
        "1 carbon intensities of Z older than the one before",
        "1 carbon intensities of Z with a shorter window",
    ]
    assert intensity_problems([], window=WINDOW) == ["no carbon intensity was published"]
