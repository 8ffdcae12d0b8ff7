"""The counterfactual: what every request would have emitted at the reference, and on average under its policy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from shared.metering.columns import Flags, Floats, Indices, IntensitySeries, Texts, partition
from tools.reporting.accounts import Prices, Site, prices_at
from tools.reporting.frame import Calls
from tools.reporting.quality import PolicyHistory
from tools.reporting.savings import Comparison

NO_REFERENCE = ""

DistributionList = Sequence[Mapping[str, float]]
"""Probability by option; `Calls.distribution` holds indices into it."""


@dataclass(frozen=True, slots=True)
class CallStatistics:
    """Energy and time of the calls of one group at one option.

    Attributes:
        calls: number of calls.
        mean: energy (J) and server time (s); shape `(2,)`.
        covariance: of energy and server time between calls; shape `(2, 2)`, zero with fewer than two calls.
        processing_s: mean time from sending to the last token.
    """

    calls: int
    mean: Floats
    covariance: Floats
    processing_s: float


class MeanTable:
    """Mean energy and server time by (group, option).

    Requests count first. If a group was never served at an option, the evaluator's calls are used, which are a random
    sample of the same prompts; otherwise the option's mean over all groups. Requests in a reference block of the
    switchback count only where there is nothing else: another dispatch charges other energy for the same tokens.
    """

    def __init__(self, requests: Calls, evaluations: Calls) -> None:
        self._pairs: dict[tuple[str, str], CallStatistics] = {}
        self._options: dict[str, CallStatistics] = {}
        in_blocks = requests.source == "switchback"
        for calls in (requests.select(in_blocks), evaluations, requests.select(~in_blocks)):  # the last one wins
            for (group, option), where in partition(calls.group, calls.option).items():
                self._pairs[group, option] = call_statistics(calls, where)
            for (option,), where in partition(calls.option).items():
                self._options[option] = call_statistics(calls, where)

    def get(self, group: str, option: str) -> CallStatistics | None:
        """The statistics of a group at an option; None if the option was never used."""
        return self._pairs.get((group, option)) or self._options.get(option)

    def measured(self) -> Iterable[tuple[tuple[str, str], CallStatistics]]:
        """All (group, option) pairs with calls."""
        return self._pairs.items()


def call_statistics(calls: Calls, where: Indices) -> CallStatistics:
    """Mean and covariance of the energy and server time of the calls of some cells."""
    count = int(calls.count[where].sum())
    sums = np.array([calls.energy_j[where].sum(), calls.server_s[where].sum()])
    both = calls.energy_server[where].sum()
    products = np.array([[calls.energy_energy[where].sum(), both], [both, calls.server_server[where].sum()]])
    covariance = np.zeros((2, 2))
    if count > 1:
        covariance = (products - np.outer(sums, sums) / count) / (count - 1)
    return CallStatistics(
        calls=count,
        mean=sums / max(1, count),
        covariance=covariance,
        processing_s=float(calls.processing_s[where].sum()) / max(1, count),
    )


@dataclass(frozen=True, slots=True)
class ComparableRequests:
    """The requests that can be compared with the reference, and the reasons why others cannot.

    Attributes:
        calls: the cells with comparable requests; shape `(comparable,)`. Of a cell, only priced calls are comparable.
        comparison: their emitted and counterfactual grams; shape `(comparable,)`.
        reference: the reference option of each; shape `(comparable,)`.
        forced: number excluded because the client chose the directive; shape `(cells,)`.
        unidentified: number excluded because the reference could not have been chosen; shape `(cells,)`.
        without_intensity: number excluded because an intensity is unknown; shape `(cells,)`.
    """

    calls: Calls
    comparison: Comparison
    reference: Texts
    forced: NDArray[np.int64]
    unidentified: NDArray[np.int64]
    without_intensity: NDArray[np.int64]


class Counterfactual:
    """Prices, and mean energy and time, with which the grams of any request at any option are estimated."""

    def __init__(
        self, requests: Calls, evaluations: Calls, *, sites: Mapping[str, Site], grid: Mapping[str, IntensitySeries]
    ) -> None:
        self._unforced = requests.select(requests.source != "forced")
        self.means = MeanTable(self._unforced, evaluations)
        self._sites = sites
        self._grid = grid

    def compare(self, requests: Calls, distributions: DistributionList, policies: PolicyHistory) -> ComparableRequests:
        """Compare the requests with what they would have emitted at the reference."""
        forced = requests.source == "forced"
        reference = references_of(requests, policies)
        propensity = propensities_of(requests, distributions, reference)
        identified = ~forced & (propensity > 0.0)
        prices = self._prices_by(requests, reference)
        known = (requests.priced > 0) & ~np.isnan(prices.g_per_j)
        mask = identified & known
        served = requests.option == reference
        predicted, variance, squared = self._predict(requests, reference, prices, served)
        return ComparableRequests(
            calls=requests.select(mask),
            comparison=Comparison.of_all(
                emitted_g=requests.total_g[mask],
                requests=requests.priced[mask].astype(float),
                propensity=propensity[mask],
                served_by_baseline=served[mask],
                predicted_g=predicted[mask],
                variance=variance[mask],
                residual_squared=squared[mask],
            ),
            reference=reference[mask],
            forced=np.where(forced, requests.count, 0),
            unidentified=np.where(~forced & ~identified, requests.count, 0),
            without_intensity=np.where(identified, requests.count - np.where(known, requests.priced, 0), 0),
        )

    def in_zone(self, requests: ComparableRequests, distributions: DistributionList, zone: str) -> Comparison:
        """The comparison of the requests that were served in one zone."""
        calls = requests.calls
        p_zone = np.zeros(len(calls))
        for (index,), where in partition(calls.distribution).items():
            distribution = distributions[int(index)]
            p_zone[where] = sum(share for option, share in distribution.items() if self._lies_in(zone, option))
        in_zone = calls.zone == zone
        # Such a request may have no distribution; its option was certain.
        p_zone[calls.reference_certain] = in_zone[calls.reference_certain]
        baseline_in_zone = np.zeros(len(calls), dtype=bool)
        for (option,), where in partition(requests.reference).items():
            baseline_in_zone[where] = self._lies_in(zone, option)
        return requests.comparison.subset(in_zone, np.minimum(1.0, p_zone), baseline_in_zone)

    def expected_under_policy(
        self, requests: Calls, distributions: DistributionList, zone: str | None = None
    ) -> Floats:
        """Expected gCO2eq of the priced calls over their distribution of options; shape `(cells,)`, NaN if unknown.

        Args:
            zone: count only the options in this zone.
        """
        expected = np.zeros(len(requests))
        prices = {
            pool: prices_at(requests, pool, self._sites, self._grid)
            for pool in {_pool_of(option) for distribution in distributions for option in distribution}
        }
        for (group, index), where in partition(requests.group, requests.distribution).items():
            for option, probability in distributions[int(index)].items():
                if probability > 0.0 and (zone is None or self._lies_in(zone, option)):
                    expected[where] += probability * self._grams(group, option, prices[_pool_of(option)], where)
        return expected

    def expected_at_reference(self, requests: Calls, reference: Texts) -> Floats:
        """Expected gCO2eq of the priced calls at their reference, from the measured means; shape `(cells,)`."""
        prices = self._prices_by(requests, reference)
        expected = np.zeros(len(requests))
        for (group, option), where in partition(requests.group, reference).items():
            expected[where] = self._grams(group, option, prices, where)
        return expected

    def _lies_in(self, zone: str, option: str) -> bool:
        site = self._sites.get(_pool_of(option))
        return site is not None and site.zone == zone

    def _grams(self, group: str, option: str, prices: Prices, where: Indices) -> Floats:
        statistics = self.means.get(group, option)
        if statistics is None:
            return np.full(len(where), np.nan)
        return prices.grams(statistics.mean[0], statistics.mean[1])[where]

    def _prices_by(self, requests: Calls, option: Texts) -> Prices:
        """The prices of each cell at its own `option`."""
        found = Prices.unknown(len(requests))
        for (name,), where in partition(option).items():
            if name == NO_REFERENCE:
                continue
            prices = prices_at(requests, _pool_of(name), self._sites, self._grid)
            for column in fields(Prices):
                getattr(found, column.name)[where] = getattr(prices, column.name)[where]
        return found

    def _predict(
        self, requests: Calls, reference: Texts, prices: Prices, served: Flags
    ) -> tuple[Floats, Floats, Floats]:
        """Grams at the reference predicted from *other* calls, the variance around it, and the squared residuals.

        The prediction of a request served by the reference leaves that request out; only then is the estimate unbiased
        with few reference calls. With a = grams per joule, b = grams per second and T the sums of a group's n calls,
        it is m = (a T_energy + b T_time - Y) / (n - 1). So the residual is Y - m = factor Y - (a x + b y) for all
        calls of the group, and its sum and square are sums of products that every cell has.

        Returns:
            Sums over the priced calls of each cell; shapes `(cells,)`. The squared residuals are those of calls that
            the reference served.
        """
        predicted, variance, squared = (np.zeros(len(requests)) for _ in range(3))
        learned = served & (requests.source != "forced") & (requests.source != "switchback")
        for (group, option), where in partition(requests.group, reference).items():
            statistics = self.means.get(group, option)
            if option == NO_REFERENCE or statistics is None:
                continue
            covariance = statistics.covariance if statistics.calls > 1 else self._covariance(option)
            variance[where] = np.maximum(
                0.0,
                prices.j_j[where] * covariance[0, 0]
                + 2 * prices.j_s[where] * covariance[0, 1]
                + prices.s_s[where] * covariance[1, 1],
            )
            predicted[where], squared[where] = _residuals(requests, prices, where, 1.0, statistics.mean)
            own = where[learned[where]]
            if len(own):
                factor, mean = _leave_one_out(requests, own, learned & (reference == option))
                predicted[own], squared[own] = _residuals(requests, prices, own, factor, mean)
        return predicted, variance, squared

    def _covariance(self, option: str) -> Floats:
        """Covariance over all groups, for a group with a single call."""
        calls = self._unforced
        return (
            call_statistics(calls, np.flatnonzero(calls.option == option)).covariance
            if len(calls)
            else np.zeros((2, 2))
        )


def _residuals(requests: Calls, prices: Prices, where: Indices, factor: float, mean: Floats) -> tuple[Floats, Floats]:
    """Predictions and squared residuals, where a residual is factor x grams - (a x mean energy + b x mean time)."""
    x, y = mean
    grams, per_j, per_s = requests.total_g[where], prices.g_per_j[where], prices.g_per_s[where]
    residual = factor * grams - (per_j * x + per_s * y)
    squared = (
        factor**2 * requests.total_total[where]
        - 2 * factor * (prices.grams_j[where] * x + prices.grams_s[where] * y)
        + prices.j_j[where] * x * x
        + 2 * prices.j_s[where] * x * y
        + prices.s_s[where] * y * y
    )
    return grams - residual, np.maximum(squared, 0.0)


def _leave_one_out(requests: Calls, own: Indices, all_groups: Flags) -> tuple[float, Floats]:
    """The factor and the means with which `_residuals` leaves each call out of its group's mean.

    With a single call, the mean is that of the other groups' calls, or 0.
    """
    count = int(requests.count[own].sum())
    sums = np.array([requests.energy_j[own].sum(), requests.server_s[own].sum()])
    if count > 1:
        return count / (count - 1), sums / (count - 1)
    others = int(requests.count[all_groups].sum()) - 1
    if others < 1:
        return 1.0, np.zeros(2)
    everything = np.array([requests.energy_j[all_groups].sum(), requests.server_s[all_groups].sum()])
    return 1.0, (everything - sums) / others


def references_of(requests: Calls, policies: PolicyHistory) -> Texts:
    """The reference option of each request: its policy's, or its own if only the reference could serve; else empty."""
    reference = np.full(len(requests), NO_REFERENCE, dtype=object)
    for (model, version), where in partition(requests.model, requests.policy_version).items():
        reference[where] = policies.reference_of(model, int(version)) or NO_REFERENCE
    reference[requests.reference_certain] = requests.option[requests.reference_certain]
    return reference


def propensities_of(requests: Calls, distributions: DistributionList, reference: Texts) -> Floats:
    """Probability with which each request's reference was chosen; 0 if it could not be; shape `(requests,)`.

    1 in fallback and in reference blocks of the switchback: such a request counts with its own grams on both sides, so
    it saves nothing, with certainty.
    """
    propensity = np.zeros(len(requests))
    for (option, index), where in partition(reference, requests.distribution).items():
        propensity[where] = min(1.0, distributions[int(index)].get(option, 0.0))
    propensity[requests.reference_certain] = 1.0
    return propensity


def _pool_of(option: str) -> str:
    return option.rpartition("/")[0]
