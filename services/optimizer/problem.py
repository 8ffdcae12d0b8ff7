"""What the linear program is asked, and what it answers; stated in docs/architecture.md."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.messages import OptionEstimate
from shared.messages.policies import PolicyStatus

Rows = dict[str, dict[str, float]]
"""Probability by group, then option; an option that is not drawn is left out."""


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
