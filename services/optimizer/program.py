"""The linear program: with which probability each option serves each prompt group; stated in docs/architecture.md.

Every scheme of the paper (arXiv 2403.12900) is a restriction of it: SPROUT is one group, one pool and three levels;
MODEL_OPT is one group and two pools, L0 alone; CO2_OPT has no bounds; BASE has no option but the reference; SPROUT_STA
is SPROUT at a mean intensity, solved once.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from services.optimizer.linear import Floats, LinearProgram
from services.optimizer.margin import Length, parts_of
from services.optimizer.posterior import SURE
from shared.messages import OptionEstimate
from shared.messages.policies import PolicyStatus

Rows = dict[str, dict[str, float]]
"""Probability by group, then option; an option that is not drawn is left out."""

DUST = 1e-8
"""A probability below it is rounding of the solver's."""

TIE_BREAK = 1e-6
"""Cost, relative to the dearest option's, that is added per place in the order: of equal options the earlier one is
taken, first of all the reference."""

SLACK = 1e-5
"""Of the reference's quality, by which a bound may be missed; what was judged tells no such difference."""

_MOST_ROUNDS = 50
"""Solutions until margins are as large as they should be; five or so do."""


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
        families: of groups that are about alike things, by group; their doubts are shared.
        estimates: e, p and q by group, then option; an option that a group lacks is not available to it.
        cautions: standard deviations of all traffic's quality by which less than its mean is counted on, by metric.
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
    families: Mapping[str, str] = field(default_factory=dict)
    cautions: Mapping[str, float] = field(default_factory=dict)
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
        quality: counted on for all traffic, relative to the reference's, by metric with a bound.
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
        """By metric; a bound of 0 is none."""
        return {metric: _Bound(self, metric, bound) for metric, bound in self.problem.bounds.items() if bound > 0.0}

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
        quality = {
            metric: 1.0 if only_reference else _Bound(self, metric, bound).relative(x)
            for metric, bound in self.problem.bounds.items()
        }
        return Solution(
            status=status,
            rows=rows,
            g_per_request=float((self.weights * self.grams) @ x),
            reference_g_per_request=float((self.weights * self.grams) @ self.reference),
            quality=quality,
        )


class _Bound:
    """A bound on all traffic, less the margin of what is moved."""

    def __init__(self, stated: _Statement, metric: str, bound: float) -> None:
        self._quality = stated.weights * stated.quality(metric)
        self._reference = float(self._quality @ stated.reference)
        self._bound = bound
        self._caution = stated.problem.cautions.get(metric, 0.0)
        self._doubted = stated.doubted(metric)

    def relative(self, x: Floats) -> float:
        """What is counted on for all traffic, over the reference's quality; 1 where that is 0."""
        counted_on = float(self._quality @ x) - self._caution * float(np.linalg.norm(self._doubted @ x))
        return counted_on / self._reference if self._reference > 0.0 else 1.0

    def short(self, x: Floats) -> bool:
        """Whether it is missed."""
        return self.relative(x) < self._bound - SLACK

    def require(self, program: LinearProgram) -> Length:
        """State it; the length is to be told wherever the bound is short."""
        length = Length(program, self._doubted)
        row = np.zeros(program.size)
        row[: len(self._quality)] = self._quality
        row[length.place] = -self._caution
        program.at_least(row, self._bound * self._reference)
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
    lengths = [(bound, bound.require(program)) for bound in stated.bounds.values()]
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
