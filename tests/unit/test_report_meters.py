"""The saving on the meter: bins keep every joule, the interval covers the truth, and nothing is guessed in silence."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from shared.fleet import Switchback
from shared.messages.policies import PoolPrice
from shared.metering.columns import IntensitySeries
from shared.metering.demand import NO_ARRIVALS, AnswerLengths, Answers, demand
from shared.metering.estimation import worlds_of
from shared.metering.tables import NO_READINGS, Load, bin_length_s, meter_table
from shared.switchback import SwitchbackSchedule
from tests.support.metered import (
    BRIEF,
    ENDPOINTS,
    INTERVAL_S,
    TOKENS,
    arrivals_of,
    fleet_days,
    metered_fleet,
    readings_of,
    table_of,
)
from tests.support.report import DAY, POOL, ZONE, intensity_at, policy_at, snapshot_of
from tools.reporting.capacity import latest_prices, needed_share, sleeping
from tools.reporting.collect import compute_report
from tools.reporting.fleet_report import WorldSums, explain
from tools.reporting.query import CallSums, Selection
from tools.reporting.summary import summary_lines

HOURS = np.arange(48.0)
GRID = {
    ZONE: IntensitySeries(
        DAY.timestamp() + HOURS * 3600, np.array([intensity_at(hour % 24) for hour in HOURS]), np.zeros(48, dtype=bool)
    )
}


@pytest.fixture(scope="module")
def fleet():
    return metered_fleet()


@pytest.fixture(scope="module")
def days(fleet):
    return fleet_days(fleet)


@pytest.fixture(scope="module")
def readings(days):
    return readings_of(days)


@pytest.fixture
def snapshot(fleet, days, readings):
    return snapshot_of(days.records, grid=GRID, fleet=fleet, readings=readings, policies=[policy_at(0)])


def reason_of(snapshot, **changes):
    found = compute_report(replace(snapshot, **changes)).metered
    assert found.saving is None
    return found.reason


# Bins


def test_bins_hold_every_joule_and_second_of_the_intervals(days):
    table = table_of(days)
    assert table.metered_j.sum() == pytest.approx(sum(row["metered_j"] for row in days.intervals), rel=1e-9)
    assert table.idle_j.sum() == pytest.approx(sum(row["idle_j"] for row in days.intervals), rel=1e-9)
    assert table.covered_s.sum() == pytest.approx(len(days.intervals) * INTERVAL_S, rel=1e-9)
    assert table.complete[:, 1:-1].all()
    assert not table.complete[:, 0].any()


def test_a_bin_divides_a_block_and_is_longer_than_two_meter_intervals():
    settings = Switchback(block_s=1800)
    assert bin_length_s(settings, 5.0) == 300.0
    assert bin_length_s(settings, 200.0) == 450.0
    assert bin_length_s(settings, 2_000.0) == 1800.0


def test_without_an_interval_there_is_no_table():
    assert meter_table([], 300.0) is None


def test_a_bin_in_which_the_world_changes_counts_for_neither(fleet, days):
    table, schedule = table_of(days), SwitchbackSchedule(fleet.switchback)
    worlds = worlds_of(table, schedule)
    for start_s, world in zip(table.start_s, worlds, strict=True):
        within = {schedule.world(datetime.fromtimestamp(start_s + share * 300.0, UTC)) for share in (0.01, 0.5, 0.99)}
        assert world == (within.pop() if len(within) == 1 else "washout")
    # 1800 s of every block, without its 300 s of washout.
    assert np.sum(worlds == "reference") == pytest.approx(5 / 6 * 0.1 * len(worlds), rel=0.15)


# Demand


def arrivals(lengths, at_s=0.0, *, level="L1", source="policy", requests=1, tokens=50):
    means = (lengths.mean("long", "chat", one) for one in ("L0", level))
    return arrivals_of([(at_s, POOL, level, source, requests, tokens, *means)])


def answers(group="long", *, level="L0", in_block=False, requests=10, tokens=1000, seconds=2000.0, task="chat"):
    return Answers(group, task, level, in_block, requests, tokens, seconds)


def test_demand_is_what_the_requests_would_have_generated(days, readings):
    table = readings.table
    edges = np.append(table.start_s, table.start_s[-1] + 300.0) + 0.0
    without = np.array(["sprout"] * len(table.start_s))
    found = demand(readings.arrivals, AnswerLengths(readings.answers), edges, without)
    brief = sum(record["level"] == "L1" for record in days.records)
    total = np.nansum(found)
    assert total == pytest.approx(len(days.records) * np.mean(list(TOKENS.values())), rel=0.03)
    assert sum(record["completion_tokens"] for record in days.records) < total * (1 - brief / 4_000 * (1 - BRIEF))


def test_before_the_first_request_the_demand_is_unknown():
    edges, lengths = np.arange(0.0, 601.0, 100.0), AnswerLengths([answers()])
    found = demand(arrivals(lengths, 250.0), lengths, edges, np.array(["reference"] * 6))
    assert np.isnan(found).tolist() == [True, True, False, False, False, False]


def test_a_request_counts_with_the_mean_of_its_group_spread_over_its_answer():
    lengths = AnswerLengths([answers(), answers(level="L1", tokens=400, seconds=400.0)])
    edges = np.arange(0.0, 601.0, 100.0)
    found = demand(arrivals(lengths, requests=3), lengths, edges, np.array(["sprout"] * 6))
    # 100 tokens each at 2 s per token.
    assert found == pytest.approx([150.0, 150.0, 0, 0, 0, 0])
    in_block = demand(arrivals(lengths, requests=3), lengths, edges, np.array(["reference"] * 6))
    # A shorter answer from before the block: 40 tokens each at 1 s per token.
    assert in_block == pytest.approx([120.0, 0, 0, 0, 0, 0])


def test_a_client_that_chooses_its_level_has_the_same_demand_without_sprout():
    lengths = AnswerLengths([answers()])
    assert arrivals(lengths, source="forced", tokens=7).without_sprout == [7.0]
    assert arrivals(lengths).without_sprout == [100.0]


def test_an_unknown_group_has_the_mean_of_its_task_then_of_all():
    lengths = AnswerLengths([answers("a", task="x", tokens=1000), answers("b", task="y", tokens=3000)])
    assert lengths.mean("new", "y", "L0") == 300.0
    assert lengths.mean("new", "new", "L0") == 200.0
    assert np.isnan(lengths.mean("new", "new", "L1"))
    assert np.isnan(AnswerLengths([answers(requests=1)]).mean("long", "chat", "L0"))


def test_without_answers_at_the_reference_the_demand_is_unknown():
    lengths = AnswerLengths([answers(level="L1")])
    assert np.isnan(demand(arrivals(lengths), lengths, np.array([0.0, 1.0]), np.array(["sprout"]))).all()
    assert demand(NO_ARRIVALS, lengths, np.array([0.0, 1.0]), np.array(["sprout"])).tolist() == [0.0]


# The estimate


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.statistical) for seed in range(3, 6))])
def test_the_interval_covers_the_true_saving_less_the_judges_energy(seed):
    fleet = metered_fleet(key=str(seed))
    days = fleet_days(fleet, seed=seed)
    report = compute_report(
        snapshot_of(days.records, grid=GRID, fleet=fleet, readings=readings_of(days), policies=[policy_at(0)])
    )
    found = report.metered.saving
    assert found.saving_interval.low < days.saving_pct < found.saving_interval.high
    assert found.saving_pct == pytest.approx(days.saving_pct, abs=1.5)
    assert found.saved_j == pytest.approx(days.without_j - days.actual_j - days.judge_j, rel=0.03)
    assert found.saved_g_interval.low < found.saved_g < found.saved_g_interval.high
    assert found.saved_g == pytest.approx(found.saved_j / 3.6e6 * 1.2 * 230, rel=0.2)


def test_the_report_has_energy_capacity_and_blocks_of_the_fleet(snapshot, days):
    found = compute_report(snapshot).metered
    assert found.fleet_energy_j == pytest.approx(days.actual_j + days.judge_j, rel=0.005)
    assert found.judge_energy_j == pytest.approx(days.judge_j, rel=0.005)
    assert found.endpoints == ENDPOINTS
    assert 1.0 <= found.endpoints_needed_mean <= 2.0
    assert found.endpoints_in_use_mean == pytest.approx(2.0 + 2.0 * 0.1, abs=0.15)
    assert found.reference_blocks == len(found.blocks)
    assert found.tpot_objective_ms == 1200
    power = [point for point in found.power if point.power_w is not None]
    assert np.mean([point.power_w for point in power]) * 2 * 86_400 == pytest.approx(days.actual_j, rel=0.02)
    assert np.mean([point.without_w for point in power]) * 2 * 86_400 == pytest.approx(days.without_j, rel=0.03)


def test_a_pool_without_a_meter_is_left_out_and_named(snapshot):
    report = compute_report(snapshot)
    assert report.metered.excluded_pools == {"spare": "no meter: endpoint spare-0 has no 'metrics' in the fleet file"}
    assert "spare: no meter" in dict(summary_lines(report))["pools left out"]


def test_a_meter_that_stands_still_leaves_its_pool_out(snapshot, readings):
    table = readings.table
    still = table.metered_j.copy()
    still[table.endpoint.index(f"{POOL}-0")] = 0.0
    report = compute_report(replace(snapshot, readings=replace(readings, table=replace(table, metered_j=still))))
    assert report.metered.excluded_pools[POOL] == f"the meter of endpoint {POOL}-0 stood still while calls ran"
    assert "no pool that serves requests has a meter" in report.metered.reason


def test_a_judge_without_readings_is_said_not_to_be_subtracted(snapshot, readings, days):
    known = replace(days, intervals=[row for row in days.intervals if row["pool"] != "judge"])
    report = compute_report(replace(snapshot, readings=replace(readings, table=table_of(known))))
    assert report.metered.excluded_pools["judge"].endswith("; the judge's energy is not subtracted")
    without_judge = 100.0 * (1.0 - days.actual_j / days.without_j)
    assert report.metered.saving.saving_pct == pytest.approx(without_judge, abs=1.5)


def test_an_endpoint_that_was_never_read_leaves_its_pool_out(snapshot, readings, days):
    known = replace(days, intervals=[row for row in days.intervals if row["endpoint"] != f"{POOL}-3"])
    changed = replace(readings, table=table_of(known))
    report = compute_report(replace(snapshot, readings=changed))
    assert report.metered.excluded_pools[POOL] == f"no reading of endpoint {POOL}-3 in this time"


def test_bins_with_a_reset_counter_are_left_out_and_said(snapshot, readings, days):
    table = readings.table
    lost = table.lost.copy()
    lost[table.endpoint.index(f"{POOL}-1"), 100:112] = True
    report = compute_report(replace(snapshot, readings=replace(readings, table=replace(table, lost=lost))))
    assert report.metered.saving.hours_left_out == pytest.approx(1.0)
    assert report.metered.saving.saving_pct == pytest.approx(days.saving_pct, abs=1.5)
    (note,) = report.metered.notes
    assert note.startswith("1.0 h are left out because a reading or a carbon intensity is missing or wrong")
    assert f"(endpoints without all readings: {POOL}-1)" in note


def test_a_period_uses_the_reference_blocks_before_it(snapshot, days):
    since = DAY + timedelta(days=1.5)
    found = compute_report(replace(snapshot, selection=Selection(since=since))).metered
    assert found.reference_blocks > len(found.blocks)
    assert found.saving.hours == pytest.approx(12.0, abs=0.2)
    assert found.saving.saving_pct == pytest.approx(days.saving_pct, abs=6.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fleet": None}, "--fleet"),
        ({"fleet": metered_fleet(share=0.0)}, "the switchback is off (share = 0): set share = 0.02"),
        ({"readings": NO_READINGS}, "no meter reading"),
        ({"selection": Selection(zone=ZONE)}, "Leave out --model and --zone"),
        ({"selection": Selection(since=DAY + timedelta(days=9))}, "no meter reading in this time"),
        ({"fleet": metered_fleet(block_s=400)}, "too seldom for blocks of 400 s of which 300 s do not count"),
        ({"fleet": metered_fleet(key="other")}, "requests of the switchback were served outside"),
    ],
)
def test_without_a_saving_the_report_says_why_and_what_to_do(snapshot, changes, words):
    assert words in reason_of(snapshot, **changes)


def test_too_few_blocks_are_said_with_a_remedy(fleet):
    days = fleet_days(fleet, days=0.4, requests=800)
    reason = reason_of(snapshot_of(days.records, grid=GRID, fleet=fleet, readings=readings_of(days)))
    assert "at least 4 are needed" in reason
    assert "one block in about 5.0 h: choose a longer period" in reason


def test_meters_that_are_read_too_seldom_are_said(snapshot, readings):
    reason = reason_of(snapshot, readings=replace(readings, interval_s=900.0))
    assert "meters are read every 900 s, too seldom for blocks of 1800 s" in reason


def test_requests_by_the_policy_in_reference_blocks_are_said(snapshot, readings):
    drawn = replace(readings.arrivals, source=np.full(len(readings.arrivals), "policy", dtype=object))
    assert "in reference blocks were served by the policy" in reason_of(
        snapshot, readings=replace(readings, arrivals=drawn)
    )


def test_without_an_answer_at_the_baseline_the_demand_is_said_to_be_unknown(snapshot, readings):
    unknown = replace(readings.arrivals, reference_mean=np.full(len(readings.arrivals), np.nan))
    assert "the demand is unknown" in reason_of(snapshot, readings=replace(readings, arrivals=unknown))


# Capacity and prices


def load(*cells: tuple[float, float, float]) -> Load:
    """Cells of (start, calls, seconds of these calls)."""
    started_s, calls, seconds = zip(*cells, strict=True)
    return Load(np.array(started_s), np.array(calls), np.array(seconds))


def test_endpoints_needed_follow_the_requests_in_flight():
    # Short calls: 2.9 run at once for two cells, 1 for one, none for seven.
    busy = load((0.0, 29_000, 435.0), (150.0, 29_000, 435.0), (300.0, 10_000, 150.0))
    share = needed_share(busy, since_s=0.0, until_s=1_500.0, target_batch=1, endpoints=4, least=1)
    assert share == pytest.approx([0.0, 0.7, 0.1, 0.2, 0.0])
    assert sleeping(share) == (2, pytest.approx(80.0)) or sleeping(share) == (3, pytest.approx(70.0))


def test_long_calls_count_as_long_as_they_run():
    # One call starts in the first cell and runs for half an hour.
    share = needed_share(load((0.0, 1, 1_800.0)), since_s=0.0, until_s=3_900.0, target_batch=1, endpoints=2, least=0)
    assert share @ np.arange(3) * 3_900.0 == pytest.approx(1_950.0)


def test_more_than_all_endpoints_are_never_needed():
    share = needed_share(load((0.0, 900, 9_000.0)), since_s=0.0, until_s=150.0, target_batch=2, endpoints=2, least=1)
    assert share == pytest.approx([0, 0, 1.0])
    assert sleeping(share) == (0, None)


def test_a_marginal_price_says_what_shorter_answers_take_off_the_meter(snapshot):
    price = PoolPrice(basis="marginal", batch=8, token_j=30.0, reason="its servers always run")
    policy = policy_at(0)
    priced = policy.model_copy(update={"inputs": policy.inputs.model_copy(update={"prices": {POOL: price}})})
    assert latest_prices([policy, priced]) == {POOL: price}
    report = compute_report(replace(snapshot, policies=type(snapshot.policies).of([priced])))
    row = report.metered.pools[0]
    saved_j = 30.0 * (4_000 * 90 - snapshot.requests.completion_tokens.sum())
    assert row.brevity_pct == pytest.approx(100 * saved_j / (row.energy_j + saved_j), rel=0.05)
    assert f"{POOL}: 30.0 J, marginal (its servers always run)" in dict(summary_lines(report))["price of a token"]
    assert "Its servers run anyway" in dict(summary_lines(report))["price of a token"]


# The explanation


def test_the_explanation_names_idle_and_shared_energy_consolidation_and_the_judge():
    sprout = WorldSums(metered_j=7.2e6, idle_j=3.6e6, tokens=1e6, in_use=1.8)
    without = WorldSums(metered_j=3.6e6, idle_j=0.72e6, tokens=1e6, in_use=3.9)
    text = explain(sprout, without, endpoints=4, judge_j=3.6e5, judge_calls_j=3.6e4)
    assert "of 2.00 kWh on the meters 1.00 kWh (50 %) is idle power" in text
    assert "without Sprout 20 %" in text
    assert "a token took 3.60 J above idle power, without Sprout 2.88 J" in text
    assert "in smaller batches each token takes more" in text
    assert "1.8 of 4 endpoints had work on average, without Sprout 3.9" in text
    assert "its endpoints used 100 Wh, its calls 10.0 Wh of it" in text


def test_the_explanation_compares_nothing_without_reference_blocks():
    nothing = WorldSums(metered_j=0.0, idle_j=0.0, tokens=0.0, in_use=None)
    sprout = WorldSums(metered_j=7.2e6, idle_j=3.6e6, tokens=1e6, in_use=1.8)
    text = explain(sprout, nothing, endpoints=4, judge_j=0.0, judge_calls_j=0.0)
    assert "without Sprout" not in text
    assert "1.8 of 4" in text
    assert explain(nothing, nothing, endpoints=4, judge_j=0.0, judge_calls_j=0.0) == ""


def test_the_two_savings_stand_side_by_side_net_of_the_evaluator(snapshot):
    purposes = {"request": CallSums(0, 0, 0, 0), "judge": CallSums(10.0, 20.0, 0.0, 0.0)}
    report = compute_report(replace(snapshot, purposes=purposes, evaluator_g=20.0))
    lines = dict(summary_lines(report))
    assert list(lines)[1:4] == ["saving on the meter", "attributed saving", "why they differ"]
    assert "kg and" in lines["saving on the meter"]
    assert "net of the evaluator; from" in lines["saving on the meter"]
    assert lines["attributed saving"].endswith("net of the evaluator (20.0 g)")
    assert report.net.saved_g == pytest.approx(report.saving.saved_g - 20.0)
