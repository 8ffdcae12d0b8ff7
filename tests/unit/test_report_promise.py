"""The account of promises by period in the report: by period, by hour, and in the summary."""

import json
from datetime import timedelta

import pytest

from shared.messages import PeriodAccount, PeriodPromise, Policy
from tests.support.report import DAY, policy_at, record_of, snapshot_of
from tools.reporting.collect import compute_report
from tools.reporting.csv_files import to_csv
from tools.reporting.json_report import to_json
from tools.reporting.quality import policies_below_bound
from tools.reporting.summary import summary_lines
from tools.reporting.tables import tables

METRIC = "preference"


def account(days: int, *, promised: float, kept: float) -> PeriodAccount:
    """Of the day that starts so many days after `DAY`."""
    start = DAY + timedelta(days=days)
    return PeriodAccount(
        start=start, end=start + timedelta(days=1), requests=100.0, promised={METRIC: promised}, kept={METRIC: kept}
    )


def by_period(hour: int, current: PeriodAccount, previous: PeriodAccount | None = None, **more) -> Policy:
    """The policy of an hour, which expects less than its bound."""
    made = policy_at(hour, expected_quality=0.5)
    promise = PeriodPromise(current=current, previous=previous, rest={METRIC: 0.97}, **more)
    return made.model_copy(update={"promise": promise})


def test_the_newest_account_of_every_period_is_shown():
    policies = [
        by_period(0, account(0, promised=0.95, kept=0.94)),
        by_period(23, account(0, promised=0.95, kept=0.93)),
        by_period(24, account(1, promised=0.96, kept=0.96), account(0, promised=0.95, kept=0.955)),
        by_period(25, account(1, promised=0.96, kept=0.97), account(0, promised=0.95, kept=0.955)),
    ]
    report = compute_report(snapshot_of([record_of("a")], policies=policies))
    assert [(row.closed, row.kept, row.rest) for row in report.promised_periods] == [
        (True, 0.955, None),
        (False, 0.97, 0.97),
    ]
    (line,) = [text for label, text in summary_lines(report) if label == "promise"]
    assert line == (
        "preference 97.00 % kept of 96.00 % promised, 2024-02-09 to 2024-02-10 so far; the rest needs 97.00 %"
    )
    table = next(one for one in tables(report) if one.title.startswith("Promise by period"))
    assert table.rows[0][4:] == ("closed", "100", "95.00 %", "95.50 %", "+0.50 points", "–")
    assert "promised_periods.csv" in to_csv(report)
    json.dumps(to_json(report))


def test_the_account_by_hour_is_weighted_by_the_hours_requests():
    first, second = by_period(0, account(0, promised=1.0, kept=1.0)), by_period(1, account(0, promised=1.0, kept=1.0))
    records = [
        record_of("a", at=DAY, policy_version=1),
        record_of("b", at=DAY, policy_version=1),
        record_of("c", at=DAY, policy_version=2),
        record_of("d", at=DAY + timedelta(hours=1), policy_version=2),
    ]
    rows = compute_report(snapshot_of(records, policies=[first, second])).promised_hours
    assert [(row.start, row.requests) for row in rows] == [(DAY, 3), (DAY + timedelta(hours=1), 1)]
    assert rows[0].promised == pytest.approx((2 * first.bounds[METRIC] + second.bounds[METRIC]) / 3)
    assert rows[0].kept == pytest.approx(0.5)


def test_hourly_promises_have_no_account():
    report = compute_report(snapshot_of([record_of("a")], policies=[policy_at(0)]))
    assert (report.promised_periods, report.promised_hours) == ((), ())
    assert "promise" not in dict(summary_lines(report))


@pytest.mark.parametrize(("more", "below"), [({}, 0), ({"shortfall": 0.01}, 1), ({"hourly_floors": {METRIC: 0.6}}, 1)])
def test_an_hour_below_its_bound_counts_only_against_floors_and_shortfalls(more, below):
    assert policies_below_bound([by_period(0, account(0, promised=0.95, kept=0.95), **more)]) == below
