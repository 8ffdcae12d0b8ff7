"""What a joule and a second cost in grams, at any option and time: the same for what was and for what was not."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tools.reporting.calls import Calls, Floats, partition

JOULES_PER_KWH = 3_600_000.0
MAX_AGE_S = 6 * 3600.0
"""How long a zone's last intensity stands for the hours after it."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a pool runs.

    Attributes:
        pue: power usage effectiveness.
        embodied_g_per_s: k1.
    """

    zone: str
    pue: float
    embodied_g_per_s: float


@dataclass(frozen=True, slots=True)
class IntensitySeries:
    """Intensity of one zone as a step function; arrays of shape (points,), in order of time.

    Attributes:
        at_s: seconds since the Unix epoch.
        g_per_kwh: in force from then on.
        estimated: whether the provider estimated it.
    """

    at_s: Floats
    g_per_kwh: Floats
    estimated: np.ndarray[tuple[int], np.dtype[np.bool_]]

    def at(self, moments_s: Floats) -> Floats:
        """The value in force at each moment; NaN before the first, and where the last is too old."""
        if not len(self.at_s):
            return np.full(len(moments_s), np.nan)
        position = np.searchsorted(self.at_s, moments_s, side="right") - 1
        found = np.clip(position, 0, None)
        fresh = (position >= 0) & (moments_s - self.at_s[found] <= MAX_AGE_S)
        return np.where(fresh, self.g_per_kwh[found], np.nan)


def sites_of(*books: Calls) -> dict[str, Site]:
    """What the footprints say of each pool: its zone, and the median of the PUE and k1 that they were computed with."""
    sites: dict[str, Site] = {}
    for calls in books:
        for (pool, zone), where in partition(calls.pool, calls.zone).items():
            if pool in sites:
                continue
            unit_g = calls.energy_j[where] / JOULES_PER_KWH * calls.intensity_g_per_kwh[where]
            priced = unit_g > 0
            timed = calls.processing_s[where] > 0
            sites[pool] = Site(
                zone=zone,
                pue=float(np.median(calls.operational_g[where][priced] / unit_g[priced])) if priced.any() else 1.0,
                embodied_g_per_s=float(np.median(calls.embodied_g[where][timed] / calls.processing_s[where][timed]))
                if timed.any()
                else 0.0,
            )
    return sites


@dataclass(frozen=True, slots=True)
class Prices:
    """Grams per joule and per second that each call would have paid at one pool; arrays of shape (n,), NaN unknown."""

    g_per_j: Floats
    g_per_s: Floats

    def grams(self, energy_j: Floats | float, processing_s: Floats | float) -> Floats:
        """Grams of that energy and time."""
        return self.g_per_j * energy_j + self.g_per_s * processing_s


def prices_at(calls: Calls, pool: str, sites: Mapping[str, Site], grid: Mapping[str, IntensitySeries]) -> Prices:
    """What the calls would have paid per joule and second at `pool`, each at its own time.

    A call in the pool's own zone keeps the intensity of its footprint, so that the swing of the grid cancels out of
    the comparison; for another zone it is the value that was in force there when the call began.
    """
    site = sites.get(pool)
    if site is None:
        unknown = np.full(len(calls), np.nan)
        return Prices(unknown, unknown)
    series = grid.get(site.zone)
    elsewhere = np.full(len(calls), np.nan) if series is None else series.at(calls.started_s)
    own = (calls.zone == site.zone) & ~np.isnan(calls.intensity_g_per_kwh)
    intensity = np.where(own, calls.intensity_g_per_kwh, elsewhere)
    return Prices(site.pue * intensity / JOULES_PER_KWH, np.full(len(calls), site.embodied_g_per_s))
