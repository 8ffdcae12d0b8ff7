"""The footprint of a call: its energy and time in gCO2eq.

operational = energy x PUE x intensity, embodied = k1 x share of the server's time (arXiv 2403.12900, section 3.1;
`shared.carbon`).
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

from shared.carbon import embodied_g, operational_g
from shared.fleet import Pool
from shared.messages import Footprint


class IntensitySteps:
    """The carbon intensity of one zone as a step function of time.

    Each value holds from its time until the next one, and for `max_age_s` at most.
    """

    def __init__(self, points: Iterable[tuple[float, float]], *, max_age_s: float) -> None:
        """Sort the points.

        Args:
            points: (seconds since the Unix epoch, gCO2eq/kWh), in any order.
            max_age_s: age beyond which a value counts as unknown, event seconds.
        """
        ordered = sorted(dict(points).items())
        self._at_s = [at_s for at_s, _ in ordered]
        self._values = [value for _, value in ordered]
        self._max_age_s = max_age_s

    def mean(self, started_s: float, finished_s: float) -> float | None:
        """Time-weighted mean over a span, gCO2eq/kWh; the value at the start if the span has no duration.

        None if the value is unknown, or older than `max_age_s`, anywhere in the span.
        """
        index = bisect_right(self._at_s, started_s) - 1
        if index < 0:
            return None
        parts: list[float] = []
        position_s = started_s
        while True:
            next_s = self._at_s[index + 1] if index + 1 < len(self._at_s) else math.inf
            until_s = min(next_s, finished_s)
            if max(until_s, position_s) - self._at_s[index] > self._max_age_s:
                return None
            if finished_s <= started_s:
                return self._values[index]
            parts.append(self._values[index] * (until_s - position_s))
            if until_s >= finished_s:
                return math.fsum(parts) / (finished_s - started_s)
            position_s = until_s
            index += 1


def footprint_grams(
    *, energy_j: float, server_s: float, pool: Pool, intensity_g_per_kwh: float | None
) -> dict[str, float | None]:
    """The carbon columns of a footprint, gCO2eq.

    Args:
        server_s: the call's share of the server's time.

    Returns:
        `operational_g`, `embodied_g` and their sum `total_g`. Operational and total are None if the intensity is
        unknown.
    """
    embodied = embodied_g(seconds=server_s, embodied_g_per_s=pool.embodied_g_per_s)
    if intensity_g_per_kwh is None:
        return {"operational_g": None, "embodied_g": embodied, "total_g": None}
    operational = operational_g(energy_j=energy_j, pue=pool.pue, intensity_g_per_kwh=intensity_g_per_kwh)
    return {"operational_g": operational, "embodied_g": embodied, "total_g": operational + embodied}


def footprint_row(
    *,
    request_id: str,
    started_s: float,
    finished_s: float,
    energy_j: float,
    server_s: float | None,
    partial: bool,
    pool: Pool,
    intensity: IntensitySteps,
) -> dict[str, Any]:
    """The computed columns of a row of `footprints`; the others are copied from the call's row.

    Args:
        started_s, finished_s: of the call, seconds since the Unix epoch.
        energy_j: attributed energy.
        server_s: the call's share of the server's time; None: unknown, then it is charged for all of its time.
        partial: some of the energy is missing.
        pool: the pool that served the call; its PUE and embodied rate apply.
        intensity: of the pool's zone.
    """
    processing_s = max(0.0, finished_s - started_s)
    intensity_g_per_kwh = intensity.mean(started_s, finished_s)
    return {
        "request_id": request_id,
        "processing_s": processing_s,
        "server_s": server_s,
        "energy_j": energy_j,
        "intensity_g_per_kwh": intensity_g_per_kwh,
        **footprint_grams(
            energy_j=energy_j,
            server_s=processing_s if server_s is None else server_s,
            pool=pool,
            intensity_g_per_kwh=intensity_g_per_kwh,
        ),
        "partial": partial,
    }


def footprint_message(row: Mapping[str, Any]) -> Footprint:
    """The message of a row of `footprints`, with `propensities` as JSON text."""
    return Footprint.model_validate({**row, "group": row["grp"], "propensities": json.loads(row["propensities"])})
