"""What requests consume: energy and time by group and option, and the traffic by group, learned from footprints.

Requests and the evaluator's generations tell energy and time: both are a fair draw of their group's prompts. Requests
alone tell the traffic. The judge's calls tell nothing about the model. The caller sees to it that a footprint comes in
once.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.optimizer.decay import DecayedSums, fading
from shared.messages import Footprint, option_key

JOULES_PER_KWH = 3_600_000.0
_SHORTEST_SPAN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """How long consumption is remembered, event time.

    Attributes:
        half_life_s: of energy and time.
        traffic_half_life_s: of the groups' shares of the traffic.
        rate_half_life_s: of the request rate.
        max_groups: beyond which the groups with the least traffic are forgotten; task labels are the producers' choice.
    """

    half_life_s: float
    traffic_half_life_s: float
    rate_half_life_s: float
    max_groups: int


@dataclass(frozen=True, slots=True)
class Consumed:
    """Effective requests of a cell, and what they took in all."""

    requests: float
    energy_kwh: float
    processing_s: float


@dataclass(slots=True)
class Consumption:
    """One model's consumption. Sums are (requests, kWh, seconds) by group, then option; requests by group."""

    cells: dict[str, dict[str, DecayedSums]] = field(default_factory=dict)
    traffic: dict[str, DecayedSums] = field(default_factory=dict)
    recent: DecayedSums | None = None
    first_request_s: float | None = None

    def observe(self, footprint: Footprint, *, now_s: float, memory: Memory) -> None:
        """Take a footprint.

        Args:
            now_s: event time; a footprint from beyond it, of a clock that is ahead, must not age everything else.
        """
        if footprint.purpose == "judge":
            return
        at_s = min(footprint.finished_at.timestamp(), now_s)
        option = option_key(footprint.pool, footprint.level)
        taken = Consumed(1.0, footprint.energy_j / JOULES_PER_KWH, footprint.processing_s)
        self.add(footprint.group, option, taken, at_s=at_s, memory=memory, asked=footprint.purpose == "request")

    def add(self, group: str, option: str, taken: Consumed, *, at_s: float, memory: Memory, asked: bool) -> None:
        """Take what some requests of one group under one option took.

        Args:
            asked: by producers, so that they are traffic too.
        """
        cell = self.cells.setdefault(group, {}).setdefault(option, DecayedSums(at_s, [0.0, 0.0, 0.0]))
        sums = (taken.requests, taken.energy_kwh, taken.processing_s)
        cell.add(sums, at_s=at_s, half_life_s=memory.half_life_s)
        if asked:
            self.traffic.setdefault(group, DecayedSums(at_s, [0.0])).add(
                (taken.requests,), at_s=at_s, half_life_s=memory.traffic_half_life_s
            )
            self.recent = self.recent or DecayedSums(at_s, [0.0])
            self.recent.add((taken.requests,), at_s=at_s, half_life_s=memory.rate_half_life_s)
            self.first_request_s = min(at_s, self.first_request_s if self.first_request_s is not None else at_s)
        if len(self.cells) > 2 * memory.max_groups:
            self._forget_small_groups(at_s, memory)

    def asked_by(self, names: Iterable[str]) -> "Consumption":
        """A copy whose traffic is that of these groups; energy and time, and the request rate, are those of all."""
        kept = set(names)
        return Consumption(
            cells={group: {option: _copied(sums) for option, sums in row.items()} for group, row in self.cells.items()},
            traffic={group: _copied(sums) for group, sums in self.traffic.items() if group in kept},
            recent=self.recent,
            first_request_s=self.first_request_s,
        )

    def consumed(self, now_s: float, memory: Memory) -> dict[str, dict[str, Consumed]]:
        """What every group took under every option, by group, then option."""
        return {
            group: {option: Consumed(*sums.at(now_s, memory.half_life_s)) for option, sums in row.items()}
            for group, row in self.cells.items()
        }

    def requests(self, now_s: float, memory: Memory) -> dict[str, float]:
        """Effective requests by group."""
        return {group: sums.at(now_s, memory.traffic_half_life_s)[0] for group, sums in self.traffic.items()}

    def requests_per_s(self, now_s: float, memory: Memory) -> float:
        """The recent request rate.

        A steady rate r has left r · H/ln 2 · (1 − 2^(−T/H)) decayed requests after a time T.
        """
        if self.recent is None or self.first_request_s is None:
            return 0.0
        span_s = max(now_s - self.first_request_s, _SHORTEST_SPAN_S)
        half_life_s = memory.rate_half_life_s
        whole = half_life_s / math.log(2) * (1.0 - fading(span_s, half_life_s))
        return self.recent.at(now_s, half_life_s)[0] / whole

    def to_document(self) -> dict[str, Any]:
        """All of it as JSON's types."""
        return {
            "cells": {
                group: {option: _stored(sums) for option, sums in row.items()} for group, row in self.cells.items()
            },
            "traffic": {group: _stored(sums) for group, sums in self.traffic.items()},
            "recent": None if self.recent is None else _stored(self.recent),
            "first_request_s": self.first_request_s,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Consumption":
        """What `to_document` wrote."""
        recent = document["recent"]
        return cls(
            cells={
                group: {option: _restored(sums) for option, sums in row.items()}
                for group, row in document["cells"].items()
            },
            traffic={group: _restored(sums) for group, sums in document["traffic"].items()},
            recent=None if recent is None else _restored(recent),
            first_request_s=document["first_request_s"],
        )

    def _forget_small_groups(self, now_s: float, memory: Memory) -> None:
        traffic = self.requests(now_s, memory)
        by_traffic = sorted(self.cells, key=lambda group: (-traffic.get(group, 0.0), group))
        for group in by_traffic[memory.max_groups :]:
            del self.cells[group]
            self.traffic.pop(group, None)


def _copied(sums: DecayedSums) -> DecayedSums:
    return DecayedSums(sums.as_of_s, list(sums.values))


def _stored(sums: DecayedSums) -> list[float]:
    return [sums.as_of_s, *sums.values]


def _restored(stored: list[float]) -> DecayedSums:
    return DecayedSums(stored[0], list(stored[1:]))
