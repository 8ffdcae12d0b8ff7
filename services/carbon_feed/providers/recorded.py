"""A recorded trace, replayed in event time. The file has Electricity Maps' download format, plain or gzipped."""

import csv
import gzip
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import Field

from services.carbon_feed.providers.base import ConfigurationError, NoDataError, Provider, Scope, Source
from shared.messages import IntensityPoint

TIME = "Datetime (UTC)"
ZONE = "Zone Id"
ESTIMATED = "Data Estimated"
TITLE_ENDINGS: dict[Scope, tuple[str, ...]] = {
    "direct": ("(direct)",),
    "life-cycle": ("(LCA)", "(life cycle)", "(Life cycle)"),
}
"""How the title of each intensity column ends; the rest of the title differs between years."""

HOUR = timedelta(hours=1)


class TraceError(ConfigurationError):
    """A trace cannot be used; the message names file, line, column and remedy."""


class CsvSource(Source):
    """A recorded trace."""

    kind: Literal["csv"]
    path: Path
    column: Scope = "direct"
    repeat: bool = Field(default=False, description="Replay it over and over, for a stack in real time")

    @property
    def scope(self) -> Scope | None:
        """As the column says."""
        return self.column

    def open(self, zone: str, *, window: timedelta) -> "TraceProvider":
        """Read the trace of a zone."""
        trace = load_trace(self.path, zone=zone, column=self.column)
        return TraceProvider(trace, self.path, repeat=self.repeat, window=window)


class TraceProvider(Provider):
    """Replays a trace in event time, without its future; gaps are preserved."""

    def __init__(self, trace: "Trace", path: Path, *, repeat: bool, window: timedelta) -> None:
        """Replay a trace.

        Args:
            repeat: start again when it has ended.
            window: length of the history that will be asked for.
        """
        self._recorded = trace
        self._trace = trace
        self._repeat = repeat
        self._window = window
        self._repeated_until: datetime | None = None
        self.source = f"csv:{path.name}" + (" (repeated)" if repeat else "")

    async def latest(self, now: datetime) -> IntensityPoint:
        """The newest recorded value."""
        point = self._trace_at(now).at(now)
        if point is None:
            raise NoDataError(f"{self.source} begins at {self._recorded.begin:%Y-%m-%d %H:%M}, after event time")
        return point

    async def history(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        """The recorded values of [since, until)."""
        return self._trace_at(until).between(since, until)

    def next_change(self, now: datetime) -> datetime | None:
        """When the next recorded period begins; an hour later once the trace has ended."""
        return self._trace_at(now).after(now) or now + HOUR

    def _trace_at(self, now: datetime) -> "Trace":
        if self._repeat and (self._repeated_until is None or now >= self._repeated_until):
            self._trace = self._recorded.repeated(now, before=self._window)
            self._repeated_until = now + timedelta(hours=12)
        return self._trace


class Trace:
    """The recorded values of one zone, ordered by the beginning of their period."""

    def __init__(self, points: Sequence[IntensityPoint]) -> None:
        """Use values that are ordered by time.

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

    def at(self, now: datetime) -> IntensityPoint | None:
        """The newest value whose period began at or before `now`; `None` before the first one."""
        position = bisect_right(self._times, now)
        return self._points[position - 1] if position else None

    def after(self, now: datetime) -> datetime | None:
        """When the next period begins; `None` after the last one."""
        position = bisect_right(self._times, now)
        return self._times[position] if position < len(self._times) else None

    def between(self, since: datetime, until: datetime) -> tuple[IntensityPoint, ...]:
        """The values of the periods that begin in [since, until)."""
        return tuple(point for point in self._points if since <= point.at < until)

    def repeated(self, around: datetime, *, before: timedelta) -> "Trace":
        """The trace repeated from `before` before `around` to a day after it, shifted by whole days.

        So every value keeps its hour of the day.
        """
        span = timedelta(days=max(1, math.ceil((self.end - self.begin + timedelta(hours=1)) / timedelta(days=1))))
        first = math.floor((around - before - self.begin) / span)
        last = math.floor((around + timedelta(days=1) - self.begin) / span)
        return Trace(
            [
                point.model_copy(update={"at": point.at + repetition * span})
                for repetition in range(first, last + 1)
                for point in self._points
            ]
        )


def load_trace(path: Path, *, zone: str, column: Scope) -> Trace:
    """Read the values of a zone from a file; an empty cell is a gap.

    Raises:
        TraceError: the file is missing or empty, has no such column or zone, or has an invalid row.
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


def parse_trace(lines: Iterable[str], *, name: str, zone: str, column: Scope) -> Trace:
    """Parse the values of a zone from the lines of a trace.

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
        raise TraceError(f"trace {name} has a header and no rows: it needs one row an hour")
    if zone not in zones:
        raise TraceError(f"trace {name} has no zone {zone!r}; it has {', '.join(sorted(zones))}")
    if not points:
        raise TraceError(f"trace {name}: every value of zone {zone!r} in column {value_column!r} is missing")
    return Trace(points)


def _value_column(header: Sequence[str], name: str, column: Scope) -> str:
    """The title of the column with the intensity."""
    if not header:
        raise TraceError(f"trace {name} is empty: it needs a header and one row an hour")
    for needed in (TIME, ZONE):
        if needed not in header:
            raise TraceError(f"trace {name} has no column {needed!r}; its columns: {', '.join(header)}")
    for title in header:
        if title.strip().endswith(TITLE_ENDINGS[column]):
            return title
    raise TraceError(
        f"trace {name} has no {column} intensity: a column ending in {' or '.join(TITLE_ENDINGS[column])} is needed; "
        f"its columns: {', '.join(header)}"
    )


def _time(text: str, where: str) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise TraceError(f"{where}: {TIME!r} must be a time such as 2024-02-01 13:00:00, got {text!r}") from None
    return at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC)


def _value(text: str, where: str, column: str) -> float | None:
    """The number in a cell; `None` if it is empty or NaN."""
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
