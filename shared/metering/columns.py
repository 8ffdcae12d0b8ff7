"""Sums as numpy columns, and the carbon intensity of the grid as a step function."""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Texts = NDArray[np.object_]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]

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
