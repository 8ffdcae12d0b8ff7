"""What is taken off the quality of all traffic, because it is not known exactly (docs/decisions/0004).

A program that may choose among noisy estimates chooses those that chance made too high; counting on less than the mean
makes up for it. What is to be kept is a bound on all traffic, so the margin is so many standard deviations of the
quality of all traffic as it is served: doubts about single groups cancel out in part, what they share does not. That is
a norm of what is moved away from the reference, which no linear program holds; its tangents are linear, and never above
it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


class Margin:
    """Of one metric, over the groups and options that may be served, in some order."""

    def __init__(self, caution: float, doubts: Floats, groups: Sequence[str], families: Sequence[str]) -> None:
        """Take what is doubted.

        Args:
            caution: standard deviations.
            doubts: (cells, 3), times the group's traffic share: of what is the group's own, of what it shares with its
                family, of what it shares with all. The options of a group are taken to be wrong together.
            groups, families: of every cell.
        """
        self._caution = caution
        # Which cells are wrong together: those of a group, those of a family, all.
        self._doubts = [
            (column, _places(sharing))
            for column, sharing in zip(doubts.T, (groups, families, [""] * len(doubts)), strict=True)
        ]

    def on(self, x: Floats) -> float:
        """For traffic that is served with these probabilities."""
        return float(self.tangent(x) @ x)

    def tangent(self, x: Floats) -> Floats:
        """By how much it grows with every probability, at these; 0 where nothing doubted is served.

        The margin of these is the sum of probability times slope; that of any others is that sum or more.
        """
        sums = [np.bincount(places, weights=column * x) for column, places in self._doubts]
        deviation = float(np.sqrt(sum(float(found @ found) for found in sums)))
        if deviation == 0.0:
            return np.zeros_like(x)
        slopes = sum(column * found[places] for (column, places), found in zip(self._doubts, sums, strict=True))
        return np.asarray(self._caution / deviation * slopes)


def _places(names: Sequence[str]) -> Places:
    known: dict[str, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)
