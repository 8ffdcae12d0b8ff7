"""The pools of inference servers: a client for each endpoint, load balancing, and health checks."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Protocol

from shared.fleet import Endpoint, Fleet, Pool
from shared.inference.balancer import Balancer, CircuitBreakerSettings
from shared.inference.base import EndpointUnavailable, InferenceClient
from shared.inference.chat import ChatTemplate
from shared.inference.chat_sources import ChatTemplates
from shared.inference.tokens import Tokenizer, Tokenizers
from shared.inference.triton.client import TritonClient
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

PROBE_INTERVAL_S: Final = 0.25
"""Wall seconds between two checks whether an ejected endpoint is due for a probe."""

MAX_WAIT_S: Final = 1.0
"""Wall seconds after which a request that waits for an endpoint chooses again, even if nothing has changed."""

_log = get_logger(__name__)


class ClientFactory(Protocol):
    """Creates the client of an endpoint; see `create_client`."""

    def __call__(  # noqa: D102
        self, pool: Pool, endpoint: Endpoint, *, clock: Clock, tokenizer: Tokenizer | None
    ) -> InferenceClient: ...


CLIENTS: Final[Mapping[str, ClientFactory]] = {"triton": TritonClient.of_endpoint}
"""The client of each kind of inference server. A new kind is one module, and one entry here."""


def create_client(
    pool: Pool, endpoint: Endpoint, *, clock: Clock, tokenizer: Tokenizer | None, kind: str = "triton"
) -> InferenceClient:
    """Create the client of an endpoint; nothing connects yet.

    Args:
        tokenizer: counts tokens where the server does not.
        kind: of inference server, a key of `CLIENTS`. The fleet file has no field for it while there is only one.

    Raises:
        FleetError: a file for TLS cannot be used.
    """
    return CLIENTS[kind](pool, endpoint, clock=clock, tokenizer=tokenizer)


class ServingPool:
    """The endpoints of one pool: their clients, load and health, and the chat template of their model."""

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
        self._clients = {
            endpoint.name: create_client(pool, endpoint, clock=clock, tokenizer=tokenizer)
            for endpoint in pool.endpoints
        }
        limits = {endpoint.name: endpoint.max_in_flight for endpoint in pool.endpoints}
        self.limited = None not in limits.values()
        self._balancer = Balancer(limits, circuit_breaker)
        self._on_failure = on_failure
        self._on_capacity = on_capacity
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._responding: set[str] = set()
        self._unconfirmed = set(self._clients)  # endpoints that have answered no request since the last health check

    def choose(self, *, avoid: set[str]) -> str | None:
        """The endpoint for the next request; None while none may be given one. See `Balancer.choose`."""
        return self._balancer.choose(_now_s(), avoid=avoid)

    @contextmanager
    def lease(self, endpoint: str) -> Iterator[InferenceClient]:
        """The client of an endpoint; counts as one request in flight."""
        probe = self._balancer.began(endpoint)
        try:
            yield self._clients[endpoint]
        finally:
            self._balancer.ended(endpoint, probe=probe)
            self._wake(1)
            self._on_capacity()

    @property
    def at_capacity(self) -> bool:
        """Whether one more request would have to wait until others end."""
        return self._balancer.at_capacity or (self.limited and bool(self._waiting))

    @property
    def reachable(self) -> bool:
        """Whether an endpoint responds and its circuit is closed."""
        return any(name in self._responding for name in self._balancer.available())

    def succeeded(self, endpoint: str) -> None:
        """An endpoint answered a request."""
        self._unconfirmed.discard(endpoint)
        self._responded(endpoint, circuit_closed=self._balancer.succeeded(endpoint))

    def failed(self, endpoint: str, error: str) -> None:
        """An endpoint failed; the error's text must not quote a prompt."""
        self._on_failure(endpoint)
        if self._balancer.failed(endpoint, _now_s()):
            _log.warning("circuit breaker opened, endpoint ejected", endpoint=endpoint, pool=self.name, error=error)
            self._wake(len(self._waiting))

    async def wait_for_endpoint(self, timeout_s: float) -> None:
        """Wait until an endpoint may be given a request, at most `timeout_s` (wall)."""
        wait_s = min(timeout_s, self._balancer.next_admission_s(_now_s()), MAX_WAIT_S)
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

    async def check(self, *, timeout_s: float, every: bool) -> None:
        """Check endpoints that are due for a probe.

        Args:
            timeout_s: for one endpoint, wall.
            every: also those in use, unless they have answered a request since the last check.
        """
        due = self._balancer.due_for_probe(_now_s())
        if every:
            due += [name for name in self._balancer.available() if name in self._unconfirmed]
            self._unconfirmed = set(self._clients)
        await asyncio.gather(*(self._check(name, timeout_s) for name in due))

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def _check(self, endpoint: str, timeout_s: float) -> None:
        with self.lease(endpoint) as client:
            try:
                await client.probe(timeout_s=timeout_s)
                problem = None if await client.is_ready(timeout_s=timeout_s) else "the model is not ready"
            except EndpointUnavailable as error:
                problem = str(error)
        if problem is None:
            self._responded(endpoint, circuit_closed=self._balancer.healthy(endpoint))
            self._unconfirmed.add(endpoint)
        else:
            self._responding.discard(endpoint)
            self.failed(endpoint, problem)

    def _responded(self, endpoint: str, *, circuit_closed: bool) -> None:
        self._responding.add(endpoint)
        if circuit_closed:
            _log.info("circuit breaker closed, endpoint back in use", endpoint=endpoint, pool=self.name)
            self._wake(len(self._waiting))

    def _wake(self, count: int) -> None:
        """Let the `count` requests that have waited longest choose an endpoint again."""
        for _ in range(min(count, len(self._waiting))):
            changed = self._waiting.popleft()
            if not changed.done():
                changed.set_result(None)


class Pools:
    """Every pool that serves a model of the fleet, and on request the judge's pool."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        clock: Clock,
        circuit_breaker: CircuitBreakerSettings,
        on_failure: Callable[[str], None],
        check_interval_s: float,
        check_timeout_s: float,
        with_judge: bool = False,
    ) -> None:
        """Create the pools; nothing connects yet.

        Args:
            on_failure: called with the endpoint's name after every failed attempt and health check.
            check_interval_s, check_timeout_s: of the health checks, wall.
            with_judge: include the pool of the fleet's judge.

        Raises:
            ChatTemplateError: a pool's chat template is missing or unusable.
            FleetError: a pool's tokenizer or a file for TLS cannot be used.
        """
        templates, tokenizers = ChatTemplates(), Tokenizers()
        judge = None if fleet.judge is None else fleet.judge.pool
        self._capacity = asyncio.Event()
        self._pools = {
            pool.name: ServingPool(
                pool,
                templates.load(fleet.chat_template_of(pool)),
                clock=clock,
                circuit_breaker=circuit_breaker,
                on_failure=on_failure,
                on_capacity=self._capacity.set,
                tokenizer=tokenizers.load(fleet.tokenizer_of(pool)),
            )
            for pool in fleet.pools
            if pool.model is not None or (with_judge and pool.name == judge)
        }
        self._by_model = {
            model.name: [self._pools[pool.name] for pool in fleet.pools_of(model.name)] for model in fleet.models
        }
        self._check_interval_s = check_interval_s
        self._check_timeout_s = check_timeout_s

    def __getitem__(self, name: str) -> ServingPool:
        return self._pools[name]

    async def wait_for_capacity(self) -> None:
        """Wait until some endpoint has capacity for one more request.

        Returns at once where a pool has an endpoint without a limit.
        """
        if not all(pool.limited for pool in self._pools.values()):
            return
        # Requests that were started just now take their capacity first.
        await asyncio.sleep(0)
        while all(pool.at_capacity for pool in self._pools.values()):
            self._capacity.clear()
            await self._capacity.wait()

    def unreachable(self) -> str | None:
        """Why the service is not ready: the models that no endpoint serves; None when every model is served."""
        missing = [model for model, pools in self._by_model.items() if not any(pool.reachable for pool in pools)]
        return f"no endpoint answers for {', '.join(missing)}" if missing else None

    async def watch(self) -> None:
        """Check the endpoints' health, without end."""
        now = asyncio.get_running_loop().time
        next_round = now()
        while True:
            every = now() >= next_round
            if every:
                next_round = now() + self._check_interval_s
            await asyncio.gather(
                *(pool.check(timeout_s=self._check_timeout_s, every=every) for pool in self._pools.values())
            )
            await asyncio.sleep(PROBE_INTERVAL_S)

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))


def _now_s() -> float:
    """The event loop's clock: circuit breakers concern our own machines, so they run in wall time, not event time."""
    return asyncio.get_running_loop().time()
