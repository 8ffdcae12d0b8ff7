"""Connects the pools of a process with other services: reads power curves and capacity, and reports the load."""

import asyncio
from datetime import datetime
from typing import Final, Literal
from uuid import uuid4

from aiokafka.errors import KafkaError
from faststream.kafka import KafkaBroker

from shared.inference.pools import Pools
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.publish import declare_publisher
from shared.kafka.subscribe import Subscriber, subscribe_compacted
from shared.messages import EndpointCurve, LoadReport, PoolCapacity
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings
from shared.topics import CAPACITY, LOAD_REPORTS, POWER_CURVES

FINAL_REPORT_TIMEOUT_S: Final = 5.0
"""Longest wait for the report at shutdown; wall seconds."""

_log = get_logger(__name__)


def subscribe_capacity(
    broker: KafkaBroker,
    dead_letters: DeadLetterPublisher,
    pools: Pools,
    *,
    kafka: KafkaSettings,
    before: str | None = None,
) -> tuple[Subscriber, ...]:
    """Subscribe to the compacted topics that decide which endpoints are used, and how much.

    Args:
        before: see `subscribe_compacted`.
    """
    curves = subscribe_compacted(broker, kafka, dead_letters, POWER_CURVES, before=before)
    capacity = subscribe_compacted(broker, kafka, dead_letters, CAPACITY, before=before)

    @curves
    async def on_curves(updates: list[EndpointCurve]) -> None:
        for curve in updates:
            pools.update_curve(curve)

    @capacity
    async def on_capacity(updates: list[PoolCapacity]) -> None:
        for update in updates:
            pools.update_capacity(update)

    return curves, capacity


class LoadReporter:
    """Publishes what a process has running on its pools."""

    def __init__(
        self,
        broker: KafkaBroker,
        pools: Pools,
        *,
        kafka: KafkaSettings,
        clock: Clock,
        service: Literal["router", "evaluator"],
        interval_s: float,
    ) -> None:
        """Set up.

        Args:
            interval_s: between two reports, wall.
        """
        self._publisher = declare_publisher(broker, kafka, LOAD_REPORTS)
        self._pools = pools
        self._clock = clock
        self._service = service
        self._interval_s = interval_s
        self._instance = f"{service}-{uuid4().hex[:16]}"
        self._reported_at = clock.now()
        self._reported_arrivals: dict[str, int] = {}
        self._publishing = asyncio.Lock()
        self._finished = False

    async def run(self) -> None:
        """Publish reports until `finish` is called."""
        while True:
            await asyncio.sleep(self._interval_s)
            if self._finished:
                return
            await self._publish(final=False)

    async def finish(self) -> None:
        """Publish the last report; the process has nothing running any more."""
        self._finished = True
        try:
            async with asyncio.timeout(FINAL_REPORT_TIMEOUT_S):
                await self._publish(final=True)
        except TimeoutError:
            _log.warning("the final load report could not be published")

    async def _publish(self, *, final: bool) -> None:
        async with self._publishing:
            now = self._clock.now()
            arrivals = {pool.name: pool.arrivals for pool in self._pools}
            report = self._report(now, final=final)
            try:
                await self._publisher.publish(
                    report, key=self._instance.encode(), correlation_id=f"{self._instance}-{now.timestamp()}"
                )
            except KafkaError as error:
                # The next report counts these arrivals.
                _log.warning("a load report could not be published", error=type(error).__name__)
            else:
                self._reported_at, self._reported_arrivals = now, arrivals

    def _report(self, now: datetime, *, final: bool) -> LoadReport:
        return LoadReport(
            instance=self._instance,
            service=self._service,
            at=now,
            # Greater than 0 also where two reports follow each other at once.
            interval_s=max(1e-6, (now - self._reported_at).total_seconds()),
            share=self._pools.share if self._service == "router" else 0.0,
            final=final,
            pools=tuple(pool.load(arrivals_before=self._reported_arrivals.get(pool.name, 0)) for pool in self._pools),
        )
