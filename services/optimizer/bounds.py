"""The quality limits of the program: current carbon intensity k0, its trailing range, b_m(k0), and confidence levels.

Only the past is used: history and the latest value, never the forecast.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import NormalDist, fmean
from typing import Literal

import numpy as np

from services.optimizer.settings import OptimizerSettings
from shared.carbon import LatestIntensities, trailing_points
from shared.messages import CarbonIntensity


@dataclass(frozen=True, slots=True)
class CurrentIntensity:
    """The carbon intensity that a zone is priced with now.

    Attributes:
        g_per_kwh: gCO2eq/kWh.
        at: start of the period that the value is for.
        source: `latest`, or `hour_mean`: the trailing mean of this hour of the day, once the latest value is too old.
    """

    g_per_kwh: float
    at: datetime
    source: Literal["latest", "hour_mean"] = "latest"


@dataclass(frozen=True, slots=True)
class TrailingRange:
    """k0_min and k0_max over the trailing window, gCO2eq/kWh; equal if there are too few values.

    They are percentiles, so that a single wrong value does not change every limit for as long as the window is.
    """

    k0_min: float
    k0_max: float

    def position(self, k0: float) -> float:
        """(k0 - k0_min) / (k0_max - k0_min), clipped to [0, 1]; 0 if the range is empty."""
        span = self.k0_max - self.k0_min
        return min(max((k0 - self.k0_min) / span, 0.0), 1.0) if span > 0.0 else 0.0


def current_intensity(
    intensity: CarbonIntensity, now: datetime, settings: OptimizerSettings
) -> CurrentIntensity | None:
    """The latest value, or the trailing mean of this hour of the day once that is older than `max_intensity_age_s`.

    Returns:
        None if the latest value is too old and no earlier day has a value for this hour.
    """
    if now - intensity.latest.at <= timedelta(seconds=settings.max_intensity_age_s):
        return CurrentIntensity(intensity.latest.intensity_g_per_kwh, intensity.latest.at)
    same_hour = [point.intensity_g_per_kwh for point in trailing_points(intensity) if point.at.hour == now.hour]
    if not same_hour:
        return None
    return CurrentIntensity(fmean(same_hour), _hour(now), "hour_mean")


def current_intensities(
    latest: LatestIntensities, zones: set[str], now: datetime, settings: OptimizerSettings
) -> dict[str, CurrentIntensity]:
    """Current intensity by zone; zones without a usable value are left out."""
    found: dict[str, CurrentIntensity] = {}
    for zone in sorted(zones):
        message = latest.get(zone)
        value = None if message is None else current_intensity(message, now, settings)
        if value is not None:
            found[zone] = value
    return found


def trailing_range(intensity: CarbonIntensity, settings: OptimizerSettings) -> TrailingRange:
    """Range over the `window_h` hours that end with the latest value; the message may hold fewer."""
    start = intensity.latest.at - timedelta(hours=settings.window_h)
    points = [point for point in trailing_points(intensity) if point.at > start]
    values = [point.intensity_g_per_kwh for point in points]
    return range_of(values, hours=len({_hour(point.at) for point in points}), settings=settings)


def range_of(values: Sequence[float], *, hours: int, settings: OptimizerSettings) -> TrailingRange:
    """Range of intensities.

    Args:
        values: gCO2eq/kWh, the latest last.
        hours: how many hours have a value. With fewer than `min_window_hours` the range is that of the latest value
            only, so that no quality loss is tolerated.
        settings: the minimum, and the percentile.
    """
    known = values if hours >= settings.min_window_hours else values[-1:]
    low, high = np.percentile(known, (settings.range_percentile, 100.0 - settings.range_percentile)).tolist()
    return TrailingRange(low, high)


def quality_bounds(position: float, settings: OptimizerSettings) -> dict[str, float]:
    """b_m(k0) = 1 - xi_m * position by metric; 1 - xi_m for the metrics of `constant_bounds`.

    Args:
        position: of k0 in its trailing range, in [0, 1].
        settings: xi and the constant bounds.
    """
    return {
        metric: 1.0 - loss * (1.0 if metric in settings.constant_bounds else position)
        for metric, loss in settings.xi.items()
    }


def joint_confidence_z(
    bounds: Mapping[str, float], settings: OptimizerSettings, *, shares: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Standard errors to take off each metric so that all limits hold together as often as a single one would.

    A single limit is missed with the probability that a normal variable exceeds `confidence_z`. All limits together may
    be missed with that probability, each with its share of it (Bonferroni): for two limits with equal shares 1 becomes
    1.41, and 1.645 becomes 1.96. `confidence_z_by_metric` is used as is, and 0 is no margin for any of them.

    Args:
        bounds: b_m by metric; 0 is no limit and left out.
        settings: the confidence level of a single limit.
        shares: by limited metric, sum to 1; None: equal ones.
    """
    limited = [metric for metric, bound in bounds.items() if bound > 0.0]
    shares = shares or {metric: 1.0 / len(limited) for metric in limited}
    missed = math.erfc(settings.confidence_z / math.sqrt(2.0)) / 2.0  # exact also for large z
    joint = {metric: -NormalDist().inv_cdf(missed * shares[metric]) for metric in limited}
    return {
        metric: settings.confidence_z_by_metric.get(metric, joint[metric] if settings.confidence_z else 0.0)
        for metric in limited
    }


def _hour(time: datetime) -> datetime:
    return time.replace(minute=0, second=0, microsecond=0)
