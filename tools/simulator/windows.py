"""Which hours are simulated, and what is missing in those that are looked back on."""

from collections.abc import Callable, Sequence

from tools.simulator.errors import SimulationInputError
from tools.simulator.grid import Grid, Window

PAPER_WINDOWS = (800, 3900, 7000)
"""Hours of the year at which the paper's seasons begin."""

PAPER_HOURS = 720

HINDSIGHT = frozenset({"oracle"})
"""Schemes that look at the whole trace in the production variant."""

Say = Callable[[str], None]


def windows_of(grids: Sequence[Grid], starts: Sequence[int], hours: int | None) -> list[Window]:
    """The windows of every grid.

    Args:
        starts, hours: none: the paper's where the traces are long enough, else what there is.

    Raises:
        SimulationInputError: a window has a gap, or begins after the end of a trace.
    """
    shortest = min(len(grid.g_per_kwh) for grid in grids)
    if not starts:
        enough = shortest >= PAPER_WINDOWS[-1] + (hours or PAPER_HOURS)
        starts = PAPER_WINDOWS if enough else (shortest // 3,)
    length = hours or min(PAPER_HOURS, shortest - max(starts))
    if length <= 0:
        raise SimulationInputError(f"--windows begins after the end of the shortest trace ({shortest} hours)")
    return [grid.window(start, length) for grid in grids for start in starts]


def say_missing_hours(grids: Sequence[Grid], schemes: Sequence[str], *, published: bool, say: Say) -> None:
    """Gaps of traces of which the whole is made use of: least, greatest and mean are of the other hours."""
    for grid in grids:
        if grid.missing and (published or HINDSIGHT & set(schemes)):
            say(
                f"zone {grid.zone}: {grid.missing} of the trace's {len(grid.g_per_kwh):,} hours have no value; the "
                "range and mean of the whole trace are of the others"
            )


def say_missing_past(
    windows: Sequence[Window], schemes: Sequence[str], *, published: bool, trailing_hours: int, say: Say
) -> None:
    """Gaps before windows, as far as they are looked back on.

    Raises:
        SimulationInputError: there are no other hours.
    """
    for window in windows:
        # The window's own first hour is the last of the trailing ones.
        looked_back = min(trailing_hours - 1, len(window.past))
        missing = window.missing_before(looked_back)
        if missing and not published:
            say(
                f"zone {window.zone}: {missing} of the {looked_back} hours looked back on before hour "
                f"{window.start_hour} have no value; the trailing range and mean are of the others"
            )
        known = min(PAPER_HOURS, len(window.past))
        # What is solved once needs a mean of the past; of the first season it is the whole trace's.
        once = published and "sprout_sta" in schemes and window.start_hour != PAPER_WINDOWS[0]
        if once and known and window.missing_before(known) == known:
            raise SimulationInputError(
                f"zone {window.zone}: none of the {known} hours before hour {window.start_hour} has a value, of which "
                "sprout_sta needs the mean; choose other --windows, or leave sprout_sta out of --schemes"
            )
