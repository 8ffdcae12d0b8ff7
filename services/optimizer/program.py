"""The linear program: with which probability each option serves each prompt group; stated in docs/architecture.md.

Every scheme of the paper (arXiv 2403.12900) is a restriction of it: SPROUT is one group, one pool and three levels;
MODEL_OPT is one group and two pools, L0 alone; CO2_OPT has no bounds; BASE has no option but the reference; SPROUT_STA
is SPROUT at a mean intensity, solved once.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pulp

from shared.messages import OptionEstimate
from shared.messages.policies import PolicyStatus

Rows = dict[str, dict[str, float]]
"""Probability by group, then option; an option that is not drawn is left out."""

SOLVER_TOLERANCE = 1e-9
"""Of HiGHS, for constraints and reduced costs."""

DUST = 1e-8
"""A probability below it is rounding of the solver's."""

TIE_BREAK = 1e-6
"""Cost, relative to the dearest option's, that is added per place in the order: of equal options the earlier one is
taken, first of all the reference."""

_TIME_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to serve a request, whatever the group.

    Attributes:
        pool: whose capacity it uses.
        g_per_kwh: gCO2eq for each kWh of the server: PUE times the intensity of the pool's zone.
        embodied_g_per_s: k1 of the pool.
    """

    pool: str
    g_per_kwh: float
    embodied_g_per_s: float

    def grams(self, estimate: OptionEstimate) -> float:
        """Expected gCO2eq of a request: e·PUE·k + k1·p."""
        return estimate.energy_kwh * self.g_per_kwh + self.embodied_g_per_s * estimate.processing_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One instance of the program.

    Attributes:
        reference: the option that quality is measured against.
        options: what may be used at all, the reference among it; where two are equal, the earlier one is taken.
        weights: traffic share by group; sums to 1.
        estimates: e, p and q by group, then option; an option that a group lacks is not available to it.
        bounds: b_m by metric, in [0, 1]: least expected quality of all traffic, relative to the reference's.
        floors: f_m by metric, in [0, 1]: least expected quality of each group, relative to the reference's.
        capacities: requests at once by pool; a pool that is left out is unbounded.
        requests_per_s: of the model, which capacities are held against.
        holdout: least probability of the reference in every group.
    """

    reference: str
    options: Mapping[str, Option]
    weights: Mapping[str, float]
    estimates: Mapping[str, Mapping[str, OptionEstimate]]
    bounds: Mapping[str, float] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)
    capacities: Mapping[str, float] = field(default_factory=dict)
    requests_per_s: float = 0.0
    holdout: float = 0.0

    def __post_init__(self) -> None:
        if not math.isclose(sum(self.weights.values()), 1.0, abs_tol=1e-6):
            raise ValueError(f"weights must sum to 1, got {sum(self.weights.values()):.6f}")
        for name, limits in (("bounds", self.bounds), ("floors", self.floors), ("holdout", {"": self.holdout})):
            if not all(0.0 <= limit <= 1.0 for limit in limits.values()):
                raise ValueError(f"{name} must lie in [0, 1], got {dict(limits)}: the reference could not keep them")
        measured = {*self.bounds, *self.floors}
        for group in self.weights:
            row = self.estimates.get(group, {})
            if self.reference not in row:
                raise ValueError(f"group {group!r} needs an estimate of the reference {self.reference!r}")
            for option, estimate in row.items():
                if missing := sorted(measured - estimate.quality.keys()) if len(row) > 1 else []:
                    raise ValueError(f"group {group!r}, option {option!r}: no quality for {', '.join(missing)}")

    def row(self, group: str) -> dict[str, OptionEstimate]:
        """The options that a group may use, in the order of `options`."""
        known = self.estimates[group]
        return {option: known[option] for option in self.options if option in known}


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What to draw from.

    Attributes:
        status: `optimal`, or which constraints had to be given up.
        rows: every row sums to 1.
        g_per_request: expected gCO2eq of a request.
        reference_g_per_request: the same traffic, all on the reference.
        quality: expected of all traffic, relative to the reference's, by metric with a bound.
    """

    status: PolicyStatus
    rows: Rows
    g_per_request: float
    reference_g_per_request: float
    quality: dict[str, float]


def solve(problem: Problem) -> Solution:
    """Solve the program; never raises for a problem without a solution.

    What cannot be kept is given up in a fixed order: the group floors, then capacity too, then everything, and the
    reference is served. Where there is nothing but the reference to choose, the status is `reference` as well.
    """
    if any(len(problem.row(group)) > 1 for group in problem.weights):
        for status, floors, capacities in _attempts(problem):
            rows = _optimum(problem, floors=floors, capacities=capacities)
            if rows is not None:
                return _solution(problem, rows, status)
    return _solution(problem, _all_reference(problem), "reference")


def warm_up() -> None:
    """Use the solver once, with standard output shut: at its first use HiGHS prints its licence there, whatever it is
    told, and a service's standard output is its log.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    shut = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(shut, 1)
        model = pulp.LpProblem("warm_up", pulp.LpMinimize)
        model.setObjective(pulp.LpAffineExpression([(model.add_variable("x", lowBound=1.0), 1.0)]))
        model.solve(_solver())
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(shut)


def _solver() -> pulp.HiGHS:
    # A thread more would only wait: the simplex method of a small program is serial.
    return pulp.HiGHS(
        msg=False,
        threads=1,
        timeLimit=_TIME_LIMIT_S,
        primal_feasibility_tolerance=SOLVER_TOLERANCE,
        dual_feasibility_tolerance=SOLVER_TOLERANCE,
    )


def _attempts(problem: Problem) -> Iterator[tuple[PolicyStatus, Mapping[str, float], Mapping[str, float]]]:
    """The constraints to try, and the status that they mean."""
    yield "optimal", problem.floors, problem.capacities
    if problem.floors:
        yield "floors_dropped", {}, problem.capacities
    if problem.capacities:
        yield "capacity_dropped", {}, {}


def _optimum(problem: Problem, *, floors: Mapping[str, float], capacities: Mapping[str, float]) -> Rows | None:
    """The cheapest rows that keep the constraints; null where there are none, or the solver found none in time."""
    rows = {group: problem.row(group) for group in problem.weights}
    model = pulp.LpProblem("policy", pulp.LpMinimize)
    x = {
        group: {
            option: model.add_variable(f"x{g}_{o}", lowBound=problem.holdout if option == problem.reference else 0.0)
            for o, option in enumerate(row)
        }
        for g, (group, row) in enumerate(rows.items())
    }
    _minimise_carbon(model, problem, rows, x)
    for group, row in x.items():
        _require(model, [(variable, 1.0) for variable in row.values()], pulp.LpConstraintEQ, 1.0)
        for metric, floor in floors.items():
            quality = [
                (row[option], estimate.group_quality.get(metric, estimate.quality[metric]))
                for option, estimate in rows[group].items()
            ]
            least = floor * rows[group][problem.reference].quality[metric]
            _require(model, quality, pulp.LpConstraintGE, least)
    for metric, bound in problem.bounds.items():
        whole = [
            (x[group][option], problem.weights[group] * estimate.quality[metric])
            for group, row in rows.items()
            for option, estimate in row.items()
        ]
        _require(model, whole, pulp.LpConstraintGE, bound * _quality(problem, _all_reference(problem), metric))
    for pool, capacity in capacities.items():
        busy = [
            (x[group][option], problem.requests_per_s * problem.weights[group] * estimate.processing_s)
            for group, row in rows.items()
            for option, estimate in row.items()
            if problem.options[option].pool == pool
        ]
        _require(model, busy, pulp.LpConstraintLE, capacity)
    model.solve(_solver())
    # PuLP calls a solver that ran out of time "optimal"; only `sol_status` tells.
    if model.status != pulp.LpStatusOptimal or model.sol_status != pulp.LpSolutionOptimal:
        return None
    return {
        group: _distribution(
            {option: variable.varValue or 0.0 for option, variable in row.items()}, problem.reference, problem.holdout
        )
        for group, row in x.items()
    }


def _minimise_carbon(
    model: pulp.LpProblem,
    problem: Problem,
    rows: Mapping[str, Mapping[str, OptionEstimate]],
    x: Mapping[str, Mapping[str, pulp.LpVariable]],
) -> None:
    """Set the objective, in units of the dearest option: the solver's tolerances then mean the same for any grid."""
    order = [problem.reference, *(option for option in problem.options if option != problem.reference)]
    tie_break = {option: place * TIE_BREAK for place, option in enumerate(order)}
    grams = {
        group: {option: problem.options[option].grams(estimate) for option, estimate in row.items()}
        for group, row in rows.items()
    }
    dearest = max((cost for row in grams.values() for cost in row.values()), default=0.0) or 1.0
    model.setObjective(
        pulp.LpAffineExpression(
            [
                (x[group][option], problem.weights[group] * (cost / dearest + tie_break[option]))
                for group, row in grams.items()
                for option, cost in row.items()
            ]
        )
    )


def _require(model: pulp.LpProblem, terms: list[tuple[pulp.LpVariable, float]], sense: int, limit: float) -> None:
    # The operators (`model += a >= b`) would copy every expression twice.
    model.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), sense, rhs=limit))


def _distribution(values: Mapping[str, float], reference: str, holdout: float) -> dict[str, float]:
    """A row without the solver's dust; sums to 1 and keeps the holdout exactly."""
    others = {option: value for option, value in values.items() if option != reference and value > DUST}
    taken = sum(others.values())
    share = min(max(1.0 - taken, 0.0), 1.0)
    kept = max(share if share > DUST else 0.0, holdout)
    if taken == 0.0 or kept >= 1.0:
        return {reference: 1.0}
    row = {reference: kept} if kept > 0.0 else {}
    return row | {option: value * (1.0 - kept) / taken for option, value in others.items()}


def _all_reference(problem: Problem) -> Rows:
    return {group: {problem.reference: 1.0} for group in problem.weights}


def _expected(problem: Problem, rows: Rows, value: Callable[[str, OptionEstimate], float]) -> float:
    """Mean of a value of options over the traffic, drawn by these rows."""
    return sum(
        problem.weights[group] * probability * value(option, problem.estimates[group][option])
        for group, row in rows.items()
        for option, probability in row.items()
    )


def _quality(problem: Problem, rows: Rows, metric: str) -> float:
    return _expected(problem, rows, lambda _, estimate: estimate.quality[metric])


def _solution(problem: Problem, rows: Rows, status: PolicyStatus) -> Solution:
    def grams(option: str, estimate: OptionEstimate) -> float:
        return problem.options[option].grams(estimate)

    reference = _all_reference(problem)
    quality: dict[str, float] = {}
    for metric in problem.bounds:
        # Nothing but the reference: what is served is the reference's quality, known or not.
        whole = 0.0 if rows == reference else _quality(problem, reference, metric)
        quality[metric] = _quality(problem, rows, metric) / whole if whole > 0.0 else 1.0
    return Solution(
        status=status,
        rows=rows,
        g_per_request=_expected(problem, rows, grams),
        reference_g_per_request=_expected(problem, reference, grams),
        quality=quality,
    )
