"""Input and solution of the linear program (docs/architecture.md)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.messages import OptionEstimate
from shared.messages.policies import PolicyStatus

Floats = NDArray[np.float64]

Rows = dict[str, dict[str, float]]
"""Probabilities by group, then option; an option with probability 0 is left out."""

Failure = Literal["infeasible", "time limit", "no convergence", "solver error"]
"""Why the program has no solution."""


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
