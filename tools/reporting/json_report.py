"""The report as JSON values."""

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel

from tools.reporting.model import Report
from tools.reporting.savings import Interval


def to_json(report: Report) -> dict[str, Any]:
    """The report as JSON values: key figures first, then everything; times as ISO 8601 in UTC, unknown as null."""
    interval = report.saving.saving_interval
    metered = report.metered
    on_meter = metered.saving
    return {
        "saving_on_meter_pct": None if on_meter is None else on_meter.saving_pct,
        "saving_on_meter_interval_pct": _bounds(None if on_meter is None else on_meter.saving_interval),
        "saved_on_meter_g": None if on_meter is None else on_meter.saved_g,
        "saved_on_meter_j": None if on_meter is None else on_meter.saved_j,
        "attributed_saving_pct": report.net.saving_pct,
        "attributed_saving_interval_pct": _bounds(report.net.saving_interval),
        "attributed_saved_g": report.net.saved_g,
        "net_of_evaluator": True,
        "fleet_energy_j": metered.fleet_energy_j,
        "idle_energy_j": metered.idle_energy_j,
        "endpoints": metered.endpoints,
        "endpoints_needed_mean": metered.endpoints_needed_mean,
        "tpot_p95_ms": metered.latency.tpot_p95_ms,
        "ttft_p95_ms": metered.latency.ttft_p95_ms,
        "tpot_objective_ms": metered.tpot_objective_ms,
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
        "not_worse_pct": report.quality.not_worse_pct,
        "evaluations": len(report.evaluations),
        "policies_published": report.policies_published,
        "report": {**_plain(report), "limits": [one.to_json() for one in report.limits]},
    }


def _bounds(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _plain(value: object) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value
