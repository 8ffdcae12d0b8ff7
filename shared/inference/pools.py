"""All pools of inference servers that a process uses, and what changes them: curves, capacity, reference blocks."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Final

from shared.fleet import Fleet
from shared.inference.balancer import CircuitBreakerSettings
from shared.inference.chat_sources import ChatTemplates
from shared.inference.pool import ServingPool
from shared.inference.tokens import Tokenizers
from shared.messages import EndpointCurve, PoolCapacity
from shared.runtime.clock import Clock
from shared.switchback import SwitchbackSchedule

PROBE_INTERVAL_S: Final = 0.25
"""Wall seconds between two checks whether an endpoint is due for a probe."""

REFRESH_INTERVAL_S: Final = 0.25
"""Longest wall time until an expired capacity message is noticed."""


class Pools:
    """Every pool that serves a model of the fleet, and on request the judge's pool.

    Attributes:
        share: share of all requests that this process gets, in [0, 1].
    """

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
        beside_evaluators: bool = False,
    ) -> None:
        """Create the pools; nothing connects yet.

        Args:
            on_failure: called with the endpoint's name after every failed attempt and health check.
            check_interval_s, check_timeout_s: of the health checks, wall.
            with_judge: include the pool of the fleet's judge.
            beside_evaluators: leave the calls of evaluators out of the targets.

        Raises:
            ChatTemplateError: a pool's chat template is missing or unusable.
            FleetError: a pool's tokenizer or a file for TLS cannot be used.
        """
        templates, tokenizers = ChatTemplates(), Tokenizers()
        judge = None if fleet.judge is None else fleet.judge.pool
        self._on_capacity: Callable[[], None] = lambda: None
        self._pools = {
            pool.name: ServingPool(
                pool,
                templates.load(fleet.chat_template_of(pool)),
                clock=clock,
                circuit_breaker=circuit_breaker,
                on_failure=on_failure,
                on_capacity=self._capacity_freed,
                tokenizer=tokenizers.load(fleet.tokenizer_of(pool)),
            )
            for pool in fleet.pools
            if pool.model is not None or (with_judge and pool.name == judge)
        }
        self._by_model = {
            model.name: [self._pools[pool.name] for pool in fleet.pools_of(model.name)] for model in fleet.models
        }
        self._fleet = fleet
        self._clock = clock
        self._switchback = SwitchbackSchedule(fleet.switchback)
        self.share = 1.0
        self._beside_evaluators = beside_evaluators
        self._check_interval_s = check_interval_s
        self._check_timeout_s = check_timeout_s
        self._dispatches_reference = False
        self._refresh()

    def __getitem__(self, name: str) -> ServingPool:
        return self._pools[name]

    def __iter__(self) -> Iterator[ServingPool]:
        return iter(self._pools.values())

    def set_share(self, share: float) -> None:
        """Set the share of all requests that this process gets: its part of the targets."""
        self.share = share
        self._refresh()

    def update_curve(self, curve: EndpointCurve) -> None:
        """Take a learned curve of an endpoint into account."""
        if curve.pool in self._pools:
            self._pools[curve.pool].targets.update(curve)
            self._refresh()

    def update_capacity(self, capacity: PoolCapacity) -> None:
        """Take into account which endpoints of a pool are to be awake."""
        if capacity.pool in self._pools:
            self._pools[capacity.pool].update_capacity(capacity)
            self._refresh()

    def reference_block(self) -> bool:
        """Whether a reference block of the switchback schedule is running. The pools dispatch accordingly."""
        running = self._switchback.is_reference(self._clock.now())
        if running is not self._dispatches_reference:
            # A busy event loop may not have applied the change yet. A request must not see half of it.
            self._refresh()
        return running

    def on_capacity(self, callback: Callable[[], None]) -> None:
        """Call back when an endpoint may have capacity for one more request."""
        self._on_capacity = callback

    def has_capacity(self, model: str) -> bool:
        """Whether an endpoint of a model has capacity for one more request, or has no limit."""
        return any(not (pool.limited and pool.at_capacity) for pool in self._by_model[model])

    def is_limited(self, model: str) -> bool:
        """Whether every endpoint of a model has a limit. Its requests then take their capacity when they start."""
        return all(pool.limited for pool in self._by_model[model])

    def unreachable(self) -> str | None:
        """Why the service is not ready: the models that no endpoint serves; None when every model is served."""
        missing = [model for model, pools in self._by_model.items() if not any(pool.reachable for pool in pools)]
        if not missing:
            return None
        reasons = "; ".join(pool.unreachable() for model in missing for pool in self._by_model[model])
        return f"no endpoint answers for {', '.join(missing)}: {reasons}"

    async def watch(self) -> None:
        """Check the endpoints' health, and follow the switchback schedule, without end."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._check_health())
            tasks.create_task(self._follow_time())

    def _refresh(self) -> None:
        now = self._clock.now()
        self._dispatches_reference = self._switchback.is_reference(now)
        dispatch = self._fleet.switchback.dispatch if self._dispatches_reference else None
        for pool in self:
            pool.refresh(now, share=self.share, reference_dispatch=dispatch, beside_evaluators=self._beside_evaluators)
        self._on_capacity()

    def _capacity_freed(self) -> None:
        self._on_capacity()

    async def _follow_time(self) -> None:
        """Apply what changes with event time: reference blocks at once, the end of a capacity message soon."""
        change = None
        while True:
            now = self._clock.now()
            if change is None or now >= change:
                change = self._switchback.next_change(now)
            until_change_s = REFRESH_INTERVAL_S if change is None else self._clock.wall_seconds_until(change)
            await asyncio.sleep(min(REFRESH_INTERVAL_S, max(0.001, until_change_s)))
            self._refresh()

    async def _check_health(self) -> None:
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
