"""Carbon intensity traces of a local stack: the trace of a zone, and the start of its replay."""

import csv
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

TRACES = Path(__file__).parent / "traces"
"""Shipped traces, named after their zones."""

SAMPLE_ZONE = "SAMPLE-SOLAR"
"""The synthetic zone whose trace is shipped."""

TIME_COLUMN = "Datetime (UTC)"
ZONE_COLUMN = "Zone Id"
"""Column names of Electricity Maps' downloads."""

TRAILING_DAYS = 7
"""Days of history before a replay starts, for the range k0_min to k0_max."""


class TraceError(ValueError):
    """A zone has no trace, or the trace cannot be read; the message says what to do."""


def shipped_trace(zone: str = SAMPLE_ZONE) -> Path:
    """The trace shipped for a zone.

    Raises:
        TraceError: no trace is shipped for the zone; the message lists the shipped ones.
    """
    for path in (TRACES / f"{zone}.csv", TRACES / f"{zone}.csv.gz"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.name.partition(".csv")[0] for path in TRACES.glob("*.csv*"))) or "none"
    raise TraceError(f"no trace is shipped for zone {zone!r} (shipped: {shipped}); give one with --carbon FILE")


def zone_of(trace: Path, *, wanted: str | None = None) -> str:
    """The zone to replay from a trace.

    Args:
        wanted: the zone's name; None: the only zone of the trace.

    Raises:
        TraceError: the trace lacks the wanted zone, or has several and none was named; the message lists them.
    """
    with _rows(trace) as rows:
        zones = sorted({row[ZONE_COLUMN] for row in rows if row.get(ZONE_COLUMN)})
    if not zones:
        raise TraceError(f"trace {trace} has no zone: it needs a column {ZONE_COLUMN!r} and at least one row")
    if wanted is not None:
        if wanted not in zones:
            raise TraceError(f"trace {trace} has no zone {wanted!r}; it has {', '.join(zones)}")
        return wanted
    if len(zones) > 1:
        raise TraceError(f"trace {trace} has several zones: name one with --zone ({', '.join(zones)})")
    return zones[0]


def default_day(trace: Path) -> datetime:
    """The default start of a replay: midnight (UTC) a week into the trace, earlier if the trace is shorter.

    Raises:
        TraceError: the file cannot be read, is empty, or its first or last row has no time.
    """
    with _rows(trace) as rows:
        first = last = next(rows, None)
        for row in rows:
            last = row
    if first is None or last is None:
        raise TraceError(f"trace {trace} is empty: it needs a header and one row an hour")
    begin, end = _time(trace, first), _time(trace, last)
    midnight = begin.replace(hour=0, minute=0, second=0, microsecond=0)
    first_day = midnight if midnight == begin else midnight + timedelta(days=1)
    days = max(0, min(TRAILING_DAYS, (end - first_day).days - 1))
    return first_day + timedelta(days=days)


@contextmanager
def _rows(trace: Path) -> Iterator[Iterator[dict[str, str]]]:
    try:
        with (
            gzip.open(trace, "rt", encoding="utf-8-sig", newline="")
            if trace.suffix == ".gz"
            else trace.open(encoding="utf-8-sig", newline="") as file
        ):
            yield iter(csv.DictReader(file))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"trace {trace} cannot be read: {error}") from error


def _time(trace: Path, row: dict[str, str]) -> datetime:
    text = row.get(TIME_COLUMN)
    if text is None:
        raise TraceError(f"trace {trace} has no column {TIME_COLUMN!r}; its columns: {', '.join(row)}")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise TraceError(f"trace {trace}: {TIME_COLUMN!r} is not a time: {text!r}") from error
    return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
