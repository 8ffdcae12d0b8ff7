"""Settled calls in columns: what every figure of the report is computed from."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Texts = NDArray[np.object_]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Calls:
    """Footprints, one element of every array per call; arrays have shape (n,).

    Attributes:
        model: logical model.
        group: prompt group.
        task: the producer's label; empty without one.
        option: `<pool>/<level>`.
        pool: pool that served the call.
        zone: the pool's grid zone.
        source: `policy`, `fallback` or `forced`; empty for the evaluator's own calls.
        policy_version: -1 where no policy was in force.
        row: index into the rows of probabilities that options were drawn from.
        started_s: seconds since the Unix epoch, event time.
        processing_s: seconds from sent to last token.
        prompt_tokens: 0 where nothing counted them.
        completion_tokens: tokens generated.
        energy_j: attributed energy.
        intensity_g_per_kwh: NaN where unknown.
        operational_g: grams of the energy; NaN where the intensity is unknown.
        embodied_g: grams of the server's making.
    """

    model: Texts
    group: Texts
    task: Texts
    option: Texts
    pool: Texts
    zone: Texts
    source: Texts
    policy_version: NDArray[np.int64]
    row: Indices
    started_s: Floats
    processing_s: Floats
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
        """Grams of each call; NaN where the intensity is unknown."""
        return self.operational_g + self.embodied_g

    def where(self, chosen: Flags) -> Self:
        """The calls for which `chosen`, of shape (n,), is true."""
        return type(self)(*(getattr(self, field.name)[chosen] for field in fields(self)))


def partition(*keys: Texts) -> dict[tuple[str, ...], Indices]:
    """Positions of the calls by the values of one or more columns, in the order of the values."""
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


def mapped(keys: Texts, values: Mapping[str, float], default: float = np.nan) -> Floats:
    """The number that belongs to every element of `keys`; shape (n,)."""
    names, codes = np.unique(keys.astype(str), return_inverse=True)
    return np.array([values.get(str(name), default) for name in names], dtype=float)[codes]
