"""The saving: grams emitted against the grams if the baseline (no directive) had served every request.

The estimator is augmented inverse propensity weighting (AIPW; Robins, Rotnitzky and Zhao, JASA 1994), known as doubly
robust off-policy evaluation (Dudík, Langford and Li, ICML 2011). It uses the probabilities logged with every request.
docs/decisions/0007 derives the estimator and its interval. No library offers this interval: the sample is fixed, and
only the random choice of the option varies.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Self

import numpy as np

from shared.metering.columns import Columns, Flags, Floats

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison(Columns):
    """Requests whose counterfactual is identified, in cells of sums; every array has shape `(cells,)`.

    The requests of a cell agree in everything but their own use. A cell may hold a single request.

    A subset can depend on the random choice, for example the requests served in one zone. Such a comparison keeps every
    request, because the requests served by the baseline also estimate what the subset would have emitted there: see
    `subset`. `select` is for what does not depend on the random choice.

    Attributes:
        emitted_g: emitted gCO2eq.
        requests: number of requests.
        propensity: probability with which the baseline was chosen, > 0; 1 in fallback and in reference blocks of the
            switchback.
        served_by_baseline: whether the baseline served the request.
        predicted_g: gCO2eq expected at the baseline, from other requests' energy and time at this request's prices.
        variance: variance of the grams at the baseline around `predicted_g`, g².
        residual_g, residual_squared: emitted grams less the predicted ones, and their squares; of requests that the
            baseline served, else 0.
        in_subset: whether the request belongs to the subset.
        p_subset: probability with which the random choice put the request into the subset.
        baseline_in_subset: whether the request would belong to the subset if the baseline had served it.
    """

    emitted_g: Floats
    propensity: Floats
    served_by_baseline: Flags
    predicted_g: Floats
    variance: Floats
    requests: Floats
    residual_g: Floats
    residual_squared: Floats
    in_subset: Flags
    p_subset: Floats
    baseline_in_subset: Flags

    @classmethod
    def of_all(
        cls,
        *,
        emitted_g: Floats,
        propensity: Floats,
        served_by_baseline: Flags,
        predicted_g: Floats,
        variance: Floats,
        requests: Floats | None = None,
        residual_squared: Floats | None = None,
    ) -> Self:
        """A comparison of all these requests.

        Args:
            requests, residual_squared: None: every cell is one request.

        Raises:
            ValueError: a propensity is 0; the counterfactual of such a request is not identified.
        """
        if np.any(propensity <= 0):
            raise ValueError("propensity must be greater than 0: a baseline that is never chosen identifies nothing")
        every, ones = np.ones(len(emitted_g), dtype=bool), np.ones(len(emitted_g))
        residual = np.where(served_by_baseline, emitted_g - predicted_g, 0.0)
        squared = residual**2 if residual_squared is None else np.where(served_by_baseline, residual_squared, 0.0)
        return cls(
            emitted_g=emitted_g,
            propensity=propensity,
            served_by_baseline=served_by_baseline,
            predicted_g=predicted_g,
            variance=variance,
            requests=ones if requests is None else requests,
            residual_g=residual,
            residual_squared=squared,
            in_subset=every,
            p_subset=ones,
            baseline_in_subset=every,
        )

    def __len__(self) -> int:
        return len(self.emitted_g)

    def subset(self, in_subset: Flags, p_subset: Floats, baseline_in_subset: Flags) -> Self:
        """The same requests, compared over a subset that depends on the random choice."""
        return replace(self, in_subset=in_subset, p_subset=p_subset, baseline_in_subset=baseline_in_subset)


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Saving:
    """What a set of requests emitted, against the counterfactual. The field names are keys of the JSON report.

    Attributes:
        requests: number of requests compared.
        references: number of requests randomly assigned to the baseline although the policy could have chosen
            otherwise.
        emitted_g: gCO2eq emitted.
        reference_g: estimated gCO2eq if the baseline had served all of them.
        reference_interval: of `reference_g`; None without evidence of its variance.
        saving_pct: negative if more was emitted; None if the baseline would have emitted nothing.
        saving_interval: of `saving_pct`.
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
        """gCO2eq saved; negative if more was emitted than at the baseline."""
        return self.reference_g - self.emitted_g


def estimate_saving(requests: Comparison) -> Saving:
    """Estimate the saving of exactly these requests.

    The baseline's emissions are the sum of psi_i = m_i + 1[baseline served i] / pi_i * (Y_i - m_i). The sum is unbiased
    for any prediction m, because the router chose the baseline at random with the logged probability pi_i.
    """
    emitted = float(requests.emitted_g[requests.in_subset].sum())
    weight = requests.p_subset / requests.propensity
    reference = float(requests.predicted_g[requests.in_subset].sum() + (weight * requests.residual_g).sum())
    half = _half_width(requests)
    references = int(requests.requests[requests.served_by_baseline & (requests.propensity < 1.0)].sum())
    compared = int(requests.requests[requests.in_subset].sum())
    if reference <= 0.0:
        return Saving(compared, references, emitted, reference, None, None, None)
    interval = None if half is None else Interval(max(0.0, reference - half), reference + half)
    # Delta method: the emitted grams A are known, only the counterfactual C is estimated: d(1 - A/C) = A/C^2 dC.
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
class NetSaving:
    """A saving less what Sprout itself emitted. The field names are keys of the JSON report.

    Attributes:
        evaluator_g: gCO2eq of the evaluator's generations and of its judge.
        saved_g: gCO2eq saved, less `evaluator_g`.
        saved_interval: of `saved_g`; None without evidence of its variance.
        saving_pct: % of the grams at the baseline; None if these are unknown.
        saving_interval: of `saving_pct`.
    """

    evaluator_g: float
    saved_g: float
    saved_interval: Interval | None
    saving_pct: float | None
    saving_interval: Interval | None


def net_of_evaluator(saving: Saving, evaluator_g: float) -> NetSaving:
    """The saving less the evaluator's grams E, over the same baseline: 1 - (A + E) / C.

    Only the counterfactual C is estimated. The emitted grams A and the evaluator's grams E are accounts.
    """
    saved_g = saving.saved_g - evaluator_g
    reference, interval = saving.reference_g, saving.reference_interval
    if saving.saving_pct is None:
        return NetSaving(evaluator_g, saved_g, None, None, None)
    net = 1.0 - (saving.emitted_g + evaluator_g) / reference
    if interval is None:
        return NetSaving(evaluator_g, saved_g, None, 100.0 * net, None)
    # The interval of C is symmetric, except that it ends at 0.
    half = interval.high - reference
    slope = (saving.emitted_g + evaluator_g) / reference**2
    return NetSaving(
        evaluator_g=evaluator_g,
        saved_g=saved_g,
        saved_interval=Interval(saved_g - half, saved_g + half),
        saving_pct=100.0 * net,
        saving_interval=Interval(100.0 * (net - slope * half), 100.0 * (net + slope * half)),
    )


@dataclass(frozen=True, slots=True)
class Allocation:
    """An estimate for all requests, allocated to the cells; arrays of shape `(cells,)`.

    Attributes:
        reference_g: sums to the `reference_g` of all requests.
        half_width_g: sums to half the width of their interval; None if there is no interval.
    """

    reference_g: Floats
    half_width_g: Floats | None


def allocate_total(requests: Comparison) -> Allocation:
    """Allocate the estimate for all requests to each request, in proportion to its prediction.

    For subsets too small for an estimate of their own, such as one hour. Requests that only the baseline could serve
    keep their own grams.
    """
    total = estimate_saving(requests)
    certain = requests.propensity >= 1.0
    known = np.where(certain & requests.in_subset, requests.emitted_g, 0.0)
    share = np.where(requests.in_subset & ~certain, requests.predicted_g, 0.0)
    shares = float(share.sum())
    if shares <= 0.0:
        return Allocation(known, np.zeros(len(requests)))
    half = None
    if total.reference_interval is not None:
        half = share * ((total.reference_interval.high - total.reference_g) / shares)
    return Allocation(known + share * ((total.reference_g - float(known.sum())) / shares), half)


def _half_width(requests: Comparison) -> float | None:
    """Half the width of the interval of the counterfactual, g; None without evidence of its variance.

    The variance is estimated from the residuals of these requests, and from the spread within their groups. The larger
    one is used: a few hours hold only a handful of baseline requests, whose residuals may be small by chance.
    """
    propensity, p_subset = requests.propensity, requests.p_subset
    # E (1[baseline] p_subset / propensity - 1[in subset])^2: variance of the random choice per squared gram.
    factor = np.maximum(0.0, p_subset**2 / propensity + np.where(requests.baseline_in_subset, -p_subset, p_subset))
    if not (factor > 0.0).any():
        return 0.0
    expected = float((factor * requests.variance).sum())
    empirical = float((factor / propensity * requests.residual_squared).sum())
    variance = max(expected, empirical)
    return _Z * math.sqrt(variance) if variance > 0.0 else None
