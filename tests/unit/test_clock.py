"""Event time: all processes of a replay have the same clock."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from shared.runtime.clock import Clock, ClockConfigurationError, ManualClock

START = datetime(2024, 2, 3, tzinfo=UTC)


def test_without_variables_event_time_is_the_wall_clock() -> None:
    clock = Clock.from_environment({})
    assert clock.rate == 1.0
    assert abs(clock.now_s() - time.time()) < 1.0


def test_a_child_process_gets_the_same_clock() -> None:
    clock = Clock.starting(START, rate=720.0)
    assert Clock.from_environment(clock.environment()) == clock


def test_an_accelerated_day_passes_in_two_minutes() -> None:
    clock = Clock(rate=720.0, origin_wall_s=time.time() - 120.0, origin_event_s=START.timestamp())
    assert abs(clock.now() - (START + timedelta(days=1))) < timedelta(minutes=30)
    assert clock.wall_seconds(3600.0) == 5.0
    assert clock.wall_seconds_until(START + timedelta(days=2)) == pytest.approx(120.0, abs=1.0)


def test_an_incomplete_configuration_is_rejected_and_names_the_missing_variables() -> None:
    with pytest.raises(ClockConfigurationError, match="SPROUT_CLOCK_ORIGIN_WALL, SPROUT_CLOCK_ORIGIN_EVENT"):
        Clock.from_environment({"SPROUT_CLOCK_RATE": "720"})


@pytest.mark.parametrize(("rate", "message"), [("fast", "must be a number"), ("0", "greater than 0")])
def test_an_invalid_rate_is_rejected(rate: str, message: str) -> None:
    with pytest.raises(ClockConfigurationError, match=message):
        Clock.from_environment(
            {"SPROUT_CLOCK_RATE": rate, "SPROUT_CLOCK_ORIGIN_WALL": "1", "SPROUT_CLOCK_ORIGIN_EVENT": "1"}
        )


def test_a_manual_clock_moves_only_when_advanced() -> None:
    clock = ManualClock(START)
    assert clock.now() == START
    clock.advance(timedelta(hours=5))
    assert clock.now() == START + timedelta(hours=5)


async def test_sleeping_until_a_past_time_returns_at_once() -> None:
    await Clock().sleep_until(START)
