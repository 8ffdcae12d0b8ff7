"""A report as a JSON document: the figures that scripts read at the top, everything below them."""

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tools.reporting.model import Report


def to_json(report: Report) -> dict[str, Any]:
    """The report as values that `json` can write; percentages are in %, times ISO 8601 in UTC, unknown is null."""
    interval = report.saving.saving_interval
    return {
        "carbon_saving_pct": report.saving.saving_pct,
        "carbon_saving_low_pct": None if interval is None else interval.low,
        "carbon_saving_high_pct": None if interval is None else interval.high,
        "carbon_saved_g": report.saving.saved_g,
        "implied_saving_pct": report.implied_saving_pct,
        "promised_saving_pct": report.promised_saving_pct,
        "energy_attributed_j": report.energy.attributed_j,
        "energy_metered_j": report.energy.metered_j,
        "energy_difference_pct": report.energy.difference_pct,
        "preference_pct": report.quality.preference_pct,
        "evaluations": len(report.evaluations),
        "policies_published": report.policies_published,
        "report": _plain(report),
    }


def _plain(value: object) -> Any:  # noqa: ANN401 - JSON
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value
