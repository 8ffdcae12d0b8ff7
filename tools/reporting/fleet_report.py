"""What the meters say of the whole fleet: the saving, why it differs from the attributed one, capacity and power."""

import math
from dataclasses import dataclass, replace

import numpy as np

from shared.fleet import Fleet
from shared.metering.columns import Flags, Floats
from shared.metering.estimation import Roles, bins_in_period, joules_by_pool, roles_of
from shared.metering.tables import MeterTable
from shared.switchback import World
from tools.reporting.accounts import NOTHING
from tools.reporting.breakdown import to_datetime
from tools.reporting.capacity import endpoints_in_use, latency_of, latest_prices, pool_row
from tools.reporting.format import energy, percent, significant_digits
from tools.reporting.meter_model import Metered, PowerPoint, TimeSpan
from tools.reporting.metered import Estimation, estimate
from tools.reporting.query import Snapshot

MOST_POINTS = 1_500
"""Of a plot."""


def metered_report(snapshot: Snapshot) -> Metered:
    """The saving on the meter, capacity and latency."""
    selection, fleet, readings = snapshot.selection, snapshot.fleet, snapshot.readings
    if selection.model is not None or selection.zone is not None:
        return Metered(
            saving=None,
            reason="meters do not distinguish models, and requests move between zones: the saving on the meter is one "
            "of the whole fleet. Leave out --model and --zone",
        )
    roles = roles_of(fleet, readings)
    prices = latest_prices(list(snapshot.policies.by_version.values()))
    table = readings.table
    period = np.zeros(0, dtype=bool) if table is None else bins_in_period(table, selection.since, selection.until)
    pools = tuple(
        pool_row(
            name,
            fleet=fleet,
            readings=readings,
            bins=period,
            price=prices.get(name),
        )
        for name in _serving_pools(fleet, roles)
    )
    found = estimate(snapshot, roles)
    included = [row for row in pools if row.pool not in roles.excluded]
    needed = [row.needed_mean for row in included if row.needed_mean is not None]
    objectives = [row.tpot_objective_ms for row in included if row.tpot_objective_ms is not None]
    report = Metered(
        saving=found.saving,
        reason=found.reason,
        reference_blocks=0 if found.result is None else found.result.blocks,
        excluded_pools=roles.excluded,
        notes=found.notes,
        endpoints=sum(row.endpoints for row in included),
        endpoints_needed_mean=sum(needed) if needed and len(needed) == len(included) else None,
        latency=latency_of(readings, None, in_block=False),
        reference_latency=latency_of(readings, None, in_block=True),
        tpot_objective_ms=min(objectives, default=None),
        pools=pools,
    )
    if table is None or not period.any():
        return report
    every, serving, judging = (
        table.of_pools(names) for names in ((*roles.serving, *roles.judging), roles.serving, roles.judging)
    )
    return replace(
        report,
        explanation=explain(
            _world_sums(snapshot, table, roles, period & _in_world(found, period, "sprout")),
            _world_sums(snapshot, table, roles, period & _in_world(found, period, "reference")),
            endpoints=report.endpoints,
            judge_j=_sum(table.metered_j, judging, period),
            judge_calls_j=snapshot.purposes.get("judge", NOTHING).energy_j,
        ),
        fleet_energy_j=_sum(table.metered_j, every, period),
        idle_energy_j=_sum(table.idle_j, every, period),
        judge_energy_j=_sum(table.metered_j, judging, period),
        endpoints_in_use_mean=endpoints_in_use(table, serving, period),
        power=_power(table, roles, found, period),
        blocks=_block_times(table, found, period),
    )


def _serving_pools(fleet: Fleet | None, roles: Roles) -> tuple[str, ...]:
    """Pools that serve requests, with or without a meter."""
    if fleet is None:
        return roles.serving
    return tuple(pool.name for pool in fleet.pools if pool.model is not None)


@dataclass(frozen=True, slots=True)
class WorldSums:
    """Sums over the serving endpoints in one world.

    Attributes:
        metered_j, idle_j: J.
        tokens: generated.
        in_use: mean number of endpoints with calls; None without readings.
    """

    metered_j: float
    idle_j: float
    tokens: float
    in_use: float | None

    @property
    def idle_pct(self) -> float:
        """Share of idle energy, %."""
        return 100.0 * self.idle_j / self.metered_j if self.metered_j > 0 else 0.0

    @property
    def token_j(self) -> float | None:
        """Energy above idle power per generated token, J; None without tokens."""
        return (self.metered_j - self.idle_j) / self.tokens if self.tokens > 0 else None


def explain(sprout: WorldSums, without: WorldSums, *, endpoints: int, judge_j: float, judge_calls_j: float) -> str:
    """Why the two savings differ, with numbers: idle energy, shared energy, consolidation, judge.

    Args:
        sprout: the time with Sprout.
        without: the reference blocks.
        endpoints: that serve requests.
        judge_j: all energy of the judge's endpoints, J.
        judge_calls_j: energy attributed to its calls, J.
    """
    if not sprout.metered_j > 0:
        return ""
    compared = without.metered_j > 0
    parts = [
        f"idle: of {energy(sprout.metered_j)} on the meters {energy(sprout.idle_j)} ({percent(sprout.idle_pct, 0)}) is "
        "idle power, which no request is charged for"
        + (f"; without Sprout {percent(without.idle_pct, 0)}" if compared else "")
    ]
    if sprout.token_j is not None and without.token_j is not None:
        cause = "a batch shares most of a step's energy, so in smaller batches each token takes more"
        if sprout.token_j < without.token_j:
            cause = "a batch shares most of a step's energy, so in fuller batches each token takes less"
        parts.append(
            f"shared energy: a token took {significant_digits(sprout.token_j)} J above idle power, without Sprout "
            f"{significant_digits(without.token_j)} J; {cause}"
        )
    if sprout.in_use is not None:
        compare = "" if without.in_use is None else f", without Sprout {without.in_use:.1f}"
        parts.append(f"consolidation: {sprout.in_use:.1f} of {endpoints} endpoints had work on average{compare}")
    if judge_j > 0:
        parts.append(f"judge: its endpoints used {energy(judge_j)}, its calls {energy(judge_calls_j)} of it")
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "."


def _in_world(found: Estimation, period: Flags, world: World) -> Flags:
    """Complete bins of a world; without reference blocks all time is with Sprout."""
    if found.bins is None:
        return np.full(len(period), world == "sprout")
    inside: Flags = found.bins.complete & (found.bins.world == world)
    return inside


def _world_sums(snapshot: Snapshot, table: MeterTable, roles: Roles, chosen: Flags) -> WorldSums:
    """Sums over some bins. Tokens count in the bin in which their request started."""
    where = table.of_pools(roles.serving)
    arrivals = snapshot.readings.arrivals
    number = np.floor(arrivals.at_s / table.bin_s) - table.first
    inside = np.isin(arrivals.pool, roles.serving) & np.isin(number, np.flatnonzero(chosen))
    tokens = float(arrivals.tokens[inside].sum())
    return WorldSums(
        metered_j=_sum(table.metered_j, where, chosen),
        idle_j=_sum(table.idle_j, where, chosen),
        tokens=tokens,
        in_use=endpoints_in_use(table, where, chosen),
    )


def _power(table: MeterTable, roles: Roles, found: Estimation, period: Flags) -> tuple[PowerPoint, ...]:
    """Power of the serving endpoints, thinned to what a plot can show."""
    shown = np.flatnonzero(period)
    joules = joules_by_pool(table, roles.serving)[shown].sum(axis=1)
    predicted = np.full(len(shown), np.nan)
    if found.result is not None and len(found.result.predicted_j):
        predicted = found.result.predicted_j[shown]
    step = math.ceil(len(shown) / MOST_POINTS)
    return tuple(
        PowerPoint(
            at=to_datetime(float(table.start_s[shown[first : first + step]].mean()) + table.bin_s / 2),
            power_w=_mean(joules[first : first + step] / table.bin_s),
            without_w=_mean(predicted[first : first + step] / table.bin_s),
        )
        for first in range(0, len(shown), step)
    )


def _block_times(table: MeterTable, found: Estimation, period: Flags) -> tuple[TimeSpan, ...]:
    """The reference blocks of the period."""
    if found.bins is None:
        return ()
    marked = np.concatenate([[False], period & (found.bins.world == "reference"), [False]])
    edges = np.flatnonzero(marked[1:] != marked[:-1])
    starts = np.append(table.start_s, table.start_s[-1] + table.bin_s)
    return tuple(
        TimeSpan(to_datetime(float(starts[first])), to_datetime(float(starts[last])))
        for first, last in zip(edges[::2], edges[1::2], strict=True)
    )


def _sum(values: Floats, where: np.ndarray, bins: Flags) -> float:
    return float(values[where][:, bins].sum())


def _mean(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
