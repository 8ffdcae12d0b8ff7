"""Input and solution of the linear program, and its data as arrays (docs/architecture.md).

A program that chooses among noisy estimates chooses those that are too high by chance. Each quality limit therefore
holds for the mean minus z standard errors of the quality of all traffic (docs/decisions/0004-optimizer-estimates.md).
Errors of single groups partly cancel out, errors that groups share do not: the standard error is the Euclidean norm
|P x| of the probabilities x, with one row of P for every independent error component.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.optimizer.quality import NO_ERROR
from shared.messages import OptionEstimate
from shared.messages.policies import PolicyStatus

Floats = NDArray[np.float64]

Rows = dict[str, dict[str, float]]
"""Probabilities by group, then option; an option with probability 0 is left out."""

Failure = Literal["infeasible", "time limit", "no convergence", "solver error"]
"""Why the program has no solution."""

PROBABILITY_EPSILON = 1e-8
"""Probabilities below this are rounding errors of the solver."""

TIE_BREAK = 1e-6
"""Cost added per place in the order of the options, relative to the most expensive option: of equally good options the
first one is used, and the reference before all others."""

BOUND_TOLERANCE = 1e-5
"""Tolerated violation of a quality limit, relative to the reference's quality; far below what judging can measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionPrice:
    """Carbon cost factors of an option; they are the same for every prompt group.

    Attributes:
        pool: the pool whose capacity it uses.
        g_per_kwh: gCO2eq per kWh of the server: PUE times the carbon intensity of the pool's zone.
        embodied_g_per_s: k1 of the pool.
    """

    pool: str
    g_per_kwh: float
    embodied_g_per_s: float

    def grams(self, estimate: OptionEstimate) -> float:
        """Expected gCO2eq of a request: e * PUE * k + k1 * s, with its server time s."""
        server_s = estimate.processing_s if estimate.server_s is None else estimate.server_s
        return estimate.energy_kwh * self.g_per_kwh + self.embodied_g_per_s * server_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LaterHours:
    """Later hours of a period with similar carbon intensities.

    Attributes:
        share: of the requests of the present hour and all later ones.
        options: prices by option; those of `Problem.options`.
    """

    share: float
    options: Mapping[str, OptionPrice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One instance of the program.

    With `later` the quality limits hold for the mean over the present hour and later ones, and the options of both are
    chosen together; only the present hour is served by the solution. Groups and estimates are the same in all hours.

    Attributes:
        reference: the baseline option, which quality is relative to.
        options: prices of the options that may be used, the reference among them; of equal options the first is used.
        later: later hours by carbon intensity; empty: the limits hold for the present hour.
        weights: traffic share w_g by group; sums to 1.
        later_weights: those expected in the later hours, of the same groups; empty: those of the present hour.
        families: families of groups about similar things, by group; groups of a family share an error component.
        estimates: e, p and q by group, then option; a group cannot use an option without an estimate.
        confidence_z: standard errors of the quality of all traffic taken off its mean, by metric.
        bounds: b_m by metric: minimum quality of all traffic, relative to the reference's. A bound above 1 makes up for
            earlier hours; it is missed by the least possible shortfall where it cannot be kept.
        hourly_floors: by metric, in [0, 1]: minimum quality of all traffic in the present hour and in each later one.
        floors: f_m by metric, in [0, 1]: minimum quality of each group, relative to the reference's.
        capacities: concurrent requests by pool; a pool that is not named is unlimited.
        requests_per_s: request rate of the model, for the capacities.
        holdout: minimum probability of the reference in every group.
        traffic_requests: effective requests that the weights were counted from; None: the weights are known exactly.
    """

    reference: str
    options: Mapping[str, OptionPrice]
    weights: Mapping[str, float]
    estimates: Mapping[str, Mapping[str, OptionEstimate]]
    later: Sequence[LaterHours] = ()
    later_weights: Mapping[str, float] = field(default_factory=dict)
    families: Mapping[str, str] = field(default_factory=dict)
    confidence_z: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    hourly_floors: Mapping[str, float] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)
    capacities: Mapping[str, float] = field(default_factory=dict)
    requests_per_s: float = 0.0
    holdout: float = 0.0
    traffic_requests: float | None = None

    def __post_init__(self) -> None:
        for weights in (self.weights, self.later_weights or self.weights):
            if not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-6):
                raise ValueError(f"weights must sum to 1, got {sum(weights.values()):.6f}")
        if self.later_weights and self.later_weights.keys() != self.weights.keys():
            raise ValueError("later_weights must be of the groups of weights")
        if not all(0.0 <= bound < math.inf for bound in self.bounds.values()):
            raise ValueError(f"bounds must not be negative, got {dict(self.bounds)}")
        of_groups_and_hours = {"floors": self.floors, "hourly_floors": self.hourly_floors}
        for name, limits in {**of_groups_and_hours, "holdout": {"": self.holdout}}.items():
            if not all(0.0 <= limit <= 1.0 for limit in limits.values()):
                raise ValueError(f"{name} must lie in [0, 1], got {dict(limits)}: the reference could not keep them")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"the later hours must leave a share for the present one, got {1.0 - self.share:.6f}")
        if any(self.options.keys() - hours.options.keys() for hours in self.later):
            raise ValueError("every option needs a price in all later hours")
        self._check_estimates()

    def _check_estimates(self) -> None:
        limited = {*self.bounds, *self.floors, *self.hourly_floors}
        if not all(capacity > 0.0 for capacity in self.capacities.values()):
            raise ValueError(f"capacities must be greater than 0, got {dict(self.capacities)}")
        for group in self.weights:
            row = self.estimates.get(group, {})
            if self.reference not in row:
                raise ValueError(f"group {group!r} needs an estimate of the reference {self.reference!r}")
            for option, estimate in row.items():
                if missing := sorted(limited - estimate.quality.keys()) if len(row) > 1 else []:
                    raise ValueError(f"group {group!r}, option {option!r}: no quality for {', '.join(missing)}")

    @property
    def share(self) -> float:
        """Share of the present hour in the requests that the limits hold for."""
        return 1.0 - sum(hours.share for hours in self.later)

    def row(self, group: str) -> dict[str, OptionEstimate]:
        """The options that a group may use, in the order of `options`."""
        known = self.estimates[group]
        return {option: known[option] for option in self.options if option in known}


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Probabilities of the present hour to draw from, and what they are expected to achieve.

    Attributes:
        status: `optimal`, or `reference` if the solver failed or there is no other option.
        rows: probabilities by group, then option; every row sums to 1.
        g_per_request: expected gCO2eq of a request.
        reference_g_per_request: expected gCO2eq of a request if the reference served all requests.
        quality: lower confidence bound of the quality of all traffic, relative to the reference's, by limited metric;
            with later hours less the present hour's part of the margin of them all.
        shortfall: by how much the bounds above 1 are missed, at most; 0 if they are kept.
        overload: share by which the pools' capacities are exceeded; 0 if they suffice.
        failure: why the solver found no solution.
    """

    status: PolicyStatus
    rows: Rows
    g_per_request: float
    reference_g_per_request: float
    quality: dict[str, float]
    shortfall: float = 0.0
    overload: float = 0.0
    failure: Failure | None = None


class Cells:
    """A problem as arrays with one entry for every (group, option) pair.

    Attributes:
        problem: what the arrays are made from.
        names: (group, option).
        reference: 1 where the option is the reference, else 0.
        weights: traffic share of the group, and `later_weights` the one in later hours.
        grams, seconds: of a request in the present hour.
        later_grams: of a request in each of the problem's later hours.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        rows = {group: problem.row(group) for group in problem.weights}
        self.names = [(group, option) for group, row in rows.items() for option in row]
        self._estimates = [estimate for row in rows.values() for estimate in row.values()]
        self.weights = np.array([problem.weights[group] for group, _ in self.names])
        later_weights = problem.later_weights or problem.weights
        self.later_weights = np.array([later_weights[group] for group, _ in self.names])
        self.reference = np.array([float(option == problem.reference) for _, option in self.names])
        self.grams = self._grams(problem.options)
        self.later_grams = [self._grams(hours.options) for hours in problem.later]
        self.seconds = np.array([estimate.processing_s for estimate in self._estimates])

    @property
    def cost_unit_g(self) -> float:
        """gCO2eq that 1 means in the objective: the most expensive option's, so that the solver's tolerances mean the
        same at every carbon intensity.
        """
        return max(float(grams.max()) for grams in (self.grams, *self.later_grams)) or 1.0

    @property
    def mean_reference_g(self) -> float:
        """Expected gCO2eq of a request over the present and the later hours if the reference served all requests."""
        later = zip(self.problem.later, self.later_grams, strict=True)
        return self.problem.share * float((self.weights * self.grams) @ self.reference) + sum(
            hours.share * float((self.later_weights * grams) @ self.reference) for hours, grams in later
        )

    @cached_property
    def bounds(self) -> "dict[str, QualityBound]":
        """The quality limits by metric, on the mean over all hours: of the present one and of all later ones."""
        share = self.problem.share
        hours = [(share, self.weights), (1.0 - share, self.later_weights)] if self.problem.later else None
        return {metric: QualityBound(self, metric, bound, hours) for metric, bound in self.problem.bounds.items()}

    def hourly_floors(self, weights: Floats) -> "dict[str, QualityBound]":
        """The quality limits of a single hour with these traffic shares, by metric."""
        floors = self.problem.hourly_floors
        return {metric: QualityBound(self, metric, floor, [(1.0, weights)]) for metric, floor in floors.items()}

    def costs(self, grams: Floats, weights: Floats) -> Floats:
        """Objective coefficients of an hour: its expected grams in units of `cost_unit_g`, plus the tie-break."""
        problem = self.problem
        order = [problem.reference, *(one for one in problem.options if one != problem.reference)]
        tie_break = {option: place * TIE_BREAK for place, option in enumerate(order)}
        places = np.array([tie_break[option] for _, option in self.names])
        return np.asarray(weights * (grams / self.cost_unit_g + places))

    def of_group(self, group: str) -> list[int]:
        """Places of a group's cells."""
        return self._places[group]

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        places: dict[str, list[int]] = {group: [] for group in self.problem.weights}
        for place, (group, _) in enumerate(self.names):
            places[group].append(place)
        return places

    def _grams(self, prices: Mapping[str, OptionPrice]) -> Floats:
        pairs = zip(self.names, self._estimates, strict=True)
        return np.array([prices[option].grams(estimate) for (_, option), estimate in pairs])

    def in_pool(self, name: str) -> Floats:
        """1 for the cells that the pool serves, else 0."""
        return np.array([float(self.problem.options[option].pool == name) for _, option in self.names])

    def quality(self, metric: str) -> Floats:
        """q_m of every cell."""
        return np.array([estimate.quality[metric] for estimate in self._estimates])

    def group_quality(self, metric: str) -> Floats:
        """Lower confidence bound of q_m of every cell, for the group floors."""
        return np.array([estimate.group_quality.get(metric, estimate.quality[metric]) for estimate in self._estimates])

    def error_factors(self, metric: str, hours: Sequence[tuple[float, Floats]]) -> Floats:
        """P of a metric, (components, hours * cells): the standard error of all traffic's quality is |P x|.

        The errors are the same in all hours.

        Args:
            hours: what the quality of each hour counts for, and its traffic shares by cell.
        """
        errors = np.array([estimate.doubt.get(metric, NO_ERROR) for estimate in self._estimates])
        parts = []
        for factor, weights in hours:
            weighted = weights[:, None] * errors
            weighted[:, 0] = np.hypot(weighted[:, 0], self._share_errors(metric, weights))
            parts.append(factor * weighted)
        groups = [group for group, _ in self.names] * len(parts)
        families = [self.problem.families.get(group, "") for group in groups]
        return error_factors(np.concatenate(parts), groups, families)

    def _share_errors(self, metric: str, weights: Floats) -> Floats:
        """Standard error of all traffic's quality due to the group's traffic share, for every cell.

        Of n requests the share w of a group has the variance w / n, apart from what all groups have in common. An error
        of a share counts as much as the group's quality differs from the reference's. Added to the cell's own error it
        is exact for a group that uses one option, and too large for one that mixes options.
        """
        requests = self.problem.traffic_requests
        if requests is None:
            return np.zeros(len(self.names))
        of_reference = {group: row[self.problem.reference] for group, row in self.problem.estimates.items()}
        change = self.quality(metric) - np.array([of_reference[group].quality[metric] for group, _ in self.names])
        return np.asarray(np.sqrt(weights / max(requests, 1.0)) * np.abs(change))

    def rows(self, x: Floats) -> Rows:
        """Probabilities as distributions by group, from the solver's values."""
        nested: Rows = {}
        for (group, option), value in zip(self.names, x.tolist(), strict=True):
            nested.setdefault(group, {})[option] = value
        return {
            group: _distribution(row, self.problem.reference, self.problem.holdout) for group, row in nested.items()
        }

    def values(self, rows: Rows) -> Floats:
        """Probabilities by cell, from distributions by group."""
        return np.array([rows.get(group, {}).get(option, 0.0) for group, option in self.names])

    def overload(self, x: Floats) -> float:
        """Largest share by which a pool's concurrent requests exceed its capacity; 0 if none does."""
        concurrent = self.problem.requests_per_s * self.weights * self.seconds * x
        loads = (float(self.in_pool(pool) @ concurrent) / of for pool, of in self.problem.capacities.items())
        return max(0.0, *(load - 1.0 for load in loads)) if self.problem.capacities else 0.0

    def solution(
        self,
        rows: Rows,
        status: PolicyStatus,
        failure: Failure | None = None,
        *,
        later: Floats | None = None,
        shortfall: float = 0.0,
    ) -> Solution:
        """A solution with these probabilities of the present hour, their expected carbon and their quality.

        Args:
            later: (cells,), mean probabilities of the later hours; None: the present hour's.
        """
        x = self.values(rows)
        return Solution(
            status=status,
            rows=rows,
            g_per_request=float((self.weights * self.grams) @ x),
            reference_g_per_request=float((self.weights * self.grams) @ self.reference),
            quality=self._present_quality(x, x if later is None else later),
            shortfall=shortfall,
            overload=self.overload(x),
            failure=failure,
        )

    def _present_quality(self, x: Floats, later: Floats) -> dict[str, float]:
        """Lower confidence bound of the present hour's quality by limited metric, relative to the reference's."""
        # If the reference serves everything its relative quality is 1, whether it is known or not.
        if (x == self.reference).all():
            return dict.fromkeys(self.problem.bounds, 1.0)
        if not self.problem.later:
            return {metric: bound.lower_bound(x) for metric, bound in self.bounds.items()}
        return {
            metric: bound.present_lower_bound(x, later, self.problem.share) for metric, bound in self.bounds.items()
        }


class QualityBound:
    """The limit on one metric of all traffic: q.x - z |P x| >= b, all relative to the reference's quality.

    Relative, so that the solver's tolerances mean the same for a metric that is defined for few prompts. Over several
    hours it is the mean of what is relative to each hour's reference, and x has the cells of all of them.

    Attributes:
        bound: b.
        z: standard errors taken off the mean.
        is_active: a limit of 0 is none, and nothing is relative to a reference that never succeeds.
        mean_factors: q, (hours * cells,).
        error_factors: P, (components, hours * cells).
    """

    def __init__(
        self, cells: Cells, metric: str, bound: float, hours: Sequence[tuple[float, Floats]] | None = None
    ) -> None:
        """State the limit.

        Args:
            hours: share of each hour in the mean, and its traffic shares by cell; None: the present hour.
        """
        hours = hours or [(1.0, cells.weights)]
        quality = cells.quality(metric)
        references = [float((weights * quality) @ cells.reference) for _, weights in hours]
        self.bound = bound
        self.z = cells.problem.confidence_z.get(metric, 0.0)
        self._is_known = min(references) > 0.0
        self.is_active = bound > 0.0 and self._is_known
        relative = [
            (share / (reference or 1.0), weights) for (share, weights), reference in zip(hours, references, strict=True)
        ]
        self.mean_factors = np.concatenate([factor * weights * quality for factor, weights in relative])
        self.error_factors = cells.error_factors(metric, relative)

    def mean(self, x: Floats) -> float:
        """Mean quality of all traffic, relative to the reference's; 1 if that is 0."""
        return float(self.mean_factors @ x) if self._is_known else 1.0

    def margin(self, x: Floats) -> float:
        """z standard errors of that mean."""
        return self.z * float(np.linalg.norm(self.error_factors @ x)) if self._is_known else 0.0

    def lower_bound(self, x: Floats) -> float:
        """Mean minus margin."""
        return self.mean(x) - self.margin(x)

    def present_lower_bound(self, x: Floats, later: Floats, share: float) -> float:
        """Mean quality of the present hour less its part of the margin of the present and the later hours.

        The parts of all hours, weighted by their shares, add up to the margin of the mean (Euler's theorem): an hour's
        part is how much the margin of the mean would grow with that hour's share.

        Args:
            x, later: (cells,), probabilities of the present hour, and their mean over the later hours.
            share: of the present hour in the mean.
        """
        if not self._is_known:
            return 1.0
        present = np.concatenate([x, np.zeros_like(later)])
        errors = self.error_factors @ np.concatenate([x, later])
        direction = errors / (np.linalg.norm(errors) or 1.0)
        part = self.z * float(direction @ (self.error_factors @ present))
        return (float(self.mean_factors @ present) - part) / share

    def is_violated(self, x: Floats, *, shortfall: float = 0.0) -> bool:
        """Whether the limit less a shortfall is missed by more than the tolerance."""
        return self.lower_bound(x) < self.bound - shortfall - BOUND_TOLERANCE


def error_factors(standard_errors: Floats, groups: Sequence[str], families: Sequence[str]) -> Floats:
    """The matrix P whose product with x has the norm "standard error of the quality of all traffic".

    Args:
        standard_errors: (cells, 3), weighted by the groups' traffic shares: each cell's own component, the one shared
            with its family, and the one shared with all. The options of a group share one error.
        groups, families: of every cell.

    Returns:
        (components, cells); components without any error are left out.
    """
    everything = [""] * len(standard_errors)
    blocks = [
        np.eye(max(numbers, default=-1) + 1)[:, numbers] * column
        for column, numbers in zip(standard_errors.T, map(_numbered, (groups, families, everything)), strict=True)
    ]
    factors = np.concatenate(blocks)
    return np.asarray(factors[factors.any(axis=1)])


def _numbered(names: Sequence[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def _distribution(values: Mapping[str, float], reference: str, holdout: float) -> dict[str, float]:
    """Probabilities without rounding errors of the solver; they sum to 1 and keep the holdout exactly."""
    others = {option: value for option, value in values.items() if option != reference and value > PROBABILITY_EPSILON}
    total = sum(others.values())
    rest = min(max(1.0 - total, 0.0), 1.0)
    of_reference = max(rest if rest > PROBABILITY_EPSILON else 0.0, holdout)
    if total == 0.0 or of_reference >= 1.0:
        return {reference: 1.0}
    row = {reference: of_reference} if of_reference > 0.0 else {}
    return row | {option: value * (1.0 - of_reference) / total for option, value in others.items()}
