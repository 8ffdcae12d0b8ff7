"""The multiplicative model of energy and time: level of the group × ratio of the option."""

from collections.abc import Callable, Mapping

import numpy as np

_ITERATIONS = 50
_CONVERGED = 1e-9
_LONGEST_STEP = 2.0
"""Of a ratio's logarithm: further away the curvature says little."""

Totals = Mapping[str, Mapping[str, tuple[float, float]]]
"""(requests, sum) by group, then option."""


def main_effects(totals: Totals, *, pseudo_requests: float) -> Callable[[str, str], float]:
    """Fit mean(group, option) = level(group) × ratio(option), so that the margins agree.

    This is the method of marginal totals of insurance rating, and the likeliest fit of a log-linear Poisson model: each
    group is compared with itself, so that an option does not look cheap because it is drawn for cheap groups. A group's
    level leans on the mean of all by pseudo-requests, of the option that is served most.

    It is found by Newton's method on the ratios' logarithms, the levels eliminated. Fitting the margins in turn, the
    usual way, takes hundreds of rounds where almost every group is served by one option, as a policy has it.

    Returns:
        The fitted mean; the usual level for an unknown group, the usual ratio for an unknown option.
    """
    groups, options = list(totals), sorted({option for row in totals.values() for option in row})
    cells = np.array([[totals[group].get(option, (0.0, 0.0)) for option in options] for group in groups])
    if not cells.size or not cells[:, :, 1].sum() > 0.0:
        return lambda _group, _option: 0.0
    requests, sums = cells[:, :, 0], cells[:, :, 1]
    served = int(requests.sum(axis=0).argmax())
    # An option that takes nothing has no logarithm; where the one served most takes nothing, there is no scale.
    moving = [o for o in range(len(options)) if o != served and sums[:, o].sum() > 0.0]
    ratio = np.where(sums.sum(axis=0) > 0.0, 1.0, 0.0)
    ratio[served] = 1.0
    for _ in range(_ITERATIONS):
        weights = requests * ratio
        usual = sums.sum() / max(float(weights.sum()), 1e-300)
        whole = weights.sum(axis=1) + pseudo_requests
        level = (sums.sum(axis=1) + pseudo_requests * usual) / np.maximum(whole, 1e-300)
        fitted = level[:, None] * weights
        slope = (sums - fitted).sum(axis=0)[moving]
        shares = weights / np.maximum(whole, 1e-300)[:, None]
        curvature = (np.diag(fitted.sum(axis=0)) - shares.T @ fitted)[np.ix_(moving, moving)]
        # Least squares: options that no group tells apart leave the curvature without an inverse.
        step = np.linalg.lstsq(curvature, slope, rcond=1e-12)[0]
        ratio[moving] *= np.exp(np.clip(step, -_LONGEST_STEP, _LONGEST_STEP))
        if not step.size or np.abs(step).max() < _CONVERGED:
            break
    levels = dict(zip(groups, level.tolist(), strict=True))
    ratios = dict(zip(options, ratio.tolist(), strict=True))
    return lambda group, option: levels.get(group, float(usual)) * ratios.get(option, 1.0)
