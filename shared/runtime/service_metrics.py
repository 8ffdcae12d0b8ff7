"""Metrics that every service has: its build and process, and the lag of its consumers."""

import asyncio
import platform
from typing import Any, Final

from aiokafka.errors import IllegalStateError, KafkaError
from faststream.kafka import KafkaBroker
from prometheus_client import CollectorRegistry, Gauge, GCCollector, ProcessCollector

LAG_INTERVAL_S: Final = 5.0
"""Wall seconds between two measurements of the lag."""

POSITION_TIMEOUT_S: Final = 1.0
"""Longest wait for the position of a consumer that has none yet, wall."""


def register_build_and_process(registry: CollectorRegistry, *, service: str, version: str) -> None:
    """Export `sprout_build_info`, Prometheus' usual `process_*` metrics, and those of Python's garbage collector."""
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    build = Gauge(
        "sprout_build_info", "1; the build is in the labels", ["service", "version", "python"], registry=registry
    )
    build.labels(service, version, platform.python_version()).set(1)


class LagMeter:
    """Measures how many records the subscribers of a service have not been given yet."""

    def __init__(self, broker: KafkaBroker, registry: CollectorRegistry) -> None:
        self._broker = broker
        self._lag = Gauge(
            "sprout_consumer_lag_records",
            "Records of the assigned partitions that were not handed to the service yet; group is empty where every "
            "copy reads all",
            ["topic", "group"],
            registry=registry,
        )

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            await asyncio.sleep(LAG_INTERVAL_S)
            await self.measure()

    async def measure(self) -> None:
        """Measure once; a topic that cannot be measured now keeps its value."""
        lags: dict[tuple[str, str], int] = {}
        for subscriber in self._broker.subscribers:
            consumer: Any = getattr(subscriber, "consumer", None)
            if consumer is None:
                continue
            try:
                async with asyncio.timeout(POSITION_TIMEOUT_S):
                    for partition in consumer.assignment():
                        end = consumer.highwater(partition)
                        if end is None:
                            continue
                        name = partition.topic, getattr(subscriber, "group_id", None) or ""
                        lags[name] = lags.get(name, 0) + max(0, end - await consumer.position(partition))
            except (KafkaError, IllegalStateError, TimeoutError):
                continue
        for (topic, group), lag in lags.items():
            self._lag.labels(topic, group).set(lag)
