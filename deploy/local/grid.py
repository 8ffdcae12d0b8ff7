"""Traces of carbon intensity for a local stack: which one a zone gets, and where its replay begins."""

import csv
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

TRACES = Path(__file__).parent / "traces"
"""Traces that the project ships, named after their zones."""

SAMPLE_ZONE = "SAMPLE-SOLAR"
"""The made-up zone whose trace is shipped."""

TIME_COLUMN = "Datetime (UTC)"
ZONE_COLUMN = "Zone Id"
"""As in Electricity Maps' downloads."""

TRAILING_DAYS = 7
"""What a replay should have behind it, so that k0_min and k0_max mean something."""


class TraceError(ValueError):
    """There is no trace for a zone, or it cannot be read; the message says what to do."""


def shipped_trace(zone: str = SAMPLE_ZONE) -> Path:
    """The trace shipped for a zone.

    Raises:
        TraceError: there is none; the message lists those there are.
    """
    for path in (TRACES / f"{zone}.csv", TRACES / f"{zone}.csv.gz"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.name.partition(".csv")[0] for path in TRACES.glob("*.csv*"))) or "none"
    raise TraceError(f"no trace is shipped for zone {zone!r} (shipped: {shipped}); give one with --carbon FILE")


def zone_of(trace: Path, *, wanted: str | None = None) -> str:
    """The zone to replay from a trace: the one wanted, else the only one that it holds.

    Raises:
        TraceError: the trace lacks the wanted zone, or holds several and none was named; the message lists them.
    """
    with _rows(trace) as rows:
        zones = sorted({row[ZONE_COLUMN] for row in rows if row.get(ZONE_COLUMN)})
    if not zones:
        raise TraceError(f"trace {trace} names no zone: it needs a column {ZONE_COLUMN!r} and one row at least")
    if wanted is not None:
        if wanted not in zones:
            raise TraceError(f"trace {trace} has no zone {wanted!r}; it has {', '.join(zones)}")
        return wanted
    if len(zones) > 1:
        raise TraceError(f"trace {trace} holds several zones: name one with --zone ({', '.join(zones)})")
    return zones[0]


def default_day(trace: Path) -> datetime:
    """Where a replay begins unless told: midnight (UTC) a week into the trace, earlier where it is shorter than that.

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
    whole = midnight if midnight == begin else midnight + timedelta(days=1)
    days = max(0, min(TRAILING_DAYS, (end - whole).days - 1))
    return whole + timedelta(days=days)


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
        raise TraceError(f"trace {trace}: {TIME_COLUMN!r} is no time: {text!r}") from error
    return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
