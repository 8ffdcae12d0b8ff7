"""The saving on the meter, by switchback.

`shared/metered_saving.py` estimates it from bins of the whole fleet. Here: which pools have meters, their bins, the
checks without which the estimate would be wrong, and the energy of the judge's endpoints, which is a cost of Sprout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from shared.carbon import JOULES_PER_KWH
from shared.fleet import Fleet
from shared.metered_saving import Estimate, FleetBins, MeteredSaving, Saving, metered_saving
from shared.pools import Pool
from shared.switchback import SwitchbackSchedule
from tools.reporting.accounts import Site
from tools.reporting.breakdown import HOUR_S
from tools.reporting.demand import AnswerLengths, demand
from tools.reporting.format import percent, significant_digits
from tools.reporting.frame import Flags, Floats
from tools.reporting.meter_model import MeterSaving
from tools.reporting.meters import INTERVALS_PER_BIN, FleetReadings, MeterTable
from tools.reporting.query import Snapshot
from tools.reporting.savings import Interval

LARGEST_MISMATCH = 0.1
"""Largest share of requests that may contradict the schedule of the switchback."""
MUCH_EXTRAPOLATION_PCT = 5.0
LARGEST_STUCK = 0.5
"""A pool is left out if a meter stood still in a larger share of the bins in which calls ran."""


@dataclass(frozen=True, slots=True)
class Roles:
    """The pools by what they do; pools that are left out are in `excluded` only, with the reason."""

    serving: tuple[str, ...]
    judging: tuple[str, ...]
    excluded: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Estimation:
    """The estimate of one report; what is unknown is None.

    Attributes:
        reason: why there is no saving, and what to do; empty with a saving.
        bins: input of the estimator; None if there is none.
        result: its result.
        notes: other things to know about the readings.
    """

    saving: MeterSaving | None
    reason: str
    bins: FleetBins | None = None
    result: MeteredSaving | None = None
    notes: tuple[str, ...] = ()


def estimate(snapshot: Snapshot, roles: Roles, sites: Mapping[str, Site]) -> Estimation:
    """Estimate the saving on the meter, or say why it cannot be estimated."""
    fleet, table, selection = snapshot.fleet, snapshot.readings.table, snapshot.selection
    if fleet is None:
        return Estimation(
            None, "the fleet file is unknown, and with it the reference blocks: give --fleet, or set SPROUT_FLEET_FILE"
        )
    problem = _problem(fleet, snapshot.readings, roles)
    if problem or table is None:
        return Estimation(None, problem)
    schedule = SwitchbackSchedule(fleet.switchback)
    bins = fleet_bins(snapshot, table, roles, sites, schedule)
    problem = _mismatch(snapshot, schedule)
    if np.isnan(bins.demand).all():
        problem = (
            "no request was served without a directive, so the demand is unknown: set SPROUT_OPTIMIZER_HOLDOUT, or "
            "wait for a reference block"
        )
    if problem:
        return Estimation(None, problem, bins)
    in_period = bins_in_period(table, selection.since, selection.until)
    if not in_period.any():
        return Estimation(None, "there is no meter reading in this time", bins)
    period_s = table.start_s[in_period]
    result = metered_saving(bins, since_s=float(period_s[0]), until_s=float(period_s[-1]) + table.bin_s)
    if result.energy is None or result.carbon is None:
        return Estimation(None, f"{result.reason}{_remedy(result, schedule)}", bins, result)
    counted = in_period & bins.complete
    judge_j = joules_by_pool(table, roles.judging)[counted]
    judge_g = judge_j * _g_per_kwh(snapshot, table, roles.judging, sites)[counted] / JOULES_PER_KWH
    energy_pct, carbon_pct = _net_pct(result.energy, judge_j.sum()), _net_pct(result.carbon, judge_g.sum())
    saving = MeterSaving(
        saved_g=result.carbon.saved.value - float(judge_g.sum()),
        saved_g_interval=_less(result.carbon.saved, float(judge_g.sum())),
        saved_j=result.energy.saved.value - float(judge_j.sum()),
        saved_j_interval=_less(result.energy.saved, float(judge_j.sum())),
        saving_pct=None if energy_pct is None else energy_pct.value,
        saving_interval=None if energy_pct is None else _less(energy_pct, 0.0),
        carbon_saving_pct=None if carbon_pct is None else carbon_pct.value,
        carbon_saving_interval=None if carbon_pct is None else _less(carbon_pct, 0.0),
        without_j=result.energy.without_sprout.value,
        without_g=result.carbon.without_sprout.value,
        hours=result.bins * table.bin_s / HOUR_S,
        hours_left_out=result.bins_left_out * table.bin_s / HOUR_S,
        extrapolated_pct=100.0 * result.extrapolated_share,
    )
    return Estimation(saving, "", bins, result, _notes(saving, table, roles, in_period))


def _problem(fleet: Fleet, readings: FleetReadings, roles: Roles) -> str:
    """Why nothing can be estimated, and what to do; empty if something can."""
    settings = fleet.switchback
    if settings.share <= 0:
        return (
            "the switchback is off (share = 0): set share = 0.02 under [switchback] in the fleet file, and restart "
            "routers and evaluator"
        )
    if readings.table is None or readings.interval_s is None:
        return "the ledger has no meter reading in this time"
    if not roles.serving:
        return "no pool that serves requests has a meter in this time"
    if INTERVALS_PER_BIN * readings.interval_s > settings.block_s - settings.washout_s:
        return (
            f"meters are read every {readings.interval_s:.0f} s, too seldom for blocks of {settings.block_s:.0f} s of "
            f"which {settings.washout_s:.0f} s do not count: lower SPROUT_LEDGER_SCRAPE_INTERVAL_S, or set a larger "
            "block_s under [switchback]"
        )
    return ""


def _remedy(result: MeteredSaving, schedule: SwitchbackSchedule) -> str:
    if not result.blocks_missing:
        return ""
    hours = schedule.stratum_blocks * schedule.settings.block_s / HOUR_S
    return (
        f". There is one block in about {significant_digits(hours, 2)} h: choose a longer period, or a larger share or "
        "shorter blocks under [switchback]"
    )


def _net_pct(saving: Saving, cost: float) -> Estimate | None:
    """The saving less a cost, % of what would have been without Sprout; None if that may be 0."""
    without = saving.without_sprout
    if without.low <= 0:
        return None
    low, high = (100.0 * (1.0 - (saving.actual + cost) / one) for one in (without.low, without.high))
    return Estimate(100.0 * (1.0 - (saving.actual + cost) / without.value), low, high)


def _less(estimate: Estimate, cost: float) -> Interval:
    return Interval(estimate.low - cost, estimate.high - cost)


def _notes(saving: MeterSaving, table: MeterTable, roles: Roles, in_period: Flags) -> tuple[str, ...]:
    notes = []
    if saving.hours_left_out > 0:
        gaps = [
            table.endpoint[place]
            for place in table.of_pools([*roles.serving, *roles.judging])
            if not table.complete[place][in_period].all()
        ]
        notes.append(
            f"{significant_digits(saving.hours_left_out, 2)} h are left out because a reading or a carbon intensity is "
            f"missing or wrong (endpoints without all readings: {', '.join(gaps) or 'none'})"
        )
    if saving.extrapolated_pct > MUCH_EXTRAPOLATION_PCT:
        notes.append(
            f"in {percent(saving.extrapolated_pct)} of the time the demand was outside of that of every reference "
            "block, where the estimate extrapolates"
        )
    return tuple(notes)


def roles_of(fleet: Fleet | None, readings: FleetReadings, *, served: set[str]) -> Roles:
    """Which pools serve, which judge, and which have no meter that can be used.

    Args:
        served: pools that served requests; decides for pools that the fleet file does not list.
    """
    table = readings.table
    seen = set() if table is None else set(table.pool)
    listed: dict[str, Pool] = {} if fleet is None else {pool.name: pool for pool in fleet.pools}
    excluded = {
        pool.name: reason + ("; the judge's energy is not subtracted" if pool.model is None else "")
        for pool in listed.values()
        if (reason := _unmetered(pool, table)) is not None
    }
    names = [*listed, *sorted((seen | served) - listed.keys())]
    judging = {name for name in names if (listed[name].model is None if name in listed else name not in served)}
    return Roles(
        serving=tuple(name for name in names if name not in judging and name not in excluded and name in seen),
        judging=tuple(name for name in names if name in judging and name not in excluded and name in seen),
        excluded=excluded,
    )


def _unmetered(pool: Pool, table: MeterTable | None) -> str | None:
    """Why a pool has no usable meter; None if it has."""
    without = [endpoint.name for endpoint in pool.endpoints if endpoint.metrics is None]
    if without:
        return f"no meter: endpoint {', '.join(without)} has no 'metrics' in the fleet file"
    if table is None:
        return None
    never = [endpoint.name for endpoint in pool.endpoints if endpoint.name not in table.endpoint]
    if never:
        return f"no reading of endpoint {', '.join(never)} in this time"
    places = table.of_pools([pool.name])
    busy, stuck = table.busy[places].sum(axis=1), table.stuck[places].sum(axis=1)
    still = [table.endpoint[place] for place, b, s in zip(places, busy, stuck, strict=True) if s > LARGEST_STUCK * b]
    if still:
        return f"the meter of endpoint {', '.join(still)} stood still while calls ran"
    return None


def fleet_bins(
    snapshot: Snapshot, table: MeterTable, roles: Roles, sites: Mapping[str, Site], schedule: SwitchbackSchedule
) -> FleetBins:
    """The input of the estimator: one column per serving pool; a bin that the judge's meters lack is unknown."""
    edges = np.append(table.start_s, table.start_s[-1] + table.bin_s)
    readings, world = snapshot.readings, worlds_of(table, schedule)
    arrivals = readings.arrivals.select(np.isin(readings.arrivals.pool, roles.serving))
    joules = joules_by_pool(table, roles.serving)
    joules[~np.isfinite(joules_by_pool(table, roles.judging)).all(axis=1)] = np.nan
    factors = _g_per_kwh(snapshot, table, roles.serving, sites)
    factors[~np.isfinite(_g_per_kwh(snapshot, table, roles.judging, sites)).all(axis=1)] = np.nan
    return FleetBins(
        length_s=table.bin_s,
        start_s=table.start_s,
        joules=joules,
        g_per_kwh=factors,
        demand=demand(arrivals, AnswerLengths(readings.answers), edges, world, readings.quantiles),
        world=world,
    )


def worlds_of(table: MeterTable, schedule: SwitchbackSchedule) -> NDArray[np.str_]:
    """The world of every bin; `washout` if the world changes in it."""
    inside = 1e-6 * table.bin_s
    first = _worlds_at(schedule, table.start_s + inside)
    return np.where(first == _worlds_at(schedule, table.start_s + table.bin_s - inside), first, "washout")


def _worlds_at(schedule: SwitchbackSchedule, times_s: Floats) -> NDArray[np.str_]:
    """The world at each time. It depends on the block of a time, and on that of the time a washout earlier."""
    settings = schedule.settings
    blocks = np.floor_divide(np.stack((times_s, times_s - settings.washout_s)), settings.block_s)
    _, examples, place = np.unique(blocks, axis=1, return_index=True, return_inverse=True)
    worlds = [schedule.world(datetime.fromtimestamp(at_s, UTC)) for at_s in times_s[examples].tolist()]
    return np.array(worlds, dtype=np.str_)[place]


def joules_by_pool(table: MeterTable, pools: Sequence[str]) -> Floats:
    """Energy by bin and pool, shape `(bins, pools)`; NaN where that of an endpoint is unknown."""
    known = np.where(table.complete, table.metered_j, np.nan)
    columns = [known[table.of_pools([pool])].sum(axis=0) for pool in pools]
    return np.column_stack(columns) if columns else np.zeros((table.metered_j.shape[1], 0))


def _g_per_kwh(snapshot: Snapshot, table: MeterTable, pools: Sequence[str], sites: Mapping[str, Site]) -> Floats:
    """Carbon intensity x PUE by bin and pool, shape `(bins, pools)`; NaN where it is unknown."""
    middle = table.start_s + table.bin_s / 2
    pues = {} if snapshot.fleet is None else {pool.name: pool.pue for pool in snapshot.fleet.pools}
    columns = []
    for pool in pools:
        zone = table.zone[int(table.of_pools([pool])[0])]
        series = snapshot.grid.get(zone)
        site = sites.get(pool)
        pue = pues.get(pool, 1.0 if site is None else site.pue)
        columns.append(np.full(len(middle), np.nan) if series is None else pue * series.at(middle))
    return np.column_stack(columns) if columns else np.zeros((len(middle), 0))


def _mismatch(snapshot: Snapshot, schedule: SwitchbackSchedule) -> str:
    """How the requests contradict the schedule, which then is not the one that the routers used; empty if not."""
    arrivals = snapshot.readings.arrivals
    world = _worlds_at(schedule, arrivals.at_s)
    by_policy, by_switchback = arrivals.source == "policy", arrivals.source == "switchback"

    def requests(which: Flags) -> int:
        return int(arrivals.requests[which].sum())

    switched, outside = requests(by_switchback), requests(by_switchback & (world == "sprout"))
    against = requests(by_policy & (world == "reference"))
    inside = requests((by_policy | by_switchback) & (world == "reference"))
    if outside > LARGEST_MISMATCH * max(1, switched):
        return (
            f"{outside:,} of {switched:,} requests of the switchback were served outside of the reference blocks of "
            "this fleet file: give the file that the routers used, or start the period after it was changed (--since)"
        )
    if against > LARGEST_MISMATCH * max(1, inside):
        return (
            f"{against:,} of {inside:,} requests in reference blocks were served by the policy: do all routers read "
            "this fleet file? If it was changed, start the period after the change (--since)"
        )
    return ""


def bins_in_period(table: MeterTable, since: datetime | None, until: datetime | None) -> Flags:
    """The bins that start in a period; shape `(bins,)`. Without its limits all, but no half bin at either end."""
    start_s = table.start_s
    inside = np.ones(len(start_s), dtype=bool)
    for end in (0, -1):
        inside[end] = table.complete[:, end].all()
    if since is not None:
        inside &= start_s >= since.timestamp()
    if until is not None:
        inside &= start_s < until.timestamp()
    return inside
