"""Recorded traces: no value from the future, gaps are preserved, errors name the line."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.local.grid import SAMPLE_ZONE, default_day, shipped_trace, zone_of
from deploy.local.grid import TraceError as GridError
from deploy.local.traces.build import TRACE, text
from services.carbon_feed.feed import Window
from services.carbon_feed.providers.constant import ConstantProvider
from services.carbon_feed.providers.recorded import Trace, TraceError, TraceProvider, load_trace, parse_trace
from shared.messages import IntensityPoint

START = datetime(2024, 2, 1, tzinfo=UTC)
HEADER = "Datetime (UTC),Zone Id,Carbon Intensity gCO₂eq/kWh (direct),Carbon Intensity gCO₂eq/kWh (LCA),Data Estimated"


def trace_of(*rows: str, column="direct", zone="Z") -> Trace:
    return parse_trace([HEADER, *rows], name="t.csv", zone=zone, column=column)


def hours(count: int, missing: set[int] = frozenset()) -> Trace:
    return Trace(
        [IntensityPoint(at=START + timedelta(hours=h), intensity_g_per_kwh=h) for h in range(count) if h not in missing]
    )


def test_the_configured_column_is_read_with_the_estimated_flag():
    row = "2024-02-01 00:00:00,Z,100.5,150,true"
    assert trace_of(row).at(START) == IntensityPoint(at=START, intensity_g_per_kwh=100.5, estimated=True)
    assert trace_of(row, column="life-cycle").at(START).intensity_g_per_kwh == 150


def test_an_empty_cell_and_nan_are_missing_and_never_zero():
    trace = trace_of("2024-02-01 00:00:00,Z,100,1,", "2024-02-01 01:00:00,Z,,1,", "2024-02-01 02:00:00,Z,NaN,1,")
    assert trace.at(START + timedelta(hours=2)).at == START
    assert len(trace.between(START, START + timedelta(days=1))) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has a header and no rows"),
        (["2024-02-01 00:00:00,Y,1,1,"], "no zone 'Z'; it has Y"),
        (["2024-02-01 00:00:00,Z,,1,"], "every value of zone 'Z'"),
        (["yesterday,Z,1,1,"], "line 2.*must be a time"),
        (["2024-02-01 00:00:00,Z,clean,1,"], "line 2.*must be a number"),
        (["2024-02-01 00:00:00,Z,-1,1,"], "at least 0"),
        (["2024-02-01 01:00:00,Z,1,1,", "2024-02-01 01:00:00,Z,1,1,"], "line 3.*sort by time"),
    ],
)
def test_an_invalid_row_is_named_with_its_line(rows, message):
    with pytest.raises(TraceError, match=message):
        trace_of(*rows)


def test_an_empty_or_missing_file_or_column_is_rejected(tmp_path: Path):
    empty = tmp_path / "empty.csv"
    empty.touch()
    with pytest.raises(TraceError, match="is empty"):
        load_trace(empty, zone="Z", column="direct")
    with pytest.raises(TraceError, match="cannot be read"):
        load_trace(tmp_path / "none.csv", zone="Z", column="direct")
    with pytest.raises(TraceError, match="no direct intensity"):
        parse_trace(["Datetime (UTC),Zone Id", "2024-02-01,Z"], name="t", zone="Z", column="direct")


@given(st.integers(0, 60 * 24 * 3), st.sets(st.integers(1, 47)))
def test_the_future_is_not_used_and_gaps_are_preserved(minutes, missing):
    moment = START + timedelta(minutes=minutes)
    trace = hours(48, missing)
    point = trace.at(moment)
    assert point.at <= moment
    assert point.at == max(p.at for p in trace.between(START, moment + timedelta(seconds=1)))
    assert not {START + timedelta(hours=h) for h in missing} & {
        p.at for p in trace.between(START, START + timedelta(3))
    }


@given(st.integers(-400, 400))
def test_a_repeated_trace_keeps_the_hour_of_the_day_and_reaches_back(days):
    now = START + timedelta(days=days, hours=5, minutes=30)
    trace = hours(48).repeated(now, before=timedelta(days=3))
    assert trace.at(now).at == now - timedelta(minutes=30)
    assert trace.at(now).intensity_g_per_kwh % 24 == 5
    assert len(trace.between(now - timedelta(days=3), now)) == 72


async def test_a_replay_has_a_history_and_no_forecast():
    provider = TraceProvider(hours(48), Path("t.csv"), repeat=False, window=timedelta(days=2))
    now = START + timedelta(hours=30, minutes=10)
    assert (await provider.latest(now)).intensity_g_per_kwh == 30
    assert len(await provider.history(now - timedelta(hours=10), now)) == 10
    assert await provider.forecast(now) == ()
    assert provider.next_change(now) == START + timedelta(hours=31)


async def test_a_constant_is_the_same_every_hour():
    provider = ConstantProvider(42.0)
    past = await provider.history(START, START + timedelta(hours=5))
    assert [point.at.hour for point in past] == [0, 1, 2, 3, 4]
    assert {point.intensity_g_per_kwh for point in past} == {42.0}
    assert (await provider.latest(START + timedelta(minutes=59))).at == START


def test_the_window_is_trailing_and_takes_corrections():
    window = Window(timedelta(hours=3))
    points = list(hours(6).between(START, START + timedelta(days=1)))
    window.add(points[:5])
    assert window.is_new(points[5])
    window.advance(points[5])
    assert [p.intensity_g_per_kwh for p in window.history()] == [2, 3, 4]
    assert not window.is_new(points[5])
    assert window.is_new(points[5].model_copy(update={"estimated": True}))
    assert not window.is_new(points[4])


def test_the_sample_trace_is_what_its_script_makes_and_starts_a_week_in():
    assert TRACE.read_text(encoding="utf-8") == text()
    assert zone_of(shipped_trace()) == SAMPLE_ZONE
    assert default_day(shipped_trace()) == datetime(2024, 2, 8, tzinfo=UTC)
    with pytest.raises(GridError, match="no zone 'ATLANTIS'; it has SAMPLE-SOLAR"):
        zone_of(shipped_trace(), wanted="ATLANTIS")
