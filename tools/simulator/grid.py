"""Recorded grids, hour by hour, and the windows of them that are simulated."""

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from services.carbon_feed.providers.base import Scope
from services.carbon_feed.providers.recorded import TIME, ZONE, TraceError, load_trace
from tools.simulator.errors import SimulationInputError
from tools.simulator.measured import Floats

HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """One zone's intensities, gCO2eq/kWh, one an hour from `begin` on; a gap is NaN and is never filled."""

    zone: str
    begin: datetime
    g_per_kwh: Floats

    @property
    def missing(self) -> int:
        """Hours without a value."""
        return int(np.count_nonzero(np.isnan(self.g_per_kwh)))

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

    def missing_before(self, hours: int) -> int:
        """Hours without a value among the last ones before it; fewer are looked at where the trace begins later."""
        return int(np.count_nonzero(np.isnan(self.past[max(0, len(self.past) - hours) :])))


def read_grids(paths: Sequence[Path], *, column: Scope, zones: Sequence[str] = ()) -> list[Grid]:
    """Read traces: files, or folders of them; a file may hold several zones.

    Args:
        column: direct or life-cycle emissions.
        zones: those to keep, in this order; none: every zone found.

    Raises:
        SimulationInputError: a trace cannot be used, a zone is not there, or it is there in two files.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.csv*")) if path.is_dir() else [path])]
    if not files:
        raise SimulationInputError(f"no trace (*.csv, *.csv.gz) in {', '.join(map(str, paths))}")
    found: dict[str, list[tuple[Path, list[_Row]]]] = {}
    for file in files:
        for zone, rows in _rows_by_zone(file).items():
            found.setdefault(zone, []).append((file, rows))
    if missing := [zone for zone in zones if zone not in found]:
        raise SimulationInputError(f"no trace of zone {', '.join(missing)}; there are {', '.join(sorted(found))}")
    grids = []
    for zone in dict.fromkeys(zones) or sorted(found):
        if len(found[zone]) > 1:
            raise SimulationInputError(
                f"zone {zone} is in several files: {', '.join(str(file) for file, _ in found[zone])}; join them in "
                "order of time in one file, or name one of them with --carbon"
            )
        file, rows = found[zone][0]
        grids.append(_grid(zone, file, rows, column))
    return grids


_Row = tuple[int, str]
"""Line and time, as text, of a row of a trace."""


def _rows_by_zone(file: Path) -> dict[str, list[_Row]]:
    """Every row by its zone, those without a value too: the feed's reader knows nothing of these."""
    rows: dict[str, list[_Row]] = {}
    try:
        with (
            gzip.open(file, "rt", encoding="utf-8-sig", newline="")
            if file.suffix == ".gz"
            else file.open(encoding="utf-8-sig", newline="") as lines
        ):
            reader = csv.DictReader(lines)
            for row in reader:
                if zone := (row.get(ZONE) or "").strip():
                    rows.setdefault(zone, []).append((reader.line_num, row.get(TIME) or ""))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise SimulationInputError(f"trace {file} cannot be read: {error}") from error
    if not rows:
        raise SimulationInputError(f"trace {file} names no zone: it needs a column {ZONE!r} and one row at least")
    return rows


def _grid(zone: str, file: Path, rows: Sequence[_Row], column: Scope) -> Grid:
    try:
        trace = load_trace(file, zone=zone, column=column)
    except TraceError as error:
        raise SimulationInputError(str(error)) from error
    # Hours count from the first row, not from the first value: a gap at the start must not shift the windows.
    begin = before = _time(file, *rows[0])
    for line, text in rows[1:]:
        at = _time(file, line, text)
        if at <= before:
            raise SimulationInputError(
                f"trace {file}, line {line}: {at:%Y-%m-%d %H:%M} does not come after the row before; sort by time"
            )
        if (at - begin) % HOUR:
            raise SimulationInputError(
                f"trace {file}, line {line}: zone {zone} has a value {_minutes(at - before)} after the one before; one "
                "row an hour is needed: give hourly means"
            )
        before = at
    values = np.full((before - begin) // HOUR + 1, np.nan)
    for point in trace.between(begin, before + HOUR):
        values[(point.at - begin) // HOUR] = point.intensity_g_per_kwh
    return Grid(zone, begin, values)


def _minutes(span: timedelta) -> str:
    return f"{span / timedelta(minutes=1):g} minutes"


def _time(file: Path, line: int, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SimulationInputError(
            f"trace {file}, line {line}: {TIME!r} must be a time such as 2024-02-01 13:00:00, got {text!r}"
        ) from None
    return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
