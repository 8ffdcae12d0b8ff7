"""A synthetic day for the report's tests: calls whose energy, grams and counterfactual are known."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import numpy as np

from shared.fleet import Fleet
from shared.messages import OptionEstimate, Policy, PolicyInputs, Quality, QualityCount
from shared.messages.evaluation import EvaluationCost
from shared.metering.columns import IntensitySeries, partition
from shared.metering.tables import NO_READINGS, FleetReadings
from tools.reporting.frame import NO_POLICY, TEXT_COLUMNS, Calls, CallsBuilder, Distributions
from tools.reporting.quality import PolicyHistory
from tools.reporting.query import CallSums, EvaluationSums, IntervalSums, LearnedGroups, Selection, Snapshot

DAY = datetime(2024, 2, 8, tzinfo=UTC)
MODEL = "llama-2-13b-chat"
POOL = "local-13b"
ZONE = "SAMPLE-SOLAR"
OPTIONS = (f"{POOL}/L0", f"{POOL}/L1", f"{POOL}/L2")
REFERENCE = OPTIONS[0]
PUE = 1.2
EMBODIED_G_PER_S = 1.6715e-4
GROUPS = {"alpaca": 1400.0, "gsm8k": 900.0, "triviaqa": 350.0}
"""Mean energy at the reference by group, J."""
FACTORS = {"L0": 1.0, "L1": 0.55, "L2": 0.4}
WATTS = 300.0


@dataclass(frozen=True, slots=True)
class MadeDay:
    """Records of `ledger.footprints`, and the true counterfactual: each request's grams at the reference."""

    records: list[dict[str, Any]]
    reference_g: np.ndarray

    @property
    def emitted_g(self) -> float:
        """Grams emitted by the requests."""
        return sum(float(record["total_g"]) for record in self.records if record["purpose"] == "request")


def intensity_at(hour: float) -> float:
    """A duck curve, gCO2eq/kWh."""
    return float(260.0 - 130.0 * np.exp(-((hour - 12.0) ** 2) / 14.0) + 70.0 * np.exp(-((hour - 19.5) ** 2) / 5.0))


def row_of(options: tuple[str, ...] = OPTIONS, hour: float = 0.0, holdout: float = 0.1) -> dict[str, float]:
    """Probabilities of a policy at an hour: more of the brief levels at high carbon intensity."""
    dirty = (intensity_at(hour) - 130.0) / 200.0
    brief = (1.0 - holdout) * min(1.0, max(0.05, dirty))
    shares = [1.0 - brief, *([brief / (len(options) - 1)] * (len(options) - 1))]
    return dict(zip(options, shares, strict=True))


def made_day(
    *,
    requests: int = 600,
    seed: int = 1,
    holdout: float = 0.1,
    zones: Mapping[str, float] | None = None,
    scatter: float = 0.6,
) -> MadeDay:
    """A day of requests, whose options are drawn from hourly policies.

    Args:
        zones: further zones with their intensity relative to the reference's; each has its own pool.
        scatter: of a request's energy around its group's mean.
    """
    random = np.random.default_rng(seed)
    pools = {POOL: (ZONE, 1.0)} | {f"pool-{zone.lower()}": (zone, share) for zone, share in (zones or {}).items()}
    options = (REFERENCE, *(f"{pool}/{level}" for pool in pools for level in FACTORS if f"{pool}/{level}" != REFERENCE))
    rows = [row_of(options, float(hour), holdout) for hour in range(24)]
    thresholds = [np.cumsum(list(row.values())) for row in rows]
    intensities = [intensity_at(hour) for hour in range(24)]
    groups = list(GROUPS)
    records, reference_g = [], []
    for number in range(requests):
        hour = float(random.uniform(0, 24))
        group = groups[random.integers(len(groups))]
        row, intensity = rows[int(hour)], intensities[int(hour)]
        option = options[int(thresholds[int(hour)].searchsorted(random.random(), side="right"))]
        pool, _, level = option.rpartition("/")
        longer = float(random.lognormal(-(scatter**2) / 2, scatter))
        zone, relative = pools[pool]
        record = record_of(
            f"r{number}",
            group=group,
            option=option,
            zone=zone,
            at=DAY + timedelta(hours=hour),
            energy_j=GROUPS[group] * FACTORS[level] * longer * float(random.lognormal(0, 0.05)),
            intensity=intensity * relative,
            row=row,
            policy_version=int(hour) + 1,
        )
        at_reference = GROUPS[group] * longer
        reference_g.append(
            float(record["total_g"])
            if option == REFERENCE
            else at_reference / 3.6e6 * PUE * intensity + at_reference / WATTS * EMBODIED_G_PER_S
        )
        records.append(record)
    return MadeDay(records, np.array(reference_g))


def record_of(
    request_id: str,
    *,
    group: str = "alpaca",
    option: str = REFERENCE,
    zone: str = ZONE,
    at: datetime = DAY,
    energy_j: float = 1000.0,
    intensity: float | None = 200.0,
    row: Mapping[str, float] | None = None,
    policy_version: int | None = 1,
    source: str | None = "policy",
    purpose: str = "request",
    evaluation_id: str | None = None,
) -> dict[str, Any]:
    """A row of `ledger.footprints`, with `propensities` as a mapping."""
    pool, _, level = option.rpartition("/")
    seconds = energy_j / WATTS
    operational = None if intensity is None else energy_j / 3.6e6 * PUE * intensity
    embodied = seconds * EMBODIED_G_PER_S
    probabilities = dict({option: 1.0} if row is None else row)
    return {
        "request_id": request_id,
        "purpose": purpose,
        "evaluation_id": evaluation_id,
        "model": MODEL,
        "grp": group,
        "task": group,
        "tenant": None,
        "pool": pool,
        "level": level,
        "zone": zone,
        "endpoint": f"{pool}-0",
        "policy_version": policy_version,
        "decision_source": source,
        "propensity": probabilities.get(option, 1.0),
        "propensities": probabilities,
        "started_at": at,
        "finished_at": at + timedelta(seconds=seconds),
        "processing_s": seconds,
        "prompt_tokens": 40,
        "completion_tokens": max(1, round(energy_j / 6)),
        "energy_j": energy_j,
        "intensity_g_per_kwh": intensity,
        "operational_g": operational,
        "embodied_g": embodied,
        "total_g": None if operational is None else operational + embodied,
    }


def calls_of(records: list[dict[str, Any]]) -> tuple[Calls, list[Mapping[str, float]]]:
    """The records as columns, one cell each, and their distributions of options."""
    distributions = Distributions()
    builder = CallsBuilder()
    for record in records:
        builder.add(_cell(record, distributions))
    return builder.build(), distributions.all


def _cell(record: Mapping[str, Any], distributions: Distributions) -> dict[str, Any]:
    """A row of a single cell."""
    text = _as_json(tuple(record["propensities"].items()))
    energy_j, embodied_g = record["energy_j"], record["embodied_g"]
    server_s = record.get("server_s") or record["processing_s"]
    intensity, operational_g = record["intensity_g_per_kwh"] or 0.0, record["operational_g"]
    total_g = 0.0 if operational_g is None else operational_g + embodied_g
    texts = {
        **{name: record[name] for name in ("model", "pool", "zone")},
        "group": record["grp"],
        "task": record["task"] or "",
        "option": f"{record['pool']}/{record['level']}",
        "source": record["decision_source"] or "",
    }
    numbers = {
        "policy_version": NO_POLICY if record["policy_version"] is None else record["policy_version"],
        "distribution": distributions.index(text, text),
        "count": 1,
        "first_s": record["started_at"].timestamp(),
        "last_s": record["started_at"].timestamp(),
        **{name: record[name] for name in ("processing_s", "prompt_tokens", "completion_tokens", "energy_j")},
        "server_s": server_s,
        "embodied_g": embodied_g,
        "energy_energy": energy_j**2,
        "server_server": server_s**2,
        "energy_server": energy_j * server_s,
        "priced": int(operational_g is not None),
        "intensity": intensity,
        "intensity_intensity": intensity**2,
        "energy_intensity": energy_j * intensity,
        "operational_g": operational_g or 0.0,
        "total_g": total_g,
        "total_total": total_g**2,
        "total_intensity": total_g * intensity,
    }
    return texts | {name: [value] for name, value in numbers.items()}


@cache
def _as_json(distribution: tuple[tuple[str, float], ...]) -> str:
    """All requests of an hour have the same distribution."""
    return json.dumps(dict(distribution))


def merged(calls: Calls) -> Calls:
    """The same calls with one cell for each hour and combination of labels, as the roll-up has them."""
    hours = np.floor(calls.started_s / 3600).astype(int).astype(object)
    labels = [getattr(calls, name) for name in TEXT_COLUMNS]
    keys = (*labels, calls.policy_version.astype(object), calls.distribution.astype(object), hours)
    cells = list(partition(*keys).values())
    same = {*TEXT_COLUMNS, "policy_version", "distribution"}
    columns: dict[str, Any] = {}
    for name in (one.name for one in fields(Calls)):
        column = getattr(calls, name)
        combine = {"first_s": np.min, "last_s": np.max}.get(name, np.sum)
        values = [column[where[0]] if name in same else combine(column[where]) for where in cells]
        columns[name] = np.array(values, dtype=column.dtype)
    return Calls(**columns)


CONSTANT_DAY = IntensitySeries(
    at_s=DAY.timestamp() + np.arange(24.0) * 3600, g_per_kwh=np.full(24, 100.0), estimated=np.zeros(24, dtype=bool)
)
"""100 gCO2eq/kWh in every hour of the day."""
PURPOSES = {
    "request": CallSums(500.0, 5.0, 0.5, 0.0),
    "evaluation": CallSums(80.0, 0.4, 0.1, 0.0),
    "judge": CallSums(20.0, 0.1, 0.0, 5.0),
}
"""600 J by purpose; with `interval_sums()`, 1000 J are metered."""


def interval_sums(zone: str = ZONE) -> IntervalSums:
    """An hour of a pool's intervals: 600 J attributed, 300 J idle, 100 J unattributed."""
    return IntervalSums(zone, POOL, DAY.timestamp() + 3.5 * 3600, 600.0, 300.0, 100.0)


def snapshot_of(
    records: Iterable[dict[str, object]] = (),
    *,
    evaluations: Iterable[dict[str, object]] = (),
    metered_j: float = 0.0,
    purposes: Mapping[str, CallSums] | None = None,
    evaluator_g: float | None = None,
    intervals: Iterable[IntervalSums] = (),
    grid: Mapping[str, IntensitySeries] | None = None,
    policies: Iterable[Policy] = (),
    qualities: Iterable[Quality] = (),
    groupings: Iterable[LearnedGroups] = (),
    unsettled: int = 0,
    selection: Selection | None = None,
    fleet: Fleet | None = None,
    readings: FleetReadings = NO_READINGS,
) -> Snapshot:
    """A snapshot of the ledger's tables, from records of `ledger.footprints`."""
    requests = list(records)
    calls, distributions = calls_of([*requests, *evaluations])
    is_request = np.arange(len(calls)) < len(requests)
    return Snapshot(
        selection=selection or Selection(),
        requests=calls.select(is_request),
        evaluations=calls.select(~is_request),
        distributions=distributions,
        unsettled=unsettled,
        unsettled_calls=unsettled,
        rejections={},
        metered_j=metered_j,
        purposes=purposes or {},
        evaluator_g=sum(sums.grams for name, sums in (purposes or {}).items() if name != "request")
        if evaluator_g is None
        else evaluator_g,
        intervals=list(intervals),
        grid=grid or {},
        policies=PolicyHistory.of(policies),
        qualities=list(qualities),
        groupings=list(groupings),
        evaluation_costs={"evaluation-12": EvaluationSums(3, 60.0, 0.5)},
        fleet=fleet,
        readings=readings,
    )


def policy_at(
    hour: int,
    *,
    reference: str = REFERENCE,
    expected_quality: float | None = None,
    expected_g: float = 0.05,
    options: tuple[str, ...] = OPTIONS,
    holdout: float = 0.1,
) -> Policy:
    """The policy of an hour: version `hour` + 1."""
    created = DAY + timedelta(hours=hour)
    intensity = intensity_at(hour)
    bound = 1.0 - 0.1 * min(1.0, max(0.0, (intensity - 130.0) / 200.0))
    row = row_of(options, hour, holdout)
    estimates = {option: OptionEstimate(energy_kwh=1e-4, processing_s=2.0, quality={}) for option in options}
    return Policy(
        model=MODEL,
        version=hour + 1,
        created_at=created,
        valid_until=created + timedelta(hours=2),
        status="optimal",
        reason="new intensity",
        reference=reference,
        groups=dict.fromkeys(GROUPS, row),
        overall=row,
        bounds={"preference": bound},
        expected_quality={"preference": bound + 0.01 if expected_quality is None else expected_quality},
        expected_g_per_request=expected_g,
        reference_g_per_request=0.08,
        inputs=PolicyInputs(
            solved_for=created,
            intensity_g_per_kwh={ZONE: intensity},
            k0_zone=ZONE,
            k0_g_per_kwh=intensity,
            k0_min_g_per_kwh=130.0,
            k0_max_g_per_kwh=330.0,
            xi={"preference": 0.1},
            weights={group: 1 / len(GROUPS) for group in GROUPS},
            estimates=dict.fromkeys(GROUPS, estimates),
            holdout=holdout,
        ),
    )


def quality_at(
    hour: float, *, options: tuple[str, ...] = OPTIONS, shares: Mapping[str, float] | None = None
) -> Quality:
    """An evaluation at an hour: 30 verdicts per group and option."""
    preferred = shares or {"L0": 0.36, "L1": 0.34, "L2": 0.30}
    return Quality(
        evaluation_id=f"evaluation-{hour:g}",
        model=MODEL,
        evaluated_at=DAY + timedelta(hours=hour),
        trigger="local_minimum",
        intensity_g_per_kwh=intensity_at(hour),
        counts=tuple(
            QualityCount(
                group=group,
                option=option,
                metric="preference",
                successes=30 * preferred[option.rpartition("/")[2]],
                trials=30,
            )
            for group in GROUPS
            for option in options
        ),
        prompts=92,
        abstentions=2,
        cost=EvaluationCost(generations=276, judgements=552, completion_tokens=40_000, processing_s=900.0),
    )
