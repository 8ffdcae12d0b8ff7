"""What the ledger knows of the whole fleet: its meters in bins of event time, its calls, and their latencies.

The saving on the meter (`shared/metered_saving.py`) is estimated from it. A meter does not distinguish models, so
nothing here depends on the selected model or zone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.fleet import Switchback
from shared.metering.columns import Flags, Floats
from shared.metering.demand import NO_ARRIVALS, Answers, Arrivals

SHORTEST_BIN_S = 300.0
INTERVALS_PER_BIN = 2.0
"""Least meter intervals per bin: an interval's energy is spread evenly over its time."""
CELL_S = 150.0
"""The roll-up sums requests that start within this time."""
BUSY = 0.01
"""Least share of a bin in which calls run, for the meter to have moved."""
COVERED = 0.999
"""Least share of a bin that readings must cover."""


@dataclass(frozen=True, slots=True)
class MeterTable:
    """Energy by endpoint and bin; arrays of shape `(endpoints, bins)`.

    Attributes:
        bin_s: length of a bin, seconds; bin n starts at n x `bin_s` since the Unix epoch.
        first: number of the first bin.
        endpoint, pool, zone: of each endpoint.
        metered_j: energy of the meter, J.
        idle_j: idle power x time, J.
        covered_s: time between readings, seconds.
        unused_j: energy of the intervals without a call, J.
        busy_s: time in which calls ran, seconds.
        lost: a counter was reset or stood still, so some energy is missing.
    """

    bin_s: float
    first: int
    endpoint: tuple[str, ...]
    pool: tuple[str, ...]
    zone: tuple[str, ...]
    metered_j: Floats
    idle_j: Floats
    unused_j: Floats
    covered_s: Floats
    busy_s: Floats
    lost: Flags

    @property
    def start_s(self) -> Floats:
        """Start of every bin, seconds since the Unix epoch; shape `(bins,)`."""
        starts: Floats = (self.first + np.arange(self.metered_j.shape[1], dtype=float)) * self.bin_s
        return starts

    @property
    def busy(self) -> Flags:
        """Bins in which calls ran; shape `(endpoints, bins)`."""
        busy: Flags = self.busy_s > BUSY * self.bin_s
        return busy

    @property
    def stuck(self) -> Flags:
        """Bins in which calls ran but the meter stood still; shape `(endpoints, bins)`."""
        stuck: Flags = self.busy & (self.metered_j <= 0)
        return stuck

    @property
    def complete(self) -> Flags:
        """Bins in which an endpoint's energy is known; shape `(endpoints, bins)`."""
        complete: Flags = (self.covered_s >= COVERED * self.bin_s) & ~self.lost & ~self.stuck
        return complete

    def of_pools(self, pools: Iterable[str]) -> NDArray[np.intp]:
        """Indices of the endpoints of some pools."""
        wanted = set(pools)
        return np.array([number for number, pool in enumerate(self.pool) if pool in wanted], dtype=np.intp)


SUMS = ("metered_j", "idle_j", "unused_j", "covered_s", "busy_s", "lost")


def meter_table(rows: Sequence[Mapping[str, Any]], bin_s: float) -> MeterTable | None:
    """Arrange sums by endpoint and bin; None without a row.

    Args:
        rows: `endpoint`, `pool` and `zone`, and arrays of `bin` and of the sums. An endpoint may have several rows, and
            a bin several places.
    """
    if not rows:
        return None
    names = sorted({_name(row) for row in rows})
    place = {name: number for number, name in enumerate(names)}
    first = int(min(row["bin"].min() for row in rows))
    shape = (len(names), int(max(row["bin"].max() for row in rows)) - first + 1)
    totals: dict[str, Any] = {name: np.zeros(shape) for name in SUMS}
    for row in rows:
        for name, total in totals.items():
            np.add.at(total[place[_name(row)]], row["bin"] - first, row[name])
    return MeterTable(
        bin_s=bin_s,
        first=first,
        endpoint=tuple(endpoint for _, endpoint, _ in names),
        pool=tuple(pool for pool, _, _ in names),
        zone=tuple(zone for _, _, zone in names),
        **{**totals, "lost": totals["lost"] > 0},
    )


def _name(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["pool"], row["endpoint"], row["zone"]


@dataclass(frozen=True, slots=True)
class Latency:
    """Time per output token and time to first token of a pool's requests, ms; None if unknown.

    Attributes:
        pool: None for all pools together.
        in_block: in reference blocks of the switchback.
    """

    pool: str | None
    in_block: bool
    requests: int
    tpot_p50_ms: float | None
    tpot_p95_ms: float | None
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None


@dataclass(frozen=True, slots=True)
class Load:
    """The calls of one pool by the time in which they started; arrays of shape `(cells,)`.

    Attributes:
        started_s: begin of the time, which lasts `CELL_S`; seconds since the Unix epoch.
        calls: number that started in it.
        seconds: that these calls took together.
    """

    started_s: Floats
    calls: Floats
    seconds: Floats


@dataclass(frozen=True, slots=True)
class FleetReadings:
    """What the ledger knows of the whole fleet.

    Attributes:
        interval_s: median time between two readings of a meter; None without an interval.
        table: of the period and of the reference blocks before it; None without an interval.
        arrivals, answers: of the same time.
        quantiles: lengths of answers without a directive, relative to their group's mean.
        pues: PUE by pool that the fleet file does not list.
        latencies: of the period.
        loads: calls of every pool, those of the evaluator included.
        stretch: the latencies, and the objectives beside them, are divided by it.
    """

    interval_s: float | None = None
    table: MeterTable | None = None
    arrivals: Arrivals = NO_ARRIVALS
    answers: Sequence[Answers] = ()
    quantiles: Sequence[float] = (1.0,)
    pues: Mapping[str, float] = field(default_factory=dict)
    latencies: Sequence[Latency] = ()
    loads: Mapping[str, Load] = field(default_factory=dict)
    stretch: float = 1.0


NO_READINGS = FleetReadings()


def bin_length_s(switchback: Switchback, interval_s: float) -> float:
    """A length that divides a block: at least five minutes and two meter intervals, if the block is that long."""
    shortest = max(SHORTEST_BIN_S, INTERVALS_PER_BIN * interval_s)
    return switchback.block_s / max(1, int(switchback.block_s / shortest))
