"""The saving on the meter: what the fleet would have used without Sprout, estimated by switchback.

In reference blocks (`shared/switchback.py`) the whole fleet serves without Sprout. There the metered energy is nearly
affine in the demand, because a decode step costs a fixed amount plus an amount per token. A regression on the bins of
these blocks predicts every other bin; the saving is the prediction minus what the meters showed. Attributed energy is
never used.

Errors are correlated within hours: bins of a block are not independent. Both parts of the interval therefore come from
whole blocks, by leaving out one block after the other:

* the error of the regression: the delete-one-block jackknife;
* the misfit: how far the true energy of the predicted time lies from the regression. Its size is that of the error
  with which blocks are predicted from the others. It is assumed to be the same for a whole day (the worst case), and
  independent between days.

The demand of a bin is the number of tokens that its requests would have generated in it without Sprout
(`tools/reporting/demand.py`). What is expected of a request is the mean of its prompt group at the reference level,
from reference blocks and the control group, also where the request was served at this level: with the actual tokens
there, the regression would not fit the other bins.

After a change of worlds, answers of the other world still run. The washout should last as long as most answers take.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.carbon import JOULES_PER_KWH

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WORLDS: Final = ("sprout", "reference", "washout")
DAY_S: Final = 86_400.0
MIN_BLOCKS: Final = 4
"""Fewer reference blocks leave an interval without use."""

BLOCKS_PER_TERM: Final = 5
"""A regression with more terms than demand needs this many blocks per coefficient."""

MORE_TERMS_GAIN: Final = 0.8
"""More terms are used where they lower the squared error of predicted blocks to this share at most."""

DEMAND: Final = "demand"
DEMAND_SQUARED: Final = "demand squared"
HOUR: Final = "hour of day"
_MODELS: Final = ((DEMAND,), (DEMAND, DEMAND_SQUARED), (DEMAND, HOUR))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FleetBins:
    """Bins of event time of equal length, in order; times without a bin are allowed.

    Attributes:
        length_s: of a bin, seconds; reference blocks and washouts should be multiples of it.
        start_s: (bins,), seconds since the epoch, UTC.
        joules: (bins, zones), energy on the meters of all endpoints of a zone, idle energy and the evaluator's
            included; NaN where a reading is missing or wrong.
        g_per_kwh: (bins, zones), carbon intensity times PUE; NaN where unknown.
        demand: (bins,), tokens that would have been generated in the bin without Sprout; NaN where unknown.
        world: (bins,), `sprout`, `reference` or `washout`; a bin that is not wholly in one world is `washout`.
    """

    length_s: float
    start_s: Floats
    joules: Floats
    g_per_kwh: Floats
    demand: Floats
    world: NDArray[np.str_]

    def __post_init__(self) -> None:
        bins = len(self.start_s)
        if not self.length_s > 0:
            raise ValueError(f"'length_s' must be greater than 0, got {self.length_s}")
        for name in ("demand", "world"):
            if getattr(self, name).shape != (bins,):
                raise ValueError(f"{name!r} must have one value for each of the {bins} bins")
        if self.joules.ndim != 2 or self.joules.shape[0] != bins or self.g_per_kwh.shape != self.joules.shape:
            raise ValueError("'joules' and 'g_per_kwh' must both have the shape (bins, zones)")
        if bins and float(np.diff(self.start_s).min(initial=self.length_s)) < self.length_s * (1.0 - 1e-6):
            raise ValueError("bins must be in order of time and must not overlap")
        if unknown := sorted(set(np.unique(self.world).tolist()) - set(WORLDS)):
            raise ValueError(f"'world' must be one of {', '.join(WORLDS)}, got {unknown[0]!r}")

    @property
    def complete(self) -> NDArray[np.bool_]:
        """(bins,), whether every figure of the bin is known."""
        known = np.isfinite(self.joules).all(axis=1) & np.isfinite(self.g_per_kwh).all(axis=1)
        return np.asarray(known & np.isfinite(self.demand))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """Energy (J) or carbon (g) of a period, with and without Sprout.

    Attributes:
        without_sprout: what the meters would have shown; in the reference blocks they did show it.
        actual: what they showed, reference blocks and washouts included.
        saved: `without_sprout` minus `actual`.
        saved_pct: of `without_sprout`; None if that is 0 or its interval contains 0.
    """

    without_sprout: Estimate
    actual: float
    saved: Estimate
    saved_pct: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeteredSaving:
    """Result of `metered_saving`.

    Attributes:
        energy: in J; None if it cannot be estimated.
        carbon: in g; None if it cannot be estimated.
        reason: why there is no estimate; None if there is one.
        blocks: reference blocks used.
        blocks_missing: how many more are needed.
        bins: of the period that are complete; the sums are theirs.
        bins_left_out: of the period that lack a reading, an intensity or a demand.
        extrapolated_share: share of the predicted bins whose demand is outside the range of the reference blocks.
        terms: what the regression uses.
        predicted_j: (bins,) of the input, what the regression predicts without Sprout, all zones together; empty
            without an estimate.
    """

    energy: Saving | None = None
    carbon: Saving | None = None
    reason: str | None = None
    blocks: int = 0
    blocks_missing: int = 0
    bins: int = 0
    bins_left_out: int = 0
    extrapolated_share: float = 0.0
    terms: tuple[str, ...] = ()
    predicted_j: Floats = field(default_factory=lambda: np.zeros(0))


def metered_saving(
    bins: FleetBins,
    *,
    since_s: float = -np.inf,
    until_s: float = np.inf,
    window_s: float = 28 * DAY_S,
    confidence: float = 0.95,
) -> MeteredSaving:
    """Estimate the saving of a period on the meter.

    Args:
        bins: of the period and of the time before it from which reference blocks are used.
        since_s, until_s: the period, seconds since the epoch; default: all bins.
        window_s: reference blocks of this time before the end of the period are used.
        confidence: of the intervals.
    """
    complete = bins.complete
    in_period = (bins.start_s >= since_s) & (bins.start_s < until_s)
    period = in_period & complete
    reference = bins.world == "reference"
    end_s = min(until_s, float(bins.start_s[-1]) + bins.length_s) if len(bins.start_s) else until_s
    used = reference & complete & (bins.start_s >= end_s - window_s) & (bins.start_s < end_s)
    blocks = _blocks(bins, reference)[used]
    number = len(np.unique(blocks))
    counts = MeteredSaving(
        blocks=number,
        blocks_missing=max(0, MIN_BLOCKS - number),
        bins=int(period.sum()),
        bins_left_out=int((in_period & ~complete).sum()),
    )
    if counts.bins == 0:
        return replace(counts, reason="no bin of the period has a meter reading, a carbon intensity and a demand")
    if counts.blocks_missing:
        return replace(
            counts,
            reason=f"{number} reference blocks with meter readings, at least {MIN_BLOCKS} are needed: "
            f"{counts.blocks_missing} more",
        )
    fit = _best_fit(bins, used, blocks)
    if fit is None:
        return replace(counts, reason="the demand does not differ between the reference blocks")
    predicted = period & ~reference
    demand, seen = bins.demand[predicted], bins.demand[used]
    outside = (demand < seen.min()) | (demand > seen.max())
    grams_per_j = bins.g_per_kwh / JOULES_PER_KWH
    return replace(
        counts,
        energy=_saving(bins, fit, period, predicted, weight=np.ones_like(bins.joules), confidence=confidence),
        carbon=_saving(bins, fit, period, predicted, weight=grams_per_j, confidence=confidence),
        extrapolated_share=float(outside.mean()) if len(outside) else 0.0,
        terms=fit.terms,
        predicted_j=(_design(bins, np.ones_like(reference), fit.terms, fit.scale) @ fit.coefficients).sum(axis=1),
    )


def student_t(confidence: float, degrees: int) -> float:
    """The value that the absolute value of Student's t stays below with this probability.

    The distribution for whole degrees of freedom is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4), which is
    inverted by bisection. The command line is installed without scipy.
    """
    low, high = 0.0, math.pi / 2.0
    for _ in range(80):
        angle = (low + high) / 2.0
        cosine = math.cos(angle)
        if degrees % 2:
            term, total = cosine, 0.0
            for k in range(1, degrees // 2 + 1):
                total += term
                term *= cosine**2 * 2 * k / (2 * k + 1)
            probability = 2.0 / math.pi * (angle + math.sin(angle) * total)
        else:
            term, total = 1.0, 0.0
            for k in range(1, degrees // 2 + 1):
                total += term
                term *= cosine**2 * (2 * k - 1) / (2 * k)
            probability = math.sin(angle) * total
        low, high = (angle, high) if probability < confidence else (low, angle)
    return math.sqrt(degrees) * math.tan((low + high) / 2.0)


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """A regression of the joules of a bin, by zone.

    Attributes:
        scale: of the demand.
        coefficients: (terms, zones).
        without_block: (blocks, terms, zones), the coefficients without each of the blocks.
        misfit: (blocks, zones), mean error per bin of each block as predicted without it.
    """

    terms: tuple[str, ...]
    scale: float
    coefficients: Floats
    without_block: Floats
    misfit: Floats


def _blocks(bins: FleetBins, reference: NDArray[np.bool_]) -> Ints:
    """(bins,), number of the block; reference bins without a gap between them are one block."""
    if not len(reference):
        return np.zeros(0, dtype=np.int64)
    follows = np.diff(bins.start_s) < bins.length_s * 1.5
    starts = np.concatenate([[True], ~(reference[1:] & reference[:-1] & follows)])
    return np.cumsum(starts)


def _design(bins: FleetBins, rows: NDArray[np.bool_], terms: tuple[str, ...], scale: float) -> Floats:
    """(rows, coefficients)."""
    demand = bins.demand[rows] / scale
    columns = [np.ones_like(demand), demand]
    if DEMAND_SQUARED in terms:
        columns.append(demand**2)
    if HOUR in terms:
        angle = 2.0 * np.pi * (bins.start_s[rows] + bins.length_s / 2.0) / DAY_S
        columns += [np.sin(angle), np.cos(angle)]
    return np.column_stack(columns)


def _best_fit(bins: FleetBins, rows: NDArray[np.bool_], blocks: Ints) -> _Fit | None:
    """The simplest regression that none with more terms beats clearly; None if demand does not differ."""
    best: _Fit | None = None
    number = len(np.unique(blocks))
    for terms in _MODELS:
        fit = _fit(bins, rows, blocks, terms)
        if fit is None:
            continue
        enough = number >= BLOCKS_PER_TERM * len(fit.coefficients)
        if best is None or (enough and _error(fit) < MORE_TERMS_GAIN * _error(best)):
            best = fit
    return best


def _error(fit: _Fit) -> float:
    return float((fit.misfit.sum(axis=1) ** 2).mean())


def _fit(bins: FleetBins, rows: NDArray[np.bool_], blocks: Ints, terms: tuple[str, ...]) -> _Fit | None:
    scale = float(bins.demand[rows].mean()) or 1.0
    design, joules = _design(bins, rows, terms, scale), bins.joules[rows]
    normal, moments = design.T @ design, design.T @ joules
    if not _solvable(normal):
        return None
    without, misfit = [], []
    for block in np.unique(blocks):
        mine = blocks == block
        rest = normal - design[mine].T @ design[mine]
        if not _solvable(rest):
            return None
        without.append(np.linalg.solve(rest, moments - design[mine].T @ joules[mine]))
        misfit.append((joules[mine] - design[mine] @ without[-1]).mean(axis=0))
    return _Fit(terms, scale, np.linalg.solve(normal, moments).astype(float), np.array(without), np.array(misfit))


def _solvable(normal: Floats) -> bool:
    return bool(np.linalg.cond(normal) < 1e12)


def _saving(
    bins: FleetBins,
    fit: _Fit,
    period: NDArray[np.bool_],
    predicted: NDArray[np.bool_],
    *,
    weight: Floats,
    confidence: float,
) -> Saving:
    """The saving of a weighted sum of the joules.

    Args:
        bins, fit: of all bins.
        period: (bins,), bins of the sums.
        predicted: (bins,), those of them in which the fleet did not live without Sprout.
        weight: (bins, zones).
        confidence: of the intervals.
    """
    actual = float((weight[period] * bins.joules[period]).sum())
    observed = float((weight[period & ~predicted] * bins.joules[period & ~predicted]).sum())
    # (zones, terms): the sum over bins depends on the coefficients through these.
    sums = weight[predicted].T @ _design(bins, predicted, fit.terms, fit.scale)
    without = float(np.einsum("zp,pz->", sums, fit.coefficients))
    jackknife = np.einsum("zp,bpz->b", sums, fit.without_block)
    blocks = len(jackknife)
    error = (blocks - 1) / blocks * float(((jackknife - without) ** 2).sum())
    days = max(1.0, int(predicted.sum()) * bins.length_s / DAY_S)
    misfit = float(((fit.misfit @ weight[predicted].sum(axis=0)) ** 2).mean()) / days
    quantile = student_t(confidence, blocks - len(fit.coefficients))
    half = quantile * float(np.sqrt(error + misfit))
    total = Estimate(without + observed, without + observed - half, without + observed + half)
    return Saving(
        without_sprout=total,
        actual=actual,
        saved=Estimate(total.value - actual, total.low - actual, total.high - actual),
        saved_pct=(
            Estimate(*(100.0 * (1.0 - actual / value) for value in (total.value, total.low, total.high)))
            if total.low > 0.0
            else None
        ),
    )
