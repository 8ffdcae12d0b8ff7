"""The report's figures: accounts balance, breakdowns sum to the total, quality follows the judged shares."""

import json
import re
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from shared.metering.columns import IntensitySeries
from tests.support.report import (
    CONSTANT_DAY,
    DAY,
    EMBODIED_G_PER_S,
    OPTIONS,
    POOL,
    PUE,
    PURPOSES,
    REFERENCE,
    ZONE,
    calls_of,
    intensity_at,
    interval_sums,
    made_day,
    merged,
    policy_at,
    quality_at,
    record_of,
    snapshot_of,
)
from tools.reporting import to_json
from tools.reporting.accounts import Site, carbon_account, energy_account, prices_at, sites_of
from tools.reporting.collect import compute_report
from tools.reporting.quality import JudgedShares, relative_pct
from tools.reporting.query import CallSums

SITES = {POOL: Site(ZONE, PUE, EMBODIED_G_PER_S)}


def test_metered_energy_is_calls_idle_and_unattributed():
    account = energy_account(snapshot_of(metered_j=1000.0, purposes=PURPOSES, intervals=[interval_sums()]))
    assert account.attributed_j == pytest.approx(account.metered_j)
    assert account.difference_pct == pytest.approx(0.0)
    assert account.unsettled_j == 0.0


def test_lost_energy_shows_as_a_difference():
    lost = {**PURPOSES, "request": CallSums(490.0, 5.0, 0.5, 0.0)}
    account = energy_account(snapshot_of(metered_j=1000.0, purposes=lost, intervals=[interval_sums()]))
    assert account.difference_pct == pytest.approx(-1.0)


def test_energy_of_unsettled_calls_is_reported_separately():
    early = {**PURPOSES, "request": CallSums(400.0, 4.0, 0.5, 0.0)}
    account = energy_account(snapshot_of(metered_j=1000.0, purposes=early, intervals=[interval_sums()], unsettled=1))
    assert account.unsettled_j == pytest.approx(100.0)
    assert account.difference_pct == pytest.approx(0.0)


def test_without_a_meter_the_difference_is_unknown():
    assert energy_account(snapshot_of()).difference_pct is None


def test_energy_is_priced_and_unpriced_energy_is_reported():
    snapshot = snapshot_of(
        purposes=PURPOSES, intervals=[interval_sums(), interval_sums(zone="DARK")], grid={ZONE: CONSTANT_DAY}
    )
    account = carbon_account(snapshot, SITES)
    assert account.idle_g == pytest.approx(300.0 / 3.6e6 * 100.0 * PUE)
    assert account.unattributed_g == pytest.approx(100.0 / 3.6e6 * 100.0 * PUE)
    assert account.unpriced_j == pytest.approx(5.0 + 400.0)
    assert account.embodied_g == pytest.approx(0.6)
    assert account.evaluation_share_pct == pytest.approx(10.0)
    assert account.total_g == pytest.approx(5.5 + account.idle_g + account.unattributed_g)


def test_a_pools_pue_and_embodied_carbon_are_read_off_its_footprints():
    calls, _ = calls_of([record_of("a"), record_of("b", energy_j=10.0, intensity=70.0)])
    site = sites_of(calls)[POOL]
    assert site.zone == ZONE
    assert site.pue == pytest.approx(PUE)
    assert site.embodied_g_per_s == pytest.approx(EMBODIED_G_PER_S)


def test_a_call_is_charged_for_its_share_of_the_servers_time():
    row = {REFERENCE: 0.5, OPTIONS[1]: 0.5}
    records = [
        record_of("a", row=row) | {"server_s": 0.5, "embodied_g": 0.5 * EMBODIED_G_PER_S, "processing_s": 9.0},
        record_of("b", row=row) | {"server_s": 1.5, "embodied_g": 1.5 * EMBODIED_G_PER_S, "processing_s": 9.0},
    ]
    calls, _ = calls_of(records)
    assert sites_of(calls)[POOL].embodied_g_per_s == pytest.approx(EMBODIED_G_PER_S)
    report = compute_report(snapshot_of(records, policies=[policy_at(0)]))
    operational = sum(record["operational_g"] for record in records)
    assert report.saving.reference_g == pytest.approx(operational + 2.0 * EMBODIED_G_PER_S, rel=1e-6)
    assert report.measured[0].processing_s == 9.0


def test_server_time_without_calls_has_embodied_carbon():
    idle = replace(interval_sums(), idle_s=100.0)
    snapshot = snapshot_of(purposes=PURPOSES, intervals=[idle], grid={ZONE: CONSTANT_DAY})
    account = carbon_account(snapshot, SITES)
    assert account.embodied_g == pytest.approx(0.6 + 100.0 * EMBODIED_G_PER_S)
    assert account.idle_g == pytest.approx(300.0 / 3.6e6 * 100.0 * PUE + 100.0 * EMBODIED_G_PER_S)


def test_a_call_keeps_its_own_intensity_in_its_zone_and_uses_the_current_one_elsewhere():
    calls, _ = calls_of([record_of("a", intensity=200.0, at=DAY + timedelta(hours=5))])
    sites = {**SITES, "north": Site("NORTH", 1.0, 0.0)}
    own_zone, other_zone = prices_at(calls, POOL, sites, {}), prices_at(calls, "north", sites, {"NORTH": CONSTANT_DAY})
    assert own_zone.g_per_j * 3.6e6 == pytest.approx([PUE * 200.0])
    assert other_zone.g_per_j * 3.6e6 == pytest.approx([100.0])
    assert np.isnan(prices_at(calls, "nowhere", sites, {}).g_per_j).all()


def test_an_intensity_holds_until_the_next_one_but_not_forever():
    late = DAY.timestamp() + np.array([-1.0, 0.0, 3599.0, 24 * 3600.0, 40 * 3600.0])
    assert np.isnan(CONSTANT_DAY.at(late)).tolist() == [True, False, False, False, True]


def test_an_empty_ledger_makes_an_empty_report():
    report = compute_report(snapshot_of())
    assert report.empty
    assert report.saving.saving_pct is None
    assert report.implied_saving_pct is None
    assert report.promised_saving_pct is None
    assert report.quality.preference_pct is None
    assert report.hours == report.zones == report.groups == report.grid == ()
    assert report.scope.first is None


def test_fallback_saves_nothing_with_certainty():
    records = [record_of(str(n), source="fallback", policy_version=None, row={REFERENCE: 1.0}) for n in range(3)]
    report = compute_report(snapshot_of(records))
    assert report.saving.saving_pct == pytest.approx(0.0)
    assert report.saving.saving_interval.high == pytest.approx(0.0)
    assert report.implied_saving_pct == pytest.approx(0.0)
    assert report.promised_saving_pct == pytest.approx(0.0)
    assert report.requests.fallback == 3
    assert report.references == (REFERENCE,)


def test_a_policy_that_never_chooses_the_reference_leaves_nothing_to_compare():
    brief = f"{POOL}/L1"
    report = compute_report(snapshot_of([record_of("a", option=brief, row={brief: 1.0})], policies=[policy_at(0)]))
    assert report.saving.saving_pct is None
    assert report.requests.unidentified == 1


def test_hours_groups_and_zones_sum_to_the_total():
    day = made_day(requests=300)
    report = compute_report(snapshot_of(day.records, policies=[policy_at(hour) for hour in range(24)]))
    assert sum(row.requests for row in report.hours) == 300
    assert sum(row.emitted_g for row in report.hours) == pytest.approx(report.saving.emitted_g)
    assert sum(row.reference_g for row in report.hours) == pytest.approx(report.saving.reference_g)
    for rows in (report.groups, report.zones):
        assert sum(row.saving.emitted_g for row in rows) == pytest.approx(report.saving.emitted_g)
        assert sum(row.saving.reference_g for row in rows) == pytest.approx(report.saving.reference_g)
    assert sum(sum(row.mix.values()) for row in report.hours) == 300


def test_the_saving_from_probabilities_does_not_depend_on_the_random_choice():
    policies = [policy_at(hour) for hour in range(24)]
    reports = [
        compute_report(snapshot_of(made_day(requests=3000, seed=n, scatter=0.1).records, policies=policies))
        for n in (1, 2)
    ]
    computed = [report.implied_saving_pct for report in reports]
    assert computed[0] == pytest.approx(computed[1], abs=1.5)
    for report in reports:
        assert report.saving.saving_pct == pytest.approx(report.implied_saving_pct, abs=3.0)


def test_evaluator_calls_are_used_for_an_option_that_served_no_request():
    row = {REFERENCE: 0.5, OPTIONS[1]: 0.5}
    records = [record_of(str(n), energy_j=1000.0, row=row) for n in range(2)]
    spent = [record_of("e", option=OPTIONS[1], energy_j=400.0, purpose="evaluation", source=None, policy_version=None)]
    report = compute_report(snapshot_of(records, evaluations=spent, policies=[policy_at(0)]))
    assert report.implied_saving_pct == pytest.approx(30.0)


def test_preference_weighs_the_judged_shares_by_the_served_options():
    row = dict.fromkeys(OPTIONS, 1 / 3)
    records = [record_of("a", row=row), record_of("b", option=OPTIONS[2], row=row, energy_j=400.0)]
    shares = {"L0": 0.4, "L1": 0.4, "L2": 0.3}
    report = compute_report(snapshot_of(records, qualities=[quality_at(1, shares=shares)], policies=[policy_at(0)]))
    assert report.quality.preference_pct == pytest.approx(100 * (0.4 + 0.3) / 0.8)
    assert report.quality.abstentions == 2
    assert report.quality.unjudged == 0


def test_an_option_never_judged_is_excluded_from_the_preference_and_counted():
    other = "other-7b/L0"
    records = [record_of("a"), record_of("b", option=other, row={REFERENCE: 0.5, other: 0.5})]
    report = compute_report(snapshot_of(records, qualities=[quality_at(1)], policies=[policy_at(0)]))
    assert report.quality.preference_pct == pytest.approx(100.0)
    assert report.quality.unjudged == 1


def test_a_group_never_judged_uses_the_overall_share():
    judged = JudgedShares([quality_at(1)])
    assert judged.share("preference", "unseen", REFERENCE) == pytest.approx(0.36)
    assert relative_pct(np.array([np.nan]), np.array([np.nan]), np.ones(1, dtype=np.int64)) is None


def test_a_policy_that_expected_less_than_its_bound_is_counted():
    below = policy_at(3, expected_quality=0.5)
    report = compute_report(snapshot_of([record_of("a")], policies=[policy_at(0), below]))
    assert report.quality.policies_below_bound == 1
    assert not report.quality.bound_kept
    assert report.policies == {"optimal": 2}


def test_the_hour_shows_expected_quality_and_bound_of_its_policy():
    report = compute_report(snapshot_of([record_of("a")], policies=[policy_at(0, expected_quality=0.97)]))
    (hour,) = report.hours
    assert hour.expected_quality == pytest.approx(0.97)
    assert hour.quality_bound == pytest.approx(policy_at(0).bounds["preference"])
    assert hour.intensity_g_per_kwh == {ZONE: pytest.approx(200.0)}


def test_the_report_is_the_same_from_the_roll_up_as_from_single_calls():
    day = made_day(requests=3_000, seed=5, zones={"NORTH": 0.5})
    for number, record in enumerate(day.records):
        if number % 50 == 0:  # some intensities are unknown, some requests were served without a policy
            record.update(intensity_g_per_kwh=None, operational_g=None, total_g=None)
        elif number % 31 == 0 and record["level"] == "L0":
            record.update(decision_source="switchback" if number % 2 else "fallback")
    hours = np.arange(24.0)
    grid = {
        zone: IntensitySeries(
            DAY.timestamp() + hours * 3600,
            np.array([intensity_at(hour) * share for hour in hours]),
            np.zeros(24, dtype=bool),
        )
        for zone, share in {ZONE: 1.0, "NORTH": 0.5}.items()
    }
    policies = [policy_at(hour) for hour in range(24)]
    single = snapshot_of(day.records, grid=grid, policies=policies, qualities=[quality_at(1.0)])
    cells = replace(single, requests=merged(single.requests), evaluations=merged(single.evaluations))
    assert len(cells.requests) < 0.7 * len(single.requests)
    expected, found = (json.dumps(to_json(compute_report(one))) for one in (single, cells))
    numbers = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
    assert numbers.sub("#", found) == numbers.sub("#", expected)
    np.testing.assert_allclose(
        [float(one) for one in numbers.findall(found)], [float(one) for one in numbers.findall(expected)], rtol=1e-6
    )
