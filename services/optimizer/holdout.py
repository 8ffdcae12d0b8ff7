"""The control group: as small as a wanted precision of the saving allows (docs/decisions/0040-holdout-by-precision.md).

`sprout report` estimates the saving from the requests that the baseline served by chance
(docs/decisions/0007-saving-estimator.md). Its interval follows from the probabilities of the policy and from the spread
of the grams at the baseline, so it is known before the policy is served.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

from services.optimizer.problem import Problem, Rows
from services.optimizer.settings import OptimizerSettings

AUTO: Final = "auto"

_Z = NormalDist().inv_cdf(0.975)
_DAY_S = 86_400.0
_HALVINGS = 30


@dataclass(frozen=True, slots=True)
class Holdout:
    """The least probability of the baseline in every group.

    Attributes:
        probability: in [0, 1].
        half_width_pct: half the width of the 95 % interval of a day's saving, points; None if it is not known.
        reason: in words, for the policy.
    """

    probability: float
    half_width_pct: float | None
    reason: str


def choose_holdout(
    problem: Problem, rows: Rows, *, variation: Mapping[str, float], settings: OptimizerSettings
) -> Holdout:
    """The smallest holdout with which a day's saving is known as precisely as wanted, within the settings' limits.

    Args:
        problem: of the policy.
        rows: its solution with the smallest holdout, probabilities by group, then option.
        variation: by group, standard deviation of a request's energy at the baseline, relative to its mean; 1 for a
            group that is not named.
        settings: the wanted half-width and the limits, or a fixed holdout.
    """

    def chosen(holdout: float, why: str) -> Holdout:
        width = saving_half_width_pct(problem, rows, holdout, variation)
        known = f": a day's saving is known within {width:.2g} points" if math.isfinite(width) else ""
        return Holdout(holdout, width if known else None, f"holdout {100.0 * holdout:.2g} %, {why}{known}")

    def suffices(holdout: float) -> bool:
        return saving_half_width_pct(problem, rows, holdout, variation) <= settings.holdout_half_width_pct

    if settings.holdout != AUTO:
        return chosen(settings.holdout, "as set")
    low, high = settings.holdout_minimum, settings.holdout_maximum
    if suffices(low):
        return chosen(low, "the minimum")
    if not suffices(high):
        return chosen(high, "the maximum")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return chosen(high, "as small as the wanted precision allows")


def saving_half_width_pct(problem: Problem, rows: Rows, holdout: float, variation: Mapping[str, float]) -> float:
    """Half the width of the 95 % interval of the saving of a day at the present request rate, points.

    With a mean of C grams at the baseline, of A as served, and probability p of the baseline in a group whose grams
    there deviate by s, the half-width is 1.96 · A / C² · √(mean of (1 - p)/p · s² / requests).

    Args:
        problem, rows, variation: as for `choose_holdout`.
        holdout: probability to which the baseline is raised in every group.

    Returns:
        Infinite without requests, or where the baseline is never served.
    """
    served = reference = variance = 0.0
    for group, weight in problem.weights.items():
        grams = {option: problem.options[option].grams(one) for option, one in problem.row(group).items()}
        of_reference = grams[problem.reference]
        before = rows[group].get(problem.reference, 0.0)
        probability = max(before, holdout)
        others = sum(share * grams[option] for option, share in rows[group].items() if option != problem.reference)
        left = (1.0 - probability) / (1.0 - before) if before < 1.0 else 0.0
        reference += weight * of_reference
        served += weight * (probability * of_reference + left * others)
        deviation = variation.get(group, 1.0) * of_reference
        variance += weight * deviation**2 * (1.0 / probability - 1.0 if probability > 0.0 else math.inf)
    requests = problem.requests_per_s * _DAY_S
    if variance == 0.0 or reference == 0.0:
        return 0.0
    return 100.0 * _Z * served / reference**2 * math.sqrt(variance / requests) if requests > 0.0 else math.inf
