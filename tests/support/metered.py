"""Days of a fleet with meters, for the report's tests: the world without Sprout is known, too.

Without Sprout the fleet takes a fixed power and energy per token; with Sprout less of both. Requests have two groups,
whose answers last a minute or two.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from shared.fleet import Fleet
from shared.metering.columns import Floats
from shared.metering.demand import REFERENCE_LEVEL, AnswerLengths, Answers, Arrivals, spread_over_bins
from shared.metering.tables import FleetReadings, MeterTable, meter_table
from shared.switchback import SwitchbackSchedule
from tests.support.report import DAY, MODEL, POOL, ZONE, record_of

ENDPOINTS = 4
TOKENS = {"short": 60.0, "long": 120.0}
"""Mean answer without a directive, by group."""
BRIEF = 0.4
"""Length of an answer with a directive, relative to one without."""
SECONDS_PER_TOKEN = 1.0
FIXED_W, TOKEN_J = 800.0, 600.0
SPROUT_FIXED_W, SPROUT_TOKEN_J = 300.0, 500.0
IDLE_W = 100.0
JUDGE_W = 20.0
INTERVAL_S, OFFSET_S = 100.0, 37.0
"""Meter intervals do not begin with bins."""


def fleet_toml(**switchback: float | str) -> str:
    """The fleet file of four servers that pack, a judge, and a pool without a meter.

    Args:
        switchback: fields of the table `switchback` that differ.
    """

    def endpoint(name: str, *, metered: bool = True) -> str:
        metrics = 'metrics = "http://host:8002/metrics"\n' if metered else ""
        return f'[[pools.endpoints]]\nname = "{name}"\ngrpc = "host:8001"\n{metrics}'

    settings = {"share": 0.1, "block_s": 1800, "washout_s": 300, **switchback}
    return "\n".join(
        [
            '[[directives]]\nlevel = "L0"\n[[directives]]\nlevel = "L1"\ntext = "Be brief."',
            f'[[models]]\nname = "{MODEL}"\nchat_template = "chatml"',
            f'[[pools]]\nname = "{POOL}"\nmodel = "{MODEL}"\nzone = "{ZONE}"\npue = 1.2',
            'dispatch = "pack"\ntarget_batch = 2\ntpot_objective_ms = 1200',
            *(endpoint(f"{POOL}-{number}") for number in range(ENDPOINTS)),
            f'[[pools]]\nname = "spare"\nmodel = "{MODEL}"\nzone = "{ZONE}"',
            endpoint("spare-0", metered=False),
            f'[[pools]]\nname = "judge"\nzone = "{ZONE}"',
            endpoint("judge-0"),
            '[judge]\npool = "judge"',
            "[switchback]",
            *(f"{name} = {json.dumps(value)}" for name, value in settings.items()),
        ]
    )


def metered_fleet(**switchback: float | str) -> Fleet:
    """The fleet of `fleet_toml`."""
    return Fleet.model_validate(tomllib.loads(fleet_toml(**switchback)))


@dataclass(frozen=True, slots=True)
class FleetDays:
    """What the ledger would have stored, and the truth.

    Attributes:
        records: rows of `ledger.footprints`.
        intervals: rows of `ledger.intervals`.
        without_j: energy of the serving endpoints without Sprout.
        actual_j, judge_j: energy of the serving endpoints, and of the judge's.
    """

    records: list[dict[str, Any]]
    intervals: list[dict[str, Any]]
    without_j: float
    actual_j: float
    judge_j: float

    @property
    def saving_pct(self) -> float:
        """The true saving on the meter, less the judge's energy, %."""
        return 100.0 * (1.0 - (self.actual_j + self.judge_j) / self.without_j)


def fleet_days(fleet: Fleet, *, days: float = 2.0, requests: int = 4_000, seed: int = 1) -> FleetDays:
    """Days of requests and meters of `metered_fleet`."""
    random = np.random.default_rng(seed)
    schedule = SwitchbackSchedule(fleet.switchback)
    day_s = 86_400.0
    begin_s = DAY.timestamp()
    # A daily cycle: most requests in the afternoon.
    offsets = np.sort(random.uniform(0, days * day_s, 4 * requests))
    kept = random.uniform(size=len(offsets)) < 0.5 + 0.4 * np.sin(2 * np.pi * (offsets / day_s - 0.3))
    offsets = np.sort(random.choice(offsets[kept], requests, replace=False))
    records, begins, ends, tokens_of, expected = [], [], [], [], []
    for number, offset in enumerate(offsets.tolist()):
        at = DAY + timedelta(seconds=offset)
        group = "short" if random.uniform() < 0.5 else "long"
        in_block = schedule.is_reference(at)
        level = "L0" if in_block or random.uniform() < 0.1 else "L1"
        length = TOKENS[group] * float(random.uniform(0.7, 1.3))
        tokens = max(2, round(length if level == "L0" else length * BRIEF))
        seconds = tokens * SECONDS_PER_TOKEN
        row = {f"{POOL}/L0": 0.1, f"{POOL}/L1": 0.9}
        records.append(
            record_of(f"r{number}", group=group, option=f"{POOL}/{level}", at=at, energy_j=10.0 * tokens, row=row)
            | {
                "decision_source": "switchback" if in_block else "policy",
                "propensities": {f"{POOL}/L0": 1.0} if in_block else row,
                "endpoint": f"{POOL}-{number % ENDPOINTS}",
                "processing_s": seconds,
                "finished_at": at + timedelta(seconds=seconds),
                "completion_tokens": tokens,
            }
        )
        begins.append(begin_s + offset)
        ends.append(begin_s + offset + seconds)
        tokens_of.append(tokens)
        expected.append(length)
    edges = begin_s + OFFSET_S + np.arange(0.0, days * day_s - INTERVAL_S, INTERVAL_S)
    generated = spread_over_bins(begins, ends, tokens_of, edges)
    demanded = spread_over_bins(begins, np.array(begins) + expected, expected, edges)
    blocks = np.array([schedule.is_reference(DAY + timedelta(seconds=float(at - begin_s))) for at in edges[:-1]])
    noise = random.normal(1.0, 0.01, len(generated))
    without = (FIXED_W * INTERVAL_S + TOKEN_J * demanded) * noise
    with_sprout = (SPROUT_FIXED_W * INTERVAL_S + SPROUT_TOKEN_J * generated) * noise
    # What is generated in a block, not what is demanded: shorter answers still run when it begins.
    in_blocks = (FIXED_W * INTERVAL_S + TOKEN_J * generated) * noise
    actual = np.where(blocks, in_blocks, with_sprout)
    intervals = [
        _interval(name, pool, edge, joules * share, idle_w=idle_w, calls=calls)
        for edge, joules, block in zip(edges[:-1].tolist(), actual.tolist(), blocks.tolist(), strict=True)
        for name, pool, share, idle_w, calls in _parts(joules, busy=ENDPOINTS if block else 2)
    ]
    return FleetDays(
        records=records,
        intervals=intervals,
        without_j=float(without.sum()),
        actual_j=float(actual.sum()),
        judge_j=JUDGE_W * INTERVAL_S * len(actual),
    )


def _parts(joules: float, *, busy: int) -> list[tuple[str, str, float, float, int]]:
    """Endpoint, pool, share of the joules, idle power and number of calls, for every endpoint."""
    parts = [(f"{POOL}-{number}", POOL, 1.0 / ENDPOINTS, IDLE_W, int(number < busy)) for number in range(ENDPOINTS)]
    return [*parts, ("judge-0", "judge", JUDGE_W * INTERVAL_S / joules, JUDGE_W, 0)]


def _interval(name: str, pool: str, begin_s: float, joules: float, *, idle_w: float, calls: int) -> dict[str, Any]:
    idle_j = min(joules, idle_w * INTERVAL_S)
    begin = DAY + timedelta(seconds=begin_s - DAY.timestamp())
    return {
        "endpoint": name,
        "started_at": begin,
        "finished_at": begin + timedelta(seconds=INTERVAL_S),
        "zone": ZONE,
        "pool": pool,
        "metered_j": joules,
        "attributed_j": joules - idle_j,
        "idle_j": idle_j,
        "unattributed_j": 0.0,
        "restarted": False,
        "calls": calls,
        "idle_s": 0.0 if calls else INTERVAL_S,
    }


def table_of(days: FleetDays, bin_s: float = 300.0) -> MeterTable:
    """The intervals in bins, computed without the database."""
    rows: list[Mapping[str, Any]] = []
    for name in sorted({row["endpoint"] for row in days.intervals}):
        mine = [row for row in days.intervals if row["endpoint"] == name]
        begins = np.array([row["started_at"].timestamp() for row in mine])
        ends = np.array([row["finished_at"].timestamp() for row in mine])
        first, last = int(begins.min() // bin_s), int(np.ceil(ends.max() / bin_s))
        edges = bin_s * np.arange(first, last + 1)
        busy = np.array([row["calls"] > 0 for row in mine])
        lost = np.array([float(row["restarted"]) for row in mine])
        metered = np.array([row["metered_j"] for row in mine])
        columns: Mapping[str, Floats] = {
            "metered_j": spread_over_bins(begins, ends, metered, edges),
            "idle_j": spread_over_bins(begins, ends, [row["idle_j"] for row in mine], edges),
            "unused_j": spread_over_bins(begins, ends, np.where(busy, 0.0, metered), edges),
            "covered_s": spread_over_bins(begins, ends, ends - begins, edges),
            "busy_s": spread_over_bins(begins, ends, ends - begins - [row["idle_s"] for row in mine], edges),
            "lost": np.ceil(spread_over_bins(begins, ends, lost, edges) - 1e-9),
        }
        rows.append({"endpoint": name, "pool": mine[0]["pool"], "zone": ZONE, "bin": np.arange(first, last), **columns})
    table = meter_table(rows, bin_s)
    assert table is not None
    return table


def readings_of(days: FleetDays, table: MeterTable | None = None) -> FleetReadings:
    """What the report reads of these days, computed without the database."""
    answers = [
        Answers(
            group=record["grp"],
            task=record["task"],
            level=record["level"],
            in_block=record["decision_source"] == "switchback",
            requests=1,
            tokens=record["completion_tokens"],
            seconds=record["completion_tokens"] * SECONDS_PER_TOKEN,
        )
        for record in days.records
        if record["decision_source"] != "forced"
    ]
    lengths = AnswerLengths(answers)
    arrivals = arrivals_of(
        (
            record["started_at"].timestamp(),
            record["pool"],
            record["level"],
            record["decision_source"],
            1,
            record["completion_tokens"],
            *(lengths.mean(record["grp"], record["task"], level) for level in (REFERENCE_LEVEL, record["level"])),
        )
        for record in days.records
    )
    return FleetReadings(
        interval_s=INTERVAL_S, table=table_of(days) if table is None else table, arrivals=arrivals, answers=answers
    )


def arrivals_of(rows: Iterable[tuple[float, str, str, str, int, int, float, float]]) -> Arrivals:
    """Arrivals of rows with their fields."""
    columns = zip(*rows, strict=True)
    return Arrivals(*(np.array(column, dtype=object if isinstance(column[0], str) else None) for column in columns))
