"""What every request would have emitted elsewhere: at the reference, and on average under its policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tools.reporting.calls import Calls, Flags, Floats, Indices, Texts, partition
from tools.reporting.grams import IntensitySeries, Prices, Site, prices_at
from tools.reporting.means import Means, cell_of
from tools.reporting.policies import PolicyBook
from tools.reporting.savings import Comparison

NO_REFERENCE = ""


@dataclass(frozen=True, slots=True)
class Comparable:
    """The requests that can be compared with the reference, and why the others cannot.

    Attributes:
        calls: those that can; shape (n,).
        comparison: their two sides; shape (n,).
        reference: each one's reference option; shape (n,).
        forced: which of all requests are left out because the producer chose the directive.
        unidentified: which are, because the reference could not have been drawn: nothing tells what it would emit.
        without_intensity: which are, because the grid's intensity is unknown where they ran, or would have.
    """

    calls: Calls
    comparison: Comparison
    reference: Texts
    forced: Flags
    unidentified: Flags
    without_intensity: Flags


class Counterfactual:
    """Prices and means with which any request can be moved to any option."""

    def __init__(
        self, requests: Calls, evaluations: Calls, *, sites: Mapping[str, Site], grid: Mapping[str, IntensitySeries]
    ) -> None:
        self._unforced = requests.where(requests.source != "forced")
        self._means = Means(self._unforced, evaluations)
        self._sites = sites
        self._grid = grid

    @property
    def means(self) -> Means:
        """Energy and time by group and option."""
        return self._means

    def comparable(self, requests: Calls, rows: Sequence[Mapping[str, float]], policies: PolicyBook) -> Comparable:
        """Set the requests beside what the reference would have emitted."""
        forced = requests.source == "forced"
        reference = references_of(requests, policies)
        propensity = propensities_of(requests, rows, reference)
        identified = ~forced & (propensity > 0.0)
        prices = self._prices_by(requests, reference)
        priced = ~np.isnan(requests.total_g) & ~np.isnan(prices.g_per_j)
        chosen = identified & priced
        predicted, variance = self._predict(requests, reference, prices)
        return Comparable(
            calls=requests.where(chosen),
            comparison=Comparison.whole(
                emitted_g=requests.total_g[chosen],
                propensity=propensity[chosen],
                referred=(requests.option == reference)[chosen],
                predicted_g=predicted[chosen],
                variance=variance[chosen],
            ),
            reference=reference[chosen],
            forced=forced,
            unidentified=~forced & ~identified,
            without_intensity=identified & ~priced,
        )

    def of_zone(self, whole: Comparable, rows: Sequence[Mapping[str, float]], zone: str) -> Comparison:
        """The comparison of the requests that were served in one zone."""
        calls = whole.calls
        probability = np.zeros(len(calls))
        for (row_name,), where in partition(calls.row.astype(object)).items():
            row = rows[int(row_name)]
            probability[where] = sum(share for option, share in row.items() if self._lies_in(zone, option))
        inside = calls.zone == zone
        # A fallback's row may be absent: its draw was certain.
        probability[calls.source == "fallback"] = inside[calls.source == "fallback"]
        reference_inside = np.array([self._lies_in(zone, option) for option in whole.reference], dtype=bool)
        return whole.comparison.part(inside, np.minimum(1.0, probability), reference_inside)

    def expected_under(self, requests: Calls, rows: Sequence[Mapping[str, float]], zone: str | None = None) -> Floats:
        """Grams expected of each request on average over the row of probabilities it was drawn from; NaN unknown.

        With a `zone`, only the options that lie there count.
        """
        expected = np.zeros(len(requests))
        prices = {
            pool: prices_at(requests, pool, self._sites, self._grid)
            for pool in {_pool_of(option) for row in rows for option in row}
        }
        for (group, row_name), where in partition(requests.group, requests.row.astype(object)).items():
            for option, probability in rows[int(row_name)].items():
                if probability > 0.0 and (zone is None or self._lies_in(zone, option)):
                    expected[where] += probability * self._grams(group, option, prices[_pool_of(option)], where)
        return expected

    def at_reference(self, requests: Calls, reference: Texts) -> Floats:
        """Grams expected of each request at its reference, by the measured means alone."""
        prices = self._prices_by(requests, reference)
        expected = np.zeros(len(requests))
        for (group, option), where in partition(requests.group, reference).items():
            expected[where] = self._grams(group, option, prices, where)
        return expected

    def _lies_in(self, zone: str, option: str) -> bool:
        site = self._sites.get(_pool_of(option))
        return site is not None and site.zone == zone

    def _grams(self, group: str, option: str, prices: Prices, where: Indices) -> Floats:
        cell = self._means.of(group, option)
        if cell is None:
            return np.full(len(where), np.nan)
        grams: Floats = prices.g_per_j[where] * cell.mean[0] + prices.g_per_s[where] * cell.mean[1]
        return grams

    def _prices_by(self, requests: Calls, option: Texts) -> Prices:
        """Each request's prices at its own `option`."""
        g_per_j = np.full(len(requests), np.nan)
        g_per_s = np.full(len(requests), np.nan)
        for (name,), where in partition(option).items():
            if name == NO_REFERENCE:
                continue
            prices = prices_at(requests, _pool_of(name), self._sites, self._grid)
            g_per_j[where], g_per_s[where] = prices.g_per_j[where], prices.g_per_s[where]
        return Prices(g_per_j, g_per_s)

    def _predict(self, requests: Calls, reference: Texts, prices: Prices) -> tuple[Floats, Floats]:
        """Grams at the reference predicted from *other* calls, and the variance around the prediction; shape (n,).

        A call is left out of its own prediction: only then does the estimate stay unbiased with few reference calls.
        """
        energy_j, processing_s = np.zeros(len(requests)), np.zeros(len(requests))
        variance = np.zeros(len(requests))
        served = (requests.option == reference) & (requests.source != "forced")
        for (group, option), where in partition(requests.group, reference).items():
            evidence = self._means.of(group, option)
            if option == NO_REFERENCE or evidence is None:
                continue
            energy_j[where], processing_s[where] = evidence.mean
            spread = evidence.covariance
            if evidence.calls < 2:
                spread = self._spread(option)
            a, b = prices.g_per_j[where], prices.g_per_s[where]
            variance[where] = np.maximum(0.0, a * a * spread[0, 0] + 2 * a * b * spread[0, 1] + b * b * spread[1, 1])
            own = where[served[where]]
            if len(own):
                energy_j[own] = self._left_out(requests.energy_j, own, served & (reference == option))
                processing_s[own] = self._left_out(requests.processing_s, own, served & (reference == option))
        return prices.grams(energy_j, processing_s), variance

    @staticmethod
    def _left_out(values: Floats, own: Indices, wider: Flags) -> Floats:
        """Mean of the other calls of the group; of the other groups' where it is the group's only one; else 0."""
        if len(own) > 1:
            means: Floats = (values[own].sum() - values[own]) / (len(own) - 1)
            return means
        others = int(wider.sum()) - 1
        return np.array([(values[wider].sum() - values[own[0]]) / others if others else 0.0])

    def _spread(self, option: str) -> Floats:
        """Covariance over all groups, for a group with a single call."""
        calls = self._unforced
        return cell_of(calls, np.flatnonzero(calls.option == option)).covariance if len(calls) else np.zeros((2, 2))


def references_of(requests: Calls, policies: PolicyBook) -> Texts:
    """Each request's reference option: its policy's, or in fallback what served it; empty where none is known."""
    reference = np.full(len(requests), NO_REFERENCE, dtype=object)
    for (model, version), where in partition(requests.model, requests.policy_version.astype(object)).items():
        reference[where] = policies.reference_of(model, int(version)) or NO_REFERENCE
    fallback = requests.source == "fallback"
    reference[fallback] = requests.option[fallback]
    return reference


def propensities_of(requests: Calls, rows: Sequence[Mapping[str, float]], reference: Texts) -> Floats:
    """Probability with which each request would have been served by its reference; 0 where it could not be."""
    propensity = np.zeros(len(requests))
    for (option, row_name), where in partition(reference, requests.row.astype(object)).items():
        propensity[where] = min(1.0, rows[int(row_name)].get(option, 0.0))
    propensity[requests.source == "fallback"] = 1.0
    return propensity


def _pool_of(option: str) -> str:
    return option.rpartition("/")[0]
