"""Energy and carbon accounts: what the metered joules, and their grams, were used for.

Also the prices, gCO2eq per joule and per second, that apply to any pool and time. Calls that were served and calls of
the counterfactual are priced alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from shared.carbon import JOULES_PER_KWH
from tools.reporting.frame import Calls, Floats, IntensitySeries, partition
from tools.reporting.model import CarbonAccount, EnergyAccount
from tools.reporting.query import CallSums, IntervalSums, Snapshot

NOTHING = CallSums(energy_j=0.0, grams=0.0, embodied_g=0.0, unpriced_j=0.0)


@dataclass(frozen=True, slots=True)
class Site:
    """Location and carbon factors of a pool.

    Attributes:
        zone: grid zone.
        pue: power usage effectiveness.
        embodied_g_per_s: embodied-carbon rate k1, gCO2eq/s.
    """

    zone: str
    pue: float
    embodied_g_per_s: float


def sites_of(*tables: Calls) -> dict[str, Site]:
    """The site of every pool: zone, and the PUE and k1 with which its footprints were computed."""
    sites: dict[str, Site] = {}
    for calls in tables:
        for (pool, zone), where in partition(calls.pool, calls.zone).items():
            if pool in sites:
                continue
            unit_g = calls.energy_intensity[where] / JOULES_PER_KWH
            priced = unit_g > 0
            timed = calls.server_s[where] > 0
            sites[pool] = Site(
                zone=zone,
                pue=float(np.median(calls.operational_g[where][priced] / unit_g[priced])) if priced.any() else 1.0,
                embodied_g_per_s=float(np.median(calls.embodied_g[where][timed] / calls.server_s[where][timed]))
                if timed.any()
                else 0.0,
            )
    return sites


@dataclass(frozen=True, slots=True)
class Prices:
    """Sums over the priced calls of each cell of their prices at one pool, and of products of these.

    A call's prices are a, gCO2eq per joule, and b, gCO2eq per second of server time; Y are the grams that it emitted.
    Shapes `(cells,)`, NaN if unknown.

    Attributes:
        g_per_j, g_per_s: a and b.
        j_j, j_s, s_s: products of a and b.
        grams_j, grams_s: Y x a and Y x b.
    """

    g_per_j: Floats
    g_per_s: Floats
    j_j: Floats
    j_s: Floats
    s_s: Floats
    grams_j: Floats
    grams_s: Floats

    @classmethod
    def unknown(cls, cells: int) -> Self:
        """Prices of which nothing is known."""
        return cls(*(np.full(cells, np.nan) for _ in fields(cls)))

    def grams(self, energy_j: float, server_s: float) -> Floats:
        """gCO2eq if each call used that energy and server time."""
        return self.g_per_j * energy_j + self.g_per_s * server_s


def prices_at(calls: Calls, pool: str, sites: Mapping[str, Site], grid: Mapping[str, IntensitySeries]) -> Prices:
    """The prices of `pool` for the calls of each cell, at their own time.

    Calls in the pool's own zone keep the intensity of their footprints, so the variation of the grid cancels out of the
    comparison. For another zone it is the zone's intensity in the middle of the cell.
    """
    site = sites.get(pool)
    if site is None:
        return Prices.unknown(len(calls))
    series = grid.get(site.zone)
    count = calls.priced.astype(float)
    elsewhere = np.full(len(calls), np.nan) if series is None else series.at(calls.started_s)
    own = (calls.zone == site.zone) & (calls.priced > 0)
    unit, rate = site.pue / JOULES_PER_KWH, site.embodied_g_per_s
    per_j = unit * np.where(own, calls.intensity, count * elsewhere)
    return Prices(
        g_per_j=per_j,
        g_per_s=count * rate,
        j_j=unit**2 * np.where(own, calls.intensity_intensity, count * elsewhere**2),
        j_s=per_j * rate,
        s_s=count * rate**2,
        grams_j=unit * np.where(own, calls.total_intensity, calls.total_g * elsewhere),
        grams_s=calls.total_g * rate,
    )


def grams_per_joule(interval: IntervalSums, grid: Mapping[str, IntensitySeries], sites: Mapping[str, Site]) -> float:
    """The price of a pool's energy in one hour, gCO2eq/J; NaN if the intensity is unknown."""
    series = grid.get(interval.zone)
    if series is None:
        return float("nan")
    site = sites.get(interval.pool)
    pue = 1.0 if site is None else site.pue
    return pue * float(series.at(np.array([interval.middle_s]))[0]) / JOULES_PER_KWH


def energy_account(snapshot: Snapshot) -> EnergyAccount:
    """Split the metered energy into calls, idle and unattributed energy."""
    requests, evaluation, judge = (
        snapshot.purposes.get(purpose, NOTHING).energy_j for purpose in ("request", "evaluation", "judge")
    )
    attributed = sum(interval.attributed_j for interval in snapshot.intervals)
    return EnergyAccount(
        metered_j=snapshot.metered_j,
        requests_j=requests,
        evaluation_j=evaluation,
        judge_j=judge,
        idle_j=sum(interval.idle_j for interval in snapshot.intervals),
        unattributed_j=sum(interval.unattributed_j for interval in snapshot.intervals),
        # Only while calls are unsettled; otherwise a difference is an error and must show as one.
        unsettled_j=max(0.0, attributed - requests - evaluation - judge) if snapshot.unsettled_calls else 0.0,
    )


def carbon_account(snapshot: Snapshot, sites: Mapping[str, Site]) -> CarbonAccount:
    """Price the same energy at the intensity of its time, and add the embodied carbon of the servers' time."""
    purposes = {name: snapshot.purposes.get(name, NOTHING) for name in ("request", "evaluation", "judge")}
    idle_g = unattributed_g = unpriced = embodied_g = 0.0
    for interval in snapshot.intervals:
        site = sites.get(interval.pool)
        embodied_g += 0.0 if site is None else interval.idle_s * site.embodied_g_per_s
        g_per_j = grams_per_joule(interval, snapshot.grid, sites)
        if np.isnan(g_per_j):
            unpriced += interval.idle_j + interval.unattributed_j
        else:
            idle_g += interval.idle_j * g_per_j
            unattributed_g += interval.unattributed_j * g_per_j
    return CarbonAccount(
        requests_g=purposes["request"].grams,
        evaluation_g=purposes["evaluation"].grams,
        judge_g=purposes["judge"].grams,
        idle_g=idle_g + embodied_g,
        unattributed_g=unattributed_g,
        embodied_g=embodied_g + sum(sums.embodied_g for sums in purposes.values()),
        unpriced_j=unpriced + sum(sums.unpriced_j for sums in purposes.values()),
    )
