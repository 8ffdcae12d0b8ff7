"""One pool of inference servers: a client for each endpoint, dispatch, load, and health checks."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Final, Protocol

from shared.inference.balancer import Balancer, CircuitBreakerSettings, PowerState
from shared.inference.base import EndpointUnavailable, InferenceClient
from shared.inference.chat import ChatTemplate
from shared.inference.openai import OpenAIClient
from shared.inference.targets import TargetBatches
from shared.inference.tokens import Tokenizer
from shared.inference.triton.client import TritonClient
from shared.messages import EndpointLoad, PoolCapacity, PoolLoad
from shared.pools import Dispatch, Endpoint, Pool
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

MAX_WAIT_S: Final = 1.0
"""Wall seconds after which a request that waits for an endpoint chooses again, even if nothing has changed."""

_log = get_logger(__name__)


class ClientFactory(Protocol):
    """Creates the client of an endpoint, which does not connect yet; the tokenizer counts where the server does not."""

    def __call__(  # noqa: D102
        self, pool: Pool, endpoint: Endpoint, *, clock: Clock, tokenizer: Tokenizer | None
    ) -> InferenceClient: ...


CLIENTS: Final[Mapping[str, ClientFactory]] = {
    "triton": TritonClient.of_endpoint,
    "openai": OpenAIClient.of_endpoint,
}
"""The client of each kind of inference server. A new kind is one module, and one entry here."""


class Lease:
    """One request in flight on an endpoint, as a context manager that yields the endpoint's client."""

    __slots__ = ("_endpoint", "_pool", "_probe", "started_at")

    def __init__(self, pool: "ServingPool", endpoint: str, started_at: datetime) -> None:
        self._pool = pool
        self._endpoint = endpoint
        self._probe = False
        self.started_at = started_at

    def __enter__(self) -> InferenceClient:
        self._probe = self._pool.balancer.began(self._endpoint)
        self._pool.running[self._endpoint][self] = None
        return self._pool.clients[self._endpoint]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._pool.running[self._endpoint][self]
        self._pool.balancer.ended(self._endpoint, probe=self._probe)
        self._pool.capacity_freed()


class ServingPool:
    """The endpoints of one pool: their clients, load and health, and the chat template of their model.

    Attributes:
        targets: requests that every endpoint is to have at once.
        arrivals: requests for the pool so far.
        clients, running: by endpoint; the requests in flight in the order of their start.
    """

    def __init__(
        self,
        pool: Pool,
        template: ChatTemplate,
        *,
        clock: Clock,
        circuit_breaker: CircuitBreakerSettings,
        on_failure: Callable[[str], None],
        on_capacity: Callable[[], None] = lambda: None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Create the clients; nothing connects yet.

        Args:
            on_failure: called with the endpoint's name after every failed attempt and health check.
            on_capacity: called when a request has left an endpoint.
            tokenizer: counts tokens where the servers do not.

        Raises:
            FleetError: a file for TLS cannot be used.
        """
        self.name = pool.name
        self.template = template
        self.targets = TargetBatches(pool)
        self.arrivals = 0
        self.clients = {
            endpoint.name: CLIENTS[pool.kind](pool, endpoint, clock=clock, tokenizer=tokenizer)
            for endpoint in pool.endpoints
        }
        self.running: dict[str, dict[Lease, None]] = {name: {} for name in self.clients}
        limits = {endpoint.name: endpoint.max_in_flight for endpoint in pool.endpoints}
        self.limited = None not in limits.values()
        self.balancer = Balancer(limits, circuit_breaker, dispatch=pool.dispatch)
        self._pool = pool
        self._capacity: PoolCapacity | None = None
        self._on_failure = on_failure
        self._on_capacity = on_capacity
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._responding: set[str] = set()
        self._unconfirmed = set(self.clients)  # endpoints that have answered no request since the last health check
        self._spreading_logged = False
        self._reachable_logged = True

    def arrived(self) -> None:
        """Count a request for the pool."""
        self.arrivals += 1

    def choose(self, *, avoid: set[str]) -> str | None:
        """The endpoint for the next request; None while none may be given one. See `Balancer.choose`."""
        return self.balancer.choose(_now_s(), avoid=avoid)

    def lease(self, endpoint: str, started_at: datetime) -> Lease:
        """The client of an endpoint; counts as one request in flight, since an event time."""
        return Lease(self, endpoint, started_at)

    @property
    def at_capacity(self) -> bool:
        """Whether one more request would have to wait until others end."""
        return self.balancer.at_capacity or (self.limited and bool(self._waiting))

    @property
    def reachable(self) -> bool:
        """Whether an endpoint is awake, responds, and its circuit is closed."""
        return any(name in self._responding for name in self.balancer.available())

    @property
    def in_use(self) -> int:
        """Endpoints with a request in flight."""
        return sum(bool(running) for running in self.running.values())

    def unreachable(self) -> str:
        """Why no request can be served now, for people."""
        asleep = sum(self.balancer.power(name) is PowerState.ASLEEP for name in self.clients)
        if asleep == len(self.clients):
            return f"all {asleep} endpoints of pool {self.name} are asleep"
        sleeping = f"; {asleep} are asleep" if asleep else ""
        return f"all endpoints of pool {self.name} that are awake fail{sleeping}"

    def load(self, *, arrivals_before: int) -> PoolLoad:
        """What is running now.

        Args:
            arrivals_before: `arrivals` at the last report.
        """
        return PoolLoad(
            pool=self.name,
            arrivals=self.arrivals - arrivals_before,
            waiting=len(self._waiting),
            endpoints={
                name: EndpointLoad(
                    in_flight=len(running), oldest_started_at=next(iter(running)).started_at if running else None
                )
                for name, running in self.running.items()
            },
        )

    def update_capacity(self, capacity: PoolCapacity) -> None:
        """Note which endpoints are to be awake; `refresh` follows it."""
        self._capacity = capacity

    def refresh(
        self, now: datetime, *, share: float, reference_dispatch: Dispatch | None, beside_evaluators: bool
    ) -> None:
        """Apply targets, dispatch and capacity.

        Args:
            now: event time.
            share: share of all requests that this process gets.
            reference_dispatch: dispatch of the reference block that is running; None outside of blocks.
            beside_evaluators: leave the calls of evaluators out of the targets.
        """
        balancer = self.balancer
        balancer.dispatch = reference_dispatch or self._pool.dispatch
        capacity = self._valid_capacity(now)
        reserved = capacity.reserved if beside_evaluators and capacity is not None else {}
        targets = {name: max(1, target - reserved.get(name, 0)) for name, target in self.targets.by_endpoint.items()}
        balancer.set_targets(targets, share=share)
        if balancer.dispatch == "pack" and not balancer.packs and self.arrivals and not self._spreading_logged:
            self._spreading_logged = True
            _log.info("requests are spread until the target batch is known from a learned curve", pool=self.name)
        waking = balancer.set_asleep(self._asleep(now))
        if waking:
            _log.info("endpoints are to be awake again", pool=self.name, endpoints=waking)

    def succeeded(self, endpoint: str) -> None:
        """An endpoint answered a request."""
        self._unconfirmed.discard(endpoint)
        self._responded(endpoint, back_in_use=self.balancer.succeeded(endpoint))

    def failed(self, endpoint: str, error: str) -> None:
        """An endpoint failed; the error's text must not quote a prompt."""
        if self.balancer.power(endpoint) is not PowerState.AWAKE:
            return  # its model is not loaded
        self._on_failure(endpoint)
        if self.balancer.failed(endpoint, _now_s()):
            _log.warning("circuit breaker opened, endpoint ejected", endpoint=endpoint, pool=self.name, error=error)
            self._wake(len(self._waiting))

    async def wait_for_endpoint(self, timeout_s: float) -> None:
        """Wait until an endpoint may be given a request, at most `timeout_s` (wall)."""
        wait_s = min(timeout_s, self.balancer.next_admission_s(_now_s()), MAX_WAIT_S)
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(changed)
        try:
            async with asyncio.timeout(max(wait_s, 0.001)):
                await changed
        except TimeoutError:
            return
        finally:
            if changed in self._waiting:
                self._waiting.remove(changed)
            self._on_capacity()

    def capacity_freed(self) -> None:
        """A request has left an endpoint: let the one that has waited longest choose again."""
        self._wake(1)
        self._on_capacity()

    async def check(self, *, timeout_s: float, every: bool) -> None:
        """Check endpoints that are due for a probe.

        Args:
            timeout_s: for one endpoint, wall.
            every: also those in use, unless they have answered a request since the last check.
        """
        due = self.balancer.due_for_probe(_now_s())
        if every:
            due += [name for name in self.balancer.available() if name in self._unconfirmed]
            self._unconfirmed = set(self.clients)
        await asyncio.gather(*(self._check(name, timeout_s) for name in due))
        if self.reachable != self._reachable_logged:
            self._reachable_logged = self.reachable
            if not self.reachable:
                _log.warning(self.unreachable(), pool=self.name)

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(client.close() for client in self.clients.values()))

    async def _check(self, endpoint: str, timeout_s: float) -> None:
        client = self.clients[endpoint]
        probe = self.balancer.check_began(endpoint)
        try:
            await client.probe(timeout_s=timeout_s)
            problem = None if await client.is_ready(timeout_s=timeout_s) else "the model is not ready"
        except EndpointUnavailable as error:
            problem = str(error)
        finally:
            self.balancer.check_ended(endpoint, probe=probe)
        if problem is None:
            self._responded(endpoint, back_in_use=self.balancer.healthy(endpoint))
            self._unconfirmed.add(endpoint)
        else:
            self._responding.discard(endpoint)
            self.failed(endpoint, problem)

    def _responded(self, endpoint: str, *, back_in_use: bool) -> None:
        self._responding.add(endpoint)
        if back_in_use:
            _log.info("endpoint back in use", endpoint=endpoint, pool=self.name)
            self._wake(len(self._waiting))

    def _asleep(self, now: datetime) -> set[str]:
        """Endpoints that may be asleep; none if the newest capacity message has expired."""
        capacity = self._valid_capacity(now)
        if capacity is None or not self._pool.sleep:
            return set()
        return set(self.clients).difference(capacity.awake)

    def _valid_capacity(self, now: datetime) -> PoolCapacity | None:
        capacity = self._capacity
        return None if capacity is None or now > capacity.valid_until else capacity

    def _wake(self, count: int) -> None:
        """Let the `count` requests that have waited longest choose an endpoint again."""
        for _ in range(min(count, len(self._waiting))):
            changed = self._waiting.popleft()
            if not changed.done():
                changed.set_result(None)


def _now_s() -> float:
    """The event loop's clock: circuit breakers concern our own machines, so they run in wall time, not event time."""
    return asyncio.get_running_loop().time()
