"""The evaluator runs at local minima of the urgency-adjusted intensity, after the grace period, or when overdue."""

import csv
import gzip
import json
import math
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.evaluator.opportunity import URGENCY_PER_HOUR, Opportunity, OpportunityRules

START = datetime(2023, 2, 10, tzinfo=UTC)
LOW = OpportunityRules()
USUAL = OpportunityRules(variant="urgency")
PUBLISHED = OpportunityRules(variant="published")


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def run(intensities, *, rules=USUAL, threshold=None, last=0.0):
    """(hour, reason) of every evaluation; the first hour is 0."""
    mean = sum(intensities) / len(intensities) if threshold is None else threshold
    opportunity = Opportunity(rules, last=None if last is None else at(last))
    found = []
    for hour, intensity in enumerate(intensities):
        trigger = opportunity.observe(at(hour), intensity, threshold=mean)
        if trigger is not None:
            found.append((hour, trigger))
            opportunity.evaluated(at(hour))
    return found


def test_it_runs_where_the_intensity_stops_falling():
    assert run([500] * 8 + [400, 300, 200, 260, 400]) == [(11, "local_minimum")]


def test_it_does_not_run_within_the_grace_period():
    assert run([300, 250, 200, 260, 400, 500], threshold=1_000.0) == []
    assert run([900] * 5 + [400, 500, 600], threshold=1_000.0) == []  # six hours after: not yet
    assert run([900] * 6 + [400, 500, 600], threshold=1_000.0) == [(7, "local_minimum")]


def test_it_does_not_run_at_a_minimum_on_a_dirty_grid():
    assert run([500] * 8 + [400, 300, 200, 260, 400], threshold=150.0) == []


def test_it_runs_when_it_is_overdue_regardless_of_the_grid():
    assert run([500.0 + hour for hour in range(80)], threshold=100.0) == [(72, "overdue")]


def test_urgency_accepts_higher_intensities_as_time_passes():
    ups_and_downs = [400, 340, 400, 430, 410] * 10
    found = run(ups_and_downs, threshold=300.0)
    assert found
    hour, trigger = found[0]
    assert trigger == "local_minimum"
    assert ups_and_downs[hour] > 300.0
    assert ups_and_downs[hour] * math.exp(-URGENCY_PER_HOUR * hour) <= 300.0
    assert pytest.approx(math.log(2)) == URGENCY_PER_HOUR * 24


def test_the_grid_does_not_trigger_the_first_evaluation():
    assert run([500] * 8 + [400, 300, 200, 260], last=None) == []


@pytest.mark.parametrize(("samples", "expected"), [(59, None), (60, "first"), (500, "first")])
def test_the_first_evaluation_waits_for_samples_only(samples, expected):
    opportunity = Opportunity(OpportunityRules())
    assert opportunity.due(at(3), samples=samples, min_samples=60) == expected


def test_without_an_intensity_it_runs_only_when_it_is_overdue():
    opportunity = Opportunity(OpportunityRules(), last=at(0))
    assert opportunity.due(at(71.9), samples=10, min_samples=60) is None
    assert opportunity.due(at(72), samples=10, min_samples=60) == "overdue"
    assert opportunity.due(at(72), samples=0, min_samples=60) is None


def test_an_older_reading_is_ignored_and_one_of_the_same_hour_replaces():
    opportunity = Opportunity(USUAL, last=at(-24))
    for hour, intensity in enumerate([500, 400, 300]):
        assert opportunity.observe(at(hour), intensity, threshold=1_000.0) is None
    assert opportunity.observe(at(1), 900, threshold=1_000.0) is None
    assert opportunity.observe(at(3), 290, threshold=1_000.0) is None
    assert opportunity.observe(at(3), 350, threshold=1_000.0) == "local_minimum"
    assert opportunity.adjusted() == pytest.approx(350 * math.exp(-URGENCY_PER_HOUR * 27))


@given(
    st.lists(st.floats(1, 1_000), min_size=2, max_size=300),
    st.sampled_from([LOW, USUAL, PUBLISHED]),
    st.floats(1, 1_000),
)
def test_gaps_between_evaluations_are_between_grace_period_and_overdue(values, rules, threshold):
    hours = [0, *(hour for hour, _ in run(values, rules=rules, threshold=threshold))]
    gaps = [later - earlier for earlier, later in pairwise(hours)]
    assert all(rules.min_gap_h < gap <= 72 for gap in gaps)
    assert len(values) - 1 - hours[-1] < 72


@given(st.lists(st.floats(1, 1_000), min_size=2, max_size=100), st.floats(0.1, 10))
def test_the_unit_of_the_intensity_does_not_matter(values, factor):
    # A rounding error could decide at a threshold that is met exactly.
    mean = sum(values) / len(values) * 1.000_1
    scaled = [value * 2.0 ** round(factor) for value in values]
    assert run(values, threshold=mean) == run(scaled, threshold=mean * 2.0 ** round(factor))


def test_it_runs_in_the_lowest_fifth_of_the_trailing_week_at_least_twelve_hours_apart():
    assert LOW.threshold([500.0, 100.0, 300.0, 400.0, 200.0, 600.0]) == 200.0
    assert LOW.threshold([300.0]) == 300.0
    assert USUAL.threshold([100.0, 300.0]) == PUBLISHED.threshold([100.0, 300.0]) == 200.0
    day = [500, 400, 300, 200, 150, 140, 130, 120, 110, 100, 150, 200, *[500] * 12]
    # Readings of 150 and less are low; the second evaluation waits for the next day's.
    assert run(day * 2, rules=LOW, threshold=150.0, last=-24) == [(4, "low_intensity"), (28, "low_intensity")]
    assert run([100] * 30, rules=LOW, threshold=100.0) == [(13, "low_intensity"), (26, "low_intensity")]


@pytest.mark.parametrize(("variant", "gap"), [("low_intensity", 12), ("urgency", 6), ("published", 6)])
def test_the_gap_between_evaluations_follows_the_rule_unless_it_is_set(variant, gap):
    assert OpportunityRules(variant=variant).min_gap_h == gap
    assert OpportunityRules(variant=variant, grace_h=3).min_gap_h == 3


def windows():
    zones = ("AU-SA", "GB", "NL", "US-CAL-CISO", "US-TEX-ERCO")
    return [(zone, start) for zone in zones for start in (800, 3900, 7000)]


@pytest.mark.parametrize(("zone", "start"), windows())
def test_the_authors_evaluations_are_reproduced_hour_by_hour(measured_data, zone, start):
    published = json.loads((measured_data / "published_evaluation_hours.json").read_text())
    with gzip.open(measured_data / "carbon" / f"{zone}_2023_hourly.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    column = next(name for name in rows[0] if "direct" in name)
    window = [float(row[column]) for row in rows[start : start + 720]]
    assert [hour for hour, _ in run(window, rules=PUBLISHED)] == published[zone][str(start)]
