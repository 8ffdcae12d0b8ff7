"""Takes partitions over that Kafka has assigned: finds out where the group stands in them, before any is served.

It runs beside the consumer, not in its callback, in which no heartbeat is sent: reading what was answered before may
take longer than the session lasts.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Final, Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import IllegalStateError
from aiokafka.structs import OffsetAndMetadata

from services.router.offsets import Commit, Standing
from services.router.recovery import commit_of, stored
from shared.runtime.logs import get_logger, where

PAUSE_S: Final = 0.5
"""Wall seconds before Kafka is asked again, after it could not be."""

Quiet = Callable[[], Awaitable[None]]
"""Waits until nothing of this router's own is on its way to Kafka, which would come after what is read."""

Resume = Callable[[Mapping[TopicPartition, Standing]], Awaitable[None]]
"""Goes on with the partitions."""

_log = get_logger(__name__)


class Group(Protocol):
    """Knows where the group stands; `services.router.recovery.Recovery`."""

    async def commits(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, OffsetAndMetadata]:
        """What the group has stored; a partition of which it has nothing is left out."""

    async def standings(self, commits: Mapping[TopicPartition, Commit]) -> Mapping[TopicPartition, Standing]:
        """The same with what was answered beyond it."""


class Takeover:
    """One takeover at a time; a new rebalance ends the one before."""

    def __init__(
        self, group: Group, consumer: Callable[[], AIOKafkaConsumer | None], *, quiet: Quiet, resume: Resume
    ) -> None:
        self._group = group
        self._quiet = quiet
        self._consumer = consumer
        self._resume = resume
        self._task: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> bool:
        """Whether partitions are still waiting."""
        return self._task is not None and not self._task.done()

    def begin(self, partitions: Collection[TopicPartition]) -> None:
        """Take partitions over, trying again for as long as it takes; what was under way ends."""
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.create_task(self._run(partitions))

    async def stop(self) -> None:
        """End it, finished or not."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self, partitions: Collection[TopicPartition]) -> None:
        while True:
            try:
                await self._quiet()
                return await self._resume(await self._standings(partitions))
            except Exception as error:  # noqa: BLE001 - a partition that nobody serves must not be left alone
                _log.warning("partitions cannot be taken over yet", error=type(error).__name__, where=where(error))
                await asyncio.sleep(PAUSE_S)

    async def _standings(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, Standing]:
        found = await self._group.commits(partitions)
        commits = {partition: commit for partition, one in found.items() if (commit := commit_of(one)) is not None}
        fresh = [partition for partition in partitions if partition not in commits]
        if fresh:
            commits |= await self._commit_first(fresh, found)
        return await self._group.standings(commits)

    async def _commit_first(
        self, partitions: Collection[TopicPartition], found: Mapping[TopicPartition, OffsetAndMetadata]
    ) -> dict[TopicPartition, Commit]:
        """Commit where the group stands already: whoever comes next must find since when there may be answers."""
        consumer = self._consumer()
        if consumer is None:
            raise IllegalStateError("there is no consumer")
        begins = await consumer.beginning_offsets(list(partitions))
        now_ms = int(time.time() * 1_000)
        commits = {one: Commit(found[one].offset if one in found else begins[one], now_ms) for one in partitions}
        await consumer.commit(stored(commits))
        return commits
