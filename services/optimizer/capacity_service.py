"""The loop of the capacity planner: load reports in, plans on the topic `capacity` out.

It needs no database: without PostgreSQL it continues, and only the learned arrivals by hour of day are stored later. Of
several copies of the optimizer all plan, so that a standby knows the load, and only the leader publishes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from services.optimizer.capacity import CapacityPlanner, plan_changed
from services.optimizer.loads import LoadReports
from services.optimizer.metrics import OptimizerMetrics
from services.optimizer.prices import PoolPrices
from services.optimizer.settings import OptimizerSettings
from services.optimizer.store import Store
from shared.kafka.leader import NotLeaderError
from shared.messages import LoadReport, PoolCapacity
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.logs import get_logger

_STORE_INTERVAL_S = 900.0
"""Event seconds between two times that the arrivals by hour of day are stored."""

_SHORTEST_STORE_INTERVAL_S = 5.0
"""The same in wall seconds, at least."""

Publish = Callable[[PoolCapacity], Awaitable[None]]

_log = get_logger(__name__)


class CapacityService:
    """Plans the endpoints of every pool about once a second of wall time."""

    def __init__(
        self,
        planner: CapacityPlanner,
        prices: PoolPrices,
        publish: Publish,
        *,
        is_leader: Callable[[], bool],
        settings: OptimizerSettings,
        clock: Clock,
        metrics: OptimizerMetrics,
    ) -> None:
        """Start without reports.

        Args:
            planner: decides how many endpoints are awake.
            prices: the pools' power curves; the present load is stored in it.
            publish: returns once Kafka has acknowledged the plan, however long that takes; raises `NotLeaderError` if
                another copy of the optimizer may be the leader.
            is_leader: whether this copy of the optimizer publishes plans and stores arrivals.
            settings: how often to plan, and how long a load report counts.
            clock: event time.
            metrics: Prometheus metrics.
        """
        self._planner, self._prices, self._publish = planner, prices, publish
        self._is_leader = is_leader
        self._interval_s = settings.capacity_interval_s
        self._reports = LoadReports(settings.load_expiry_s)
        self._clock, self._metrics = clock, metrics
        self._published: dict[str, PoolCapacity] = {}

    def add_load_reports(self, messages: Sequence[LoadReport]) -> None:
        """Take what routers and evaluators have running."""
        for one in messages:
            self._reports.update(one, wall_s=time.monotonic())

    async def restore_profiles(self, store: Store) -> None:
        """Load the arrivals by hour of day that an earlier process stored."""
        self._planner.restore_profiles(await store.arrival_profiles())

    async def run(self) -> None:
        """Plan until cancelled."""
        while True:
            try:
                await self.plan_once()
            except NotLeaderError:
                _log.info("a plan was not published: another copy of the optimizer may be the leader")
            await asyncio.sleep(self._interval_s)

    async def plan_once(self) -> None:
        """Publish the plans that changed or expire. Without a live router nothing is known, so nothing is published.

        Raises:
            NotLeaderError: another copy of the optimizer may be the leader.
        """
        now = self._clock.now()
        demand = self._reports.demand(wall_s=time.monotonic())
        if demand is None:
            self._prices.load = {}
            for pool, published in list(self._published.items()):
                if published.valid_until <= now:
                    del self._published[pool]
                    self._metrics.set_unknown_capacity(pool, endpoints=published.endpoints)
            return
        plans = self._planner.plan(demand, self._prices, now)
        self._prices.load = self._planner.loads()
        for plan in plans:
            self._metrics.set_capacity(plan)
            if not self._is_leader():
                self._published.clear()  # the leader publishes others
                continue
            published_before = self._published.get(plan.pool)
            if plan_changed(published_before, plan):
                await self._publish(plan)
                self._published[plan.pool] = plan
                if published_before is None or published_before.awake != plan.awake:
                    _log.info("endpoints awake", pool=plan.pool, awake=len(plan.awake), reason=plan.reason)

    async def store_profiles(self, store: Store) -> None:
        """Store the arrivals by hour of day from time to time, until cancelled."""
        pause_s = max(self._clock.wall_seconds(_STORE_INTERVAL_S), _SHORTEST_STORE_INTERVAL_S)
        while True:
            await asyncio.sleep(pause_s)
            if not self._is_leader():
                continue
            try:
                await store.put_arrival_profiles(self._planner.profiles())
            except DatabaseUnavailableError as error:
                _log.warning("arrivals by hour of day are not stored now", reason=str(error))
