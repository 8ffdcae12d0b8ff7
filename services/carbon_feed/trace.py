"""Reading a recorded trace: Electricity Maps' download format, plain or gzipped. Pure but for the file."""

import csv
import gzip
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from shared.messages import IntensityPoint

Column = Literal["direct", "life-cycle"]

TIME = "Datetime (UTC)"
ZONE = "Zone Id"
ESTIMATED = "Data Estimated"
MARKS: dict[Column, tuple[str, ...]] = {
    "direct": ("(direct)",),
    "life-cycle": ("(LCA)", "(life cycle)", "(Life cycle)"),
}
"""How the header of each intensity column ends; the rest of it changes from year to year."""


class TraceError(ValueError):
    """A trace cannot be used; the message names file, line, column and remedy."""


class Trace:
    """The recorded values of one zone, by the time at which their period begins."""

    def __init__(self, points: Sequence[IntensityPoint]) -> None:
        """Take the points, in order of time.

        Raises:
            TraceError: there are none.
        """
        if not points:
            raise TraceError("the trace holds no value")
        self._points = tuple(points)
        self._times = [point.at for point in self._points]

    @property
    def begin(self) -> datetime:
        """When the first period begins."""
        return self._times[0]

    @property
    def end(self) -> datetime:
        """When the last period begins."""
        return self._times[-1]

    def at(self, moment: datetime) -> IntensityPoint | None:
        """The newest value whose period began at or before `moment`; null before the first."""
        position = bisect_right(self._times, moment)
        return self._points[position - 1] if position else None

    def after(self, moment: datetime) -> datetime | None:
        """When the next period begins; null after the last."""
        position = bisect_right(self._times, moment)
        return self._times[position] if position < len(self._times) else None

    def between(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        """The values of periods that begin in [since, until)."""
        return tuple(point for point in self._points if since <= point.at < until)

    def repeated(self, around: datetime, *, before: timedelta) -> "Trace":
        """The same days over and over, whole days apart, as far as needed for `before` up to a day after `around`.

        The hour of the day stays what it was.
        """
        span = timedelta(days=max(1, math.ceil((self.end - self.begin + timedelta(hours=1)) / timedelta(days=1))))
        first = math.floor((around - before - self.begin) / span)
        last = math.floor((around + timedelta(days=1) - self.begin) / span)
        return Trace(
            [
                point.model_copy(update={"at": point.at + turn * span})
                for turn in range(first, last + 1)
                for point in self._points
            ]
        )


def load_trace(path: Path, *, zone: str, column: Column) -> Trace:
    """Read the values of a zone; an empty cell is a gap.

    Raises:
        TraceError: the file is missing, empty, lacks a column or the zone, or a row of it is wrong.
    """
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig", newline="") as file
        ):
            return parse_trace(file, name=str(path), zone=zone, column=column)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"trace {path} cannot be read: {error}") from error


def parse_trace(lines: Iterable[str], *, name: str, zone: str, column: Column) -> Trace:
    """The values of a zone in the text of a trace.

    Raises:
        TraceError: as `load_trace`.
    """
    reader = csv.DictReader(lines)
    value_column = _value_column(reader.fieldnames or [], name, column)
    points: list[IntensityPoint] = []
    zones: set[str] = set()
    for row in reader:
        found = (row.get(ZONE) or "").strip()
        zones.add(found)
        if found != zone:
            continue
        where = f"trace {name}, line {reader.line_num}"
        at = _time(row.get(TIME) or "", where)
        if points and at <= points[-1].at:
            raise TraceError(f"{where}: {at:%Y-%m-%d %H:%M} does not come after the row before; sort by time")
        value = _value(row.get(value_column) or "", where, value_column)
        if value is not None:
            estimated = (row.get(ESTIMATED) or "").strip().lower() == "true"
            points.append(IntensityPoint(at=at, intensity_g_per_kwh=value, estimated=estimated))
    if not zones:
        raise TraceError(f"trace {name} has a header and no rows: give one row an hour")
    if zone not in zones:
        raise TraceError(f"trace {name} has no zone {zone!r}; it has {', '.join(sorted(zones))}")
    if not points:
        raise TraceError(f"trace {name}: every value of zone {zone!r} in column {value_column!r} is missing")
    return Trace(points)


def _value_column(header: Sequence[str], name: str, column: Column) -> str:
    """The title of the column to read."""
    if not header:
        raise TraceError(f"trace {name} is empty: it needs a header and one row an hour")
    for needed in (TIME, ZONE):
        if needed not in header:
            raise TraceError(f"trace {name} has no column {needed!r}; its columns: {', '.join(header)}")
    for title in header:
        if title.strip().endswith(MARKS[column]):
            return title
    raise TraceError(
        f"trace {name} has no {column} intensity: a column ending in {' or '.join(MARKS[column])} is needed; "
        f"its columns: {', '.join(header)}"
    )


def _time(text: str, where: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise TraceError(f"{where}: {TIME!r} must be a time such as 2024-02-01 13:00:00, got {text!r}") from None
    return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)


def _value(text: str, where: str, column: str) -> float | None:
    """The number in a cell; null where it is empty or NaN."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        raise TraceError(f"{where}: {column!r} must be a number of gCO2eq/kWh, got {text!r}") from None
    if math.isnan(value):
        return None
    if value < 0 or math.isinf(value):
        raise TraceError(f"{where}: {column!r} must be at least 0 gCO2eq/kWh, got {text!r}")
    return value
