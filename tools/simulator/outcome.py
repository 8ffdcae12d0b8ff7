"""What a scheme did in a window, hour by hour, and the figures that sum it up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.simulator.measured import Flags, Floats

KEPT_TOLERANCE = 1e-6
"""By which the quality of an hour may miss its bound: rounding of the solver's."""

UNKNOWN_HOURS = "{key} is null: in {hours} of {all} hours the reference is {never} on a measured prompt"


def relative(quality: Floats, reference: Floats, *, only_reference: Flags) -> Floats:
    """Quality of what was served, relative to the reference's, by hour; NaN where the reference has none.

    Args:
        only_reference: hours in which nothing else served: there it is 1, whatever the reference's quality.
    """
    return np.divide(quality, reference, out=np.where(only_reference, 1.0, np.nan), where=reference > 0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """One scheme in one window; every array has one value an hour.

    Attributes:
        grams: mean gCO2eq of a request.
        base_grams: the same, had the reference served all.
        preference: relative to the reference's; NaN where the reference is never preferred.
        bound: of the preference that held; NaN for a scheme without one.
        correctness: share of right answers relative to the reference's; null where nobody knows which are right.
        correctness_bound: as `bound`; null where none was asked for.
        standard_errors: of the mean preference and correctness, by metric, as other prompts to measure on would vary
            it; null or absent: unknown.
        mix: (hours, options) share of requests.
        processing_s: mean of a request.
        base_processing_s: the same, had the reference served all.
        evaluator_grams: of the evaluator, per request of the traffic; zeros where it is free, as in the published runs.
        evaluation_hours: in which it ran.
        fallbacks: hours in which the program was to choose and could only serve the reference, by reason.
        withheld: hours in which an option could not be used because too little was known of it, by option.
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
    base_processing_s: Floats
    g_per_kwh: Floats
    correctness: Floats | None = None
    correctness_bound: Floats | None = None
    standard_errors: Mapping[str, float | None] = field(default_factory=dict)
    evaluator_grams: Floats = field(default_factory=lambda: np.zeros(1))
    evaluation_hours: tuple[int, ...] = ()
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    withheld: Mapping[str, int] = field(default_factory=dict)

    @property
    def saving_pct(self) -> float | None:
        """Of the carbon of BASE, the evaluator's counted against it; null where BASE emits nothing."""
        return self._of_base(float(self.base_grams.mean() - self.grams.mean() - self.evaluator_grams.mean()))

    @property
    def evaluator_share_pct(self) -> float | None:
        """The evaluator's carbon, of BASE's; null where BASE emits nothing."""
        return self._of_base(float(self.evaluator_grams.mean()))

    @property
    def preference_pct(self) -> float | None:
        """Mean over the hours; null where it is unknown in one of them."""
        return _mean_pct(self.preference)

    @property
    def correctness_pct(self) -> float | None:
        """Mean over the hours; null where it is unknown in one of them."""
        return None if self.correctness is None else _mean_pct(self.correctness)

    @property
    def kept_pct(self) -> float | None:
        """Share of the hours in which every bound was kept; null where there is none, or a quality is unknown."""
        held = ~np.isnan(self.bound)
        if not held.any():
            return None
        bounded = [(self.preference, self.bound)]
        if self.correctness is not None and self.correctness_bound is not None:
            bounded.append((self.correctness, self.correctness_bound))
        if any(np.isnan(quality[held]).any() for quality, _ in bounded):
            return None
        kept = np.logical_and.reduce([quality[held] >= bound[held] - KEPT_TOLERANCE for quality, bound in bounded])
        return float(100.0 * kept.mean())

    @property
    def notes(self) -> tuple[str, ...]:
        """Why figures are null that others have."""
        found = []
        if self.saving_pct is None:
            found.append("carbon_saving_pct and evaluator_share_pct are null: the reference emits nothing")
        qualities = (
            ("preference_pct", "never preferred", self.preference),
            ("correctness_pct", "never right", self.correctness),
        )
        for key, never, quality in qualities:
            if quality is not None and (hours := int(np.isnan(quality).sum())):
                found.append(UNKNOWN_HOURS.format(key=key, hours=hours, all=len(quality), never=never))
        return tuple(found)

    def summary(self) -> dict[str, Any]:
        """The figures, as `summary.json` has them: finite numbers, or null where one is unknown."""
        return {
            "zone": self.zone,
            "window_start_hour": self.window_start_hour,
            "scheme": self.scheme,
            "xi": self.xi,
            "carbon_saving_pct": self.saving_pct,
            "preference_pct": self.preference_pct,
            "correctness_pct": self.correctness_pct,
            "hours_bound_kept_pct": self.kept_pct,
            "evaluations": len(self.evaluation_hours),
            "evaluation_hours": list(self.evaluation_hours),
            "evaluator_share_pct": self.evaluator_share_pct,
            "mean_gco2_per_request": float(self.grams.mean() + self.evaluator_grams.mean()),
            "preference_se_pct": _percent(self.standard_errors.get("preference")),
            "correctness_se_pct": _percent(self.standard_errors.get("correctness")),
            "mean_processing_s": float(self.processing_s.mean()),
            "mix_pct": {
                option: float(100.0 * share) for option, share in zip(self.options, self.mix.mean(axis=0), strict=True)
            },
            "fallback_hours": sum(self.fallbacks.values()),
            "fallback_reasons": dict(self.fallbacks),
            "withheld_hours": dict(self.withheld),
            "notes": list(self.notes),
        }

    def _of_base(self, grams: float) -> float | None:
        whole = float(self.base_grams.mean())
        return 100.0 * grams / whole if whole > 0.0 else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _mean_pct(values: Floats) -> float | None:
    return None if np.isnan(values).any() else float(100.0 * values.mean())
