"""From what is known of a model to its policy: states the program, has it solved, and words the result."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from services.optimizer.bounds import InForce, TrailingRange, quality_bounds
from services.optimizer.caution import Caution
from services.optimizer.estimates import Estimates
from services.optimizer.problem import Option, Problem, Solution
from services.optimizer.program import solve
from services.optimizer.triggers import Trigger
from shared.fleet import Fleet
from shared.messages import OptionEstimate, Policy, PolicyInputs

WHOLE = "*"
"""The one group of the program that makes the row for groups without one."""

_BECAUSE: dict[Trigger, str] = {
    "start": "the optimizer started",
    "intensity": "the carbon intensity changed",
    "groups": "the prompt groups changed",
    "quality": "an evaluation came in",
    "estimates": "energy, time or traffic changed",
    "validity": "the last policy was about to expire",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Aims:
    """What the operator wants.

    Attributes:
        xi: largest relative quality loss, by metric.
        constant_bounds: metrics for which it is tolerated at all times, not only on the dirtiest grid.
        floors: least quality of every group relative to the reference's, by metric.
        caution: how much less than what is expected is counted on.
        holdout: least probability of the reference.
        validity: of a policy, event time.
    """

    xi: Mapping[str, float]
    constant_bounds: Collection[str] = ()
    floors: Mapping[str, float] = field(default_factory=dict)
    caution: Caution = field(default_factory=Caution)
    holdout: float
    validity: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is known of a model at an instant.

    Attributes:
        intensities: in force, by zone; the reference's zone is among them.
        range: of k0, over the trailing window of the reference's zone.
        group_version: of the learned prompt groups that the estimates go by; null: task labels.
    """

    model: str
    now: datetime
    trigger: Trigger
    intensities: Mapping[str, InForce]
    range: TrailingRange
    estimates: Estimates
    group_version: str | None = None


def make_policy(situation: Situation, *, fleet: Fleet, aims: Aims, version: int) -> Policy:
    """Solve for a situation.

    The row for groups that have none is the answer of the same program for all traffic as one group, so that it keeps
    the bounds by itself, whatever the groups' own shares turn out to be.
    """
    reference = fleet.reference_of(situation.model)
    zone = fleet.pools_of(situation.model)[0].zone
    k0 = situation.intensities[zone].g_per_kwh
    bounds = quality_bounds(situation.range.dirtiness(k0), aims.xi, constant=aims.constant_bounds)
    estimates = situation.estimates
    overall = solve(_problem(situation, fleet, aims, bounds, weights={WHOLE: 1.0}, rows={WHOLE: estimates.whole}))
    solution = overall
    if estimates.weights:
        problem = _problem(situation, fleet, aims, bounds, weights=estimates.weights, rows=estimates.groups)
        solution = solve(problem)
    return Policy(
        model=situation.model,
        version=version,
        group_version=situation.group_version,
        created_at=situation.now,
        valid_until=situation.now + aims.validity,
        status=solution.status,
        reason=_reason(situation, solution, bounds, zone),
        reference=reference,
        groups=solution.rows if estimates.weights else {},
        overall=overall.rows[WHOLE],
        bounds=bounds,
        expected_quality=solution.quality,
        expected_g_per_request=solution.g_per_request,
        reference_g_per_request=solution.reference_g_per_request,
        inputs=PolicyInputs(
            solved_for=situation.now,
            intensity_g_per_kwh={name: one.g_per_kwh for name, one in situation.intensities.items()},
            k0_zone=zone,
            k0_g_per_kwh=k0,
            k0_min_g_per_kwh=situation.range.k0_min,
            k0_max_g_per_kwh=situation.range.k0_max,
            xi=dict(aims.xi),
            weights=estimates.weights,
            families=estimates.families,
            cautions=aims.caution.together(bounds),
            estimates=estimates.groups or {WHOLE: estimates.whole},
            holdout=aims.holdout,
        ),
    )


def _problem(
    situation: Situation,
    fleet: Fleet,
    aims: Aims,
    bounds: Mapping[str, float],
    *,
    weights: Mapping[str, float],
    rows: Mapping[str, Mapping[str, OptionEstimate]],
) -> Problem:
    pools = fleet.pools_of(situation.model)
    return Problem(
        reference=fleet.reference_of(situation.model),
        # An option whose zone's intensity is unknown has no price.
        options={
            f"{pool.name}/{level}": Option(
                pool=pool.name,
                g_per_kwh=pool.pue * situation.intensities[pool.zone].g_per_kwh,
                embodied_g_per_s=pool.embodied_g_per_s,
            )
            for pool in pools
            if pool.zone in situation.intensities
            for level in fleet.levels
        },
        weights=weights,
        families=situation.estimates.families,
        estimates=rows,
        cautions=aims.caution.together(bounds),
        bounds=bounds,
        floors=aims.floors,
        capacities={pool.name: float(pool.concurrency) for pool in pools if pool.concurrency is not None},
        requests_per_s=situation.estimates.requests_per_s,
        holdout=aims.holdout,
    )


def _reason(situation: Situation, solution: Solution, bounds: Mapping[str, float], zone: str) -> str:
    k0 = situation.intensities[zone]
    parts = [f"{_BECAUSE[situation.trigger]}: {k0.g_per_kwh:.0f} g/kWh in {zone}"]
    estimated = [name for name, one in situation.intensities.items() if one.source == "hour_mean"]
    if estimated:
        parts.append(f"no fresh intensity of {', '.join(estimated)}: the mean of this hour on earlier days stands in")
    if situation.range.k0_min >= situation.range.k0_max:
        parts.append("too little history to tell a dirty grid from a clean one: it counts as clean")
    parts.extend(f"{metric} at least {bound:.3f} of the reference's" for metric, bound in bounds.items())
    if solution.status in ("floors_dropped", "capacity_dropped"):
        parts.append(
            "no solution keeps the group floors"
            if solution.status == "floors_dropped"
            else "no solution keeps the pools' capacities: more endpoints are needed"
        )
    elif solution.status == "reference":
        parts.append("the reference is served")
    parts.extend(f"{option} not used: {why}" for option, why in situation.estimates.withheld.items())
    return "; ".join(parts)
