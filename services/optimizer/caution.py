"""How much less than what is expected of a quality is counted on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

_MISSED = 0.05
"""Share of cases in which a bound that stands alone is missed by a caution of 1.645, the default."""


@dataclass(frozen=True, slots=True)
class Caution:
    """In standard deviations.

    Attributes:
        usual: where nothing else is said.
        by_metric: where it is, whatever else is bound.
    """

    usual: float = 0.0
    by_metric: Mapping[str, float] = field(default_factory=dict)

    def alone(self, metric: str) -> float:
        """For a bound that stands alone."""
        return self.by_metric.get(metric, self.usual)

    def together(self, bounds: Mapping[str, float]) -> dict[str, float]:
        """By metric, for bounds that are to hold together as often as one alone would.

        Each may then be missed in a share of cases that is smaller by their number (Bonferroni). The caution grows by
        the factor that this takes at the default: for two bounds from 1.645 to 1.96.

        Args:
            bounds: by metric; one of 0 is none.
        """
        bound = [metric for metric, least in bounds.items() if least > 0.0]
        factor = _deviations(_MISSED / max(len(bound), 1)) / _deviations(_MISSED)
        return {metric: self.by_metric.get(metric, self.usual * factor) for metric in bound}


def _deviations(missed: float) -> float:
    """That a normal distribution falls short of its mean by in so small a share of cases."""
    return NormalDist().inv_cdf(1.0 - missed)
