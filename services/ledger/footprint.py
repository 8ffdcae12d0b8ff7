"""The footprint of a call: its energy and time in gCO2eq.

operational = energy x PUE x intensity, embodied = k1 x share of the server's time (arXiv 2403.12900, section 3.1;
`shared.carbon`).
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

import asyncpg
from pydantic_core import to_json

from shared.carbon import embodied_g, operational_g
from shared.messages.base import SCHEMA_VERSION
from shared.pools import Pool

Row = Mapping[str, Any] | asyncpg.Record
"""A row of a table, by the names of its columns."""


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
        if index + 1 == len(self._at_s) or finished_s <= self._at_s[index + 1]:
            within = max(started_s, finished_s) - self._at_s[index] <= self._max_age_s
            return self._values[index] if within else None
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


def footprint_head(dimension: Mapping[str, Any]) -> bytes:
    """The beginning of the messages of all calls with a dimension: JSON without its end.

    Args:
        dimension: row of `dimensions`, with the propensities as JSON text in `distribution`.
    """
    names = ("purpose", "evaluation_id", "model", "task", "tenant", "pool", "level", "zone", "endpoint",
             "policy_version", "propensity", "finish_reason")  # fmt: skip
    content = {"schema_version": SCHEMA_VERSION, **{name: dimension[name] for name in names}}
    content["group"] = dimension["grp"]
    content["propensities"] = json.loads(dimension["distribution"])
    return to_json(content)[:-1] + b","


def footprint_json(head: bytes, row: Row) -> bytes:
    """The message `Footprint` of a row of `settled_calls`.

    The text is put together from its parts, which takes a tenth of the time of a validated message. A test compares
    both.

    Args:
        head: of the row's dimension, see `footprint_head`.
    """
    started, finished = row["started_at"], row["finished_at"]
    key, request_id = row["id"], row["request_id"]
    operational, embodied = row["operational_g"], row["embodied_g"]
    content = {
        "request_id": key if request_id is None else request_id,
        "record": None if request_id is None else key,
        "started_at": started,
        "finished_at": finished,
        "processing_s": max(0.0, (finished - started).total_seconds()),
        "server_s": row["server_s"],
        "prompt_tokens": row["prompt_tokens"],
        "completion_tokens": row["completion_tokens"],
        "energy_j": row["energy_j"],
        "intensity_g_per_kwh": row["intensity_g_per_kwh"],
        "operational_g": operational,
        "embodied_g": embodied,
        "total_g": None if operational is None else operational + embodied,
    }
    return head + to_json(content)[1:]
