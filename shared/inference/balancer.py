"""Which endpoint of a pool is asked: the least busy one that has room and is not known to fail.

An endpoint that fails several times in a row is left alone for a while, longer after each relapse. Then one request, or
the health check, is let through; if it succeeds the endpoint is back, if not it cools down again. A health check tells
that the server is there, not that its model generates: until it has answered a request, one failure more sends it back.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CoolDownRules:
    """When an endpoint is left alone; seconds on the clock that is handed in.

    Attributes:
        failures: in a row, before it is left alone.
        first_s: how long at first; doubles with every relapse.
        longest_s: how long at most.
    """

    failures: int = 3
    first_s: float = 1.0
    longest_s: float = 15.0


@dataclass(slots=True)
class EndpointState:
    """What is known of one endpoint.

    Attributes:
        limit: most requests at once; null: unbounded.
        outstanding: requests that it is working on.
        failures: in a row.
        relapses: how often it was left alone since it last worked.
        closed_until_s: it is left alone until then; null: it works, as far as is known.
        probing: it was left alone, and one request has been let through.
    """

    name: str
    limit: int | None = None
    outstanding: int = 0
    failures: int = 0
    relapses: int = 0
    closed_until_s: float | None = None
    probing: bool = False

    @property
    def full(self) -> bool:
        """Whether it works on as many requests as it may."""
        return self.limit is not None and self.outstanding >= self.limit


class Balancer:
    """Chooses among the endpoints of one pool."""

    def __init__(self, limits: Mapping[str, int | None], rules: CoolDownRules) -> None:
        """Set up.

        Args:
            limits: most requests at once, by endpoint; null: unbounded.
        """
        self._endpoints = {name: EndpointState(name, limit) for name, limit in limits.items()}
        self._rules = rules
        self._turn = 0

    def choose(self, now_s: float, *, avoid: Collection[str] = ()) -> str | None:
        """The endpoint to ask next; null while all are full or left alone. `began` must follow.

        Args:
            avoid: endpoints that have already failed this request; asked again only if there is no other.
        """
        ready = [one for one in self._endpoints.values() if self._admits(one, now_s)]
        if not ready:
            return None
        fresh = [one for one in ready if one.name not in avoid] or ready
        # A probe goes first: it is what brings an endpoint back. Ties are broken in turn.
        self._turn += 1
        count = len(fresh)
        best = min(
            range(count),
            key=lambda index: (
                fresh[index].closed_until_s is None,
                fresh[index].outstanding,
                (index - self._turn) % count,
            ),
        )
        return fresh[best].name

    def opens_in_s(self, now_s: float) -> float:
        """Seconds until an endpoint may be asked again, 0 if one may be now; infinite while
        all are full or tried by a probe."""
        waits = [
            0.0 if one.closed_until_s is None else max(0.0, one.closed_until_s - now_s)
            for one in self._endpoints.values()
            if not one.probing and not one.full
        ]
        return min(waits, default=float("inf"))

    def began(self, name: str) -> bool:
        """A request was given to the endpoint that `choose` named; returns whether it is the probe."""
        endpoint = self._endpoints[name]
        endpoint.outstanding += 1
        if endpoint.closed_until_s is None:
            return False
        endpoint.probing = True
        return True

    def ended(self, name: str, *, probe: bool) -> None:
        """The request is no longer with the endpoint, however it ended; says nothing about its health."""
        endpoint = self._endpoints[name]
        endpoint.outstanding -= 1
        if probe:
            endpoint.probing = False

    def succeeded(self, name: str) -> bool:
        """The endpoint answered a request; returns whether it was left alone until now."""
        endpoint = self._endpoints[name]
        was_closed = endpoint.closed_until_s is not None
        endpoint.failures = endpoint.relapses = 0
        endpoint.closed_until_s = None
        return was_closed

    def healthy(self, name: str) -> bool:
        """The endpoint's health check succeeded; returns whether it was left alone until now."""
        endpoint = self._endpoints[name]
        was_closed = endpoint.closed_until_s is not None
        endpoint.failures = min(endpoint.failures, self._rules.failures - 1)
        endpoint.closed_until_s = None
        return was_closed

    def failed(self, name: str, now_s: float) -> bool:
        """The endpoint failed; returns whether it is left alone from now on."""
        endpoint = self._endpoints[name]
        endpoint.failures += 1
        if endpoint.closed_until_s is not None:
            if now_s < endpoint.closed_until_s:
                return False  # a request that began before it was left alone
        elif endpoint.failures < self._rules.failures:
            return False
        pause_s = min(self._rules.longest_s, self._rules.first_s * 2.0 ** min(endpoint.relapses, 30))
        endpoint.relapses += 1
        endpoint.closed_until_s = now_s + pause_s
        return True

    def working(self) -> list[str]:
        """Endpoints that are not left alone."""
        return [one.name for one in self._endpoints.values() if one.closed_until_s is None]

    def due_for_probe(self, now_s: float) -> list[str]:
        """Endpoints that were left alone long enough, with no request let through yet."""
        return [
            one.name
            for one in self._endpoints.values()
            if one.closed_until_s is not None and now_s >= one.closed_until_s and not one.probing
        ]

    @property
    def full(self) -> bool:
        """Whether every endpoint works on as many requests as it may."""
        return all(one.full for one in self._endpoints.values())

    def outstanding(self) -> dict[str, int]:
        """Requests being worked on, by endpoint."""
        return {one.name: one.outstanding for one in self._endpoints.values()}

    def _admits(self, endpoint: EndpointState, now_s: float) -> bool:
        if endpoint.full:
            return False
        if endpoint.closed_until_s is None:
            return True
        return now_s >= endpoint.closed_until_s and not endpoint.probing
