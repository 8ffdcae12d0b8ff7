"""Chooses the endpoint of a pool for a request: the least busy one with free capacity whose circuit is closed.

A circuit breaker per endpoint: after several failures in a row the circuit opens, and the endpoint is ejected for a
while, for longer after each re-ejection. Then the circuit is half-open: one request, or a health check, probes the
endpoint. Success closes the circuit, failure opens it again. A health check shows that the server responds, not that
its model generates: until the endpoint has answered a request, one more failure opens the circuit again.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, Field, model_validator


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


@dataclass(slots=True)
class EndpointState:
    """Load and circuit breaker of one endpoint.

    Attributes:
        limit: most requests at once; None: unlimited.
        outstanding: requests in flight.
        failures: failures in a row.
        ejections: how often the circuit opened since the last request succeeded.
        open_until_s: the circuit is open until then, and half-open afterwards; None: the circuit is closed.
        probing: the circuit is half-open and its one request is in flight.
    """

    name: str
    limit: int | None = None
    outstanding: int = 0
    failures: int = 0
    ejections: int = 0
    open_until_s: float | None = None
    probing: bool = False

    @property
    def at_capacity(self) -> bool:
        """Whether it has as many requests in flight as it may have."""
        return self.limit is not None and self.outstanding >= self.limit

    def admits(self, now_s: float) -> bool:
        """Whether it may be given a request."""
        if self.at_capacity:
            return False
        return self.open_until_s is None or (now_s >= self.open_until_s and not self.probing)


class Balancer:
    """The endpoints of one pool; all times are seconds on the clock that the caller passes in."""

    def __init__(self, limits: Mapping[str, int | None], settings: CircuitBreakerSettings) -> None:
        """Start with all circuits closed.

        Args:
            limits: most requests at once, by endpoint; None: unlimited.
        """
        self._endpoints = {name: EndpointState(name, limit) for name, limit in limits.items()}
        self._settings = settings
        self._turn = 0

    def choose(self, now_s: float, *, avoid: Collection[str] = ()) -> str | None:
        """The endpoint for the next request; None while all are at capacity or ejected. Call `began` next.

        Args:
            avoid: endpoints at which this request has failed; chosen only if there is no other.
        """
        admitting = [one for one in self._endpoints.values() if one.admits(now_s)]
        if not admitting:
            return None
        candidates = [one for one in admitting if one.name not in avoid] or admitting
        # Half-open endpoints come first, because only a probe brings them back. Ties are broken round-robin.
        self._turn += 1
        count = len(candidates)
        best = min(
            range(count),
            key=lambda index: (
                candidates[index].open_until_s is None,
                candidates[index].outstanding,
                (index - self._turn) % count,
            ),
        )
        return candidates[best].name

    def next_admission_s(self, now_s: float) -> float:
        """Seconds until an endpoint may be given a request, as far as time decides; 0 if one may be now.

        Infinite while every endpoint is at capacity or has a probe in flight.
        """
        waits = [
            0.0 if one.open_until_s is None else max(0.0, one.open_until_s - now_s)
            for one in self._endpoints.values()
            if not one.probing and not one.at_capacity
        ]
        return min(waits, default=float("inf"))

    def began(self, name: str) -> bool:
        """A request was sent to the endpoint that `choose` named; returns whether it is the probe."""
        endpoint = self._endpoints[name]
        endpoint.outstanding += 1
        if endpoint.open_until_s is None:
            return False
        endpoint.probing = True
        return True

    def ended(self, name: str, *, probe: bool) -> None:
        """The request has ended; `succeeded` or `failed` reports how."""
        endpoint = self._endpoints[name]
        endpoint.outstanding -= 1
        if probe:
            endpoint.probing = False

    def succeeded(self, name: str) -> bool:
        """The endpoint answered a request; returns whether this closed its circuit."""
        endpoint = self._endpoints[name]
        was_open = endpoint.open_until_s is not None
        endpoint.failures = endpoint.ejections = 0
        endpoint.open_until_s = None
        return was_open

    def healthy(self, name: str) -> bool:
        """The endpoint's health check succeeded; returns whether this closed its circuit."""
        endpoint = self._endpoints[name]
        was_open = endpoint.open_until_s is not None
        endpoint.failures = min(endpoint.failures, self._settings.circuit_failures - 1)
        endpoint.open_until_s = None
        return was_open

    def failed(self, name: str, now_s: float) -> bool:
        """The endpoint failed; returns whether this opened its circuit."""
        endpoint = self._endpoints[name]
        endpoint.failures += 1
        if endpoint.open_until_s is not None:
            if now_s < endpoint.open_until_s:
                return False  # a request that was sent before the circuit opened
        elif endpoint.failures < self._settings.circuit_failures:
            return False
        backoff_s = self._settings.circuit_open_s * 2.0 ** min(endpoint.ejections, 30)
        endpoint.ejections += 1
        endpoint.open_until_s = now_s + min(self._settings.circuit_open_max_s, backoff_s)
        return True

    def available(self) -> list[str]:
        """Endpoints whose circuit is closed."""
        return [one.name for one in self._endpoints.values() if one.open_until_s is None]

    def due_for_probe(self, now_s: float) -> list[str]:
        """Endpoints whose circuit is half-open, without a probe in flight."""
        return [
            one.name
            for one in self._endpoints.values()
            if one.open_until_s is not None and now_s >= one.open_until_s and not one.probing
        ]

    @property
    def at_capacity(self) -> bool:
        """Whether every endpoint has as many requests in flight as it may have."""
        return all(one.at_capacity for one in self._endpoints.values())

    def outstanding(self) -> dict[str, int]:
        """Requests in flight, by endpoint."""
        return {one.name: one.outstanding for one in self._endpoints.values()}
