"""What a scheme did in a window, hour by hour, and the figures that sum it up."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simulator.measured import Floats

KEPT_TOLERANCE = 1e-6
"""By which the quality of an hour may miss its bound: rounding of the solver's."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """One scheme in one window; every array has one value an hour.

    Attributes:
        grams: mean gCO2eq of a request.
        base_grams: the same, had the reference served all.
        preference: relative to the reference's.
        bound: of the preference that held; NaN for a scheme without one.
        correctness: share of right answers relative to the reference's; null where nobody knows which are right.
        correctness_bound: as `bound`; null where none was asked for.
        mix: (hours, options) share of requests.
        processing_s: mean of a request.
        evaluator_grams: of the evaluator, per request of the traffic.
        evaluation_hours: in which it ran.
    """

    zone: str
    window_start_hour: int
    scheme: str
    xi: float
    options: tuple[str, ...]
    grams: Floats
    base_grams: Floats
    preference: Floats
    bound: Floats
    mix: Floats
    processing_s: Floats
    g_per_kwh: Floats
    correctness: Floats | None = None
    correctness_bound: Floats | None = None
    evaluator_grams: Floats = field(default_factory=lambda: np.zeros(1))
    evaluation_hours: tuple[int, ...] = ()

    @property
    def saving_pct(self) -> float:
        """Of the carbon of BASE, without the evaluator's."""
        return float(100.0 * (1.0 - self.grams.mean() / self.base_grams.mean()))

    @property
    def kept_pct(self) -> float | None:
        """Share of the hours in which every bound was kept; null where there is none."""
        held = ~np.isnan(self.bound)
        if not held.any():
            return None
        kept = self.preference[held] >= self.bound[held] - KEPT_TOLERANCE
        if self.correctness is not None and self.correctness_bound is not None:
            kept &= self.correctness[held] >= self.correctness_bound[held] - KEPT_TOLERANCE
        return float(100.0 * kept.mean())

    def summary(self) -> dict[str, Any]:
        """The figures, as `summary.json` has them."""
        evaluator_g = float(self.evaluator_grams.mean())
        return {
            "zone": self.zone,
            "window_start_hour": self.window_start_hour,
            "scheme": self.scheme,
            "xi": self.xi,
            "carbon_saving_pct": self.saving_pct,
            "preference_pct": float(100.0 * self.preference.mean()),
            "correctness_pct": None if self.correctness is None else float(100.0 * self.correctness.mean()),
            "hours_bound_kept_pct": self.kept_pct,
            "evaluations": len(self.evaluation_hours),
            "evaluation_hours": list(self.evaluation_hours),
            "evaluator_share_pct": float(100.0 * evaluator_g / self.base_grams.mean()),
            "mean_gco2_per_request": float(self.grams.mean()) + evaluator_g,
            "mean_processing_s": float(self.processing_s.mean()),
            "mix_pct": {
                option: float(100.0 * share) for option, share in zip(self.options, self.mix.mean(axis=0), strict=True)
            },
        }
