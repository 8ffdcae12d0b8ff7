"""The promise by period: the quality limits hold for the mean over a period, such as 30 days, not for every hour.

Every hour promises what the hourly limits would: b_m(k0). The account adds up what was promised and what was kept, and
the program plans the rest of the period so that both agree at its end. It knows the future only by the past: the hours
to come have the carbon intensities of the trailing window at the same hours of the day
(docs/decisions/0038-promise-by-period.md).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from services.optimizer.bounds import CurrentIntensity, TrailingRange, quality_bounds
from services.optimizer.settings import OptimizerSettings
from shared.carbon import LatestIntensities, trailing_points
from shared.messages import CarbonIntensity, PeriodAccount, Policy

Floats = NDArray[np.float64]

BINS = 10
"""Groups of later hours with similar carbon intensity."""

PERIOD_ORIGIN = datetime(2024, 1, 1, tzinfo=UTC)
"""Periods start a whole number of their lengths after this: days at midnight UTC, weeks on Mondays."""

_HOUR = timedelta(hours=1)
_HOURS_OF_DAY = 24
_SHORTEST_REST = timedelta(minutes=1)
"""What an hour or period still lasts at least, so that the last moment is not divided by nothing."""


@dataclass(frozen=True, slots=True)
class Period:
    """[start, end) that a promise is for."""

    start: datetime
    end: datetime

    @classmethod
    def at(cls, time: datetime, *, days: int) -> "Period":
        """The period of `days` days that contains a time."""
        length = timedelta(days=days)
        start = PERIOD_ORIGIN + (time - PERIOD_ORIGIN) // length * length
        return cls(start, start + length)

    def before(self) -> "Period":
        """The period that ends where this one starts."""
        return Period(self.start - (self.end - self.start), self.start)


@dataclass(frozen=True, slots=True)
class Sums:
    """Requests, and the sums over them of the promised and of the kept quality of one metric."""

    requests: float = 0.0
    promised: float = 0.0
    kept: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.requests + other.requests, self.promised + other.promised, self.kept + other.kept)


@dataclass(slots=True)
class Account:
    """What was promised to one model's requests and what was kept, by hour and metric.

    What was kept is the lower confidence bound that the policy expected when it was served, with its part of the margin
    of the plan, and stays as it was booked: an account that changed with every evaluation could be checked by nobody,
    and prompt groups do not outlive theirs.

    Attributes:
        hours: by start of the hour, then metric.
        booked_until: up to here everything is in the account; None: it is empty.
        changed: hours that were booked since the account was read.
    """

    hours: dict[datetime, dict[str, Sums]] = field(default_factory=dict)
    booked_until: datetime | None = None
    changed: set[datetime] = field(default_factory=set)

    def add(self, at: datetime, requests: float, *, promised: Mapping[str, float], kept: Mapping[str, float]) -> None:
        """Book requests of one hour.

        Args:
            at: a time in the hour.
            requests: number of requests.
            promised: b_m of the hour by metric, relative to the reference's quality.
            kept: quality by metric; a metric without one is not booked.
        """
        hour = _hour(at)
        row = self.hours.setdefault(hour, {})
        for metric in promised.keys() & kept.keys():
            sums = Sums(requests, requests * promised[metric], requests * kept[metric])
            row[metric] = row.get(metric, Sums()) + sums
        self.changed.add(hour)

    def book(self, policy: Policy | None, now: datetime, *, since: datetime) -> None:
        """Book the time up to now, in which a policy was served until it expired, and then the reference.

        Hours without a valid policy promise the reference's own quality, which is what they keep.

        Args:
            policy: as published last; None: there was none.
            now: event time.
            since: earlier times are not booked any more.
        """
        start = self.booked_until
        # Another process's clock may be a little ahead: no time is booked twice.
        self.booked_until = now if start is None else max(start, now)
        if start is None or policy is None:
            return
        for begin, end in _pieces(max(start, since), now, policy.valid_until):
            requests = policy.inputs.requests_per_s * (end - begin).total_seconds()
            if end <= policy.valid_until:
                self.add(begin, requests, promised=policy.bounds, kept=policy.expected_quality)
            else:
                ones = dict.fromkeys(policy.bounds, 1.0)
                self.add(begin, requests, promised=ones, kept=ones)

    def total(self, period: Period) -> dict[str, Sums]:
        """Sums over the hours of a period, by metric."""
        found: dict[str, Sums] = {}
        for hour, row in self.hours.items():
            if period.start <= hour < period.end:
                for metric, sums in row.items():
                    found[metric] = found.get(metric, Sums()) + sums
        return found

    def of_period(self, period: Period) -> PeriodAccount:
        """The account of a period as it is published."""
        found = {metric: sums for metric, sums in self.total(period).items() if sums.requests > 0.0}
        return PeriodAccount(
            start=period.start,
            end=period.end,
            requests=max((sums.requests for sums in found.values()), default=0.0),
            promised={metric: sums.promised / sums.requests for metric, sums in found.items()},
            kept={metric: sums.kept / sums.requests for metric, sums in found.items()},
        )

    def requests_by_hour_of_day(self, *, default: float) -> Floats:
        """Mean requests in each hour of the day, (24,).

        Args:
            default: requests per hour while the account has no whole hour; an hour of the day without one has the mean
                of the others.
        """
        # The first and the last hour may be incomplete.
        whole = sorted(self.hours)[1:-1]
        values = np.array(
            [max(sums.requests for sums in self.hours[hour].values()) for hour in whole if self.hours[hour]]
        )
        if not values.any():
            return np.full(_HOURS_OF_DAY, default)
        of_day = np.array([hour.hour for hour in whole if self.hours[hour]])
        counts = np.bincount(of_day, minlength=_HOURS_OF_DAY)
        sums = np.bincount(of_day, weights=values, minlength=_HOURS_OF_DAY)
        return np.where(counts > 0, sums / np.maximum(counts, 1), values.mean())


def _pieces(start: datetime, end: datetime, cut: datetime) -> Iterator[tuple[datetime, datetime]]:
    """[start, end) cut at every whole hour and at one more time."""
    while start < end:
        next_hour = _hour(start) + _HOUR
        stop = min(next_hour, end, *([cut] if cut > start else []))
        yield start, stop
        start = stop


@dataclass(frozen=True, slots=True, eq=False)
class TrailingHours:
    """Carbon intensities of the trailing window.

    Attributes:
        zones: the zone of the limits first.
        of_day: (hours,), hour of the day, UTC.
        g_per_kwh: (hours, zones), gCO2eq/kWh.
    """

    zones: tuple[str, ...]
    of_day: NDArray[np.int64]
    g_per_kwh: Floats


def trailing_hours(
    latest: LatestIntensities, current: Mapping[str, CurrentIntensity], zone: str, settings: OptimizerSettings
) -> TrailingHours:
    """Hourly means of the `window_h` hours that end with the latest value.

    Args:
        latest: newest message of every zone.
        current: intensity by zone; a zone without a value in an hour has this one.
        zone: of the limits.
        settings: length of the window.
    """
    zones = (zone, *(one for one in current if one != zone))
    by_zone = {one: _hourly_means(latest.get(one), settings) for one in zones}
    hours = sorted(by_zone[zone])
    values = [[by_zone[one].get(hour, current[one].g_per_kwh) for one in zones] for hour in hours]
    return TrailingHours(zones, np.array([hour.hour for hour in hours], dtype=np.int64), np.array(values, ndmin=2))


def _hourly_means(message: CarbonIntensity | None, settings: OptimizerSettings) -> dict[datetime, float]:
    if message is None:
        return {}
    start = message.latest.at - timedelta(hours=settings.window_h)
    found: dict[datetime, list[float]] = {}
    for point in trailing_points(message):
        if point.at > start:
            found.setdefault(_hour(point.at), []).append(point.intensity_g_per_kwh)
    return {hour: fmean(values) for hour, values in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedHours:
    """Later hours of the period with similar carbon intensities.

    Attributes:
        share: of the requests that are still to come in the period.
        g_per_kwh: mean by zone, gCO2eq/kWh.
    """

    share: float
    g_per_kwh: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestOfPeriod:
    """What the program plans: the rest of a period, the present hour included.

    Attributes:
        current: account of the period so far.
        previous: account of the period before; None: nothing was booked in it.
        bounds: mean quality that is needed in the rest, by metric, relative to the reference's; above 1 to make up for
            what was served so far.
        later: the hours after the present one, cleanest first; none in the last hour, and without a history.
    """

    current: PeriodAccount
    previous: PeriodAccount | None
    bounds: dict[str, float]
    later: tuple[ExpectedHours, ...]


def plan_rest(
    account: Account,
    trailing: TrailingHours,
    *,
    period: Period,
    now: datetime,
    k0: float,
    trailing_range: TrailingRange,
    requests_per_s: float,
    settings: OptimizerSettings,
) -> RestOfPeriod:
    """What the rest of the period needs, by what was booked so far.

    Args:
        account: booked until now.
        trailing: intensities of the trailing window.
        period: of which `now` is a part.
        now: event time.
        k0: present intensity in the zone of the limits.
        trailing_range: k0_min and k0_max.
        requests_per_s: rate while the account does not know the traffic by hour of the day.
        settings: the limits, and the least history.
    """
    default = requests_per_s * _HOUR.total_seconds()
    by_hour = account.requests_by_hour_of_day(default=default if default > 0.0 else 1.0)
    to_come, present = _requests_to_come(by_hour, now, period.end)
    rest = present + float(to_come.sum())
    bounds = quality_bounds(trailing_range.position(k0), settings)
    weights = _weights(trailing.of_day, to_come)
    later: tuple[ExpectedHours, ...] = ()
    if len(weights) >= settings.min_window_hours and weights.any():
        later = tuple(_bins(trailing, weights, share=1.0 - present / rest))
        span = trailing_range.k0_max - trailing_range.k0_min
        positions = np.clip((trailing.g_per_kwh[:, 0] - trailing_range.k0_min) / (span or np.inf), 0.0, 1.0)
        of_later = quality_bounds(float(np.average(positions, weights=weights)), settings)
        bounds = {
            metric: (present * one + (rest - present) * of_later[metric]) / rest for metric, one in bounds.items()
        }
    arrears = {metric: sums.promised - sums.kept for metric, sums in account.total(period).items()}
    previous = account.of_period(period.before())
    return RestOfPeriod(
        current=account.of_period(period),
        previous=previous if previous.requests > 0.0 else None,
        bounds={metric: max(0.0, bound + arrears.get(metric, 0.0) / rest) for metric, bound in bounds.items()},
        later=later,
    )


def _requests_to_come(by_hour: Floats, now: datetime, end: datetime) -> tuple[Floats, float]:
    """Requests after the present hour up to the end of the period by hour of the day, and those left of this hour."""
    next_hour = _hour(now) + _HOUR
    present = max(next_hour - now, _SHORTEST_REST) / _HOUR * float(by_hour[now.hour] or by_hour.mean())
    whole_days, odd_hours = divmod(max((end - next_hour) // _HOUR, 0), _HOURS_OF_DAY)
    hours = np.full(_HOURS_OF_DAY, float(whole_days))
    hours[(next_hour.hour + np.arange(odd_hours)) % _HOURS_OF_DAY] += 1.0
    return hours * by_hour, present


def _weights(of_day: NDArray[np.int64], to_come: Floats) -> Floats:
    """Requests that each trailing hour stands for: those to come at its hour of the day, shared by all such hours."""
    counts = np.bincount(of_day, minlength=_HOURS_OF_DAY)
    return (to_come / np.maximum(counts, 1))[of_day]


def _bins(trailing: TrailingHours, weights: Floats, *, share: float) -> Iterator[ExpectedHours]:
    """Up to `BINS` groups of hours of equal weight, by intensity of the zone of the limits."""
    order = np.argsort(trailing.g_per_kwh[:, 0], kind="stable")
    values, weights = trailing.g_per_kwh[order], weights[order] / weights.sum()
    middles = np.cumsum(weights) - weights / 2.0
    places = np.minimum((middles * BINS).astype(int), BINS - 1)
    for place in np.unique(places[weights > 0.0]):
        here = places == place
        means = np.average(values[here], axis=0, weights=weights[here]).tolist()
        yield ExpectedHours(
            share=share * float(weights[here].sum()), g_per_kwh=dict(zip(trailing.zones, means, strict=True))
        )


def _hour(time: datetime) -> datetime:
    return time.replace(minute=0, second=0, microsecond=0)
