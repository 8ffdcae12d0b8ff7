"""Energy, time, tokens and traffic by prompt group and option: decayed sums of footprints, and means from them.

Footprints of requests and of the evaluator's generations carry energy, time and tokens: both sample their group's
prompts fairly. Only requests count as traffic, and all of them do; the energy, time and tokens of a cancelled one say
nothing about whole answers and are left out. Calls of the judge say nothing about the model and are ignored. The caller
makes sure that each footprint is counted once.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from services.optimizer.multiplicative_model import MeanModel
from services.optimizer.settings import OptimizerSettings
from shared.carbon import JOULES_PER_KWH
from shared.fleet import reworded
from shared.messages import Footprint, option_key, split_option

_HOUR_S = 3_600.0
_SHORTEST_SPAN_S = 60.0
_RECENT_OF_FIRST_RELEASE = 2
"""Length of the stored `recent` without seconds; its half-life was an hour."""


@dataclass(slots=True)
class DecayedSums:
    """Sums of observations, each weighted by 2^(-age / half-life); the order of arrival does not matter.

    Attributes:
        as_of_s: event time that `values` refer to, seconds since the Unix epoch: that of the newest observation.
        values: the sums.
    """

    as_of_s: float
    values: list[float]

    def add(self, observation: Sequence[float], *, at_s: float, half_life_s: float) -> None:
        """Add an observation made at event time `at_s`."""
        if at_s > self.as_of_s:
            factor = decay_factor(at_s - self.as_of_s, half_life_s)
            self.values = [value * factor + new for value, new in zip(self.values, observation, strict=True)]
            self.as_of_s = at_s
        else:
            weight = decay_factor(self.as_of_s - at_s, half_life_s)
            self.values = [value + new * weight for value, new in zip(self.values, observation, strict=True)]

    def at(self, now_s: float, half_life_s: float) -> list[float]:
        """The sums at event time `now_s`."""
        factor = decay_factor(now_s - self.as_of_s, half_life_s)
        return [value * factor for value in self.values]

    def copy(self) -> "DecayedSums":
        """An independent copy."""
        return DecayedSums(self.as_of_s, list(self.values))


def decay_factor(age_s: float, half_life_s: float) -> float:
    """2^(-age / half-life); 1 for an observation that lies in the future."""
    return float(2.0 ** (-max(0.0, age_s) / half_life_s))


def decayed_seconds(span_s: float, half_life_s: float) -> float:
    """The last `span_s` seconds, each weighted by 2^(-age / half-life); 0 for a span that lies in the future."""
    return half_life_s / math.log(2) * (1.0 - decay_factor(span_s, half_life_s))


@dataclass(frozen=True, slots=True)
class ResourceUse:
    """What some requests used in all.

    Tokens and server time are not known of every request: older footprints lack the server time, some model servers do
    not count prompts, and sums that earlier releases stored lack all of them. Each has a count of its own.

    Attributes:
        requests: effective number of requests; all of them have energy and time.
        energy_kwh, processing_s: attributed energy, and time from sending the call to its last token.
        token_requests, completion_tokens: requests with a known number of generated tokens, and these tokens.
        prompt_requests, prompt_tokens: requests with a known length of the prompt, and these tokens.
        server_requests, server_s: requests with a known share of the server's time, and these seconds.
        energy_squares: sum of the squared energies, kWh²; None: not known, a coefficient of variation of 1 is assumed.
    """

    requests: float
    energy_kwh: float
    processing_s: float
    token_requests: float = 0.0
    completion_tokens: float = 0.0
    prompt_requests: float = 0.0
    prompt_tokens: float = 0.0
    server_requests: float = 0.0
    server_s: float = 0.0
    energy_squares: float | None = None

    def values(self) -> tuple[float, ...]:
        """All fields, in order."""
        *known, squares = (getattr(self, name) for name in _RESOURCES)
        return (*known, self._assumed_squares() if squares is None else squares)

    def _assumed_squares(self) -> float:
        return 2.0 * self.energy_kwh**2 / self.requests if self.requests > 0.0 else 0.0

    @classmethod
    def of_footprint(cls, footprint: Footprint) -> "ResourceUse":
        """What one call used."""
        prompt_tokens, server_s = footprint.prompt_tokens, footprint.server_s
        return cls(
            requests=1.0,
            energy_kwh=footprint.energy_j / JOULES_PER_KWH,
            processing_s=footprint.processing_s,
            token_requests=1.0,
            completion_tokens=float(footprint.completion_tokens),
            prompt_requests=0.0 if prompt_tokens is None else 1.0,
            prompt_tokens=float(prompt_tokens or 0),
            server_requests=0.0 if server_s is None else 1.0,
            server_s=server_s or 0.0,
            energy_squares=(footprint.energy_j / JOULES_PER_KWH) ** 2,
        )


_RESOURCES = tuple(one.name for one in fields(ResourceUse))


@dataclass(slots=True)
class Consumption:
    """Decayed sums of one model's footprints; the document of `to_document` is stored in the table `consumption`.

    Attributes:
        cells: the sums of `ResourceUse` by group, then option.
        traffic: requests by group.
        recent: requests of all groups, and the seconds in which they arrived, for the request rate; None before the
            first request.
        directives: by level, the hash of the text for which its cells are counted, and since when, event seconds.
    """

    cells: dict[str, dict[str, DecayedSums]] = field(default_factory=dict)
    traffic: dict[str, DecayedSums] = field(default_factory=dict)
    recent: DecayedSums | None = None
    directives: dict[str, tuple[str, float]] = field(default_factory=dict)

    def note_directives(self, hashes: Mapping[str, str]) -> None:
        """Levels whose text is not known yet are counted for these texts."""
        for level, text in hashes.items():
            self.directives.setdefault(level, (text, 0.0))

    def drop_reworded(self, hashes: Mapping[str, str], *, now_s: float) -> list[str]:
        """Drop the energy, time and tokens of levels that have another text now; traffic stays.

        Args:
            hashes: of the present texts, by level.
            now_s: event time. Calls that began earlier count as traffic only.

        Returns:
            These levels.
        """
        levels = reworded({level: text for level, (text, _) in self.directives.items()}, hashes)
        for row in self.cells.values():
            for option in [option for option in row if split_option(option)[1] in levels]:
                del row[option]
        self.directives |= {level: (hashes[level], now_s) for level in levels}
        self.note_directives(hashes)
        return levels

    def add_footprint(self, footprint: Footprint, *, now_s: float, settings: OptimizerSettings) -> None:
        """Count a footprint.

        Args:
            footprint: of any purpose; those of the judge are ignored.
            now_s: event time. A footprint from the future (a clock that is ahead) counts as of now: otherwise it would
                age all others.
            settings: half-lives and the number of groups kept.
        """
        if footprint.purpose == "judge":
            return
        at_s = min(footprint.finished_at.timestamp(), now_s)
        option = option_key(footprint.pool, footprint.level)
        cut_short = footprint.finish_reason == "cancelled"
        _, since_s = self.directives.get(footprint.level, ("", 0.0))
        of_old_text = footprint.started_at.timestamp() < since_s
        used = ResourceUse(0.0, 0.0, 0.0) if cut_short or of_old_text else ResourceUse.of_footprint(footprint)
        traffic = 1.0 if footprint.purpose == "request" else 0.0
        self.add(footprint.group, option, used, at_s=at_s, settings=settings, traffic=traffic)

    def add(
        self,
        group: str,
        option: str,
        used: ResourceUse,
        *,
        at_s: float,
        settings: OptimizerSettings,
        traffic: float,
    ) -> None:
        """Count what some requests of one group and option used.

        Args:
            group: prompt group.
            option: `<pool>/<level>`.
            used: totals of these requests.
            at_s: event time.
            settings: half-lives and the number of groups kept.
            traffic: requests of clients, which count in traffic shares and request rate.
        """
        cell = self.cells.setdefault(group, {}).setdefault(option, DecayedSums(at_s, [0.0] * len(_RESOURCES)))
        cell.add(used.values(), at_s=at_s, half_life_s=settings.footprint_half_life_s)
        if traffic > 0.0:
            self.recent = self.recent or DecayedSums(at_s, [0.0, 0.0])
            half_life_s = self._rate_half_life_s(at_s, settings)
            seconds = decayed_seconds(at_s - self.recent.as_of_s, half_life_s)
            self.recent.add((traffic, seconds), at_s=at_s, half_life_s=half_life_s)
            self.traffic.setdefault(group, DecayedSums(at_s, [0.0])).add(
                (traffic,), at_s=at_s, half_life_s=self.traffic_half_life_s(at_s, settings)
            )
        if len(self.cells) > 2 * settings.max_groups:
            self._drop_small_groups(at_s, settings)

    def with_traffic_of(self, groups: Iterable[str]) -> "Consumption":
        """A copy that counts only these groups as traffic; energy, time and request rate stay those of all groups."""
        kept = set(groups)
        return Consumption(
            cells={group: {option: sums.copy() for option, sums in row.items()} for group, row in self.cells.items()},
            traffic={group: sums.copy() for group, sums in self.traffic.items() if group in kept},
            recent=self.recent,
            directives=dict(self.directives),
        )

    def totals(self, now_s: float, settings: OptimizerSettings) -> dict[str, dict[str, ResourceUse]]:
        """Decayed totals by group, then option, at an event time."""
        return {
            group: {
                option: ResourceUse(*sums.at(now_s, settings.footprint_half_life_s)) for option, sums in row.items()
            }
            for group, row in self.cells.items()
        }

    def requests(self, now_s: float, settings: OptimizerSettings) -> dict[str, float]:
        """Effective requests of clients by group, at an event time."""
        half_life_s = self.traffic_half_life_s(now_s, settings)
        return {group: sums.at(now_s, half_life_s)[0] for group, sums in self.traffic.items()}

    def requests_per_s(self, now_s: float, settings: OptimizerSettings) -> float:
        """The recent request rate: decayed requests per decayed second."""
        return self._rate(now_s, self._rate_half_life_s(now_s, settings))

    def traffic_half_life_s(self, now_s: float, settings: OptimizerSettings) -> float:
        """Half-life of the traffic shares: the time of some requests, because fewer say little, within limits."""
        rate = self.requests_per_s(now_s, settings)
        return _half_life_s(settings.traffic_half_life_requests, rate, settings.traffic_half_life_h, settings)

    def _rate_half_life_s(self, now_s: float, settings: OptimizerSettings) -> float:
        rate = self._rate(now_s, settings.rate_half_life_h * _HOUR_S)
        return _half_life_s(settings.rate_half_life_requests, rate, settings.rate_half_life_h, settings)

    def _rate(self, now_s: float, half_life_s: float) -> float:
        """Requests per second; `half_life_s` is that of the time since the newest request."""
        if self.recent is None:
            return 0.0
        requests, seconds = self.recent.at(now_s, half_life_s)
        seconds += decayed_seconds(now_s - self.recent.as_of_s, half_life_s)
        return requests / max(seconds, _SHORTEST_SPAN_S)

    def to_document(self) -> dict[str, Any]:
        """The sums as JSON types: every entry is [as_of_s, *values]."""
        return {
            "cells": {
                group: {option: _to_list(sums) for option, sums in row.items()} for group, row in self.cells.items()
            },
            "traffic": {group: _to_list(sums) for group, sums in self.traffic.items()},
            "recent": None if self.recent is None else _to_list(self.recent),
            "directives": {level: list(known) for level, known in self.directives.items()},
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Consumption":
        """Read what `to_document` wrote; earlier releases stored less: no tokens, server time, seconds, directives."""
        recent = document["recent"]
        if recent is not None and len(recent) == _RECENT_OF_FIRST_RELEASE:
            recent = [*recent, decayed_seconds(recent[0] - document["first_request_s"], _HOUR_S)]
        return cls(
            cells={
                group: {option: _cell_from_list(sums) for option, sums in row.items()}
                for group, row in document["cells"].items()
            },
            traffic={group: _from_list(sums) for group, sums in document["traffic"].items()},
            recent=None if recent is None else _from_list(recent),
            directives={level: (text, since_s) for level, (text, since_s) in document.get("directives", {}).items()},
        )

    def _drop_small_groups(self, now_s: float, settings: OptimizerSettings) -> None:
        """Keep the `max_groups` groups with most traffic: task labels are chosen by clients and may be many."""
        traffic = self.requests(now_s, settings)
        by_traffic = sorted(self.cells, key=lambda group: (-traffic.get(group, 0.0), group))
        for group in by_traffic[settings.max_groups :]:
            del self.cells[group]
            self.traffic.pop(group, None)


def _half_life_s(requests: float, rate: float, shortest_h: float, settings: OptimizerSettings) -> float:
    """The time of some requests at a rate (1/s), within limits."""
    shortest_s, longest_s = shortest_h * _HOUR_S, max(shortest_h, settings.longest_half_life_h) * _HOUR_S
    return min(max(shortest_s, requests / rate), longest_s) if rate > 0.0 else longest_s


def _to_list(sums: DecayedSums) -> list[float]:
    return [sums.as_of_s, *sums.values]


def _from_list(stored: list[float]) -> DecayedSums:
    return DecayedSums(stored[0], list(stored[1:]))


def _cell_from_list(stored: list[float]) -> DecayedSums:
    """The sums of a cell, with defaults for those that an earlier release did not store."""
    return DecayedSums(stored[0], list(ResourceUse(*stored[1:]).values()))


class CostModel:
    """Mean energy, time and tokens of a request for every group and option; a `MeanModel` each, fitted when needed."""

    def __init__(self, totals: Mapping[str, Mapping[str, ResourceUse]], pseudo_requests: float) -> None:
        """Take the data.

        Args:
            totals: by group, then option.
            pseudo_requests: prior weight.
        """
        self._totals = totals
        self._pseudo_requests = pseudo_requests

    def requests(self, group: str, option: str) -> float:
        """Effective requests of a group and option."""
        used = self._totals.get(group, {}).get(option)
        return 0.0 if used is None else used.requests

    def energy_variation(self, group: str, option: str) -> float:
        """Standard deviation of a request's energy, relative to its mean; shrunk to 1, which is more than usual."""
        used = self._totals.get(group, {}).get(option)
        if used is None or used.energy_squares is None or used.energy_kwh <= 0.0:
            return 1.0
        square = max(0.0, used.requests * used.energy_squares / used.energy_kwh**2 - 1.0)
        return math.sqrt((used.requests * square + self._pseudo_requests) / (used.requests + self._pseudo_requests))

    @cached_property
    def energy_kwh(self) -> MeanModel:
        """Attributed energy."""
        return self._fit(lambda used: (used.requests, used.energy_kwh))

    @cached_property
    def processing_s(self) -> MeanModel:
        """Time from sending the call to its last token."""
        return self._fit(lambda used: (used.requests, used.processing_s))

    @cached_property
    def completion_tokens(self) -> MeanModel:
        """Generated tokens."""
        return self._fit(lambda used: (used.token_requests, used.completion_tokens))

    @cached_property
    def prompt_tokens(self) -> MeanModel:
        """Tokens of the prompt, directive included."""
        return self._fit(lambda used: (used.prompt_requests, used.prompt_tokens))

    @cached_property
    def server_s(self) -> MeanModel:
        """Share of the server's time."""
        return self._fit(lambda used: (used.server_requests, used.server_s))

    def _fit(self, value: Callable[[ResourceUse], tuple[float, float]]) -> MeanModel:
        totals = {group: {option: value(used) for option, used in row.items()} for group, row in self._totals.items()}
        return MeanModel(totals, self._pseudo_requests)
