"""The report as CSV files: one for each table, with the field names of the JSON report as columns."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from tools.reporting.json_report import to_json
from tools.reporting.model import Report

TABLES = (
    "hours",
    "groups",
    "zones",
    "measured",
    "evaluations",
    "groupings",
    "grid",
    "promised_periods",
    "promised_hours",
    "quality_weeks",
    "limits",
)
FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a text that begins so for a formula."""


def to_csv(report: Report) -> dict[str, str]:
    """The content of every file, by its name: `summary.csv` with the key figures, then a file for each table.

    Nested values become several columns (`saving.emitted_g`), lists JSON text. Unknown is empty.
    """
    figures = to_json(report)
    details = figures.pop("report")
    files = {"summary.csv": _table([{"figure": name, "value": _cell(value)} for name, value in figures.items()])}
    for name in TABLES:
        files[f"{name}.csv"] = _table([_flat(row) for row in details[name]])
    return files


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _cell(value)
    return flat


def _cell(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, list):
        return json.dumps(value)
    if isinstance(value, str) and value.startswith(FORMULAS):
        return f"'{value}"
    return value


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
