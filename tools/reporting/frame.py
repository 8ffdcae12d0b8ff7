"""Settled calls as numpy columns, and the carbon intensity of the grid as a step function.

Plain numpy: every figure is a masked or grouped sum of a few columns, which a data-frame library would not shorten.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import asyncpg
import numpy as np
from numpy.typing import NDArray

from shared.messages import option_key

Floats = NDArray[np.float64]
Texts = NDArray[np.object_]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]

NO_POLICY = -1
MAX_AGE_S = 6 * 3600.0
"""Age up to which a zone's last intensity is used, s."""


@dataclass(frozen=True, slots=True)
class Calls:
    """Footprints as columns; every array has shape `(calls,)`.

    Attributes:
        model: logical model.
        group: prompt group.
        task: the client's task label; empty without one.
        option: `<pool>/<level>`.
        pool: pool that served the call.
        zone: the pool's grid zone.
        source: `policy`, `fallback`, `forced` or `switchback`; empty for calls of the evaluator.
        policy_version: -1 without a policy.
        distribution: index into `Distributions.all` of the probabilities from which the option was drawn.
        started_s: seconds since the Unix epoch, event time.
        processing_s: seconds from sending to the last token.
        server_s: share of the server's time, which calls that run at once divide; seconds. Footprints of an earlier
            version were charged for `processing_s`.
        prompt_tokens: 0 if unknown.
        completion_tokens: generated tokens.
        energy_j: attributed energy, J.
        intensity_g_per_kwh: gCO2eq/kWh; NaN if unknown.
        operational_g: gCO2eq of the energy; NaN if the intensity is unknown.
        embodied_g: gCO2eq of the server's manufacture.
    """

    model: Texts
    group: Texts
    task: Texts
    option: Texts
    pool: Texts
    zone: Texts
    source: Texts
    policy_version: NDArray[np.int64]
    distribution: Indices
    started_s: Floats
    processing_s: Floats
    server_s: Floats
    prompt_tokens: NDArray[np.int64]
    completion_tokens: NDArray[np.int64]
    energy_j: Floats
    intensity_g_per_kwh: Floats
    operational_g: Floats
    embodied_g: Floats

    def __len__(self) -> int:
        return len(self.started_s)

    @property
    def total_g(self) -> Floats:
        """gCO2eq of each call; NaN if the intensity is unknown."""
        return self.operational_g + self.embodied_g

    @property
    def reference_certain(self) -> Flags:
        """Requests that only the reference could serve: in fallback, or in a reference block of the switchback."""
        certain: Flags = (self.source == "fallback") | (self.source == "switchback")
        return certain

    def select(self, mask: Flags) -> Self:
        """The calls for which `mask`, of shape `(calls,)`, is true."""
        return type(self)(*(getattr(self, field.name)[mask] for field in fields(self)))


def partition(*keys: Texts) -> dict[tuple[str, ...], Indices]:
    """Indices of the calls by the values of one or more columns, ordered by these values."""
    if not len(keys[0]):
        return {}
    combined = np.zeros(len(keys[0]), dtype=np.int64)
    for key in keys:
        names, codes = np.unique(key.astype(str), return_inverse=True)
        combined = combined * len(names) + codes
    order = np.argsort(combined, kind="stable")
    starts = np.flatnonzero(np.diff(combined[order], prepend=-1))
    parts = np.split(order, starts[1:])
    return {tuple(str(key[part[0]]) for key in keys): part for part in parts}


class Distributions:
    """The distinct probability distributions over options; one per policy and prompt group, not per request."""

    def __init__(self) -> None:
        self.all: list[Mapping[str, float]] = []
        self._indices: dict[str, int] = {}

    def index(self, text: str | None) -> int:
        """The index of a distribution, given as JSON; None counts as empty."""
        key = text or "{}"
        if key not in self._indices:
            self._indices[key] = len(self.all)
            self.all.append({option: float(probability) for option, probability in json.loads(key).items()})
        return self._indices[key]


_MEASURED = (
    "started_s",
    "processing_s",
    "server_s",
    "prompt_tokens",
    "completion_tokens",
    "energy_j",
    "intensity_g_per_kwh",
    "operational_g",
    "embodied_g",
)
_NUMBERS: dict[str, type] = {
    **dict.fromkeys(_MEASURED, np.float64),
    **dict.fromkeys(("policy_version", "prompt_tokens", "completion_tokens"), np.int64),
    "distribution": np.intp,
}


class CallsBuilder:
    """Collects records of `ledger.footprints` into columns; equal texts are stored once."""

    def __init__(self, distributions: Distributions) -> None:
        self._distributions = distributions
        self._texts: dict[str, list[str]] = {
            name: [] for name in ("model", "group", "task", "option", "pool", "zone", "source")
        }
        self._numbers: dict[str, list[float]] = {name: [] for name in _NUMBERS}

    def add(self, record: asyncpg.Record | Mapping[str, Any]) -> None:
        """Add a record; SQL NULL becomes NaN, or -1 for the policy's version."""
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
        numbers["distribution"].append(self._distributions.index(record["propensities"]))
        for name in _MEASURED:
            value = record[name]
            numbers[name].append(float("nan") if value is None else value)

    def build(self) -> Calls:
        """All calls added so far."""
        columns: dict[str, Any] = {name: _text_column(values) for name, values in self._texts.items()}
        for name, values in self._numbers.items():
            columns[name] = np.array(values, dtype=_NUMBERS[name])
        return Calls(**columns)


def _text_column(values: list[str]) -> Texts:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


@dataclass(frozen=True, slots=True)
class IntensitySeries:
    """The carbon intensity of one zone as a step function; arrays of shape `(points,)`, in order of time.

    Attributes:
        at_s: seconds since the Unix epoch.
        g_per_kwh: gCO2eq/kWh from then on.
        estimated: whether the provider estimated the value.
    """

    at_s: Floats
    g_per_kwh: Floats
    estimated: Flags

    def at(self, times_s: Floats) -> Floats:
        """The intensity at each time; NaN before the first point, and `MAX_AGE_S` after the last one before it."""
        if not len(self.at_s):
            return np.full(len(times_s), np.nan)
        position = np.searchsorted(self.at_s, times_s, side="right") - 1
        found = np.clip(position, 0, None)
        fresh = (position >= 0) & (times_s - self.at_s[found] <= MAX_AGE_S)
        return np.where(fresh, self.g_per_kwh[found], np.nan)
