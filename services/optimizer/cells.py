"""A problem as arrays, with one entry for every pair of group and option, and its quality limits in numbers.

A program that chooses among noisy estimates chooses those that are too high by chance. Each quality limit therefore
holds for the mean minus z standard errors of the quality of all traffic (docs/decisions/0004-optimizer-estimates.md).
Errors of single groups partly cancel out, errors that groups share do not: the standard error is the Euclidean norm
|P x| of the probabilities x, with one row of P for every independent error component.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from services.optimizer.problem import Failure, Floats, OptionPrice, Problem, Rows, Solution
from services.optimizer.quality import NO_ERROR
from shared.messages.policies import PolicyStatus

PROBABILITY_EPSILON = 1e-8
"""Probabilities below this are rounding errors of the solver."""

TIE_BREAK = 1e-6
"""Cost added per place in the order of the options, relative to the most expensive option: of equally good options the
first one is used, and the reference before all others."""

BOUND_TOLERANCE = 1e-5
"""Tolerated violation of a quality limit, relative to the reference's quality; far below what judging can measure."""


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
