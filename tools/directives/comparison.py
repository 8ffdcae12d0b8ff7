"""Statistics of a trial: length and quality of directives relative to no directive, and which are worth having.

All figures are paired: every directive answered the same prompts. Intervals are 95 % ones. Those of lengths come from a
bootstrap over prompts; shares have Wilson's interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.fleet import Directive

Floats = NDArray[np.float64]

RESAMPLES: Final = 2_000
Z: Final = 1.959963984540054
"""Standard errors on each side of a 95 % interval."""
MIN_VERDICTS: Final = 20
"""Verdicts below which nothing is recommended; the optimizer also needs 20 for an option."""
CLEAR: Final = 0.8
"""Share of the resamples that must agree on whether a directive is on the Pareto front."""

Advice = Literal["worth it", "beaten", "unclear", "not shorter", "too few verdicts"]
"""`beaten`: another directive is shorter and no worse."""


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurement:
    """A directive's answers to the prompts of a trial.

    Attributes:
        tokens, seconds: of every answer.
        not_worse: 1 where the judge prefers it to the answer without a directive, or finds a tie; 0 where it is worse;
            nan without a verdict.
        right: 1 for a right answer, 0 for a wrong one, nan where that is not known.
        joules: mean of an answer; None: unmetered.
    """

    directive: Directive
    tokens: Floats
    seconds: Floats
    not_worse: Floats
    right: Floats
    joules: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a trial says of one directive; ratios and differences are to the answers without a directive.

    Attributes:
        tokens, seconds, joules: mean of an answer.
        tokens_ratio: ratio of the mean tokens.
        joules_ratio: ratio of the joules; None: unmetered.
        not_worse: share of the verdicts; None without any.
        verdicts: number of prompts with a verdict.
        right: share of right answers; None: not known of any prompt.
        right_change: difference of that share.
        rated: number of prompts for which it is known whether the answers are right.
        front_share: share of the resamples in which no other directive is shorter and no worse.
        beaten_by: levels of directives that are shorter and no worse.
        better_mix: levels of two directives of which a mix is shorter at the same quality; None: there are none.
    """

    level: str
    text: str
    tokens: float
    tokens_ratio: Estimate
    seconds: float
    joules: float | None
    joules_ratio: float | None
    not_worse: Estimate | None
    verdicts: int
    right: float | None
    right_change: Estimate | None
    rated: int
    front_share: float
    beaten_by: tuple[str, ...]
    better_mix: tuple[str, str] | None

    @property
    def advice(self) -> Advice:
        """Whether the directive belongs in the model's catalogue."""
        if self.verdicts < MIN_VERDICTS:
            return "too few verdicts"
        if self.tokens_ratio.high >= 1.0:
            return "not shorter"
        if self.front_share >= CLEAR:
            return "worth it"
        return "beaten" if self.front_share <= 1.0 - CLEAR else "unclear"

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON document."""
        document = {name: getattr(self, name) for name in self.__slots__}
        for name in ("tokens_ratio", "not_worse", "right_change"):
            estimate: Estimate | None = document[name]
            document[name] = None if estimate is None else estimate.value
            document[f"{name}_interval"] = None if estimate is None else [estimate.low, estimate.high]
        return document | {"advice": self.advice}


def compare(reference: Measurement, others: Sequence[Measurement], *, seed: int = 0) -> list[Result]:
    """Compare directives with the answers without one.

    Args:
        reference: the answers without a directive; its `not_worse` is not read: it is as good as itself.
        others: at least one; on the same prompts in the same order.
        seed: of the bootstrap.

    Raises:
        ValueError: there are no prompts, or the answers without a directive have no tokens.
    """
    prompts = len(reference.tokens)
    if not prompts or reference.tokens.sum() <= 0.0:
        raise ValueError("the model generated no tokens without a directive, so there is nothing to compare with")
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1.0 / prompts), size=RESAMPLES)
    weights = counts.astype(np.float64)
    everything = [reference, *others]
    tokens = np.array([one.tokens for one in everything])
    quality = np.array([np.ones(prompts), *(one.not_worse for one in others)])
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = weights @ tokens.T
        ratios = drawn / drawn[:, :1]
        on_front = (~_beats(drawn, _means(quality, weights)).any(axis=2)).mean(axis=0)
    points = [(float(one.tokens.mean()), _share(one)) for one in everything]
    points[0] = (points[0][0], 1.0)
    beats = _beats(np.array([[cost for cost, _ in points]]), np.array([[share for _, share in points]]))[0]
    levels = [one.directive.level for one in everything]
    return [
        _result(
            one,
            reference,
            tokens_ratio=Estimate(points[place][0] / points[0][0], *_percentiles(ratios[:, place])),
            right_change=_right_change(one, reference, weights),
            front_share=float(on_front[place]),
            beaten_by=tuple(levels[other] for other in np.flatnonzero(beats[place])),
            better_mix=_better_mix(place, points, levels),
        )
        for place, one in enumerate(everything[1:], start=1)
    ]


def wilson(successes: float, trials: int) -> Estimate:
    """A share with Wilson's 95 % interval.

    Raises:
        ValueError: there are no trials.
    """
    if trials <= 0:
        raise ValueError("a share needs at least one trial")
    share, square = successes / trials, Z * Z
    centre = (share + square / (2 * trials)) / (1.0 + square / trials)
    half = Z * math.sqrt(share * (1.0 - share) / trials + square / (4 * trials * trials)) / (1.0 + square / trials)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def _result(
    one: Measurement,
    reference: Measurement,
    *,
    tokens_ratio: Estimate,
    right_change: Estimate | None,
    front_share: float,
    beaten_by: tuple[str, ...],
    better_mix: tuple[str, str] | None,
) -> Result:
    verdicts = one.not_worse[~np.isnan(one.not_worse)]
    rated = one.right[_both_rated(one, reference)]
    metered = one.joules is not None and reference.joules is not None and reference.joules > 0.0
    return Result(
        level=one.directive.level,
        text=one.directive.text,
        tokens=float(one.tokens.mean()),
        tokens_ratio=tokens_ratio,
        seconds=float(one.seconds.mean()),
        joules=one.joules,
        joules_ratio=(one.joules or 0.0) / (reference.joules or 1.0) if metered else None,
        not_worse=wilson(float(verdicts.sum()), len(verdicts)) if len(verdicts) else None,
        verdicts=len(verdicts),
        right=float(rated.mean()) if len(rated) else None,
        right_change=right_change,
        rated=len(rated),
        front_share=front_share,
        beaten_by=beaten_by,
        better_mix=better_mix,
    )


def _right_change(one: Measurement, reference: Measurement, weights: Floats) -> Estimate | None:
    rated = _both_rated(one, reference)
    if not rated.any():
        return None
    change = np.where(rated, one.right - reference.right, np.nan)
    with np.errstate(invalid="ignore"):
        drawn = _means(change[np.newaxis], weights)[:, 0]
    return Estimate(float(np.nanmean(change)), *_percentiles(drawn))


def _both_rated(one: Measurement, reference: Measurement) -> NDArray[np.bool_]:
    rated: NDArray[np.bool_] = ~(np.isnan(one.right) | np.isnan(reference.right))
    return rated


def _means(values: Floats, weights: Floats) -> Floats:
    """Weighted means over prompts, without those that are nan.

    Args:
        values: [directives, prompts].
        weights: [resamples, prompts].

    Returns:
        [resamples, directives]; nan where no prompt has a value.
    """
    known = ~np.isnan(values)
    means: Floats = (weights @ np.where(known, values, 0.0).T) / (weights @ known.T.astype(np.float64))
    return means


def _beats(cost: Floats, quality: Floats) -> NDArray[np.bool_]:
    """[samples, i, j]: whether j costs no more than i and is no worse, and is better in one of both.

    Args:
        cost, quality: [samples, directives].
    """
    cheaper = cost[:, np.newaxis, :] - cost[:, :, np.newaxis]
    better = quality[:, np.newaxis, :] - quality[:, :, np.newaxis]
    beats: NDArray[np.bool_] = (cheaper <= 0.0) & (better >= 0.0) & ((cheaper < 0.0) | (better > 0.0))
    return beats


def _share(one: Measurement) -> float:
    known = one.not_worse[~np.isnan(one.not_worse)]
    return float(known.mean()) if len(known) else math.nan


def _better_mix(place: int, points: Sequence[tuple[float, float]], levels: Sequence[str]) -> tuple[str, str] | None:
    """The pair whose mix saves most at the quality of one directive, if it saves more than the directive itself."""
    cost, quality = points[place]
    best, found = cost, None
    for one, (high_cost, high) in enumerate(points):
        for other, (low_cost, low) in enumerate(points):
            if place in {one, other} or not low < quality < high:
                continue
            part = (quality - low) / (high - low)
            mixed = part * high_cost + (1.0 - part) * low_cost
            if mixed < best:
                best, found = mixed, (levels[one], levels[other])
    return found


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
