"""Sums over settled calls as numpy columns.

Plain numpy: a data-frame library would replace one in a hundred lines (docs/decisions/0052).
"""

import json
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.metering.columns import Columns, Flags, Floats, Indices, Texts

NO_POLICY = -1


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
