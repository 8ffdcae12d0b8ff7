"""Conservation: the joules that the meters counted, and the grams they came to, by what they were spent on."""

from collections.abc import Mapping

import numpy as np

from tools.reporting.books import Books, CallSums, IntervalSums
from tools.reporting.grams import JOULES_PER_KWH, IntensitySeries, Site
from tools.reporting.model import CarbonAccount, EnergyAccount

NOTHING = CallSums(energy_j=0.0, grams=0.0, embodied_g=0.0, unpriced_j=0.0)


def energy_account(books: Books) -> EnergyAccount:
    """Share the metered joules among calls, idle power and what nothing explains."""
    requests, evaluation, judge = (
        books.purposes.get(purpose, NOTHING).energy_j for purpose in ("request", "evaluation", "judge")
    )
    attributed = sum(interval.attributed_j for interval in books.intervals)
    return EnergyAccount(
        metered_j=books.metered_j,
        requests_j=requests,
        evaluation_j=evaluation,
        judge_j=judge,
        idle_j=sum(interval.idle_j for interval in books.intervals),
        unattributed_j=sum(interval.unattributed_j for interval in books.intervals),
        # Only where calls wait to be settled: elsewhere a difference would be an error, and must show as one.
        unsettled_j=max(0.0, attributed - requests - evaluation - judge) if books.unsettled_calls else 0.0,
    )


def carbon_account(books: Books, sites: Mapping[str, Site]) -> CarbonAccount:
    """Price the same joules with the intensity in force, embodied carbon included where a call took time."""
    purposes = {name: books.purposes.get(name, NOTHING) for name in ("request", "evaluation", "judge")}
    idle_g = unattributed_g = unpriced = 0.0
    for interval in books.intervals:
        g_per_j = price_of(interval, books.grid, sites)
        if np.isnan(g_per_j):
            unpriced += interval.idle_j + interval.unattributed_j
        else:
            idle_g += interval.idle_j * g_per_j
            unattributed_g += interval.unattributed_j * g_per_j
    return CarbonAccount(
        requests_g=purposes["request"].grams,
        evaluation_g=purposes["evaluation"].grams,
        judge_g=purposes["judge"].grams,
        idle_g=idle_g,
        unattributed_g=unattributed_g,
        embodied_g=sum(sums.embodied_g for sums in purposes.values()),
        unpriced_j=unpriced + sum(sums.unpriced_j for sums in purposes.values()),
    )


def price_of(interval: IntervalSums, grid: Mapping[str, IntensitySeries], sites: Mapping[str, Site]) -> float:
    """Grams per joule in an hour of a pool's intervals; NaN where the intensity is unknown."""
    series = grid.get(interval.zone)
    if series is None:
        return float("nan")
    site = sites.get(interval.pool)
    pue = 1.0 if site is None else site.pue
    return pue * float(series.at(np.array([interval.middle_s]))[0]) / JOULES_PER_KWH
