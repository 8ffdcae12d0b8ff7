"""The saving: grams emitted against those of the same requests, had all of them been served by the reference.

Doubly robust (augmented inverse propensity weighting) from the probabilities logged with every request; the method,
and why the interval is what it is, stands in docs/decisions/0007-saving-estimator.md.
"""

import math
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import Self

import numpy as np

from tools.reporting.calls import Flags, Floats

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Requests whose counterfactual can be identified; arrays of shape (n,), one element per request.

    A part that the draw itself decides upon (the requests that were served in one zone) keeps every request, because
    those that the reference served tell what the part would have emitted there, wherever the reference lies.

    Attributes:
        emitted_g: grams emitted.
        propensity: probability with which the reference would have been drawn, > 0; 1 in fallback.
        referred: whether the reference served it.
        predicted_g: grams expected at the reference from other requests' energy and time, at this one's prices.
        variance: of the grams at the reference around `predicted_g`.
        inside: whether it belongs to the part compared; all do in the whole.
        inside_probability: probability with which the draw would have put it inside; 1 in the whole.
        reference_inside: whether it would belong had the reference served it.
    """

    emitted_g: Floats
    propensity: Floats
    referred: Flags
    predicted_g: Floats
    variance: Floats
    inside: Flags
    inside_probability: Floats
    reference_inside: Flags

    @classmethod
    def whole(
        cls, *, emitted_g: Floats, propensity: Floats, referred: Flags, predicted_g: Floats, variance: Floats
    ) -> Self:
        """A comparison of all these requests.

        Raises:
            ValueError: a propensity is 0: where the reference is never drawn nothing is known.
        """
        if np.any(propensity <= 0):
            raise ValueError("propensity must be greater than 0: where the reference is never drawn nothing is known")
        everyone = np.ones(len(emitted_g), dtype=bool)
        return cls(emitted_g, propensity, referred, predicted_g, variance, everyone, np.ones(len(emitted_g)), everyone)

    def __len__(self) -> int:
        return len(self.emitted_g)

    def part(self, inside: Flags, inside_probability: Floats, reference_inside: Flags) -> Self:
        """The same requests, compared over a part that the draw decides upon."""
        return replace(self, inside=inside, inside_probability=inside_probability, reference_inside=reference_inside)

    def where(self, chosen: Flags) -> Self:
        """The requests for which `chosen`, of shape (n,), is true; it must not depend on the draw."""
        return type(self)(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, 95 %."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Saving:
    """What a set of requests emitted, against the counterfactual.

    Attributes:
        requests: how many were compared.
        references: how many of them a policy could have served otherwise but served by the reference: the evidence.
        reference_g: grams had the reference served all of them.
        reference_interval: of `reference_g`; null where there is no evidence for one.
        saving_pct: null where nothing would have been emitted.
    """

    requests: int
    references: int
    emitted_g: float
    reference_g: float
    reference_interval: Interval | None
    saving_pct: float | None
    saving_interval: Interval | None

    @property
    def saved_g(self) -> float:
        """Grams not emitted; negative where more was."""
        return self.reference_g - self.emitted_g


def estimate_saving(requests: Comparison) -> Saving:
    """Estimate the saving of these very requests.

    psi_i = m_i + 1[reference served i] / pi_i * (Y_i - m_i), summed, is what the reference would have emitted; it is
    unbiased whatever the prediction m, because the router drew with the probability pi that it logged.
    """
    inside = requests.inside
    emitted = float(requests.emitted_g[inside].sum())
    residual = np.where(requests.referred, requests.emitted_g - requests.predicted_g, 0.0)
    weight = requests.inside_probability / requests.propensity
    reference = float(requests.predicted_g[inside].sum() + (weight * residual).sum())
    half = _half_width(requests, residual)
    references = int(np.count_nonzero(requests.referred & (requests.propensity < 1.0)))
    compared = int(np.count_nonzero(inside))
    if reference <= 0.0:
        return Saving(compared, references, emitted, reference, None, None, None)
    interval = None if half is None else Interval(max(0.0, reference - half), reference + half)
    # The emitted grams are known, only the counterfactual is estimated: d(1 - A/C) = A/C^2 dC.
    slope = emitted / reference**2
    saving = 1.0 - emitted / reference
    return Saving(
        requests=compared,
        references=references,
        emitted_g=emitted,
        reference_g=reference,
        reference_interval=interval,
        saving_pct=100.0 * saving,
        saving_interval=None
        if half is None
        else Interval(100.0 * (saving - slope * half), 100.0 * (saving + slope * half)),
    )


@dataclass(frozen=True, slots=True)
class SharedOut:
    """An estimate of the whole, shared out to its requests; arrays of shape (n,).

    Attributes:
        reference_g: sums to the whole's `reference_g`.
        half_width_g: sums to half the whole's interval; null where it has none.
    """

    reference_g: Floats
    half_width_g: Floats | None


def benchmarked(requests: Comparison) -> SharedOut:
    """Share the estimate of all requests out to each: what the prediction says, scaled to the doubly robust total.

    For parts too small to estimate alone, such as an hour. What the reference was bound to serve keeps its own grams.
    """
    whole = estimate_saving(requests)
    certain = requests.propensity >= 1.0
    known = np.where(certain & requests.inside, requests.emitted_g, 0.0)
    shape = np.where(requests.inside & ~certain, requests.predicted_g, 0.0)
    total = float(shape.sum())
    if total <= 0.0:
        return SharedOut(known, np.zeros(len(requests)))
    half = None
    if whole.reference_interval is not None:
        half = shape * ((whole.reference_interval.high - whole.reference_g) / total)
    return SharedOut(known + shape * ((whole.reference_g - float(known.sum())) / total), half)


def _half_width(requests: Comparison, residual: Floats) -> float | None:
    """Half the interval's width in grams: the wider of what these requests show and what their groups do.

    A few hours hold only a handful of reference draws, whose own spread may look small by chance.
    """
    drawn, apart = requests.propensity, requests.inside_probability
    # E (1[reference] apart / drawn - 1[inside])^2: what the draw adds, per squared gram around the prediction.
    factor = np.maximum(0.0, apart**2 / drawn + np.where(requests.reference_inside, -apart, apart))
    at_stake = factor > 0.0
    if not at_stake.any():
        return 0.0
    expected = float((factor * requests.variance).sum())
    shown = factor / drawn * residual**2
    variance = max(expected, float(shown.sum()))
    return _Z * math.sqrt(variance) if variance > 0.0 else None
