"""The model servers: a client for each endpoint, chosen by the pool's balancer and looked after in the background."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shared.fleet import Fleet, Pool
from shared.inference.balancer import Balancer, CoolDownRules
from shared.inference.base import EndpointUnavailable
from shared.inference.chat import ChatTemplate
from shared.inference.chat_sources import ChatTemplates
from shared.inference.tokens import Tokenizer, Tokenizers
from shared.inference.triton.channel import credentials_of
from shared.inference.triton.client import TritonClient
from shared.inference.triton.contract import ContractError
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

TICK_S = 0.25
"""Wall seconds between two looks whether an endpoint that was left alone may be probed."""

LONGEST_WAIT_S = 1.0
"""Wall seconds after which a request that waits for an endpoint looks again, whatever it heard."""

_log = get_logger(__name__)


class ServingPool:
    """One pool: its endpoints' clients, their health, and the chat template of its model."""

    def __init__(
        self,
        pool: Pool,
        template: ChatTemplate,
        *,
        clock: Clock,
        rules: CoolDownRules,
        on_failure: Callable[[str], None],
        on_room: Callable[[], None] = lambda: None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Set up; nothing connects yet.

        Args:
            on_room: told when a request has left an endpoint.
            tokenizer: counts tokens where the servers do not.

        Raises:
            FleetError: a file for TLS cannot be used.
        """
        self.name = pool.name
        self.template = template
        self._clients = {
            endpoint.name: TritonClient(
                endpoint.grpc,
                model=pool.triton_model,
                clock=clock,
                name=endpoint.name,
                credentials=credentials_of(pool, endpoint),
                server_name=endpoint.over(pool).tls_server_name,
                tokenizer=tokenizer,
            )
            for endpoint in pool.endpoints
        }
        limits = {endpoint.name: endpoint.max_in_flight for endpoint in pool.endpoints}
        self.limited = None not in limits.values()
        self._balancer = Balancer(limits, rules)
        self._on_failure = on_failure
        self._on_room = on_room
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._heard: set[str] = set()
        self._quiet = set(self._clients)

    def choose(self, *, avoid: set[str]) -> str | None:
        """The endpoint to ask; null while none may be asked."""
        return self._balancer.choose(_now_s(), avoid=avoid)

    @contextmanager
    def lease(self, endpoint: str) -> Iterator[TritonClient]:
        """The client of an endpoint, counted as busy with one request more."""
        probe = self._balancer.began(endpoint)
        try:
            yield self._clients[endpoint]
        finally:
            self._balancer.ended(endpoint, probe=probe)
            self._wake(1)
            self._on_room()

    @property
    def full(self) -> bool:
        """Whether one more request would have to wait for others to end."""
        return self._balancer.full or (self.limited and bool(self._waiting))

    def succeeded(self, endpoint: str) -> None:
        """An endpoint answered a request."""
        self._quiet.discard(endpoint)
        self._reached(endpoint, back=self._balancer.succeeded(endpoint))

    def _reached(self, endpoint: str, *, back: bool) -> None:
        self._heard.add(endpoint)
        if back:
            _log.info("endpoint is back", endpoint=endpoint, pool=self.name)
            self._wake(len(self._waiting))

    def failed(self, endpoint: str, error: str) -> None:
        """An endpoint failed."""
        self._on_failure(endpoint)
        if self._balancer.failed(endpoint, _now_s()):
            _log.warning("endpoint is left alone for a while", endpoint=endpoint, pool=self.name, error=error)
            self._wake(len(self._waiting))

    async def wait_for_endpoint(self, longest_s: float) -> None:
        """Wait until an endpoint may be asked again, at most `longest_s` (wall)."""
        wait_s = min(longest_s, self._balancer.opens_in_s(_now_s()), LONGEST_WAIT_S)
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

    @property
    def reachable(self) -> bool:
        """Whether an endpoint has answered and none since has shown that all are gone."""
        return any(name in self._heard for name in self._balancer.working())

    async def check(self, *, timeout_s: float, every: bool) -> None:
        """Ask endpoints for their health.

        Args:
            every: also those that seem to work, unless they have answered since they were last asked.
        """
        due = self._balancer.due_for_probe(_now_s())
        if every:
            due += [name for name in self._balancer.working() if name in self._quiet]
            self._quiet = set(self._clients)
        await asyncio.gather(*(self._check(name, timeout_s) for name in due))

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def _check(self, endpoint: str, timeout_s: float) -> None:
        with self.lease(endpoint) as client:
            try:
                await client.probe(timeout_s=timeout_s)
                problem = None if await client.is_ready(timeout_s=timeout_s) else "the model is not ready"
            except (EndpointUnavailable, ContractError) as error:
                problem = str(error)
        if problem is None:
            self._reached(endpoint, back=self._balancer.healthy(endpoint))
            self._quiet.add(endpoint)
        else:
            self._heard.discard(endpoint)
            self.failed(endpoint, problem)

    def _wake(self, count: int) -> None:
        """Let so many of the requests that wait for an endpoint look again, those that came first."""
        for _ in range(min(count, len(self._waiting))):
            changed = self._waiting.popleft()
            if not changed.done():
                changed.set_result(None)


class Pools:
    """Every pool that serves a model of the fleet; the judge's too where it is asked for."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        clock: Clock,
        rules: CoolDownRules,
        on_failure: Callable[[str], None],
        check_interval_s: float,
        check_timeout_s: float,
        with_judge: bool = False,
    ) -> None:
        """Set up; nothing connects yet.

        Args:
            on_failure: told the endpoint's name at every failed attempt and health check.
            check_interval_s, check_timeout_s: of the health checks, wall.
            with_judge: include the pool of the fleet's judge.

        Raises:
            ChatTemplateError: a pool's chat template is missing or unusable.
            FleetError: a pool's tokenizer or a file for TLS is.
        """
        templates, tokenizers = ChatTemplates(), Tokenizers()
        judge = None if fleet.judge is None else fleet.judge.pool
        self._room = asyncio.Event()
        self._pools = {
            pool.name: ServingPool(
                pool,
                templates.load(fleet.chat_template_of(pool)),
                clock=clock,
                rules=rules,
                on_failure=on_failure,
                on_room=self._room.set,
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

    async def room(self) -> None:
        """Wait until a further request need not wait for others on its way: until some endpoint has room.

        Where no endpoint of a pool has a limit, that is always.
        """
        if not all(pool.limited for pool in self._pools.values()):
            return
        # What was begun just now takes its place first.
        await asyncio.sleep(0)
        while all(pool.full for pool in self._pools.values()):
            self._room.clear()
            await self._room.wait()

    def unreachable(self) -> str | None:
        """Models that no endpoint serves at the moment, in words; null when every model is served."""
        missing = [model for model, pools in self._by_model.items() if not any(pool.reachable for pool in pools)]
        return f"no endpoint answers for {', '.join(missing)}" if missing else None

    async def watch(self) -> None:
        """Look after the endpoints, for ever."""
        now = asyncio.get_running_loop().time
        next_round = now()
        while True:
            every = now() >= next_round
            if every:
                next_round = now() + self._check_interval_s
            await asyncio.gather(
                *(pool.check(timeout_s=self._check_timeout_s, every=every) for pool in self._pools.values())
            )
            await asyncio.sleep(TICK_S)

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))


def _now_s() -> float:
    """The clock of cool-downs: they concern our own machines, not the grid, and so take real time."""
    return asyncio.get_running_loop().time()
