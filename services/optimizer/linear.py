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
    """Minimises a cost over variables; a row is what their values are multiplied by and summed up."""

    def __init__(self, costs: Floats, *, least: Floats) -> None:
        """State the objective.

        Args:
            least: of every variable.
        """
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
        self._highs.addVars(len(costs), least, np.full(len(costs), highspy.kHighsInf))
        self._highs.changeColsCost(len(costs), np.arange(len(costs), dtype=np.int32), costs)

    def equal(self, row: Floats, value: float) -> None:
        """What a row comes to must be a value."""
        self._require(row, value, value)

    def at_least(self, row: Floats, value: float) -> None:
        """It must be a value or more."""
        self._require(row, value, highspy.kHighsInf)

    def at_most(self, row: Floats, value: float) -> None:
        """It must be a value or less."""
        self._require(row, -highspy.kHighsInf, value)

    def solve(self) -> Floats | None:
        """The values at an optimum; null where there is none, or none was found in time."""
        self._highs.run()
        if self._highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        return np.asarray(self._highs.getSolution().col_value, dtype=np.float64)

    def _require(self, row: Floats, least: float, most: float) -> None:
        places = np.flatnonzero(row)
        self._highs.addRow(least, most, len(places), places.astype(np.int32), row[places])


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
