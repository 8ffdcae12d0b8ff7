"""Recorded grids, hour by hour, and the windows of them that are simulated."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from deploy.local.grid import TraceError as GridError
from deploy.local.grid import zone_of
from services.carbon_feed.trace import Column, Trace, TraceError, load_trace
from simulator.errors import SimulationInputError
from simulator.measured import Floats

HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """One zone's intensities, gCO2eq/kWh, one an hour from `begin` on; a gap is NaN and is never filled."""

    zone: str
    begin: datetime
    g_per_kwh: Floats

    def window(self, start_hour: int, hours: int) -> "Window":
        """Some hours of it.

        Raises:
            SimulationInputError: the trace ends before, or has a gap in them.
        """
        end = start_hour + hours
        if start_hour < 0 or end > len(self.g_per_kwh):
            raise SimulationInputError(
                f"zone {self.zone}: a window of {hours} hours from hour {start_hour} does not lie within the trace's "
                f"{len(self.g_per_kwh)} hours; choose --windows and --hours accordingly"
            )
        values = self.g_per_kwh[start_hour:end]
        if len(gaps := np.flatnonzero(np.isnan(values))):
            first = self.begin + (start_hour + int(gaps[0])) * HOUR
            raise SimulationInputError(
                f"zone {self.zone}: {len(gaps)} hours without a value in the window from hour {start_hour} (the first: "
                f"{first:%Y-%m-%d %H:%M}); choose another window, or fill them knowingly"
            )
        return Window(self.zone, start_hour, self.begin + start_hour * HOUR, values, self.g_per_kwh[:start_hour], self)


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What is simulated of a grid.

    Attributes:
        g_per_kwh: of every hour in it.
        past: of the hours before, as far as the trace goes back; may hold NaN.
    """

    zone: str
    start_hour: int
    begin: datetime
    g_per_kwh: Floats
    past: Floats
    grid: Grid

    def at(self, hour: int) -> datetime:
        """When an hour of the window begins."""
        return self.begin + hour * HOUR


def read_grids(paths: Sequence[Path], *, column: Column, zones: Sequence[str] = ()) -> list[Grid]:
    """Read traces: files, or folders of them.

    Args:
        column: direct or life-cycle emissions.
        zones: those to keep, in this order; none: every zone found.

    Raises:
        SimulationInputError: a trace cannot be used, or a zone is not there.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.csv*")) if path.is_dir() else [path])]
    if not files:
        raise SimulationInputError(f"no trace (*.csv, *.csv.gz) in {', '.join(map(str, paths))}")
    try:
        found = {zone_of(file): file for file in files}
        if missing := [zone for zone in zones if zone not in found]:
            raise SimulationInputError(f"no trace of zone {', '.join(missing)}; there are {', '.join(sorted(found))}")
        return [_grid(zone, load_trace(found[zone], zone=zone, column=column)) for zone in zones or sorted(found)]
    except (GridError, TraceError) as error:
        raise SimulationInputError(str(error)) from error


def _grid(zone: str, trace: Trace) -> Grid:
    hours = round((trace.end - trace.begin) / HOUR) + 1
    values = np.full(hours, np.nan)
    for point in trace.between(trace.begin, trace.end + HOUR):
        values[(point.at - trace.begin) // HOUR] = point.intensity_g_per_kwh
    return Grid(zone, trace.begin, values)
