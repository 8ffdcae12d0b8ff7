"""Reads the meters and the demand of the whole fleet from the ledger's tables.

The database sums by endpoint and bin: two weeks of readings every five seconds are millions of intervals.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import numpy as np

from shared.carbon import JOULES_PER_KWH
from shared.fleet import Fleet, Switchback
from shared.metering.arrays import Connection, array_columns, read_arrays
from shared.metering.columns import Floats, IntensitySeries
from shared.metering.demand import NO_ARRIVALS, REFERENCE_LEVEL, AnswerLengths, Answers, Arrivals
from shared.metering.tables import CELL_S, SUMS, FleetReadings, Latency, Load, bin_length_s, meter_table

WINDOW_S = 28 * 86_400.0
"""Reference blocks up to this long before the end of the period are used."""
HOUR_S = 3_600.0
BUCKET = 1.05
"""Ratio of the bounds of a bucket in the histograms of the roll-up."""
LONGEST_ANSWER_S = 6 * 3_600.0
"""Requests from this long before the first bin count, too."""
QUANTILES = tuple(float(one) for one in np.arange(0.05, 1.0, 0.1))

# Below, $1 is the start and $2 the end of the time; the median needs no more than the last intervals.
_INTERVAL = """
SELECT coalesce(percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM finished_at - started_at))::float8,
                (SELECT 300.0 / 2 WHERE EXISTS (SELECT FROM ledger.meter_sums
                 WHERE ($1::timestamptz IS NULL OR at >= $1) AND ($2::timestamptz IS NULL OR at < $2))))
FROM (SELECT started_at, finished_at FROM ledger.intervals
      WHERE ($1::timestamptz IS NULL OR finished_at > $1) AND ($2::timestamptz IS NULL OR started_at < $2)
      ORDER BY finished_at DESC LIMIT 100000) AS latest
"""

_LAST = """
SELECT greatest((SELECT max(finished_at) FROM ledger.intervals WHERE $1::timestamptz IS NULL OR started_at < $1),
                (SELECT max(at) + interval '5 minutes' FROM ledger.meter_sums
                 WHERE $1::timestamptz IS NULL OR at < $1))
"""

# Energy is spread evenly over an interval. $3 is the length of a bin in seconds.
_INTERVAL_SUMS = """
SELECT endpoint, pool, zone, bin, sum(metered_j * share)::float8 AS metered_j, sum(idle_j * share)::float8 AS idle_j,
       coalesce(sum(metered_j * share) FILTER (WHERE calls = 0), 0)::float8 AS unused_j,
       sum(length * share)::float8 AS covered_s,
       sum(share * coalesce(length - idle_s, CASE WHEN calls > 0 THEN length ELSE 0 END))::float8 AS busy_s,
       max((restarted OR coalesce(stalled, false))::int) AS lost
FROM (
    SELECT endpoint, pool, zone, metered_j, idle_j, idle_s, calls, restarted, stalled, length, bin,
           (least(until, (bin + 1) * $3::float8) - greatest(since, bin * $3::float8)) / length AS share
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

# An array of each column for every endpoint: a month of bins are a hundred thousand rows.
_METERS = f"""
SELECT endpoint, pool, zone, {array_columns("bin", *SUMS)} FROM ({_INTERVAL_SUMS}) AS bins
GROUP BY endpoint, pool, zone
"""

# Likewise the sums by five minutes in the roll-up, whose parts `meter_table` adds.
_ROLLED_UP_METERS = f"""
SELECT endpoint, pool, zone, {array_columns("bin", *SUMS)}
FROM (
    SELECT endpoint, pool, zone, bin, metered_j * share AS metered_j, idle_j * share AS idle_j,
           unused_j * share AS unused_j, covered_s * share AS covered_s, busy_s * share AS busy_s, lost::int AS lost
    FROM (
        SELECT *, (least(since + 300, (bin + 1) * $3::float8) - greatest(since, bin * $3::float8)) / 300 AS share
        FROM (
            SELECT *, extract(epoch FROM at)::float8 AS since FROM ledger.meter_sums
            WHERE ($1::timestamptz IS NULL OR at > $1) AND ($2::timestamptz IS NULL OR at < $2)
        ) AS cell
        CROSS JOIN LATERAL
            generate_series(floor(since / $3::float8)::bigint, ceil((since + 300) / $3::float8)::bigint - 1) AS bin
    ) AS parts
) AS bins
GROUP BY endpoint, pool, zone
"""

_TIME = "($1::timestamptz IS NULL OR {at} >= $1) AND ($2::timestamptz IS NULL OR {at} < $2)"

# The times in which calls started: arrays for every purpose, pool, level and source.
_ARRIVALS = f"""
SELECT purpose, pool, level, source, {array_columns("at_s", "requests", "tokens", "seconds")}
FROM (
    SELECT extract(epoch FROM at)::float8 + {CELL_S / 2} AS at_s, purpose, pool, level,
           coalesce(decision_source, '') AS source, sum(calls)::bigint AS requests,
           sum(completion_tokens)::bigint AS tokens, sum(processing_s) AS seconds
    FROM (
        SELECT * FROM ledger.all_call_starts
        WHERE purpose IN ('request', 'evaluation') AND {_TIME.format(at="at")}
        UNION ALL
        SELECT date_bin('{CELL_S:.0f} seconds', started_at, 'epoch'), purpose, pool, level, decision_source,
               1, completion_tokens, greatest(0, extract(epoch FROM finished_at - started_at)::float8)
        FROM ledger.open_calls JOIN ledger.dimensions AS d ON d.id = dimension
        WHERE purpose IN ('request', 'evaluation') AND {_TIME.format(at="started_at")}
    ) AS starts
    GROUP BY 1, 2, 3, 4, 5 ORDER BY 1
) AS cells
GROUP BY purpose, pool, level, source
"""

# Requests by group, task and level, of each pool, level and source: who asked in which hour, and all answers.
_MIX = f"""
SELECT pool, level, coalesce(decision_source, '') AS source, grp, coalesce(task, '') AS task,
       array_agg(extract(epoch FROM hour)::float8) AS hour_s, array_agg(calls) AS requests,
       sum(completion_tokens)::bigint AS tokens, sum(processing_s) AS seconds
FROM ledger.all_hourly_calls
WHERE purpose = 'request' AND {_TIME.format(at="hour")} GROUP BY 1, 2, 3, 4, 5
"""

_HISTOGRAMS = f"""
SELECT kind, name, in_block, bucket, sum(calls)::bigint AS calls FROM ledger.all_histograms
WHERE kind = ANY($3) AND {_TIME.format(at="hour")} GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
"""


# PUE of pools that the fleet file does not list any more, from their footprints.
_PUES = f"""
SELECT pool, sum(operational_g) * {JOULES_PER_KWH} / sum(energy_intensity) AS pue FROM ledger.all_hourly_calls
WHERE energy_intensity > 0 AND pool <> ALL($3::text[]) AND {_TIME.format(at="hour")} GROUP BY pool
"""

_INTENSITY = f"""
SELECT zone, extract(epoch FROM at)::float8 AS at_s, intensity_g_per_kwh::float8 AS g_per_kwh, estimated
FROM ledger.intensity WHERE {_TIME.format(at="at")} ORDER BY zone, at
"""


async def read_grid(
    connection: Connection, *, since: datetime | None, until: datetime | None
) -> Mapping[str, IntensitySeries]:
    """Carbon intensity by zone."""
    by_zone: dict[str, list[asyncpg.Record]] = {}
    for point in await connection.fetch(_INTENSITY, since, until):
        by_zone.setdefault(point["zone"], []).append(point)
    return {
        zone: IntensitySeries(
            at_s=np.array([point["at_s"] for point in series], dtype=float),
            g_per_kwh=np.array([point["g_per_kwh"] for point in series], dtype=float),
            estimated=np.array([point["estimated"] for point in series], dtype=bool),
        )
        for zone, series in by_zone.items()
    }


async def read_fleet(
    connection: Connection,
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
    hour = None if since is None else since.replace(minute=0, second=0, microsecond=0)
    latencies = _latencies(await connection.fetch(_HISTOGRAMS, hour, until, ["ttft", "tpot"]), stretch)
    last = await connection.fetchval(_LAST, until)
    if last is None:
        return FleetReadings(latencies=latencies, stretch=stretch)
    end = last if until is None else min(last, until)
    begin = None if since is None else min(since, datetime.fromtimestamp(end.timestamp() - WINDOW_S, UTC))
    interval_s = await connection.fetchval(_INTERVAL, begin, until)
    if interval_s is None:
        return FleetReadings(latencies=latencies, stretch=stretch)
    bin_s = bin_length_s(Switchback() if fleet is None else fleet.switchback, interval_s)
    meters = [
        row
        for statement in (_METERS, _ROLLED_UP_METERS)
        async for row in read_arrays(connection, statement, begin, until, bin_s, at_once=1)
    ]
    earlier = None if begin is None else datetime.fromtimestamp(begin.timestamp() - LONGEST_ANSWER_S, UTC)
    day = None if earlier is None else earlier.replace(hour=0, minute=0, second=0, microsecond=0)
    starts = [row async for row in read_arrays(connection, _ARRIVALS, earlier, until)]
    mix = [row async for row in read_arrays(connection, _MIX, earlier, until)]
    answers = [
        Answers(
            group=row["grp"],
            task=row["task"],
            level=row["level"],
            in_block=row["source"] == "switchback",
            requests=int(row["requests"].sum()),
            tokens=row["tokens"],
            seconds=row["seconds"],
        )
        for row in mix
        if row["source"] not in ("forced", "")
    ]
    listed = [] if fleet is None else [pool.name for pool in fleet.pools]
    pues: dict[str, float] = {}
    if {row["pool"] for row in meters} - set(listed):
        pues = {row["pool"]: row["pue"] for row in await connection.fetch(_PUES, day, until, listed)}
    quantiles = _relative_lengths(await connection.fetch(_HISTOGRAMS, day, until, ["tokens"]))
    return FleetReadings(
        interval_s=interval_s,
        table=meter_table(meters, bin_s),
        arrivals=_arrivals(starts, mix, AnswerLengths(answers)),
        loads=_loads(starts),
        answers=answers,
        quantiles=quantiles,
        pues=pues,
        latencies=latencies,
        stretch=stretch,
    )


def _arrivals(
    starts: Iterable[Mapping[str, Any]], mix: Iterable[Mapping[str, Any]], lengths: AnswerLengths
) -> Arrivals:
    """The requests by the time in which they started. Their mix of groups is that of the hour."""
    mixes: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in mix:
        mixes.setdefault((row["pool"], row["level"], row["source"]), []).append(row)
    parts = []
    for row in starts:
        if row["purpose"] == "request":
            labels = row["pool"], row["level"], row["source"]
            reference, served = (
                _expected(row["at_s"], mixes.get(labels, []), lengths, level)
                for level in (REFERENCE_LEVEL, row["level"])
            )
            texts = (np.full(len(row["at_s"]), label, dtype=object) for label in labels)
            parts.append((row["at_s"], *texts, row["requests"], row["tokens"], reference, served))
    return Arrivals(*map(np.concatenate, zip(*parts, strict=True))) if parts else NO_ARRIVALS


def _expected(at_s: Floats, mix: Sequence[Mapping[str, Any]], lengths: AnswerLengths, level: str) -> Floats:
    """Mean tokens at a level of requests that started at some times; that of all requests where the mix is unknown.

    Args:
        mix: requests by hour, a row for every group and task.
    """
    expected = np.full(len(at_s), lengths.mean("", "", level))
    if mix:
        hours, place = np.unique(np.concatenate([row["hour_s"] for row in mix]), return_inverse=True)
        requests = np.concatenate([row["requests"] for row in mix])
        tokens = np.concatenate([row["requests"] * lengths.mean(row["grp"], row["task"], level) for row in mix])
        mean = np.bincount(place, weights=tokens) / np.bincount(place, weights=requests)
        hour_s = at_s // HOUR_S * HOUR_S
        found = np.minimum(np.searchsorted(hours, hour_s), len(hours) - 1)
        expected = np.where(hours[found] == hour_s, mean[found], expected)
    return expected


def _loads(rows: Iterable[Mapping[str, Any]]) -> dict[str, Load]:
    """The calls of every pool, of requests and the evaluator, by the time in which they started."""
    by_pool: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_pool.setdefault(row["pool"], []).append(row)
    return {pool: _load(parts) for pool, parts in by_pool.items()}


def _load(rows: Sequence[Mapping[str, Any]]) -> Load:
    at_s, calls, seconds = (np.concatenate([row[name] for row in rows]) for name in ("at_s", "requests", "seconds"))
    middle_s, place = np.unique(at_s, return_inverse=True)
    sums = (np.bincount(place, weights=one).astype(np.float64) for one in (calls, seconds))
    return Load(middle_s - CELL_S / 2, *sums)


def _latencies(rows: Sequence[asyncpg.Record], stretch: float) -> list[Latency]:
    """Quantiles by pool, and of all pools."""
    counts: dict[tuple[str | None, bool], dict[str, dict[int, int]]] = {}
    for row in rows:
        for pool in (None, row["name"]):
            found = counts.setdefault((pool, row["in_block"]), {"ttft": {}, "tpot": {}})[row["kind"]]
            found[row["bucket"]] = found.get(row["bucket"], 0) + row["calls"]
    latencies = []
    for (pool, in_block), kinds in sorted(counts.items(), key=lambda one: (one[0][0] or "", one[0][1])):
        tpot, ttft = ([None if q is None else q / stretch for q in quantiles(kinds[kind], (0.5, 0.95))]
                      for kind in ("tpot", "ttft"))  # fmt: skip
        calls = max(sum(kind.values()) for kind in kinds.values())
        latencies.append(Latency(pool, in_block, calls, tpot[0], tpot[1], ttft[0], ttft[1]))
    return latencies


def quantiles(counts: Mapping[int, float], shares: Sequence[float]) -> list[float | None]:
    """Quantiles of a histogram; None without a value. Exact to half a bucket, 2.5 %.

    Args:
        counts: by bucket n, which holds the values from `BUCKET`^n to `BUCKET`^(n+1).
    """
    total = sum(counts.values())
    if not total:
        return [None for _ in shares]
    buckets = sorted(counts)
    reached = np.cumsum([counts[bucket] for bucket in buckets]) / total
    return [
        float(BUCKET ** (buckets[min(int(np.searchsorted(reached, share)), len(buckets) - 1)] + 0.5))
        for share in shares
    ]


def _relative_lengths(rows: Sequence[asyncpg.Record]) -> Sequence[float]:
    """Quantiles of the lengths of answers, relative to their group's mean."""
    groups: dict[str, dict[int, int]] = {}
    for row in rows:
        group = groups.setdefault(row["name"], {})
        group[row["bucket"]] = group.get(row["bucket"], 0) + row["calls"]
    values, weights = [], []
    for counts in groups.values():
        lengths = BUCKET ** (np.array(list(counts)) + 0.5)
        calls = np.array(list(counts.values()), dtype=float)
        values.append(lengths / (lengths @ calls / calls.sum()))
        weights.append(calls)
    if not values:
        return (1.0,)
    value, weight = np.concatenate(values), np.concatenate(weights)
    order = np.argsort(value)
    reached = np.cumsum(weight[order]) / weight.sum()
    return tuple(float(one) for one in np.interp(QUANTILES, reached, value[order]))
