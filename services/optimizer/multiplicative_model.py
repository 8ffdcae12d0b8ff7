"""The mean of a quantity per request for every prompt group and option, from sparse sums.

A multiplicative model, group effect x option effect, is fitted to the sums, and every (group, option) mean is shrunk
towards it (docs/decisions/0004-optimizer-estimates.md).
"""

from collections.abc import Callable, Mapping

import numpy as np

_NEWTON_STEPS = 50
_CONVERGED = 1e-9
_LONGEST_STEP = 2.0
"""Largest Newton step of a log option effect; the quadratic approximation does not hold further away."""


class MeanModel:
    """Mean of one quantity per request for every group and option.

    A (group, option) mean is shrunk towards the multiplicative model m(group, option) with the weight of
    `pseudo_requests`: (sum + pseudo_requests * m) / (requests + pseudo_requests). A group that never used an option is
    therefore expected to use its own baseline times the option's usual ratio.
    """

    def __init__(self, totals: Mapping[str, Mapping[str, tuple[float, float]]], pseudo_requests: float) -> None:
        """Fit the model.

        Args:
            totals: (requests, sum of the quantity) by group, then option.
            pseudo_requests: prior weight.
        """
        self._totals = totals
        self._pseudo_requests = pseudo_requests
        self._fitted = fit_multiplicative_model(totals, pseudo_requests=pseudo_requests)

    def __call__(self, group: str, option: str) -> float:
        """The mean of one request of a group and option."""
        requests, total = self._totals.get(group, {}).get(option, (0.0, 0.0))
        return (total + self._pseudo_requests * self._fitted(group, option)) / (requests + self._pseudo_requests)


def fit_multiplicative_model(
    totals: Mapping[str, Mapping[str, tuple[float, float]]], *, pseudo_requests: float
) -> Callable[[str, str], float]:
    """Fit mean(g, o) = a_g * r_o so that the fitted sums over groups and over options equal the observed ones.

    With n_go requests and observed sums s_go, this is the method of marginal totals of insurance rating, which is also
    the maximum-likelihood fit of a log-linear Poisson model (McCullagh and Nelder, Generalized Linear Models, 6). Each
    group is compared with itself, so that an option does not look cheap because it is drawn for cheap groups. The group
    effects are shrunk towards the overall mean u of the most used option:
    a_g = (sum_o s_go + pseudo_requests * u) / (sum_o n_go r_o + pseudo_requests).

    The option effects are found by Newton's method on log r, with a_g eliminated. Alternating between rows and columns
    (iterative proportional fitting) takes hundreds of iterations where a policy serves almost every group by one
    option.

    Args:
        totals: (requests n_go, sum s_go) by group, then option.
        pseudo_requests: prior weight of the overall mean.

    Returns:
        The fitted mean as a function of (group, option). An unknown group has the overall mean, an unknown option the
        effect 1.
    """
    groups, options = list(totals), sorted({option for row in totals.values() for option in row})
    cells = np.array([[totals[group].get(option, (0.0, 0.0)) for option in options] for group in groups])
    if not cells.size or not cells[:, :, 1].sum() > 0.0:
        return lambda _group, _option: 0.0
    requests, sums = cells[:, :, 0], cells[:, :, 1]
    base = int(requests.sum(axis=0).argmax())
    # An option whose sum is 0 has no logarithm: its effect is 0, or 1 for the base option, which sets the scale.
    free = [o for o in range(len(options)) if o != base and sums[:, o].sum() > 0.0]
    effect = np.where(sums.sum(axis=0) > 0.0, 1.0, 0.0)
    effect[base] = 1.0
    for _ in range(_NEWTON_STEPS):
        weights = requests * effect
        overall = sums.sum() / max(float(weights.sum()), 1e-300)
        group_weights = weights.sum(axis=1) + pseudo_requests
        group_effect = (sums.sum(axis=1) + pseudo_requests * overall) / np.maximum(group_weights, 1e-300)
        fitted = group_effect[:, None] * weights
        gradient = (sums - fitted).sum(axis=0)[free]
        shares = weights / np.maximum(group_weights, 1e-300)[:, None]
        hessian = (np.diag(fitted.sum(axis=0)) - shares.T @ fitted)[np.ix_(free, free)]
        # Least squares: the Hessian is singular where no group used two options, so that nothing compares them.
        step = np.linalg.lstsq(hessian, gradient, rcond=1e-12)[0]
        effect[free] *= np.exp(np.clip(step, -_LONGEST_STEP, _LONGEST_STEP))
        if not step.size or np.abs(step).max() < _CONVERGED:
            break
    group_effects = dict(zip(groups, group_effect.tolist(), strict=True))
    option_effects = dict(zip(options, effect.tolist(), strict=True))
    return lambda group, option: group_effects.get(group, float(overall)) * option_effects.get(option, 1.0)
