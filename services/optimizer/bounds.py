"""Where the grid stands, and how much quality may be given up there: k0, its trailing range, b_m(k0).

Only the past is looked at: history and the latest value, never the forecast.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import fmean
from typing import Literal

from shared.messages import CarbonIntensity, IntensityPoint


@dataclass(frozen=True, slots=True)
class InForce:
    """The intensity that a zone is counted with now.

    Attributes:
        at: start of the period that it stands for.
        source: `latest`, or `hour_mean`: the trailing mean of this hour of the day, once the latest value is too old.
    """

    g_per_kwh: float
    at: datetime
    source: Literal["latest", "hour_mean"] = "latest"


@dataclass(frozen=True, slots=True)
class TrailingRange:
    """k0_min and k0_max over the trailing window; they are equal where too little is known to tell them."""

    k0_min: float
    k0_max: float

    def dirtiness(self, k0: float) -> float:
        """(k0 − k0_min)/(k0_max − k0_min), clipped to [0, 1]; 0 where the range is empty."""
        span = self.k0_max - self.k0_min
        return min(max((k0 - self.k0_min) / span, 0.0), 1.0) if span > 0.0 else 0.0


def in_force(intensity: CarbonIntensity, now: datetime, *, max_age: timedelta) -> InForce | None:
    """The latest value while it is fresh, then the same hour's trailing mean, then null (docs/architecture.md).

    Args:
        now: event time.
        max_age: event time from the start of the latest value's period until it is too old.
    """
    if now - intensity.latest.at <= max_age:
        return InForce(intensity.latest.intensity_g_per_kwh, intensity.latest.at)
    same_hour = [point.intensity_g_per_kwh for point in _known(intensity) if point.at.hour == now.hour]
    if not same_hour:
        return None
    return InForce(fmean(same_hour), _hour(now), "hour_mean")


def trailing_range(intensity: CarbonIntensity, *, window: timedelta, min_hours: int) -> TrailingRange:
    """The range over the window that ends with the latest value.

    Args:
        window: event time; the message may hold less.
        min_hours: with values of fewer hours the range is that of the latest value alone, and no loss is tolerated.
    """
    newest = intensity.latest.at
    points = [point for point in _known(intensity) if point.at > newest - window]
    values = [point.intensity_g_per_kwh for point in points]
    return spanned(values, hours=len({_hour(point.at) for point in points}), min_hours=min_hours)


def spanned(values: Sequence[float], *, hours: int, min_hours: int) -> TrailingRange:
    """The range of values, g/kWh, of which the last is the latest.

    Args:
        hours: that have a value.
        min_hours: with fewer the range is that of the latest value alone, and no loss is tolerated.
    """
    known = values if hours >= min_hours else values[-1:]
    return TrailingRange(min(known), max(known))


def quality_bounds(dirtiness: float, xi: Mapping[str, float], *, constant: Collection[str] = ()) -> dict[str, float]:
    """b_m(k0) = 1 − xi_m · dirtiness, by metric.

    Args:
        constant: metrics whose bound is 1 − xi_m at all times: a level of service that the grid has no say in.
    """
    return {metric: 1.0 - loss * (1.0 if metric in constant else dirtiness) for metric, loss in xi.items()}


def _known(intensity: CarbonIntensity) -> list[IntensityPoint]:
    """History up to the latest value, and the latest value."""
    return [*(point for point in intensity.history if point.at < intensity.latest.at), intensity.latest]


def _hour(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)
