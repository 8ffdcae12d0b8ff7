"""Chooses the endpoint of a pool for a request, among those with free capacity whose circuit is closed.

`spread` uses the least busy endpoint. `pack` uses as few endpoints as possible, in the order of the fleet file, which
is the same in every router. Each endpoint has a target: the process's share of the requests that the endpoint is to
have at once. Requests go to the active endpoints, the first ones of those that are healthy and awake. They are filled
in order. When all are at their targets, one more becomes active at once; when the load would fit on one fewer for a
while, the last one gets no more requests. Calls never move.

A circuit breaker per endpoint: after several failures in a row the circuit opens, and the endpoint is ejected for a
while, for longer after each re-ejection. Then the circuit is half-open: one request, or a health check, probes the
endpoint. Success closes the circuit, failure opens it again. A health check shows that the server responds, not that
its model generates: until the endpoint has answered a request, one more failure opens the circuit again.

An endpoint that is asleep gets neither requests nor health checks. When it is to be awake again, it gets requests after
its first successful health check.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Self

from pydantic import BaseModel, Field, model_validator

from shared.pools import Dispatch

CHANCE_DEVIATIONS: Final = 2.0
"""Standard deviations by which a process may exceed its part of the targets before one more endpoint becomes active.

A process sees a random share of the requests. It may have more than its part while the others have less, and all of
them together do not need another endpoint. With one process there is no such chance.
"""

MEAN_CALLS: Final = 4.0
"""Mean call times over which the load is averaged: a mean load above the process's part is no chance."""

SPARE_DEVIATIONS: Final = 0.5
"""Standard deviations of the load (a Poisson number) that the active endpoints but one must have spare before the last
one gets no more requests."""

SPARE_CALLS: Final = 0.5
"""How long they must have it, in mean call times."""

LAST_TWO_FILL: Final = 0.9
"""Share of its target to which the last active endpoint but one is filled before the last one gets requests; so the
last one is not emptied and filled by turns."""


class CircuitBreakerSettings(BaseModel):
    """When an endpoint's circuit opens, and for how long. A service's settings class may inherit these fields."""

    circuit_failures: int = Field(default=3, ge=1, description="Failures in a row that eject an endpoint")
    circuit_open_s: float = Field(
        default=1.0, gt=0, description="First time that an endpoint stays ejected; doubles with each re-ejection; wall"
    )
    circuit_open_max_s: float = Field(default=15.0, gt=0, description="Longest time that it stays ejected, wall")

    @model_validator(mode="after")
    def _check_circuit_times(self) -> Self:
        if self.circuit_open_max_s < self.circuit_open_s:
            raise ValueError("CIRCUIT_OPEN_MAX_S must not be below CIRCUIT_OPEN_S")
        return self


class PowerState(Enum):
    """Whether an endpoint's model is loaded."""

    AWAKE = auto()
    ASLEEP = auto()
    WAKING = auto()  # to be awake, but no health check has succeeded yet


@dataclass(slots=True, eq=False)
class EndpointState:
    """Load, circuit breaker and power state of one endpoint.

    Attributes:
        limit: most requests at once; None: unlimited.
        target: requests of this process that it is to have at once; None while it is unknown.
        outstanding: requests in flight.
        failures: failures in a row.
        ejections: how often the circuit opened since the last request succeeded.
        open_until_s: the circuit is open until then, and half-open afterwards; None: the circuit is closed.
        probing: its probe is in flight: the one request of a half-open circuit, or a health check.
    """

    name: str
    limit: int | None = None
    target: int | None = None
    outstanding: int = 0
    failures: int = 0
    ejections: int = 0
    open_until_s: float | None = None
    probing: bool = False
    power: PowerState = PowerState.AWAKE

    @property
    def at_capacity(self) -> bool:
        """Whether it has as many requests in flight as it may have."""
        return self.limit is not None and self.outstanding >= self.limit

    @property
    def usable(self) -> bool:
        """Whether it is awake and its circuit is closed."""
        return self.open_until_s is None and self.power is PowerState.AWAKE

    @property
    def relative_load(self) -> float:
        """Requests in flight per request of its target."""
        return self.outstanding / (self.target or 1)

    def admits(self, now_s: float) -> bool:
        """Whether it may be given a request."""
        if self.power is not PowerState.AWAKE or (self.limit is not None and self.outstanding >= self.limit):
            return False
        return self.open_until_s is None or (now_s >= self.open_until_s and not self.probing)


class Balancer:
    """The endpoints of one pool; all times are seconds on the clock that the caller passes in.

    Attributes:
        dispatch: `pack` needs targets: requests are spread until all are known.
    """

    def __init__(
        self, limits: Mapping[str, int | None], settings: CircuitBreakerSettings, *, dispatch: Dispatch = "spread"
    ) -> None:
        """Start with all endpoints awake, their circuits closed, and no targets.

        Args:
            limits: most requests at once, by endpoint in the order of packing; None: unlimited.
        """
        self.dispatch: Dispatch = dispatch
        self._endpoints = {name: EndpointState(name, limit) for name, limit in limits.items()}
        self._settings = settings
        self._turn = 0
        self._share = 1.0
        self._targets_known = False
        self._outstanding = 0
        self._mean_outstanding = 0.0
        self._active = 1
        self._ended_with_spare = 0
        self._update()

    @property
    def packs(self) -> bool:
        """Whether requests are packed: as `dispatch` says, and all targets are known."""
        return self._targets_known and self.dispatch == "pack"

    def set_targets(self, targets: Mapping[str, int], *, share: float) -> None:
        """Set the targets.

        Args:
            targets: requests that an endpoint is to have at once, of all processes together; absent: unknown.
            share: share of all requests that this process gets.
        """
        self._share = share
        for one in self._endpoints.values():
            target = targets.get(one.name)
            one.target = None if target is None else max(1, round(target * share))
        self._targets_known = all(one.target is not None for one in self._endpoints.values())
        self._update()

    def choose(self, now_s: float, *, avoid: Collection[str] = ()) -> str | None:
        """The endpoint for the next request; None while none may be given one. Call `began` next.

        Args:
            avoid: endpoints at which this request has failed; chosen only if there is no other.
        """
        admitting = [one for one in self._endpoints.values() if one.admits(now_s)]
        if not admitting:
            return None
        candidates = [one for one in admitting if one.name not in avoid] or admitting
        # Half-open endpoints come first, because only a probe brings them back.
        half_open = [one for one in candidates if one.open_until_s is not None]
        if self.packs and not half_open:
            return self._pack(candidates).name
        return self._spread(half_open or candidates).name

    def next_admission_s(self, now_s: float) -> float:
        """Seconds until an endpoint may be given a request, as far as time decides; 0 if one may be now.

        Infinite while every endpoint is at capacity, asleep, or has a probe in flight.
        """
        waits = [
            0.0 if one.open_until_s is None else max(0.0, one.open_until_s - now_s)
            for one in self._endpoints.values()
            if one.power is PowerState.AWAKE and not one.probing and not one.at_capacity
        ]
        return min(waits, default=float("inf"))

    def began(self, name: str) -> bool:
        """A request was sent to the endpoint that `choose` named; returns whether it is the probe."""
        endpoint = self._endpoints[name]
        endpoint.outstanding += 1
        self._outstanding += 1
        # Arrivals see the mean over time; as many as are in flight arrive in a mean call time.
        self._mean_outstanding += (self._outstanding - self._mean_outstanding) / (MEAN_CALLS * self._outstanding)
        if endpoint.open_until_s is None:
            return False
        endpoint.probing = True
        return True

    def ended(self, name: str, *, probe: bool) -> None:
        """The request has ended; `succeeded` or `failed` reports how."""
        if self._active > 1 and self.packs:
            self._deactivate_last_if_spare()
        endpoint = self._endpoints[name]
        endpoint.outstanding -= 1
        self._outstanding -= 1
        if probe:
            endpoint.probing = False

    def check_began(self, name: str) -> bool:
        """A health check has started; returns whether it is the probe."""
        endpoint = self._endpoints[name]
        if endpoint.usable:
            return False
        endpoint.probing = True
        return True

    def check_ended(self, name: str, *, probe: bool) -> None:
        """The health check has ended; `healthy` or `failed` reports how."""
        if probe:
            self._endpoints[name].probing = False

    def succeeded(self, name: str) -> bool:
        """The endpoint answered a request; returns whether this closed its circuit."""
        endpoint = self._endpoints[name]
        was_open = endpoint.open_until_s is not None
        endpoint.failures = endpoint.ejections = 0
        if was_open:
            endpoint.open_until_s = None
            self._update()
        return was_open

    def healthy(self, name: str) -> bool:
        """The endpoint's health check succeeded; returns whether this closed its circuit, or woke it."""
        endpoint = self._endpoints[name]
        was_usable = endpoint.usable
        if endpoint.power is PowerState.WAKING:
            endpoint.power = PowerState.AWAKE
        endpoint.failures = min(endpoint.failures, self._settings.circuit_failures - 1)
        endpoint.open_until_s = None
        self._update()
        return endpoint.usable and not was_usable

    def failed(self, name: str, now_s: float) -> bool:
        """The endpoint failed; returns whether this opened its circuit. Those that are not awake have no failures."""
        endpoint = self._endpoints[name]
        if endpoint.power is not PowerState.AWAKE:
            return False
        endpoint.failures += 1
        if endpoint.open_until_s is not None:
            if now_s < endpoint.open_until_s:
                return False  # a request that was sent before the circuit opened
        elif endpoint.failures < self._settings.circuit_failures:
            return False
        backoff_s = self._settings.circuit_open_s * 2.0 ** min(endpoint.ejections, 30)
        endpoint.ejections += 1
        endpoint.open_until_s = now_s + min(self._settings.circuit_open_max_s, backoff_s)
        self._update()
        return True

    def set_asleep(self, names: Collection[str]) -> list[str]:
        """Let these endpoints sleep, and all others be awake.

        Returns:
            The endpoints that are to wake up: they are used after their next successful health check.
        """
        waking = []
        for one in self._endpoints.values():
            if one.name in names:
                one.power = PowerState.ASLEEP
                one.failures = one.ejections = 0
                one.open_until_s = None
            elif one.power is PowerState.ASLEEP:
                one.power = PowerState.WAKING
                waking.append(one.name)
        self._update()
        return waking

    def power(self, name: str) -> PowerState:
        """The endpoint's power state."""
        return self._endpoints[name].power

    def available(self) -> list[str]:
        """Endpoints that are awake and whose circuit is closed."""
        return [one.name for one in self._endpoints.values() if one.usable]

    def due_for_probe(self, now_s: float) -> list[str]:
        """Endpoints that are waking, or whose circuit is half-open, without a probe in flight."""
        return [
            one.name
            for one in self._endpoints.values()
            if not one.probing
            and (
                one.power is PowerState.WAKING
                or (one.power is PowerState.AWAKE and one.open_until_s is not None and now_s >= one.open_until_s)
            )
        ]

    @property
    def at_capacity(self) -> bool:
        """Whether every endpoint that is awake has as many requests in flight as it may have; False if none is."""
        awake = [one for one in self._endpoints.values() if one.power is PowerState.AWAKE]
        return bool(awake) and all(one.at_capacity for one in awake)

    def outstanding(self) -> dict[str, int]:
        """Requests in flight, by endpoint."""
        return {one.name: one.outstanding for one in self._endpoints.values()}

    def _spread(self, candidates: Sequence[EndpointState]) -> EndpointState:
        """The endpoint with the fewest requests in flight; ties are broken round-robin."""
        self._turn += 1
        count = len(candidates)
        best = min(range(count), key=lambda index: (candidates[index].outstanding, (index - self._turn) % count))
        return candidates[best]

    def _pack(self, candidates: Sequence[EndpointState]) -> EndpointState:
        """The first active endpoint that is not filled, else the one with the least load for its target."""
        chosen = self._first_unfilled(candidates)
        while chosen is None and self._active < len(self._usable) and self._is_full():
            self._set_active(self._active + 1)
            chosen = self._first_unfilled(candidates)
        if chosen is not None:
            return chosen
        active = [one for one in self._usable[: self._active] if one in candidates] or candidates
        return next((one for one in active if one.relative_load < 1.0), None) or min(
            active, key=lambda one: one.relative_load
        )

    def _first_unfilled(self, candidates: Sequence[EndpointState]) -> EndpointState | None:
        """The first active endpoint with fewer requests than it is to be filled to."""
        for one, fill in zip(self._usable, self._fills, strict=False):
            if one.outstanding < fill and one in candidates:
                return one
        return None

    def _is_full(self) -> bool:
        """Whether the active endpoints are at their targets, and not by chance."""
        target = sum(self._targets[: self._active])
        load = sum(one.outstanding for one in self._usable[: self._active])
        by_chance = CHANCE_DEVIATIONS * math.sqrt(target * (1.0 - self._share))
        return load >= target and (load >= target + by_chance or self._mean_outstanding >= target)

    def _deactivate_last_if_spare(self) -> None:
        """One endpoint fewer is active once the load has fitted on the others for a while.

        Ended requests measure the time: as many as are in flight end in a mean call time.
        """
        if self._outstanding > self._fits_on_fewer:
            self._ended_with_spare = 0
            return
        self._ended_with_spare += 1
        if self._ended_with_spare >= SPARE_CALLS * self._outstanding:
            self._set_active(self._active - 1)

    def _set_active(self, count: int) -> None:
        self._active = count
        self._ended_with_spare = 0
        self._update()

    def _update(self) -> None:
        """Update what follows from the endpoints' states, their targets, and the number of active ones."""
        self._usable = [one for one in self._endpoints.values() if one.usable]
        self._active = max(1, min(self._active, len(self._usable)))
        self._targets = [one.target or 1 for one in self._usable]
        # Requests up to which the active endpoints are filled in order.
        self._fills = [float(target) for target in self._targets[: self._active]]
        for place in range(max(0, self._active - 2), self._active if self._active > 1 else 0):
            self._fills[place] *= LAST_TWO_FILL
        fewer = sum(self._targets[: self._active - 1])
        self._fits_on_fewer = fewer - SPARE_DEVIATIONS * math.sqrt(fewer)
