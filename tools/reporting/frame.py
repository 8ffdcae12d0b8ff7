"""Sums over settled calls as numpy columns, and the carbon intensity of the grid as a step function.

Plain numpy: a data-frame library would replace one in a hundred lines (docs/decisions/0052).
"""

import json
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Texts = NDArray[np.object_]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]

NO_POLICY = -1
MAX_AGE_S = 6 * 3600.0
"""Age up to which a zone's last intensity is used, s."""


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Cells as columns: every field is an array of shape `(cells,)`."""

    def select(self, mask: Flags | Indices) -> Self:
        """The cells for which `mask`, of shape `(cells,)`, is true; or those with these indices."""
        if mask.dtype == np.bool_ and mask.all():
            return self  # a month of calls is not copied
        return type(self)(*(getattr(self, field.name)[mask] for field in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class Calls(Columns):
    """Settled calls as columns of sums; every array has shape `(cells,)`.

    A cell holds the calls that started in one hour and agree in all labels. So a month has as many cells as a busy or a
    quiet fleet. "Priced" calls are those whose carbon intensity is known.

    Attributes:
        model: logical model.
        group: prompt group.
        task: the client's task label; empty without one.
        option: `<pool>/<level>`.
        pool: pool that served the calls.
        zone: the pool's grid zone.
        source: `policy`, `fallback`, `forced` or `switchback`; empty for calls of the evaluator.
        policy_version: -1 without a policy.
        distribution: index into `Distributions.all` of the probabilities from which the option was drawn.
        count: number of calls.
        first_s, last_s: earliest and latest start, seconds since the Unix epoch, event time.
        processing_s: seconds from sending to the last token.
        server_s: share of the server's time, which calls that run at once divide; seconds. Footprints of an earlier
            version were charged for `processing_s`.
        prompt_tokens: unknown ones count 0.
        completion_tokens: generated tokens.
        energy_j: attributed energy, J.
        embodied_g: gCO2eq of the server's manufacture.
        energy_energy, server_server, energy_server: sums of products of a call's energy and server time.
        priced: number of priced calls; the following are of these.
        intensity, intensity_intensity: gCO2eq/kWh of each call, and its square.
        energy_intensity: product of energy and intensity.
        operational_g: gCO2eq of the energy.
        total_g, total_total, total_intensity: gCO2eq in all, its square, and its product with the intensity.
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
    count: NDArray[np.int64]
    first_s: Floats
    last_s: Floats
    processing_s: Floats
    server_s: Floats
    prompt_tokens: NDArray[np.int64]
    completion_tokens: NDArray[np.int64]
    energy_j: Floats
    embodied_g: Floats
    energy_energy: Floats
    server_server: Floats
    energy_server: Floats
    priced: NDArray[np.int64]
    intensity: Floats
    intensity_intensity: Floats
    energy_intensity: Floats
    operational_g: Floats
    total_g: Floats
    total_total: Floats
    total_intensity: Floats

    def __len__(self) -> int:
        return len(self.count)

    @property
    def started_s(self) -> Floats:
        """A time that stands for the starts of the cell's calls, seconds since the Unix epoch."""
        return (self.first_s + self.last_s) / 2

    @property
    def requests(self) -> int:
        """Number of calls in all cells."""
        return int(self.count.sum())

    @property
    def reference_certain(self) -> Flags:
        """Requests that only the reference could serve: in fallback, or in a reference block of the switchback."""
        certain: Flags = (self.source == "fallback") | (self.source == "switchback")
        return certain


def partition(*keys: Texts | NDArray[np.integer[Any]]) -> dict[tuple[str, ...], Indices]:
    """Indices of the calls by the values of one or more columns, ordered by these values."""
    if not len(keys[0]):
        return {}
    combined = np.zeros(len(keys[0]), dtype=np.int64)
    for key in keys:
        # Not `np.unique`, which would sort as many texts as there are cells.
        values = key.tolist()
        codes = {value: code for code, value in enumerate(sorted(set(values)))}
        combined *= len(codes)
        combined += np.fromiter(map(codes.__getitem__, values), dtype=np.int64, count=len(values))
    # Numbers of 16 bits are sorted in linear time.
    small = combined.max() < 2**16
    order = np.argsort(combined.astype(np.uint16) if small else combined, kind="stable")
    starts = np.flatnonzero(np.diff(combined[order], prepend=-1))
    parts = np.split(order, starts[1:])
    return {tuple(str(key[part[0]]) for key in keys): part for part in parts}


class Distributions:
    """The distinct probability distributions over options; one per policy and prompt group, not per request."""

    def __init__(self) -> None:
        self.all: list[Mapping[str, float]] = []
        self._indices: dict[Hashable, int] = {}

    def index(self, key: Hashable, text: str | None) -> int:
        """The index of a distribution.

        Args:
            key: its identity.
            text: as JSON; None counts as empty.
        """
        if key not in self._indices:
            self._indices[key] = len(self.all)
            found = json.loads(text or "{}")
            self.all.append({option: float(probability) for option, probability in found.items()})
        return self._indices[key]


TEXT_COLUMNS = ("model", "group", "task", "option", "pool", "zone", "source")
NUMBER_COLUMNS = tuple(field.name for field in fields(Calls) if field.name not in TEXT_COLUMNS)
_INTEGERS = ("policy_version", "count", "prompt_tokens", "completion_tokens", "priced")


class CallsBuilder:
    """Collects cells that agree in their texts; equal texts are stored once."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {name: [] for name in TEXT_COLUMNS}
        # Not many small arrays, which would take twice the memory once they are put together.
        self._numbers = {name: bytearray() for name in NUMBER_COLUMNS}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add cells: the texts of them all and an array of each number, by the names of the columns of `Calls`."""
        cells = len(row["count"])
        for name, texts in self._texts.items():
            texts.extend([sys.intern(row[name])] * cells)
        for name, numbers in self._numbers.items():
            numbers.extend(np.asarray(row[name], dtype=_number_type(name)).tobytes())

    def __len__(self) -> int:
        return len(self._texts["model"])

    def build(self) -> Calls:
        """All cells added so far."""
        columns: dict[str, Any] = {name: np.array(values, dtype=object) for name, values in self._texts.items()}
        for name, values in self._numbers.items():
            columns[name] = np.frombuffer(values, dtype=_number_type(name))
        return Calls(**columns)


def _number_type(name: str) -> type:
    if name == "distribution":
        return np.intp
    return np.int64 if name in _INTEGERS else np.float64


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
