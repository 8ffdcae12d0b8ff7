"""Result of a scheme in a window, hour by hour, and its summary figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from services.optimizer.settings import Promise
from tools.simulator.requests import Flags, Floats

KEPT_TOLERANCE = 1e-6
"""Tolerated violation of the quality limit of an hour, for rounding errors of the solver."""

UNKNOWN_HOURS = "{key} is null: in {hours} of {all} hours the reference is {never} on a measured prompt"


def relative(quality: Floats, reference: Floats, *, only_reference: Flags) -> Floats:
    """Quality of what was served relative to the reference's, by hour; NaN if the reference's quality is 0.

    Args:
        quality, reference: (hours,).
        only_reference: hours in which the reference served everything: the result is 1, whatever its quality.
    """
    return np.divide(quality, reference, out=np.where(only_reference, 1.0, np.nan), where=reference > 0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """One scheme in one window; arrays have one value per hour.

    Attributes:
        options: the reference first.
        grams: mean gCO2eq of a request.
        base_grams: the same if the reference served all requests.
        preference: relative to the reference's; NaN if the reference is never preferred.
        bound: minimum preference; NaN for a scheme without a limit.
        mix: (hours, options), shares of the requests.
        processing_s: mean time of a request.
        base_processing_s: the same if the reference served all requests.
        correctness: share of right answers relative to the reference's; None if the right answers are not known.
        correctness_bound: minimum correctness; None without a limit.
        standard_errors: of the mean preference and correctness, by metric, over samples of prompts to measure on; None
            or absent if unknown.
        evaluator_grams: of the evaluator, per request of the traffic; 0 in the published variant, which ignores them.
        tokens: mean generated tokens of a request; None if they are not known.
        base_tokens: the same if the reference served all requests.
        evaluator_tokens: of the evaluator in the hour; the judge's reading counts as the tokens of the same energy.
        evaluation_hours: in which the evaluator ran.
        judged_prompts: in them, without those of the first evaluation; mean over the folds.
        promise: what was to keep the limits: every hour, or the mean over a period.
        period_days: length of the periods, which start with the window.
        fallbacks: hours in which the program could only serve the reference, by reason.
        ineligible: hours in which an option could not be used because too little was known about it, by option.
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
    tokens: Floats | None = None
    base_tokens: Floats | None = None
    evaluator_tokens: Floats | None = None
    evaluation_hours: tuple[int, ...] = ()
    judged_prompts: float = 0.0
    promise: Promise = "hourly"
    period_days: int = 30
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    ineligible: Mapping[str, int] = field(default_factory=dict)

    @property
    def saving_pct(self) -> float | None:
        """Carbon saving, % of BASE's, net of the evaluator's; None if BASE emits nothing."""
        return self._of_base(float(self.base_grams.mean() - self.grams.mean() - self.evaluator_grams.mean()))

    @property
    def evaluator_share_pct(self) -> float | None:
        """The evaluator's carbon, % of BASE's; None if BASE emits nothing."""
        return self._of_base(float(self.evaluator_grams.mean()))

    @property
    def preference_pct(self) -> float | None:
        """Mean over the hours; None if it is unknown in any of them."""
        return _mean_pct(self.preference)

    @property
    def correctness_pct(self) -> float | None:
        """Mean over the hours; None if it is unknown in any of them."""
        return None if self.correctness is None else _mean_pct(self.correctness)

    @property
    def kept_pct(self) -> float | None:
        """Share of the hours in which every limit held; None without a limit, or if a quality is unknown."""
        return self._kept_pct(hours=1)

    @property
    def period_kept_pct(self) -> float | None:
        """Share of the periods whose mean quality kept the mean of every limit; None as for the hours."""
        return self._kept_pct(hours=24 * self.period_days)

    def _kept_pct(self, *, hours: int) -> float | None:
        """Share of the stretches of so many hours, the last one possibly shorter, whose means kept every limit."""
        held = ~np.isnan(self.bound)
        if not held.any():
            return None
        bounded = [(self.preference, self.bound)]
        if self.correctness is not None and self.correctness_bound is not None:
            bounded.append((self.correctness, self.correctness_bound))
        if any(np.isnan(quality[held]).any() for quality, _ in bounded):
            return None
        excess = [(quality - bound)[held] for quality, bound in bounded]
        starts = np.arange(0, len(excess[0]), hours)
        lengths = np.diff([*starts, len(excess[0])])
        means = [np.add.reduceat(values, starts) / lengths for values in excess]
        return float(100.0 * np.logical_and.reduce([mean >= -KEPT_TOLERANCE for mean in means]).mean())

    @property
    def notes(self) -> tuple[str, ...]:
        """Why figures are null that other runs have."""
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
        """The figures of `summary.json`: finite numbers, null if unknown."""
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
            "withheld_hours": dict(self.ineligible),
            "promise": self.promise,
            "period_kept_pct": self.period_kept_pct,
            "judged_prompts": self.judged_prompts,
            "notes": list(self.notes),
        }

    def _of_base(self, grams: float) -> float | None:
        base_grams = float(self.base_grams.mean())
        return 100.0 * grams / base_grams if base_grams > 0.0 else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _mean_pct(values: Floats) -> float | None:
    return None if np.isnan(values).any() else float(100.0 * values.mean())
