"""Event time: one clock for all processes of a deployment.

In production, event time is wall-clock time. In an accelerated replay every process, model servers included, derives
event time from the same three environment variables, so that power, time and energy are consistent:

    event = origin_event + (wall - origin_wall) * rate

This module uses the standard library only: model servers import it in Python environments of their own.
"""

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

RATE_VARIABLE = "SPROUT_CLOCK_RATE"
ORIGIN_WALL_VARIABLE = "SPROUT_CLOCK_ORIGIN_WALL"
ORIGIN_EVENT_VARIABLE = "SPROUT_CLOCK_ORIGIN_EVENT"


class ClockConfigurationError(ValueError):
    """The environment variables of the clock are incomplete, or not numbers."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Maps wall time to event time; the default is the identity.

    Attributes:
        rate: event seconds per wall second, > 0; 720 replays a day in two minutes.
        origin_wall_s: wall time of the origin, seconds since the Unix epoch.
        origin_event_s: event time of the origin, seconds since the Unix epoch.
    """

    rate: float = 1.0
    origin_wall_s: float = 0.0
    origin_event_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ClockConfigurationError(f"{RATE_VARIABLE} must be greater than 0, got {self.rate}")

    @classmethod
    def starting(cls, event_start: datetime, *, rate: float) -> "Clock":
        """A clock that shows `event_start` now and runs `rate` times as fast as wall-clock time."""
        return cls(rate=rate, origin_wall_s=time.time(), origin_event_s=event_start.timestamp())

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Clock":
        """The clock of the deployment: wall-clock time unless the three `SPROUT_CLOCK_*` variables are set.

        Raises:
            ClockConfigurationError: only some of the variables are set, or one is not a number.
        """
        source = os.environ if environment is None else environment
        names = (RATE_VARIABLE, ORIGIN_WALL_VARIABLE, ORIGIN_EVENT_VARIABLE)
        given = {name: source[name] for name in names if source.get(name)}
        if not given:
            return cls()
        missing = [name for name in names if name not in given]
        if missing:
            raise ClockConfigurationError(
                f"{', '.join(missing)} must be set together with {', '.join(given)}, "
                "or leave all three unset for real time"
            )
        numbers = {}
        for name, text in given.items():
            try:
                numbers[name] = float(text)
            except ValueError:
                raise ClockConfigurationError(f"{name} must be a number, got {text!r}") from None
        return cls(
            rate=numbers[RATE_VARIABLE],
            origin_wall_s=numbers[ORIGIN_WALL_VARIABLE],
            origin_event_s=numbers[ORIGIN_EVENT_VARIABLE],
        )

    def environment(self) -> dict[str, str]:
        """The environment variables that give a child process the same clock."""
        return {
            RATE_VARIABLE: repr(self.rate),
            ORIGIN_WALL_VARIABLE: repr(self.origin_wall_s),
            ORIGIN_EVENT_VARIABLE: repr(self.origin_event_s),
        }

    def now_s(self) -> float:
        """Event time, seconds since the Unix epoch."""
        return self.origin_event_s + (time.time() - self.origin_wall_s) * self.rate

    def now(self) -> datetime:
        """Event time, UTC, with its time zone."""
        return datetime.fromtimestamp(self.now_s(), UTC)

    def wall_seconds(self, event_seconds: float) -> float:
        """Wall seconds that `event_seconds` take."""
        return event_seconds / self.rate

    def wall_seconds_until(self, event_time: datetime) -> float:
        """Wall seconds until `event_time`; negative once it has passed."""
        return (event_time.timestamp() - self.now_s()) / self.rate

    async def sleep(self, event_seconds: float) -> None:
        """Sleep for `event_seconds` of event time."""
        await asyncio.sleep(max(0.0, self.wall_seconds(event_seconds)))

    async def sleep_until(self, event_time: datetime) -> None:
        """Sleep until `event_time`; returns at once if it has passed."""
        await asyncio.sleep(max(0.0, self.wall_seconds_until(event_time)))


class ManualClock(Clock):
    """A clock that moves only by `advance`; for simulations and tests."""

    __slots__ = ("_now",)

    def __init__(self, now: datetime) -> None:
        super().__init__()
        object.__setattr__(self, "_now", now)

    def now_s(self) -> float:
        """Event time, seconds since the Unix epoch."""
        now: datetime = object.__getattribute__(self, "_now")
        return now.timestamp()

    def advance(self, span: timedelta) -> None:
        """Move event time forward."""
        now: datetime = object.__getattribute__(self, "_now")
        object.__setattr__(self, "_now", now + span)
