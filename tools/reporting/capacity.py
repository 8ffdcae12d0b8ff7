"""Capacity of the pools: endpoints needed over time, energy of idle endpoints, latency, and the price of a token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.fleet import Fleet
from shared.messages import Policy
from shared.messages.policies import PoolPrice
from shared.metering.columns import Flags, Floats
from shared.metering.tables import CELL_S, FleetReadings, Latency, Load, MeterTable
from shared.pools import Pool

NO_LOAD = Load(np.zeros(0), np.zeros(0), np.zeros(0))
NO_LATENCY = Latency(None, False, 0, None, None, None, None)


@dataclass(frozen=True, slots=True)
class PoolRow:
    """Capacity, latency and price of one pool that serves requests. The field names are keys of the JSON report.

    Attributes:
        endpoints: of the fleet file, else those with a meter.
        target_batch: requests at once that an endpoint is to have; None while it is unknown.
        needed_mean: fewest endpoints that could carry the load, mean over time; None without a target.
        in_use_mean: endpoints with calls, mean over time; None without a meter.
        could_sleep, could_sleep_pct: this many endpoints were not needed during this share of the time.
        energy_j, idle_j: on the meter, and its idle power x time, J.
        unused_j: energy of endpoints while they had no call, J.
        latency, reference_latency: with Sprout, and in reference blocks.
        tpot_objective_ms, ttft_objective_ms: of the fleet file.
        price: of the pool's latest policy; None without one.
        brevity_pct: energy of the tokens that shorter answers saved, at `price`, % of the meter without them; None if
            unknown.
    """

    pool: str
    endpoints: int
    target_batch: float | None
    needed_mean: float | None
    in_use_mean: float | None
    could_sleep: int
    could_sleep_pct: float | None
    energy_j: float
    idle_j: float
    unused_j: float
    latency: Latency
    reference_latency: Latency
    tpot_objective_ms: float | None
    ttft_objective_ms: float | None
    price: PoolPrice | None
    brevity_pct: float | None


def latest_prices(policies: Sequence[Policy]) -> dict[str, PoolPrice]:
    """The price of every pool, from the latest policy that has one."""
    prices: dict[str, PoolPrice] = {}
    for policy in sorted(policies, key=lambda one: one.created_at):
        prices.update(policy.inputs.prices)
    return prices


def pool_row(
    name: str,
    *,
    fleet: Fleet | None,
    readings: FleetReadings,
    bins: Flags,
    price: PoolPrice | None,
) -> PoolRow:
    """The row of one pool.

    Args:
        bins: those of the period; shape `(bins,)` of the meter table.
    """
    pool = next((one for one in fleet.pools if one.name == name), None) if fleet is not None else None
    table = readings.table
    where = np.zeros(0, dtype=np.intp) if table is None else table.of_pools([name])
    endpoints = len(where) if pool is None else len(pool.endpoints)
    target = _target_batch(pool, price)
    share = None
    if table is not None and bins.any() and endpoints and target is not None:
        share = needed_share(
            readings.loads.get(name, NO_LOAD),
            since_s=float(table.start_s[bins].min()),
            until_s=float(table.start_s[bins].max()) + table.bin_s,
            target_batch=target,
            endpoints=endpoints,
            least=1 if pool is None else pool.min_awake,
        )
    could_sleep, could_sleep_pct = (0, None) if share is None else sleeping(share)

    def metered(values: Floats) -> float:
        return float(values[where][:, bins].sum())

    return PoolRow(
        pool=name,
        endpoints=endpoints,
        target_batch=target,
        needed_mean=None if share is None else float(share @ np.arange(len(share))),
        in_use_mean=None if table is None or not len(where) else endpoints_in_use(table, where, bins),
        could_sleep=could_sleep,
        could_sleep_pct=could_sleep_pct,
        energy_j=0.0 if table is None else metered(table.metered_j),
        idle_j=0.0 if table is None else metered(table.idle_j),
        unused_j=0.0 if table is None else metered(table.unused_j),
        latency=latency_of(readings, name, in_block=False),
        reference_latency=latency_of(readings, name, in_block=True),
        tpot_objective_ms=_objective_ms(None if pool is None else pool.tpot_objective_ms, readings.stretch),
        ttft_objective_ms=_objective_ms(None if pool is None else pool.ttft_objective_ms, readings.stretch),
        price=price,
        brevity_pct=_brevity_pct(name, readings, bins, price, 0.0 if table is None else metered(table.metered_j)),
    )


def latency_of(readings: FleetReadings, pool: str | None, *, in_block: bool) -> Latency:
    """The latency of a pool's requests, or of all pools together."""
    found = (one for one in readings.latencies if one.pool == pool and one.in_block == in_block)
    return next(found, NO_LATENCY)


def endpoints_in_use(table: MeterTable, where: Sequence[int] | np.ndarray, bins: Flags) -> float | None:
    """Mean number of these endpoints that had calls; None without a bin with readings."""
    covered = table.covered_s[where][:, bins]
    if not covered.sum() > 0:
        return None
    busy = table.busy_s[where][:, bins]
    # By endpoint, because one may have been metered for a shorter time.
    return float((busy.sum(axis=1) / np.maximum(covered.sum(axis=1), 1e-9)).sum())


def needed_share(
    load: Load, *, since_s: float, until_s: float, target_batch: float, endpoints: int, least: int
) -> Floats:
    """Share of the time in which 0, 1, ... endpoints were needed; shape `(endpoints + 1,)`, sums to 1.

    In steps of `CELL_S`: calls that start in a cell run evenly from its begin until their mean duration after its end.

    Args:
        target_batch: requests at once on one endpoint.
        endpoints: more than these are not counted.
        least: endpoints that are needed without load, too.
    """
    edges = np.append(np.arange(since_s, until_s, CELL_S), until_s)
    spread_s = CELL_S + np.divide(load.seconds, load.calls, out=np.zeros_like(load.seconds), where=load.calls > 0)
    # Integral over time of the calls that run at once, at the edges: each cell's seconds grow from 0 to all.
    times = np.concatenate([load.started_s, load.started_s + spread_s])
    slopes = np.concatenate([load.seconds / spread_s, -load.seconds / spread_s])
    order = np.argsort(times, kind="stable")
    times, rate = times[order], np.cumsum(slopes[order])
    done = np.concatenate([[0.0], np.cumsum(np.diff(times) * rate[:-1])]) if len(times) else np.zeros(0)
    at_edges = np.interp(edges, times, done) if len(times) else np.zeros(len(edges))
    lasting = np.diff(edges)
    needed = np.ceil(np.diff(at_edges) / lasting / target_batch - 1e-9)
    needed = np.clip(needed, min(least, endpoints), endpoints).astype(np.int64)
    seconds = np.bincount(needed, weights=lasting, minlength=endpoints + 1)
    return np.asarray(seconds / seconds.sum(), dtype=float)


def sleeping(share: Floats) -> tuple[int, float | None]:
    """How many endpoints could have slept, and % of the time; the number for which their product is largest.

    Args:
        share: see `needed_share`.
    """
    endpoints = len(share) - 1
    most = np.cumsum(share)
    found = max(range(1, endpoints), key=lambda idle: idle * float(most[endpoints - idle]), default=0)
    if found == 0 or most[endpoints - found] <= 0:
        return 0, None
    return found, 100.0 * float(most[endpoints - found])


def _brevity_pct(
    pool: str, readings: FleetReadings, bins: Flags, price: PoolPrice | None, metered_j: float
) -> float | None:
    """Tokens that were not generated, at the price of a token, % of the energy that they would have come to."""
    table = readings.table
    if table is None or not bins.any() or price is None or price.token_j is None or metered_j <= 0:
        return None
    since_s, until_s = float(table.start_s[bins].min()), float(table.start_s[bins].max()) + table.bin_s
    arrivals = readings.arrivals
    here = (arrivals.pool == pool) & (arrivals.at_s >= since_s) & (arrivals.at_s < until_s)
    saved_j = price.token_j * float((arrivals.without_sprout - arrivals.tokens)[here].sum())
    return None if math.isnan(saved_j) else 100.0 * saved_j / (metered_j + saved_j)


def _objective_ms(value: float | None, stretch: float) -> float | None:
    return None if value is None else value / stretch


def _target_batch(pool: Pool | None, price: PoolPrice | None) -> float | None:
    if pool is not None and pool.target_batch is not None:
        return float(pool.target_batch)
    # The price of elastic capacity is that of a full endpoint.
    return price.batch if price is not None and price.basis == "average" and price.batch else None
