"""Recorded carbon intensities by hour, and the windows of them that are simulated."""

import csv
import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from services.carbon_feed.providers.base import Scope
from services.carbon_feed.providers.recorded import TIME, ZONE, TraceError, load_trace
from tools.simulator.requests import Floats, SimulationInputError

HOUR = timedelta(hours=1)

PAPER_WINDOWS = (800, 3900, 7000)
"""Hours of the year at which the paper's seasons start."""

PAPER_HOURS = 720

HINDSIGHT = frozenset({"oracle"})
"""Schemes that use the whole trace in the production variant."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Carbon intensities of one zone, gCO2eq/kWh, one per hour from `begin`; gaps are NaN and are never filled."""

    zone: str
    begin: datetime
    g_per_kwh: Floats

    @property
    def missing(self) -> int:
        """Hours without a value."""
        return int(np.count_nonzero(np.isnan(self.g_per_kwh)))

    def window(self, start_hour: int, hours: int) -> "Window":
        """Part of the trace.

        Raises:
            SimulationInputError: it goes beyond the trace, or has a gap.
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
                f"{first:%Y-%m-%d %H:%M}); choose another window, or fill the gap in the file"
            )
        return Window(self.zone, start_hour, self.begin + start_hour * HOUR, values, self.g_per_kwh[:start_hour], self)


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Some hours of a trace.

    Attributes:
        start_hour: hours from the start of the trace.
        g_per_kwh: of every hour of the window.
        past: of the hours before it, from the start of the trace; may contain NaN.
        grid: the whole trace.
    """

    zone: str
    start_hour: int
    begin: datetime
    g_per_kwh: Floats
    past: Floats
    grid: Grid

    def at(self, hour: int) -> datetime:
        """Start of an hour of the window."""
        return self.begin + hour * HOUR

    def missing_before(self, hours: int) -> int:
        """Hours without a value among the last `hours` before the window, or since the start of the trace."""
        return int(np.count_nonzero(np.isnan(self.past[max(0, len(self.past) - hours) :])))


def read_grids(paths: Sequence[Path], *, column: Scope, zones: Sequence[str] = ()) -> list[Grid]:
    """Read traces: files, or folders of them; a file may hold several zones.

    Args:
        column: direct or life-cycle emissions.
        zones: to read, in this order; empty: every zone found.

    Raises:
        SimulationInputError: a trace cannot be used, a zone is missing, or a zone is in two files.
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


def windows_of(grids: Sequence[Grid], starts: Sequence[int], hours: int | None) -> list[Window]:
    """The windows of every grid.

    Args:
        grids: traces.
        starts: hours at which windows start; empty: those of the paper if the traces are long enough, else one.
        hours: length of a window; None: that of the paper, or of the rest of the trace.

    Raises:
        SimulationInputError: a window has a gap, or starts after the end of a trace.
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
    """Report gaps of traces that are used as a whole: their range and mean are those of the other hours."""
    for grid in grids:
        if grid.missing and (published or HINDSIGHT & set(schemes)):
            say(
                f"zone {grid.zone}: {grid.missing} of the trace's {len(grid.g_per_kwh):,} hours have no value; the "
                "range and mean of the whole trace are of the others"
            )


def say_missing_past(
    windows: Sequence[Window], schemes: Sequence[str], *, published: bool, trailing_hours: int, say: Say
) -> None:
    """Report gaps in the hours before a window that its trailing range and mean use.

    Raises:
        SimulationInputError: there is no hour with a value.
    """
    for window in windows:
        # The first hour of the window is the last of the trailing ones.
        looked_back = min(trailing_hours - 1, len(window.past))
        missing = window.missing_before(looked_back)
        if missing and not published:
            say(
                f"zone {window.zone}: {missing} of the {looked_back} hours before hour {window.start_hour} have no "
                "value; the trailing range and mean are computed from the others"
            )
        known = min(PAPER_HOURS, len(window.past))
        # A scheme that is solved once needs the mean of the past; in the first season it uses that of the whole trace.
        once = published and "sprout_sta" in schemes and window.start_hour != PAPER_WINDOWS[0]
        if once and known and window.missing_before(known) == known:
            raise SimulationInputError(
                f"zone {window.zone}: none of the {known} hours before hour {window.start_hour} has a value, of which "
                "sprout_sta needs the mean; choose other --windows, or leave sprout_sta out of --schemes"
            )


_Row = tuple[int, str]
"""Line and time, as text, of a row of a trace."""


def _rows_by_zone(file: Path) -> dict[str, list[_Row]]:
    """Every row by zone, with the rows that have no value, which the feed's reader skips."""
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
    # Hours count from the first row, with or without a value: a gap at the start must not shift the windows.
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
