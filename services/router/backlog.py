"""How many requests wait in Kafka, from what the consumer has been told anyway: no request of its own."""

import asyncio
from collections.abc import Callable

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import IllegalStateError

from services.router.metrics import RouterMetrics

INTERVAL_S = 1.0
"""Wall seconds between two looks."""


class Backlog:
    """Records of every assigned partition that are not finished.

    Every fetch tells the end of its partition, also when there was nothing to fetch.
    """

    def __init__(
        self,
        consumer: Callable[[], AIOKafkaConsumer | None],
        *,
        finished: Callable[[TopicPartition], int | None],
        metrics: RouterMetrics,
    ) -> None:
        """Set up.

        Args:
            finished: the offset of a partition before which all is finished; null where nothing was begun here.
        """
        self._consumer = consumer
        self._finished = finished
        self._metrics = metrics
        self._shown: set[str] = set()

    async def watch(self) -> None:
        """Show the backlog, for ever."""
        while True:
            self._show(await self._measure())
            await asyncio.sleep(INTERVAL_S)

    async def _measure(self) -> dict[str, int]:
        consumer = self._consumer()
        found: dict[str, int] = {}
        if consumer is None:
            return found
        try:
            # A position that is not known yet is waited for.
            async with asyncio.timeout(INTERVAL_S):
                for partition in consumer.assignment():
                    end = consumer.highwater(partition)
                    if end is None:
                        continue
                    done = self._finished(partition)
                    if done is None:
                        done = await consumer.position(partition)
                    found[str(partition.partition)] = max(0, end - done)
        except (IllegalStateError, TimeoutError):  # a rebalance is under way
            return {}
        return found

    def _show(self, lags: dict[str, int]) -> None:
        for partition in self._shown - set(lags):
            self._metrics.lag_records.remove(partition)
        for partition, lag in lags.items():
            self._metrics.lag_records.labels(partition).set(lag)
        self._shown = set(lags)
