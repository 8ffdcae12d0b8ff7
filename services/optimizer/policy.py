"""Policies: the program of a model's current situation, the message made from its solution, and its comparison."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from services.optimizer.bounds import CurrentIntensity, TrailingRange, joint_confidence_z, quality_bounds
from services.optimizer.estimates import Estimates, price_bases, relative_change
from services.optimizer.holdout import AUTO, Holdout, choose_holdout
from services.optimizer.outcome import settled_groups
from services.optimizer.prices import describe_price
from services.optimizer.problem import Failure, LaterHours, OptionPrice, Problem, Solution
from services.optimizer.program import TIME_LIMIT_S, Program, solve, solve_program
from services.optimizer.promise import RestOfPeriod
from services.optimizer.safety_margin import solve_jointly
from services.optimizer.settings import OptimizerSettings
from shared.fleet import Fleet
from shared.messages import PeriodPromise, Policy, PolicyInputs, option_key
from shared.messages.policies import LaterHoursInputs, OptionInputs

Trigger = Literal["start", "intensity", "groups", "quality", "estimates", "validity", "period"]
"""The events that make the optimizer solve."""

ALL_TRAFFIC = "*"
"""The only group of the program that makes the overall distribution."""

_TRIGGERED_BY: dict[Trigger, str] = {
    "start": "the optimizer started",
    "intensity": "the carbon intensity changed",
    "groups": "the prompt groups changed",
    "quality": "an evaluation arrived",
    "estimates": "energy, time, traffic or the price of a token changed",
    "validity": "the last policy was about to expire",
    "period": "a new period began",
}
_FAILURE: dict[Failure, str] = {
    "time limit": f"the solver reached its time limit of {TIME_LIMIT_S:g} s",
    "no convergence": "the safety margins did not converge",
    "infeasible": "the solver found no solution",
    "solver error": "the solver failed",
}

OVERLOAD_EPSILON = 1e-4
"""Overloads below this are rounding errors."""

SHORTFALL_EPSILON = 1e-5
"""Shortfalls below this are rounding errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """The inputs of a policy: estimates and carbon intensities of one model at one instant.

    Attributes:
        model: name of the model.
        now: event time.
        trigger: the event that makes the optimizer solve.
        intensities: current carbon intensity by zone, with that of the reference's zone.
        range: k0_min and k0_max of the reference's zone.
        estimates: e, p and q.
        group_version: version of the learned prompt groups that the estimates are by; None: task labels.
        rest: with a promise by period, what the rest of the period needs; None: every hour keeps the limits.
    """

    model: str
    now: datetime
    trigger: Trigger
    intensities: Mapping[str, CurrentIntensity]
    range: TrailingRange
    estimates: Estimates
    group_version: str | None = None
    rest: RestOfPeriod | None = None


def build_problem(
    estimates: Estimates,
    *,
    reference: str,
    prices: Mapping[str, OptionPrice],
    bounds: Mapping[str, float],
    settings: OptimizerSettings,
    rest_bounds: Mapping[str, float] | None = None,
    later: Sequence[LaterHours] = (),
    holdout: float = 0.0,
    capacities: Mapping[str, float] | None = None,
    overall: bool = False,
) -> Problem:
    """The program of some estimates: the one way from estimates to a program, for the service and the simulator.

    Args:
        estimates: e, p and q.
        reference: the baseline option.
        prices: by option; an option without a price is not used.
        bounds: b_m of the present hour by metric.
        settings: confidence level and floors.
        rest_bounds: with a promise by period, what the present hour and the later ones need together, by metric.
        later: those later hours.
        holdout: minimum probability of the reference in every group.
        capacities: concurrent requests by pool; None: unlimited.
        overall: state the program for all traffic as one group, `ALL_TRAFFIC`.
    """
    return Problem(
        reference=reference,
        options=prices,
        weights={ALL_TRAFFIC: 1.0} if overall else estimates.weights,
        later_weights={} if overall or not later else estimates.usual_weights,
        families=estimates.families,
        estimates={ALL_TRAFFIC: estimates.overall} if overall else estimates.groups,
        confidence_z=joint_confidence_z(bounds, settings),
        bounds=bounds if rest_bounds is None else rest_bounds,
        hourly_floors={} if rest_bounds is None else settings.hourly_floors,
        later=later,
        floors=settings.floors,
        capacities=capacities or {},
        requests_per_s=estimates.requests_per_s,
        holdout=holdout,
        traffic_requests=None if overall else estimates.traffic_requests,
    )


def make_policy(
    situation: Situation, *, fleet: Fleet, settings: OptimizerSettings, version: int
) -> tuple[Policy, Program | None]:
    """Solve the program of a situation.

    Expected grams are those that requests add: where servers run anyway, their idle energy and their embodied carbon
    are the same whatever is served, and not part of them.

    The overall distribution, for groups without one of their own, is the solution of the same program for all traffic
    as one group: it keeps the limits by itself, whatever those groups' shares of the traffic are.

    Returns:
        The policy, and its solved program; None if the reference is served.
    """
    reference = fleet.reference_of(situation.model)
    zone = fleet.pools_of(situation.model)[0].zone
    k0 = situation.intensities[zone].g_per_kwh
    bounds = quality_bounds(situation.range.position(k0), settings)
    rest = situation.rest
    estimates = situation.estimates
    prices = _prices(situation, fleet)
    later = [
        LaterHours(share=hours.share, options=_prices_of(fleet, situation.model, hours.g_per_kwh))
        for hours in (() if rest is None else rest.later)
    ]
    capacities = {
        pool.name: float(pool.concurrency) for pool in fleet.pools_of(situation.model) if pool.concurrency is not None
    }

    def problem_with(holdout: float, *, overall: bool) -> Problem:
        return build_problem(
            estimates,
            reference=reference,
            prices=prices,
            bounds=bounds,
            rest_bounds=None if rest is None else rest.bounds,
            later=later,
            settings=settings,
            holdout=holdout,
            capacities=capacities,
            overall=overall,
        )

    least = settings.holdout_minimum if settings.holdout == AUTO else settings.holdout
    problem = problem_with(least, overall=not estimates.weights)
    problem, solution, program = solve_jointly(problem, settings)
    holdout = choose_holdout(problem, solution.rows, variation=estimates.variation, settings=settings)
    if holdout.probability > least:
        solution, program = solve_program(replace(problem, holdout=holdout.probability))
    overall = solve(problem_with(holdout.probability, overall=True)) if estimates.weights else solution
    promise = None
    if rest is not None:
        promise = PeriodPromise(
            current=rest.current,
            previous=rest.previous,
            rest=rest.bounds,
            hourly_floors=settings.hourly_floors,
            shortfall=solution.shortfall if solution.shortfall > SHORTFALL_EPSILON else 0.0,
        )
    policy = Policy(
        model=situation.model,
        version=version,
        group_version=situation.group_version,
        created_at=situation.now,
        valid_until=situation.now + settings.validity,
        status=solution.status,
        overload=solution.overload if solution.overload > OVERLOAD_EPSILON else 0.0,
        reason=_reason(situation, solution, bounds, promise=promise, zone=zone, holdout=holdout),
        reference=reference,
        groups=solution.rows if estimates.weights else {},
        overall=overall.rows[ALL_TRAFFIC],
        bounds=bounds,
        promise=promise,
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
            xi=dict(settings.xi),
            weights=estimates.weights,
            families=estimates.families,
            cautions=problem.confidence_z,
            estimates=estimates.groups or {ALL_TRAFFIC: estimates.overall},
            holdout=holdout.probability,
            saving_half_width_pct=holdout.half_width_pct,
            options={
                option: OptionInputs(
                    pool=price.pool, g_per_kwh=price.g_per_kwh, embodied_g_per_s=price.embodied_g_per_s
                )
                for option, price in prices.items()
            },
            prices=estimates.prices,
            floors=dict(settings.floors),
            capacities=capacities,
            requests_per_s=estimates.requests_per_s,
            later_weights=problem.later_weights,
            later=tuple(
                LaterHoursInputs(
                    share=hours.share, g_per_kwh={option: price.g_per_kwh for option, price in hours.options.items()}
                )
                for hours in later
            ),
            traffic_requests=estimates.traffic_requests if estimates.weights else None,
        ),
    )
    return policy, program


class MissingPricesError(ValueError):
    """A policy of an earlier release, without the prices of its options, and no fleet to take them from."""


def problem_of(policy: Policy, *, fleet: Fleet | None = None) -> Problem:
    """Rebuild the program that a policy was solved from, out of its `inputs`.

    Args:
        policy: as published.
        fleet: prices and capacities for a policy of an earlier release, which does not contain them.

    Raises:
        MissingPricesError: the policy contains no prices, and there is no fleet.
        ValueError: the policy's inputs contradict each other.
    """
    inputs = policy.inputs
    capacities = dict(inputs.capacities)
    prices = {
        name: OptionPrice(pool=one.pool, g_per_kwh=one.g_per_kwh, embodied_g_per_s=one.embodied_g_per_s)
        for name, one in inputs.options.items()
    }
    if not prices:
        if fleet is None:
            raise MissingPricesError(
                "the policy was made by an earlier release and does not contain the prices of its options"
            )
        prices = _prices_of(fleet, policy.model, inputs.intensity_g_per_kwh)
    weights = inputs.weights or dict.fromkeys(inputs.estimates, 1.0)
    promise = policy.promise
    return Problem(
        reference=policy.reference,
        options=prices,
        later=[
            LaterHours(
                share=hours.share,
                options={name: replace(price, g_per_kwh=hours.g_per_kwh[name]) for name, price in prices.items()},
            )
            for hours in inputs.later
        ],
        weights=weights,
        later_weights=inputs.later_weights,
        families=inputs.families,
        estimates=inputs.estimates,
        confidence_z=inputs.cautions,
        bounds=policy.bounds if promise is None else promise.rest,
        hourly_floors={} if promise is None else promise.hourly_floors,
        floors=inputs.floors,
        capacities=capacities,
        requests_per_s=inputs.requests_per_s,
        holdout=inputs.holdout,
        traffic_requests=inputs.traffic_requests,
    )


def margin_g(policy: Policy) -> float:
    """Grams per request that the safety margins of a policy's limits cost: its objective less that without margins.

    Args:
        policy: with the prices of its options.
    """
    without_margins = solve(replace(problem_of(policy), confidence_z={}))
    return max(0.0, policy.expected_g_per_request - without_margins.g_per_request)


def settled_since(
    policy: Policy, program: Program | None, before: Policy | None, *, settings: OptimizerSettings
) -> dict[str, datetime]:
    """Groups in which further verdicts would change nothing, with the time since when that is so.

    Args:
        policy: as it is to be published.
        program: its solved program; None: the reference is served.
        before: the policy that it replaces; None: there is none.
        settings: the minimum of judged prompts.
    """
    if not policy.groups or program is None:
        return {}
    earlier = {} if before is None or before.valid_until < policy.created_at else before.settled
    found = settled_groups(program, min_trials=settings.min_trials)
    return {group: earlier.get(group, policy.created_at) for group in sorted(found)}


def policy_difference(old: Policy, new: Policy, settings: OptimizerSettings) -> str | None:
    """The first difference that matters to routers or ledgers, in words; None if there is none."""
    return next(_differences(old, new, settings), None)


def _differences(old: Policy, new: Policy, settings: OptimizerSettings) -> Iterator[str]:
    if (new.status, new.reference) != (old.status, old.reference):
        yield f"status {old.status} is now {new.status}"
    if (new.groups.keys(), new.group_version) != (old.groups.keys(), old.group_version):
        yield "other prompt groups"
        return
    rows = [(old.overall, new.overall), *((old.groups[group], new.groups[group]) for group in new.groups)]
    changed = max(
        abs(after.get(option, 0.0) - before.get(option, 0.0))
        for before, after in rows
        for option in before.keys() | after.keys()
    )
    if changed > settings.probability_change:
        yield f"a probability changed by {changed:.3f}"
    if new.bounds.keys() != old.bounds.keys() or any(
        abs(new.bounds[metric] - old.bounds[metric]) > settings.bound_change for metric in new.bounds
    ):
        yield "other quality limits"
    if abs(new.overload - old.overload) > settings.probability_change:
        yield f"an overload of {old.overload:.1%} is now {new.overload:.1%}"
    if price_bases(old.inputs.prices) != price_bases(new.inputs.prices):
        yield "tokens are priced in another way"
    if relative_change(old.expected_g_per_request, new.expected_g_per_request) > settings.carbon_change:
        yield "other grams per request"


def _prices(situation: Situation, fleet: Fleet) -> dict[str, OptionPrice]:
    intensities = {zone: one.g_per_kwh for zone, one in situation.intensities.items()}
    return _prices_of(fleet, situation.model, intensities)


def _prices_of(fleet: Fleet, model: str, g_per_kwh: Mapping[str, float]) -> dict[str, OptionPrice]:
    """Prices of a model's options; options in a zone without a known intensity have none."""
    return {
        option_key(pool.name, level): OptionPrice(
            pool=pool.name,
            g_per_kwh=pool.pue * g_per_kwh[pool.zone],
            embodied_g_per_s=pool.embodied_g_per_s,
        )
        for pool in fleet.pools_of(model)
        if pool.zone in g_per_kwh
        for level in fleet.levels
    }


def _reason(
    situation: Situation,
    solution: Solution,
    bounds: Mapping[str, float],
    *,
    promise: PeriodPromise | None,
    zone: str,
    holdout: Holdout,
) -> str:
    k0 = situation.intensities[zone]
    parts = [f"{_TRIGGERED_BY[situation.trigger]}: {k0.g_per_kwh:.0f} g/kWh in {zone}"]
    estimated = [name for name, one in situation.intensities.items() if one.source == "hour_mean"]
    if estimated:
        parts.append(
            f"no recent carbon intensity of {', '.join(estimated)}: the mean of this hour of earlier days is used"
        )
    if situation.range.k0_min >= situation.range.k0_max:
        parts.append("too little history of the carbon intensity: no quality loss is tolerated")
    if promise is None:
        parts.extend(f"{metric} at least {bound:.3f} of the baseline's" for metric, bound in bounds.items())
    else:
        parts.extend(_promise_in_words(promise, bounds))
    if solution.overload > OVERLOAD_EPSILON:
        parts.append(f"{solution.overload:.1%} more load than the pools' capacities: more endpoints are needed")
    if solution.failure is not None:
        parts.append(_FAILURE[solution.failure])
    if solution.status == "reference":
        parts.append("the reference is served")
    else:
        parts.append(holdout.reason)
    parts.extend(f"{option} not used: {why}" for option, why in situation.estimates.ineligible.items())
    parts.extend(describe_price(pool, price) for pool, price in situation.estimates.prices.items())
    return "; ".join(parts)


def _promise_in_words(promise: PeriodPromise, bounds: Mapping[str, float]) -> Iterator[str]:
    account = promise.current
    yield f"promise for {account.start:%Y-%m-%d} to {account.end:%Y-%m-%d}"
    for metric, rest in promise.rest.items():
        booked = metric in account.promised
        so_far = f"{account.kept[metric]:.3f} kept of {account.promised[metric]:.3f} so far, " if booked else ""
        yield f"{metric}: {so_far}{bounds[metric]:.3f} for this hour, at least {rest:.3f} needed in the rest"
    if promise.shortfall:
        yield f"what is missing so far cannot be made up for: {promise.shortfall:.3f} are missing in the rest"
