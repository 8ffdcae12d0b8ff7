"""Footprint records into columns, one record at a time; names are kept once."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import asyncpg
import numpy as np

from shared.messages import option_key
from tools.reporting.calls import Calls, Texts

NO_POLICY = -1


class Rows:
    """The distinct rows of probabilities, each kept once: there is one per policy and group, not per request."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []
        self._positions: dict[str, int] = {}

    def position(self, text: str | None) -> int:
        """Where a row, given as JSON, is kept; a missing one counts as empty."""
        key = text or "{}"
        if key not in self._positions:
            self._positions[key] = len(self.rows)
            self.rows.append({option: float(probability) for option, probability in json.loads(key).items()})
        return self._positions[key]


class CallColumns:
    """Collects records of `ledger.footprints`."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._texts: dict[str, list[str]] = {
            name: [] for name in ("model", "group", "task", "option", "pool", "zone", "source")
        }
        self._numbers: dict[str, list[float]] = {name: [] for name in _NUMBERS}

    def add(self, record: asyncpg.Record | Mapping[str, Any]) -> None:
        """Take one record; what is null in the table becomes NaN, or -1 for the policy's version."""
        texts, numbers = self._texts, self._numbers
        texts["model"].append(sys.intern(record["model"]))
        texts["group"].append(sys.intern(record["grp"]))
        texts["task"].append(sys.intern(record["task"] or ""))
        texts["option"].append(sys.intern(option_key(record["pool"], record["level"])))
        texts["pool"].append(sys.intern(record["pool"]))
        texts["zone"].append(sys.intern(record["zone"]))
        texts["source"].append(sys.intern(record["decision_source"] or ""))
        version = record["policy_version"]
        numbers["policy_version"].append(NO_POLICY if version is None else version)
        numbers["row"].append(self._rows.position(record["propensities"]))
        for name in _MEASURED:
            value = record[name]
            numbers[name].append(float("nan") if value is None else value)

    def calls(self) -> Calls:
        """All that were taken."""
        columns: dict[str, Any] = {name: _texts(values) for name, values in self._texts.items()}
        for name, values in self._numbers.items():
            columns[name] = np.array(values, dtype=_NUMBERS[name])
        return Calls(**columns)


_MEASURED = (
    "started_s",
    "processing_s",
    "prompt_tokens",
    "completion_tokens",
    "energy_j",
    "intensity_g_per_kwh",
    "operational_g",
    "embodied_g",
)
_INTEGERS = ("policy_version", "prompt_tokens", "completion_tokens")
_NUMBERS: dict[str, type] = {
    **dict.fromkeys(_MEASURED, np.float64),
    **dict.fromkeys(_INTEGERS, np.int64),
    "row": np.intp,
}


def _texts(values: list[str]) -> Texts:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
