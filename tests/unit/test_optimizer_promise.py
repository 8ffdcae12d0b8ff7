"""The promise by period: periods, the account by hour, and what is left for the rest of the period."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.optimizer.bounds import CurrentIntensity, TrailingRange, quality_bounds
from services.optimizer.promise import (
    BINS,
    Account,
    Period,
    RestOfPeriod,
    Sums,
    TrailingHours,
    plan_rest,
    trailing_hours,
)
from services.optimizer.settings import OptimizerSettings
from shared.carbon import LatestIntensities
from shared.messages import CarbonIntensity, IntensityPoint, Policy, PolicyInputs

METRIC = "preference"
ZONE = "NL"
MONDAY = datetime(2026, 3, 2, tzinfo=UTC)
HOUR = timedelta(hours=1)
RANGE = TrailingRange(100.0, 300.0)


def settings(**more) -> OptimizerSettings:
    return OptimizerSettings(**{"promise": "period", "xi": {METRIC: 0.1}, "period_days": 7, **more})


def policy(created_at: datetime, *, bound: float = 0.95, kept: float = 0.93, per_s: float = 1.0) -> Policy:
    """A policy that is valid for three hours."""
    return Policy(
        model="m", version=1, created_at=created_at, valid_until=created_at + 3 * HOUR, status="optimal", reason="",
        reference="p/L0", groups={}, overall={"p/L0": 1.0}, bounds={METRIC: bound}, expected_quality={METRIC: kept},
        expected_g_per_request=1.0, reference_g_per_request=1.0,
        inputs=PolicyInputs(
            solved_for=created_at, intensity_g_per_kwh={ZONE: 200.0}, k0_zone=ZONE, k0_g_per_kwh=200.0,
            k0_min_g_per_kwh=100.0, k0_max_g_per_kwh=300.0, xi={METRIC: 0.1}, weights={}, estimates={}, holdout=0.0,
            requests_per_s=per_s,
        ),
    )  # fmt: skip


def booked(*entries: tuple[datetime, float, float, float]) -> Account:
    """An account of (time, requests, promised, kept)."""
    account = Account()
    for at, requests, promised, kept in entries:
        account.add(at, requests, promised={METRIC: promised}, kept={METRIC: kept})
    return account


def days_of(*g_per_kwh: float, days: int = 30) -> TrailingHours:
    """Days that all have these intensities by hour."""
    return TrailingHours((ZONE,), np.arange(24 * days) % 24, np.tile(g_per_kwh, days)[:, None])


FLAT = days_of(*[200.0] * 24)


def rest_of(account: Account, now: datetime, trailing: TrailingHours = FLAT, **more) -> RestOfPeriod:
    own = more.pop("settings", settings())
    return plan_rest(
        account,
        trailing,
        period=Period.at(now, days=own.period_days),
        now=now,
        **{"k0": 200.0, "trailing_range": RANGE, "requests_per_s": 1.0, "settings": own, **more},
    )


@pytest.mark.parametrize(
    ("days", "start"),
    [(1, datetime(2026, 3, 5, tzinfo=UTC)), (7, MONDAY), (30, datetime(2026, 2, 19, tzinfo=UTC))],
)
def test_a_period_starts_at_midnight_and_a_week_on_monday(days, start):
    period = Period.at(datetime(2026, 3, 5, 17, 30, tzinfo=UTC), days=days)
    assert (period.start, period.end) == (start, start + timedelta(days=days))
    assert period.before().end == period.start
    assert Period.at(period.end, days=days).start == period.end


def test_the_account_books_what_the_policy_promised_and_kept_by_hour():
    account = Account(booked_until=MONDAY + 0.5 * HOUR)
    account.book(policy(MONDAY), MONDAY + 2 * HOUR, since=MONDAY)
    assert account.hours == {
        MONDAY: {METRIC: Sums(1_800.0, pytest.approx(1_800 * 0.95), pytest.approx(1_800 * 0.93))},
        MONDAY + HOUR: {METRIC: Sums(3_600.0, pytest.approx(3_600 * 0.95), pytest.approx(3_600 * 0.93))},
    }
    assert account.booked_until == MONDAY + 2 * HOUR
    assert account.changed == set(account.hours)


def test_nothing_is_booked_before_the_first_policy_nor_twice():
    account = Account()
    account.book(policy(MONDAY), MONDAY + HOUR, since=MONDAY)
    account.book(None, MONDAY + 2 * HOUR, since=MONDAY)
    account.book(policy(MONDAY), MONDAY + 2 * HOUR, since=MONDAY)
    assert account.hours == {}
    assert account.booked_until == MONDAY + 2 * HOUR


def test_a_period_that_ended_while_the_optimizer_was_away_is_closed():
    """The policy was served for three hours, the reference afterwards; the new period owes nothing for the old one."""
    away_since = MONDAY - 5 * HOUR
    account = Account(booked_until=away_since)
    now = MONDAY + 2.5 * HOUR
    account.book(policy(away_since), now, since=Period.at(now, days=7).before().start)
    rest = rest_of(account, now)
    assert rest.previous is not None
    assert rest.previous.end == MONDAY == rest.current.start
    assert rest.previous.requests == pytest.approx(5 * 3_600)
    assert rest.previous.promised[METRIC] == pytest.approx((3 * 0.95 + 2) / 5)
    assert rest.previous.kept[METRIC] == pytest.approx((3 * 0.93 + 2) / 5)
    assert rest.current.promised == rest.current.kept == {METRIC: pytest.approx(1.0)}
    assert rest.bounds[METRIC] == pytest.approx(0.95)


def test_an_absence_of_several_periods_books_the_last_ones_only():
    account = Account(booked_until=MONDAY - timedelta(days=400))
    account.book(policy(MONDAY - timedelta(days=400)), MONDAY + HOUR, since=MONDAY - timedelta(days=7))
    assert min(account.hours) == MONDAY - timedelta(days=7)
    assert account.total(Period.at(MONDAY, days=7))[METRIC] == Sums(3_600.0, 3_600.0, 3_600.0)


def test_the_rest_makes_up_for_what_was_spent():
    """Half a week at 0.90 of a promised 0.95 needs 1.00 in the other half."""
    half = [(MONDAY + hour * HOUR, 3_600.0, 0.95, 0.90) for hour in range(84)]
    rest = rest_of(booked(*half), MONDAY + 84 * HOUR)
    assert rest.bounds[METRIC] == pytest.approx(1.0)
    assert rest.current.kept[METRIC] == pytest.approx(0.90)
    saved = [(at, requests, promised, 0.98) for at, requests, promised, _ in half]
    assert rest_of(booked(*saved), MONDAY + 84 * HOUR).bounds[METRIC] == pytest.approx(0.92)


def test_the_next_period_starts_without_debts():
    spent = booked((MONDAY - HOUR, 1e6, 0.95, 0.5))
    assert rest_of(spent, MONDAY).bounds[METRIC] == pytest.approx(0.95)


def test_hours_with_more_requests_count_more():
    """Nights have a tenth of the days' requests: a loss at night is made up for by a tenth of it by day."""
    nights = [(MONDAY + hour * HOUR, 100.0 if hour % 24 < 12 else 1_000.0, 0.95, 0.95) for hour in range(48)]
    now = MONDAY + 48 * HOUR
    account = booked(*nights)
    account.add(now - HOUR, 1_000.0, promised={METRIC: 0.95}, kept={METRIC: 0.85})
    to_come = 5 * 12 * 1_100.0
    # The last hour may be incomplete, so it is not counted as a measure of its hour of the day.
    assert rest_of(account, now).bounds[METRIC] == pytest.approx(0.95 + 100.0 / to_come)


def test_the_promise_is_the_mean_of_the_hourly_limits():
    """Half of the hours to come have the lowest intensity, at which nothing is tolerated, the others the highest."""
    rest = rest_of(Account(), MONDAY, days_of(*[100.0] * 12, *[300.0] * 12), k0=100.0)
    assert rest.bounds[METRIC] == pytest.approx(0.95)
    constant = settings(constant_bounds={METRIC})
    assert rest_of(Account(), MONDAY, settings=constant).bounds[METRIC] == pytest.approx(0.90)


def test_only_the_hours_of_the_day_that_are_still_to_come_count():
    """At 20:00 of a period of one day the clean mornings are over."""
    trailing = days_of(*[100.0] * 20, *[300.0] * 4)
    rest = rest_of(Account(), MONDAY + 20 * HOUR, trailing, k0=300.0, settings=settings(period_days=1))
    assert [one.g_per_kwh[ZONE] for one in rest.later] == pytest.approx([300.0] * len(rest.later))
    assert sum(one.share for one in rest.later) == pytest.approx(0.75)


@given(st.lists(st.integers(0, 900), min_size=24, max_size=24), st.integers(0, 166), st.integers(0, 59))
def test_later_hours_are_bins_of_equal_weight_in_order(g_per_kwh, hours, minutes):
    now = MONDAY + hours * HOUR + timedelta(minutes=minutes)
    rest = rest_of(Account(), now, days_of(*g_per_kwh))
    means = [one.g_per_kwh[ZONE] for one in rest.later]
    assert 1 <= len(means) <= BINS
    assert means == pytest.approx(sorted(means))
    left = 1.0 - minutes / 60
    assert sum(one.share for one in rest.later) == pytest.approx(1.0 - left / (left + 167 - hours))
    if hours < 144:
        expected = np.mean([g_per_kwh[(hours + 1 + hour) % 24] for hour in range(167 - hours)])
        mean = sum(one.share * one.g_per_kwh[ZONE] for one in rest.later) / sum(one.share for one in rest.later)
        assert mean == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("now", [MONDAY + 167 * HOUR, MONDAY + timedelta(days=7) - timedelta(seconds=1)])
def test_the_last_hour_of_a_period_is_alone(now):
    rest = rest_of(booked((MONDAY, 3_600.0, 0.95, 0.90)), now)
    assert rest.later == ()
    assert np.isfinite(rest.bounds[METRIC])


def test_without_a_history_no_loss_is_tolerated_and_the_hour_stands_for_all_to_come():
    short = TrailingHours((ZONE,), np.arange(5), np.full((5, 1), 200.0))
    rest = rest_of(Account(), MONDAY, short, trailing_range=TrailingRange(200.0, 200.0))
    assert rest.later == ()
    assert rest.bounds == {METRIC: 1.0}
    # What was spent earlier is made up for in all of the hours to come, not in this one.
    spent = booked((MONDAY, 3_600.0, 1.0, 0.9))
    later = rest_of(spent, MONDAY + HOUR, short, trailing_range=TrailingRange(200.0, 200.0))
    assert later.bounds[METRIC] == pytest.approx(1.0 + 0.1 / 167)


def test_a_surplus_lowers_the_bound_to_no_less_than_nothing():
    rest = rest_of(booked((MONDAY, 1e9, 0.9, 1.0)), MONDAY + 100 * HOUR)
    assert rest.bounds == {METRIC: 0.0}


def test_traffic_is_flat_until_the_account_knows_it():
    assert Account().requests_by_hour_of_day(default=7.0).tolist() == [7.0] * 24
    known = booked(*((MONDAY + hour * HOUR, 10.0 * hour, 1.0, 1.0) for hour in range(4)))
    by_hour = known.requests_by_hour_of_day(default=7.0)
    assert by_hour[[1, 2]].tolist() == [10.0, 20.0]
    assert by_hour[5] == 15.0


def message(zone: str, values: dict[int, float]) -> CarbonIntensity:
    points = [IntensityPoint(at=MONDAY + hour * HOUR, intensity_g_per_kwh=value) for hour, value in values.items()]
    return CarbonIntensity(zone=zone, published_at=MONDAY, latest=points[-1], history=tuple(points[:-1]), source="csv")


def test_trailing_hours_of_several_zones_are_aligned():
    latest = LatestIntensities()
    latest.update(message("NL", {0: 100.0, 1: 200.0, 2: 300.0}))
    latest.update(message("GB", {0: 10.0, 2: 30.0}))
    current = {zone: CurrentIntensity(value, MONDAY) for zone, value in (("GB", 30.0), ("NL", 300.0))}
    found = trailing_hours(latest, current, "NL", settings(window_h=2))
    assert found.zones == ("NL", "GB")
    assert found.of_day.tolist() == [1, 2]
    # GB has no value at 01:00: its current one is used.
    assert found.g_per_kwh.tolist() == [[200.0, 30.0], [300.0, 30.0]]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"promise": "period"}, "PROMISE=period needs SPROUT_OPTIMIZER_XI"),
        ({"hourly_floors": {METRIC: 0.9}}, "HOURLY_FLOORS needs SPROUT_OPTIMIZER_PROMISE=period"),
        ({"promise": "period", "xi": {METRIC: 0.1}, "hourly_floors": {"correctness": 0.9}}, "correctness"),
        ({"promise": "monthly", "xi": {METRIC: 0.1}}, "'hourly' or 'period'"),
        ({"promise": "period", "xi": {METRIC: 0.1}, "period_days": 0}, "greater than or equal to 1"),
    ],
)
def test_a_promise_that_is_not_stated_is_refused(more, complaint):
    with pytest.raises(ValidationError, match=complaint):
        OptimizerSettings(**more)


def test_the_hourly_limits_are_what_a_period_promises():
    assert quality_bounds(RANGE.position(200.0), settings()) == {METRIC: 0.95}
