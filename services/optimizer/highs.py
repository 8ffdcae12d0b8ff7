"""HiGHS, the solver, as the program uses it, with workarounds for two faults of HiGHS (highspy 1.16.0).

- In a process it prints its licence to standard output, which is the log of a service, before an option can be set:
  `warm_up`. Reported: https://github.com/ERGO-Code/HiGHS/issues/1932.
- It may end without a result, in the state unknown: `outcome`. Reported:
  https://github.com/ERGO-Code/HiGHS/issues/2108.

`tests/integration/test_library_faults.py` fails when HiGHS has mended them.
"""

import os
import sys
from typing import Final

import highspy
import pulp

from services.optimizer.problem import Failure

TOLERANCE: Final = 1e-9
"""For constraints and reduced costs."""

_WHEN_UNKNOWN: Final[tuple[tuple[str, int | str], ...]] = (
    ("simplex_scale_strategy", 0),
    ("presolve", "off"),
    ("simplex_scale_strategy", 2),
)
"""Options that are changed, one more each time, if HiGHS ends without a result; it then starts again. Seen where limits
cannot be kept: scaling or presolving the cuts left infeasibilities above its tolerance."""


def highs(time_limit_s: float) -> pulp.HiGHS:
    """The solver for PuLP; the live model that it makes keeps these options."""
    return pulp.HiGHS(
        msg=False,
        # The simplex method of a small program is serial, more threads only wait. The number is the same everywhere:
        # HiGHS has one pool of threads per process, and fails if a later model asks for another size.
        threads=1,
        timeLimit=time_limit_s,
        primal_feasibility_tolerance=TOLERANCE,
        dual_feasibility_tolerance=TOLERANCE,
    )


def outcome(solver: highspy.Highs) -> Failure | None:
    """Why the last run of a live model has no solution, None if it has; runs it again where HiGHS does not know.

    PuLP does not tell a time limit from an optimum, so HiGHS is asked.
    """
    for option, value in _WHEN_UNKNOWN:
        if solver.getModelStatus() != highspy.HighsModelStatus.kUnknown:
            break
        solver.setOptionValue(option, value)
        solver.clearSolver()
        solver.run()
    match solver.getModelStatus():
        case highspy.HighsModelStatus.kOptimal:
            return None
        case highspy.HighsModelStatus.kInfeasible | highspy.HighsModelStatus.kUnboundedOrInfeasible:
            return "infeasible"
        case highspy.HighsModelStatus.kTimeLimit:
            return "time limit"
        case _:
            return "solver error"


def warm_up() -> None:
    """Have the licence printed while standard output is closed."""
    sys.stdout.flush()
    saved = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        highspy.Highs()  # type: ignore[no-untyped-call]
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)
