"""What is taken off the quality of all traffic, because it is not known exactly (docs/decisions/0004).

A program that may choose among noisy estimates chooses those that chance made too high; counting on less than the mean
makes up for it. What is to be kept is a bound on all traffic, so the margin is so many standard deviations of the
quality of all traffic as it is served: doubts about single groups cancel out in part, what they share does not. That is
a length, |P·x| with probabilities x and a row of P for everything that is doubted by itself, and no linear program
holds a length.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.optimizer.linear import Floats, LinearProgram


def parts_of(doubts: Floats, groups: Sequence[str], families: Sequence[str]) -> Floats:
    """P, (parts, cells), of groups and options that may be served, in some order.

    Args:
        doubts: (cells, 3), times the group's traffic share: of what is the group's own, of what it shares with its
            family, of what it shares with all. The options of a group are taken to be wrong together.
        groups, families: of every cell.
    """
    everything = [""] * len(doubts)
    parts = [
        np.eye(max(places, default=-1) + 1)[:, places] * column
        for column, places in zip(doubts.T, map(_places, (groups, families, everything)), strict=True)
    ]
    found = np.concatenate(parts)
    return np.asarray(found[found.any(axis=1)])


class Length:
    """A variable of a linear program that is |P·x| at least, as far as it was told.

    |v| is the sum of vₖ²/|v|, and every one of these is linear in vₖ and |v| at a tangent and no less elsewhere:
    vₖ²/|v| ≥ 2a·vₖ − a²·|v|. Tangents of the parts hold a length far sooner than tangents of the whole would: a dozen
    parts that are told one by one leave no corner, and one tangent of all of them cuts off a single one.

    Attributes:
        place: of the variable.
    """

    def __init__(self, program: LinearProgram, parts: Floats) -> None:
        """Add the variable to a program whose first variables are x."""
        self._program = program
        self._matrix = parts
        self.place, *of_parts = program.add(np.zeros(1 + len(parts)), least=np.zeros(1 + len(parts)))
        self._parts: NDArray[np.int64] = np.array(of_parts, dtype=np.int64)
        total = np.zeros(program.size)
        total[self.place] = 1.0
        total[self._parts] = -1.0
        program.at_least(total, 0.0)

    def hold(self, x: Floats) -> None:
        """Tell the length at these values."""
        values = self._matrix @ x
        slopes = values / np.linalg.norm(values)
        some = np.flatnonzero(slopes)
        rows = np.zeros((len(some), self._program.size))
        rows[:, : len(x)] = -2.0 * slopes[some, None] * self._matrix[some]
        rows[np.arange(len(some)), self._parts[some]] = 1.0
        rows[:, self.place] = slopes[some] ** 2
        self._program.at_least(rows, 0.0)


def _places(names: Sequence[str]) -> list[int]:
    known: dict[str, int] = {}
    return [known.setdefault(name, len(known)) for name in names]
