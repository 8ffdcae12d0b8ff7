"""A linear program, solved by HiGHS, and again after more rows, from where it was.

HiGHS is spoken to directly: PuLP, by which such programs are often stated, has it solve once and would state all anew.
"""

import os
import sys

import highspy
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SOLVER_TOLERANCE = 1e-9
"""For constraints and reduced costs."""

_TIME_LIMIT_S = 10.0


class LinearProgram:
    """Minimises a cost over variables; a row is what their values are multiplied by and summed up.

    Rows may be given as a vector, or as a matrix with one in every line; variables after its end are not in them.

    Attributes:
        size: number of variables.
    """

    def __init__(self, costs: Floats, *, least: Floats) -> None:
        """State the objective.

        Args:
            least: of every variable.
        """
        self.size = 0
        self._highs = highspy.Highs()  # type: ignore[no-untyped-call] # its constructor alone has no types
        for option, value in {
            "output_flag": False,
            # One more would only wait: the simplex method of a small program is serial.
            "threads": 1,
            "time_limit": _TIME_LIMIT_S,
            "primal_feasibility_tolerance": SOLVER_TOLERANCE,
            "dual_feasibility_tolerance": SOLVER_TOLERANCE,
        }.items():
            self._highs.setOptionValue(option, value)
        self.add(costs, least=least)

    def add(self, costs: Floats, *, least: Floats) -> range:
        """More variables; returns their places."""
        places = range(self.size, self.size + len(costs))
        self._highs.addVars(len(costs), least, np.full(len(costs), highspy.kHighsInf))
        self._highs.changeColsCost(len(costs), np.array(places, dtype=np.int32), costs)
        self.size += len(costs)
        return places

    def equal(self, rows: Floats, value: float | Floats) -> None:
        """What rows come to must be a value."""
        self._require(rows, value, value)

    def at_least(self, rows: Floats, value: float | Floats) -> None:
        """It must be a value or more."""
        self._require(rows, value, highspy.kHighsInf)

    def at_most(self, rows: Floats, value: float | Floats) -> None:
        """It must be a value or less."""
        self._require(rows, -highspy.kHighsInf, value)

    def solve(self) -> Floats | None:
        """The values at an optimum; null where there is none, or none was found in time."""
        self._highs.run()
        if self._highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        return np.asarray(self._highs.getSolution().col_value, dtype=np.float64)

    def _require(self, rows: Floats, least: float | Floats, most: float | Floats) -> None:
        rows = np.atleast_2d(rows)
        lines, places = np.nonzero(rows)
        begins = np.searchsorted(lines, np.arange(len(rows)))
        status = self._highs.addRows(
            len(rows),
            np.broadcast_to(np.asarray(least, dtype=np.float64), len(rows)),
            np.broadcast_to(np.asarray(most, dtype=np.float64), len(rows)),
            len(lines),
            begins.astype(np.int32),
            places.astype(np.int32),
            rows[lines, places],
        )
        if status == highspy.HighsStatus.kError:
            raise ValueError("HiGHS takes no such rows: a number in them is not finite")


def warm_up() -> None:
    """Use the solver once, with standard output shut: at its first use HiGHS prints its licence there, whatever it is
    told, and a service's standard output is its log.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    shut = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(shut, 1)
        LinearProgram(np.ones(1), least=np.ones(1)).solve()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(shut)
