"""The linear program: with which probability each option serves each prompt group; stated in docs/architecture.md.

Every scheme of the paper (arXiv 2403.12900) is a restriction of it: SPROUT is one group, one pool and three levels;
MODEL_OPT is one group and two pools, L0 alone; CO2_OPT has no bounds; BASE has no option but the reference; SPROUT_STA
is SPROUT at a mean intensity, solved once.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np

from services.optimizer.linear import Floats, LinearProgram
from services.optimizer.margin import Length, parts_of
from services.optimizer.posterior import SURE
from services.optimizer.problem import Problem, Rows, Solution
from shared.messages.policies import PolicyStatus

DUST = 1e-8
"""A probability below it is rounding of the solver's."""

TIE_BREAK = 1e-6
"""Cost, relative to the dearest option's, that is added per place in the order: of equal options the earlier one is
taken, first of all the reference."""

SLACK = 1e-5
"""Of the reference's quality, by which a bound may be missed; what was judged tells no such difference."""

_MOST_ROUNDS = 50
"""Solutions until margins are as large as they should be; five or so do."""


def solve(problem: Problem) -> Solution:
    """Solve the program; never raises for a problem without a solution.

    What cannot be kept is given up in a fixed order: the group floors, then capacity too, then everything, and the
    reference is served. Where there is nothing but the reference to choose, the status is `reference` as well.
    """
    stated = _Statement(problem)
    if any(len(problem.row(group)) > 1 for group in problem.weights):
        for status, floors, capacities in _attempts(problem):
            rows = _optimum(stated, floors=floors, capacities=capacities)
            if rows is not None:
                return stated.solution(rows, status)
    return stated.solution({group: {problem.reference: 1.0} for group in problem.weights}, "reference")


def _attempts(problem: Problem) -> Iterator[tuple[PolicyStatus, Mapping[str, float], Mapping[str, float]]]:
    """The constraints to try, and the status that they mean."""
    yield "optimal", problem.floors, problem.capacities
    if problem.floors:
        yield "floors_dropped", {}, problem.capacities
    if problem.capacities:
        yield "capacity_dropped", {}, {}


class _Statement:
    """A problem in arrays, with a place for every group and each of its options.

    Attributes:
        cells: group and option.
        reference: where the latter is the reference, as a share: all traffic on it.
        weights: traffic shares of the groups.
        grams, seconds: of a request.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        rows = {group: problem.row(group) for group in problem.weights}
        self.cells = [(group, option) for group, row in rows.items() for option in row]
        self._estimates = [estimate for row in rows.values() for estimate in row.values()]
        self.weights = np.array([problem.weights[group] for group, _ in self.cells])
        self.reference = np.array([float(option == problem.reference) for _, option in self.cells])
        options = [problem.options[option] for _, option in self.cells]
        self.grams = np.array([one.grams(estimate) for one, estimate in zip(options, self._estimates, strict=True)])
        self.seconds = np.array([estimate.processing_s for estimate in self._estimates])

    @cached_property
    def bounds(self) -> "dict[str, _Bound]":
        """By metric."""
        return {metric: _Bound(self, metric, bound) for metric, bound in self.problem.bounds.items()}

    def costs(self) -> Floats:
        """The objective, in units of the dearest option: the solver's tolerances then mean the same for any grid."""
        order = [self.problem.reference, *(one for one in self.problem.options if one != self.problem.reference)]
        tie_break = {option: place * TIE_BREAK for place, option in enumerate(order)}
        dearest = float(self.grams.max()) or 1.0
        places = np.array([tie_break[option] for _, option in self.cells])
        return np.asarray(self.weights * (self.grams / dearest + places))

    def groups(self) -> Floats:
        """A row for every group, 1 for its cells."""
        places = {group: place for place, group in enumerate(self.problem.weights)}
        return np.asarray(np.eye(len(places))[:, [places[group] for group, _ in self.cells]])

    def pool(self, name: str) -> Floats:
        """1 for the cells that it serves."""
        return np.array([float(self.problem.options[option].pool == name) for _, option in self.cells])

    def quality(self, metric: str) -> Floats:
        """Of every cell."""
        return np.array([estimate.quality[metric] for estimate in self._estimates])

    def group_quality(self, metric: str) -> Floats:
        """What is counted on for a floor."""
        return np.array([estimate.group_quality.get(metric, estimate.quality[metric]) for estimate in self._estimates])

    def doubted(self, metric: str) -> Floats:
        """What the standard deviation of a metric of all traffic is the length of (`parts_of`)."""
        doubts = np.array([estimate.doubt.get(metric, SURE) for estimate in self._estimates])
        groups = [group for group, _ in self.cells]
        families = [self.problem.families.get(group, "") for group in groups]
        return parts_of(self.weights[:, None] * doubts, groups, families)

    def rows(self, x: Floats) -> Rows:
        """As distributions, from what the solver found."""
        nested: Rows = {}
        for (group, option), value in zip(self.cells, x.tolist(), strict=True):
            nested.setdefault(group, {})[option] = value
        return {
            group: _distribution(row, self.problem.reference, self.problem.holdout) for group, row in nested.items()
        }

    def solution(self, rows: Rows, status: PolicyStatus) -> Solution:
        """What is to be expected of these rows."""
        x = np.array([rows[group].get(option, 0.0) for group, option in self.cells])
        # Nothing but the reference: what is served is the reference's quality, known or not.
        only_reference = bool((x == self.reference).all())
        quality = {metric: 1.0 if only_reference else self.bounds[metric].relative(x) for metric in self.problem.bounds}
        return Solution(
            status=status,
            rows=rows,
            g_per_request=float((self.weights * self.grams) @ x),
            reference_g_per_request=float((self.weights * self.grams) @ self.reference),
            quality=quality,
        )


class _Bound:
    """A bound on all traffic, less the margin of what is moved.

    Everything is relative to the reference's quality, so that the solver's tolerances mean the same for a metric that
    can be told of few prompts.

    Attributes:
        binds: a bound of 0 is none, and nothing can be relative to a reference that never succeeds.
    """

    def __init__(self, stated: _Statement, metric: str, bound: float) -> None:
        quality = stated.weights * stated.quality(metric)
        reference = float(quality @ stated.reference)
        self.binds = bound > 0.0 and reference > 0.0
        self._measured = reference > 0.0
        self._quality = quality / (reference or 1.0)
        self._bound = bound
        self._caution = stated.problem.cautions.get(metric, 0.0)
        self._doubted = stated.doubted(metric) / (reference or 1.0)

    def relative(self, x: Floats) -> float:
        """What is counted on for all traffic, over the reference's quality; 1 where that is 0."""
        counted_on = float(self._quality @ x) - self._caution * float(np.linalg.norm(self._doubted @ x))
        return counted_on if self._measured else 1.0

    def short(self, x: Floats) -> bool:
        """Whether it is missed."""
        return self.relative(x) < self._bound - SLACK

    def require(self, program: LinearProgram) -> Length:
        """State it; the length is to be told wherever the bound is short."""
        length = Length(program, self._doubted)
        row = np.zeros(program.size)
        row[: len(self._quality)] = self._quality
        row[length.place] = -self._caution
        program.at_least(row, self._bound)
        return length


def _optimum(stated: _Statement, *, floors: Mapping[str, float], capacities: Mapping[str, float]) -> Rows | None:
    """The cheapest rows that keep the constraints; null where there are none, or the solver found none in time."""
    problem = stated.problem
    program = LinearProgram(stated.costs(), least=problem.holdout * stated.reference)
    groups = stated.groups()
    program.equal(groups, 1.0)
    for metric, floor in floors.items():
        of_reference = groups @ (stated.reference * stated.quality(metric))
        program.at_least(groups * stated.group_quality(metric), floor * of_reference)
    for pool, capacity in capacities.items():
        program.at_most(stated.pool(pool) * problem.requests_per_s * stated.weights * stated.seconds, capacity)
    lengths = [(bound, bound.require(program)) for bound in stated.bounds.values() if bound.binds]
    for _ in range(_MOST_ROUNDS):
        values = program.solve()
        if values is None:
            return None
        x = values[: len(stated.cells)]
        short = [length for bound, length in lengths if bound.short(x)]
        if not short:
            return stated.rows(x)
        for length in short:
            length.hold(x)
    return None


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
