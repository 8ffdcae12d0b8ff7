"""Traces of carbon intensity for a local stack: which one a zone gets, and where its replay begins."""

import csv
import gzip
from datetime import UTC, datetime, timedelta
from pathlib import Path

TRACES = Path(__file__).parent / "traces"
"""Traces that the project ships, named after their zones."""

TIME_COLUMN = "Datetime (UTC)"
"""As in Electricity Maps' downloads."""


class TraceError(ValueError):
    """There is no trace for a zone, or it cannot be read; the message says what to do."""


def shipped_trace(zone: str) -> Path:
    """The trace shipped for a zone.

    Raises:
        TraceError: there is none; the message lists those there are.
    """
    for path in (TRACES / f"{zone}.csv", TRACES / f"{zone}.csv.gz"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.name.partition(".csv")[0] for path in TRACES.glob("*.csv*"))) or "none"
    raise TraceError(f"no trace is shipped for zone {zone!r} (shipped: {shipped}); give one with --carbon FILE")


def first_full_day(trace: Path) -> datetime:
    """Midnight (UTC) after the trace's first 24 hours: a replay from there on has a trailing day behind it.

    Raises:
        TraceError: the file cannot be read, or its first row has no time.
    """
    try:
        with (
            gzip.open(trace, "rt", encoding="utf-8-sig", newline="")
            if trace.suffix == ".gz"
            else trace.open(encoding="utf-8-sig", newline="") as file
        ):
            first = next(csv.DictReader(file), None)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"trace {trace} cannot be read: {error}") from error
    if first is None:
        raise TraceError(f"trace {trace} is empty: it needs a header and one row an hour")
    text = first.get(TIME_COLUMN)
    if text is None:
        raise TraceError(f"trace {trace} has no column {TIME_COLUMN!r}; its columns: {', '.join(first)}")
    try:
        begin = datetime.fromisoformat(text)
    except ValueError as error:
        raise TraceError(f"trace {trace}, first row: {TIME_COLUMN!r} is no time: {text!r}") from error
    begin = begin.replace(tzinfo=begin.tzinfo or UTC).astimezone(UTC)
    midnight = begin.replace(hour=0, minute=0, second=0, microsecond=0)
    full = midnight if midnight == begin else midnight + timedelta(days=1)
    return full + timedelta(days=1)
