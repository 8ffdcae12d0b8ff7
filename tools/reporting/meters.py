"""Reads the meters and the demand of the whole fleet, in bins of event time.

The saving on the meter (`shared/metered_saving.py`) is estimated from them. The database sums by endpoint and bin: two
weeks of readings every five seconds are millions of intervals. A meter does not distinguish models, so nothing here
depends on the selected model or zone.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg
import numpy as np
from asyncpg.pool import PoolConnectionProxy
from numpy.typing import NDArray

from shared.fleet import Fleet, Switchback
from tools.reporting.demand import REFERENCE_LEVEL, Answers, Arrivals
from tools.reporting.frame import Flags, Floats

WINDOW_S = 28 * 86_400.0
"""Reference blocks up to this long before the end of the period are used."""
SHORTEST_BIN_S = 300.0
INTERVALS_PER_BIN = 2.0
"""Least meter intervals per bin: an interval's energy is spread evenly over its time."""
CELL_S = 60.0
"""Requests that start in the same minute are summed; in a long period those of half a bin."""
LONG_PERIOD_S = 3 * 86_400.0
LONGEST_ANSWER_S = 6 * 3_600.0
"""Requests from this long before the first bin count, too."""
QUANTILES = tuple(float(one) for one in np.arange(0.05, 1.0, 0.1))
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


def meter_table(rows: Iterable[Mapping[str, Any] | asyncpg.Record], bin_s: float) -> MeterTable | None:
    """Arrange sums by endpoint and bin; None without a row.

    Args:
        rows: `endpoint`, `pool`, `zone`, `bin` and the sums, as `_METERS` selects them.
    """
    found = list(rows)
    if not found:
        return None
    names = sorted({(str(row["pool"]), str(row["endpoint"]), str(row["zone"])) for row in found})
    number = {endpoint: place for place, (_, endpoint, _) in enumerate(names)}
    first = min(int(row["bin"]) for row in found)
    shape = (len(names), max(int(row["bin"]) for row in found) - first + 1)
    where = (np.array([number[row["endpoint"]] for row in found]), np.array([int(row["bin"]) - first for row in found]))

    def sums(name: str) -> Floats:
        total = np.zeros(shape)
        np.add.at(total, where, np.array([row[name] for row in found], dtype=float))
        return total

    return MeterTable(
        bin_s=bin_s,
        first=first,
        endpoint=tuple(endpoint for _, endpoint, _ in names),
        pool=tuple(pool for pool, _, _ in names),
        zone=tuple(zone for _, _, zone in names),
        metered_j=sums("metered_j"),
        idle_j=sums("idle_j"),
        unused_j=sums("unused_j"),
        covered_s=sums("covered_s"),
        busy_s=sums("busy_s"),
        lost=sums("lost") > 0,
    )


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
class FleetReadings:
    """What the ledger knows of the whole fleet.

    Attributes:
        interval_s: median time between two readings of a meter; None without an interval.
        table: of the period and of the reference blocks before it; None without an interval.
        arrivals, answers: of the same time.
        quantiles: lengths of answers without a directive, relative to their group's mean.
        latencies: of the period.
        stretch: the latencies, and the objectives beside them, are divided by it.
    """

    interval_s: float | None = None
    table: MeterTable | None = None
    arrivals: Sequence[Arrivals] = ()
    answers: Sequence[Answers] = ()
    quantiles: Sequence[float] = (1.0,)
    latencies: Sequence[Latency] = ()
    stretch: float = 1.0


NO_READINGS = FleetReadings()


def bin_length_s(switchback: Switchback, interval_s: float) -> float:
    """A length that divides a block: at least five minutes and two meter intervals, if the block is that long."""
    shortest = max(SHORTEST_BIN_S, INTERVALS_PER_BIN * interval_s)
    return switchback.block_s / max(1, int(switchback.block_s / shortest))


# Below, $1 is the start and $2 the end of the time; the median needs no more than the last intervals.
_INTERVAL = """
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM finished_at - started_at))::float8
FROM (SELECT started_at, finished_at FROM ledger.intervals
      WHERE ($1::timestamptz IS NULL OR finished_at > $1) AND ($2::timestamptz IS NULL OR started_at < $2)
      ORDER BY finished_at DESC LIMIT 100000) AS latest
"""

_LAST = "SELECT max(finished_at) FROM ledger.intervals WHERE $1::timestamptz IS NULL OR started_at < $1"

# Energy is spread evenly over an interval. $3 is the length of a bin in seconds.
_METERS = """
SELECT endpoint, pool, zone, bin, sum(metered_j * share)::float8 AS metered_j, sum(idle_j * share)::float8 AS idle_j,
       coalesce(sum(metered_j * share) FILTER (WHERE calls = 0), 0)::float8 AS unused_j,
       sum(length * share)::float8 AS covered_s,
       sum(share * coalesce(length - idle_s, CASE WHEN calls > 0 THEN length ELSE 0 END))::float8 AS busy_s,
       max((restarted OR coalesce(stalled, false))::int) AS lost
FROM (
    SELECT *, (least(until, (bin + 1) * $3::float8) - greatest(since, bin * $3::float8)) / length AS share
    FROM (
        SELECT *, until - since AS length FROM (
            SELECT endpoint, pool, zone, metered_j, idle_j, idle_s, calls, restarted, stalled,
                   extract(epoch FROM started_at)::float8 AS since, extract(epoch FROM finished_at)::float8 AS until
            FROM ledger.intervals
            WHERE ($1::timestamptz IS NULL OR finished_at > $1) AND ($2::timestamptz IS NULL OR started_at < $2)
        ) AS interval
    ) AS timed
    CROSS JOIN LATERAL generate_series(floor(since / $3::float8)::bigint, ceil(until / $3::float8)::bigint - 1) AS bin
    WHERE length > 0
) AS part
GROUP BY endpoint, pool, zone, bin
"""

_TIME = "($1::timestamptz IS NULL OR started_at >= $1) AND ($2::timestamptz IS NULL OR started_at < $2)"

_ARRIVALS = f"""
SELECT (floor(extract(epoch FROM started_at) / $3::float8) + 0.5) * $3::float8 AS at_s, pool, level, grp,
       coalesce(task, '') AS task, coalesce(decision_source, '') AS source, count(*) AS requests,
       sum(completion_tokens) AS tokens
FROM (
    SELECT started_at, pool, level, grp, task, decision_source, completion_tokens
    FROM ledger.footprints WHERE purpose = 'request' AND {_TIME}
    UNION ALL
    SELECT started_at, pool, level, grp, task, decision_source, completion_tokens
    FROM ledger.calls WHERE purpose = 'request' AND NOT settled AND {_TIME}
) AS requests
GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1
"""

# The client did not choose the level.
_DRAWN = f"purpose = 'request' AND decision_source <> 'forced' AND {_TIME}"

_ANSWERS = f"""
SELECT grp, coalesce(task, '') AS task, level, decision_source = 'switchback' AS in_block, count(*) AS requests,
       sum(completion_tokens) AS tokens, sum(processing_s)::float8 AS seconds
FROM ledger.footprints WHERE {_DRAWN} GROUP BY 1, 2, 3, 4
"""

_QUANTILES = f"""
SELECT percentile_cont($3::float8[]) WITHIN GROUP (ORDER BY relative) FROM (
    SELECT completion_tokens / nullif(avg(completion_tokens) OVER (PARTITION BY grp), 0)::float8 AS relative
    FROM ledger.footprints WHERE {_DRAWN} AND level = '{REFERENCE_LEVEL}'
) AS answers
"""

_LATENCIES = f"""
SELECT pool, in_block, count(*) AS requests,
       percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY tpot_ms) AS tpot_ms,
       percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY ttft_ms) AS ttft_ms
FROM (
    SELECT pool, coalesce(decision_source = 'switchback', false) AS in_block,
           1000 * extract(epoch FROM first_token_at - started_at)::float8 AS ttft_ms,
           CASE WHEN completion_tokens > 1
                THEN 1000 * extract(epoch FROM finished_at - first_token_at)::float8 / (completion_tokens - 1)
           END AS tpot_ms
    FROM ledger.calls WHERE purpose = 'request' AND {_TIME}
) AS timed
GROUP BY GROUPING SETS ((pool, in_block), (in_block)) ORDER BY pool NULLS FIRST, in_block
"""


async def read_fleet(
    connection: asyncpg.Connection | PoolConnectionProxy,
    *,
    since: datetime | None,
    until: datetime | None,
    fleet: Fleet | None,
    stretch: float = 1.0,
) -> FleetReadings:
    """Read the meters and the demand of a period, and of the reference blocks before it.

    Args:
        fleet: its switchback decides the length of the bins.
        stretch: latencies are divided by it; of simulated servers whose steps take this many times as long.
    """
    latencies = [_latency(row, stretch) for row in await connection.fetch(_LATENCIES, since, until)]
    last = await connection.fetchval(_LAST, until)
    if last is None:
        return FleetReadings(latencies=latencies, stretch=stretch)
    end = last if until is None else min(last, until)
    begin = None if since is None else min(since, datetime.fromtimestamp(end.timestamp() - WINDOW_S, UTC))
    interval_s = await connection.fetchval(_INTERVAL, begin, until)
    if interval_s is None:
        return FleetReadings(latencies=latencies, stretch=stretch)
    bin_s = bin_length_s(Switchback() if fleet is None else fleet.switchback, interval_s)
    table = meter_table(await connection.fetch(_METERS, begin, until, bin_s), bin_s)
    earlier = None if begin is None else datetime.fromtimestamp(begin.timestamp() - LONGEST_ANSWER_S, UTC)
    long = (table.start_s[-1] - table.start_s[0] if table is not None else 0.0) > LONG_PERIOD_S
    arrivals = await connection.fetch(_ARRIVALS, earlier, until, bin_s / 2 if long else CELL_S)
    answers = await connection.fetch(_ANSWERS, earlier, until)
    quantiles = await connection.fetchval(_QUANTILES, earlier, until, QUANTILES)
    return FleetReadings(
        interval_s=interval_s,
        table=table,
        arrivals=[
            Arrivals(
                at_s=row["at_s"],
                pool=sys.intern(row["pool"]),
                level=sys.intern(row["level"]),
                group=sys.intern(row["grp"]),
                task=sys.intern(row["task"]),
                source=sys.intern(row["source"]),
                requests=row["requests"],
                tokens=row["tokens"],
            )
            for row in arrivals
        ],
        answers=[
            Answers(
                group=row["grp"],
                task=row["task"],
                level=row["level"],
                in_block=bool(row["in_block"]),
                requests=row["requests"],
                tokens=row["tokens"],
                seconds=row["seconds"],
            )
            for row in answers
        ],
        quantiles=quantiles if quantiles and sum(quantiles) > 0 else (1.0,),
        latencies=latencies,
        stretch=stretch,
    )


def _latency(row: asyncpg.Record, stretch: float) -> Latency:
    tpot, ttft = (
        [None if value is None else value / stretch for value in row[name] or (None, None)]
        for name in ("tpot_ms", "ttft_ms")
    )
    return Latency(row["pool"], row["in_block"], row["requests"], tpot[0], tpot[1], ttft[0], ttft[1])
