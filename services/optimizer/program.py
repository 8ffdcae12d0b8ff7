"""The linear program: with which probability each option serves each prompt group (docs/architecture.md).

PuLP states it, HiGHS solves it in process. Variables and constraints are named as in the documentation: `x[group,
option]`, `one[group]`, `bound[metric]`, `floor[metric,group]`, `capacity[pool]`; PuLP writes `_` for brackets and other
characters that its file formats do not allow.

A linear program cannot express the norm in the safety margin of a quality limit (a second-order-cone constraint). The
program is solved, tangent cuts are added to the live HiGHS model where a margin is too small, and it is solved again
from its last basis (outer approximation by cutting planes).

Every scheme of the paper (arXiv 2403.12900) is a restriction of this program: SPROUT has one group, one pool and three
levels; MODEL_OPT one group, two pools and L0; CO2_OPT no quality limits; BASE no option but the reference; SPROUT_STA
is SPROUT at a mean intensity, solved once.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import highspy
import numpy as np
import pulp

from services.optimizer.cells import Cells, QualityBound
from services.optimizer.highs import highs, outcome
from services.optimizer.problem import Failure, Floats, Problem, Rows, Solution

TIME_LIMIT_S = 10.0
"""Wall time of a program, all rounds of cuts together."""

RELIEF_TOLERANCE = 1e-6
"""What overload and shortfall may be above the least possible ones, so that the solver finds the least carbon."""

SHORTFALL_WEIGHT = 1e-3
"""What a shortfall counts for while overload and shortfall are minimised: rather miss a bound than overload a pool."""

_MAX_ROUNDS = 50
"""Rounds of cuts; about five are enough."""

_PULP_SPELLING = str.maketrans("-+[] ->/", "________")
"""How PuLP spells names in its files."""


def solve(problem: Problem, *, time_limit_s: float = TIME_LIMIT_S) -> Solution:
    """Solve the program; see `solve_program`."""
    return solve_program(problem, time_limit_s=time_limit_s)[0]


def solve_program(problem: Problem, *, time_limit_s: float = TIME_LIMIT_S) -> "tuple[Solution, Program | None]":
    """Solve the program; there is always a solution.

    The reference keeps all limits up to 1 and all floors, so only capacities can be too small, and bounds above 1 too
    high; see `Program.solve`. If the solver fails, the reference is served. If the reference is the only option, the
    status is `reference` as well.

    Returns:
        The solution, and the solved program with its shadow prices; None if the reference is served.
    """
    cells = Cells(problem)
    failure = None
    if any(len(problem.row(group)) > 1 for group in problem.weights):
        program = Program(cells)
        failure = program.solve(time_limit_s=time_limit_s)
        if failure is None:
            later = program.plan[len(program.x) :] if problem.later else None
            return cells.solution(program.rows(), "optimal", later=later, shortfall=program.shortfall), program
    only_reference = {group: {problem.reference: 1.0} for group in problem.weights}
    return cells.solution(only_reference, "reference", failure), None


class NormConstraint:
    """sigma >= |P x|, as far as the cuts added so far enforce it.

    With v = P x: |v| = sum_k v_k^2 / |v|, and every term is convex and homogeneous in (v_k, |v|), so that for any a
    v_k^2 / |v| >= 2 a v_k - a^2 |v|, with equality at a = v_k / |v|. One variable t_k stands for every term, with
    sigma >= sum_k t_k and cuts t_k >= 2 a v_k - a^2 sigma. Cuts of single components converge in a few rounds; cuts of
    the whole norm exclude one corner of the feasible set at a time and need many.

    Attributes:
        sigma: the variable.
    """

    def __init__(self, lp: pulp.LpProblem, name: str, factors: Floats, variables: Sequence[pulp.LpVariable]) -> None:
        """Add the variables and `sigma >= sum_k t_k` to a program that is not solved yet.

        Args:
            lp: the program.
            name: the variables are `sigma[name]` and `term[name,k]`, the row is `norm[name]`.
            factors: P, (components, cells).
            variables: x, of the cells.
        """
        self._factors = factors
        self._variables = variables
        self._name = name
        self._cuts: list[tuple[int, float, Floats]] = []
        self.sigma = lp.add_variable(f"sigma[{name}]", lowBound=0.0)
        self._terms = [lp.add_variable(f"term[{name},{k}]", lowBound=0.0) for k in range(len(factors))]
        row = [(self.sigma, 1.0), *((term, -1.0) for term in self._terms)]
        lp.addConstraint(pulp.LpAffineExpression(row) >= 0.0, f"norm[{name}]")

    def value(self, x: Floats) -> float:
        """|P x|."""
        return float(np.linalg.norm(self._factors @ x))

    def add_cuts(self, solver: highspy.Highs, x: Floats) -> None:
        """Add the cuts that are tangent at x to the solver's live model.

        Args:
            solver: of the program, after its first solve.
            x: (cells,), probabilities at which the norm is too small.
        """
        values = self._factors @ x
        slopes = values / np.linalg.norm(values)
        for k in np.flatnonzero(slopes).tolist():
            # t_k - 2 a (P x)_k + a^2 sigma >= 0
            row = -2.0 * slopes[k] * self._factors[k]
            cells = np.flatnonzero(row).tolist()
            columns = [*(self._variables[cell].index for cell in cells), self._terms[k].index, self.sigma.index]
            coefficients = np.concatenate([row[cells], [1.0, slopes[k] ** 2]])
            solver.addRow(0.0, highspy.kHighsInf, len(columns), np.array(columns, dtype=np.int32), coefficients)
            self._cuts.append((k, float(slopes[k] ** 2), row))

    def state_cuts(self, lp: pulp.LpProblem) -> None:
        """Add the cuts to the PuLP program as well, named `cut[name,n]`, so that its text contains them."""
        for number, (k, slope_squared, row) in enumerate(self._cuts):
            terms = [(self._terms[k], 1.0), (self.sigma, slope_squared)]
            terms += [(self._variables[cell], float(row[cell])) for cell in np.flatnonzero(row).tolist()]
            lp.addConstraint(pulp.LpAffineExpression(terms) >= 0.0, f"cut[{self._name},{number}]")


class Program:
    """The PuLP formulation of a problem, and its HiGHS model.

    Attributes:
        cells: the problem.
        x: (cells,), probabilities of the present hour in the last solve.
        plan: what the quality limits hold for: `x`, and where there are later hours the mean over them, (2 * cells,).
        shortfall: by how much bounds above 1 are missed.
    """

    def __init__(self, cells: Cells) -> None:
        """State the program.

        Raises:
            ValueError: a number in it is not finite; HiGHS would drop the constraint.
        """
        self.cells = cells
        self.x: Floats = np.array([])
        self.plan: Floats = np.array([])
        self.shortfall = 0.0
        self._lp = pulp.LpProblem("sprout", pulp.LpMinimize)
        self._names: set[str] = set()
        self._constraints: dict[str, pulp.LpConstraint] = {}
        self._limits: list[tuple[QualityBound, NormConstraint, list[pulp.LpVariable]]] = []
        self._cuts_stated = False
        problem = cells.problem
        self._reliefs: dict[str, pulp.LpVariable] = {}
        self._x = self._variables("x")
        later = [self._variables(f"x{number}") for number in range(1, len(problem.later) + 1)]
        shares = [problem.share, *(hours.share for hours in problem.later)]
        hours = list(zip((self._x, *later), (cells.grams, *cells.later_grams), shares, strict=True))
        weights = [cells.weights, *(cells.later_weights for _ in problem.later)]
        costs = [share * cells.costs(grams, w) for (_, grams, share), w in zip(hours, weights, strict=True)]
        self._lp.setObjective(
            _expression([one for variables, _, _ in hours for one in variables], np.concatenate(costs), keep_zeros=True)
        )
        for number, (variables, _, _) in enumerate(hours):
            self._add_hour(variables, "" if number == 0 else f"{number}", weights[number])
        self._plan = self._x + (self._mean_of_later(later, shares[1:]) if later else [])
        for metric, bound in cells.bounds.items():
            if bound.is_active:
                self._add_bound(f"bound[{metric}]", metric, bound, self._plan)

    def solve(self, *, time_limit_s: float = TIME_LIMIT_S) -> Failure | None:
        """Solve. Where no solution keeps the capacities and the bounds above 1, the least overload and shortfall are
        found first, then the least carbon.

        Returns:
            None once `x` is optimal; else why there is no solution.
        """
        self._lp.solve(highs(time_limit_s))
        failure = self._add_cuts()
        if failure != "infeasible" or not self._reliefs:
            return failure
        solver = self._solver
        weights = {"overload": 1.0, "shortfall": SHORTFALL_WEIGHT}
        columns, costs = np.arange(solver.getNumCol(), dtype=np.int32), np.array(solver.getLp().col_cost_)
        relaxed = np.zeros(len(costs))
        for name, relief in self._reliefs.items():
            solver.changeColBounds(relief.index, 0.0, highspy.kHighsInf)
            relaxed[relief.index] = weights[name]
        solver.changeColsCost(len(columns), columns, relaxed)
        solver.run()
        failure = self._add_cuts()
        if failure is not None:
            return failure
        least = solver.getSolution().col_value
        for relief in self._reliefs.values():
            solver.changeColBounds(relief.index, 0.0, least[relief.index] + RELIEF_TOLERANCE)
        solver.changeColsCost(len(columns), columns, costs)
        solver.run()
        return self._add_cuts()

    def _add_cuts(self) -> Failure | None:
        """Add cuts, and solve again, until every limit holds with its safety margin."""
        for _ in range(_MAX_ROUNDS):
            failure = outcome(self._solver)
            if failure is not None:
                return failure
            values = np.asarray(self._solver.getSolution().col_value)
            self.x, self.plan = _values(values, self._x), _values(values, self._plan)
            shortfall = self._reliefs.get("shortfall")
            self.shortfall = 0.0 if shortfall is None else float(values[shortfall.index])
            violated = [
                (norm, x)
                for bound, norm, variables in self._limits
                if bound.is_violated(x := _values(values, variables), shortfall=self._shortfall_of(bound))
            ]
            if not violated:
                return None
            for norm, x in violated:
                norm.add_cuts(self._solver, x)
            self._solver.run()
        return "no convergence"

    def _shortfall_of(self, bound: QualityBound) -> float:
        return self.shortfall if bound.bound > 1.0 else 0.0

    def rows(self) -> Rows:
        """Probabilities by group, then option."""
        return self.cells.rows(self.x)

    def mean_g_per_request(self) -> float:
        """Expected gCO2eq of a request over the present and the later hours."""
        return float(self._solver.getObjectiveValue()) * self.cells.cost_unit_g

    def shadow_prices(self) -> dict[str, float]:
        """By constraint: change of the expected gCO2eq per request, over all hours, for one more unit of its right-hand
        side.
        """
        duals = self._solver.getSolution().row_dual
        unit = self.cells.cost_unit_g
        return {name: float(duals[constraint.index]) * unit for name, constraint in self._constraints.items()}

    def holdout_price_g(self) -> float:
        """Change of the expected gCO2eq per request for one more unit of the holdout, in all groups."""
        duals = np.asarray(self._solver.getSolution().col_dual)[[variable.index for variable in self._x]]
        return float(duals @ self.cells.reference) * self.cells.cost_unit_g

    def extra_g(self) -> Rows:
        """By group, then option: gCO2eq by which the whole traffic emits more for one more request with that option.

        The reduced costs of the present hour: quality that the request loses is made up for elsewhere. 0 for the
        options that the solution uses, but for the reference where the holdout forces it.
        """
        duals = np.asarray(self._solver.getSolution().col_dual)[[variable.index for variable in self._x]]
        unit = self.cells.cost_unit_g / self.cells.problem.share
        rows: Rows = {}
        for (group, option), dual, weight in zip(self.cells.names, duals, self.cells.weights, strict=True):
            rows.setdefault(group, {})[option] = unit * float(dual) / float(weight) if weight else 0.0
        return rows

    def lp_text(self) -> str:
        """The program in CPLEX LP format, with the cuts added so far."""
        if not self._cuts_stated:
            for _, norm, _ in self._limits:
                norm.state_cuts(self._lp)
            self._cuts_stated = True
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "program.lp"
            self._lp.writeLP(str(path), max_length=1_000)
            return path.read_text(encoding="utf-8")

    @property
    def _solver(self) -> highspy.Highs:
        """The live model that PuLP built; it keeps its basis between runs."""
        solver: highspy.Highs = self._lp.solverModel
        return solver

    def _variables(self, name: str) -> list[pulp.LpVariable]:
        """One variable for every cell, at least the holdout."""
        holdout, cells = self.cells.problem.holdout, self.cells
        return [
            self._lp.add_variable(self._unique(f"{name}[{group},{option}]"), lowBound=holdout if reference else 0.0)
            for (group, option), reference in zip(cells.names, cells.reference, strict=True)
        ]

    def _add_hour(self, x: list[pulp.LpVariable], hour: str, weights: Floats) -> None:
        """Add the constraints that hold in every single hour.

        Args:
            x: of the cells.
            hour: number of the later hours; empty: the present hour, whose constraints have shadow prices.
            weights: traffic shares of the hour, by cell.
        """
        problem, cells = self.cells.problem, self.cells
        for group in problem.weights:
            row = pulp.LpAffineExpression([(x[place], 1.0) for place in cells.of_group(group)])
            self._add(f"one[{group}]", row == 1.0, hour)
        for metric, floor in problem.floors.items():
            self._add_floors(metric, floor, x, hour)
        for pool, capacity in problem.capacities.items():
            self._add_capacity(pool, capacity, x, hour, weights)
        for metric, bound in cells.hourly_floors(weights).items():
            if bound.is_active:
                self._add_bound(f"hourly[{metric}]", f"hourly_{metric}{hour}", bound, x, hour)

    def _mean_of_later(
        self, later: Sequence[Sequence[pulp.LpVariable]], shares: Sequence[float]
    ) -> list[pulp.LpVariable]:
        """Variables for the mean over the later hours, by cell."""
        mean, total = self._variables("later"), sum(shares)
        for place, ((group, option), variable) in enumerate(zip(self.cells.names, mean, strict=True)):
            row = [(variable, -1.0), *((x[place], share / total) for x, share in zip(later, shares, strict=True))]
            self._lp.addConstraint(pulp.LpAffineExpression(row) == 0.0, self._unique(f"later[{group},{option}]"))
        return mean

    def _add_bound(
        self, name: str, norm_name: str, bound: QualityBound, x: list[pulp.LpVariable], hour: str = ""
    ) -> None:
        quality = _expression(x, bound.mean_factors)
        if bound.z > 0.0 and len(bound.error_factors):
            _require_finite(bound.error_factors)
            norm = NormConstraint(self._lp, self._unique(norm_name), bound.error_factors, x)
            self._limits.append((bound, norm, x))
            quality[norm.sigma] = -bound.z
        if bound.bound > 1.0:
            quality[self._relief("shortfall")] = 1.0
        self._add(name, quality >= bound.bound, hour)

    def _add_capacity(
        self, pool: str, capacity: float, x: Sequence[pulp.LpVariable], hour: str, weights: Floats
    ) -> None:
        """Limit the concurrent requests of a pool to (1 + overload) times its capacity."""
        problem = self.cells.problem
        concurrent = self.cells.in_pool(pool) * problem.requests_per_s * weights * self.cells.seconds
        if not concurrent.any():
            return
        row = _expression(x, concurrent)
        row[self._relief("overload")] = -capacity
        self._add(f"capacity[{pool}]", row <= capacity, hour)

    def _relief(self, name: str) -> pulp.LpVariable:
        """A variable that is 0 unless the program has no solution otherwise; one for all pools, so that the least
        overload is shared evenly, and one for all bounds.
        """
        if name not in self._reliefs:
            self._reliefs[name] = self._lp.add_variable(self._unique(name), lowBound=0.0, upBound=0.0)
        return self._reliefs[name]

    def _add_floors(self, metric: str, floor: float, x: Sequence[pulp.LpVariable], hour: str) -> None:
        quality, group_quality = self.cells.quality(metric), self.cells.group_quality(metric)
        _require_finite(quality, group_quality)
        for group in self.cells.problem.weights:
            places = self.cells.of_group(group)
            of_reference = float(quality[places] @ self.cells.reference[places])
            row = [(x[p], value) for p, value in zip(places, group_quality[places].tolist(), strict=True) if value]
            self._add(f"floor[{metric},{group}]", pulp.LpAffineExpression(row) >= floor * of_reference, hour)

    def _add(self, name: str, constraint: pulp.LpConstraint, hour: str) -> None:
        """Add a constraint; those of the present hour and of all hours have shadow prices."""
        if not hour:
            self._constraints[name] = constraint
        self._lp.addConstraint(constraint, self._unique(f"{name}{hour}"))

    def _unique(self, name: str) -> str:
        """The name, with a number if PuLP spells another one alike: groups may differ in a space or a dash only."""
        spelled, number = name.translate(_PULP_SPELLING), 1
        while (unique := spelled if number == 1 else f"{spelled}~{number}") in self._names:
            number += 1
        self._names.add(unique)
        return unique


def _expression(
    variables: Sequence[pulp.LpVariable], coefficients: Floats, *, keep_zeros: bool = False
) -> pulp.LpAffineExpression:
    _require_finite(coefficients)
    pairs = zip(variables, coefficients.tolist(), strict=True)
    return pulp.LpAffineExpression([pair for pair in pairs if keep_zeros or pair[1]])


def _values(values: Floats, variables: Sequence[pulp.LpVariable]) -> Floats:
    return values[[variable.index for variable in variables]]


def _require_finite(*arrays: Floats) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("a number of the program is not finite")
