"""Takes the first records of a partition in hand so that a record which ends the process is found and set aside.

`shared.kafka.deaths` counts the processes that died with the same offset committed, and decides. After the first deaths
the records of the partition that were published before are delivered one at a time, each after a commit of its offset,
so the next death shows which one it was. Meanwhile the partition is paused; those that have arrived wait here.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from services.router.offsets import OffsetTracker, RecoveredOffsets
from shared.kafka.dead_letters import PROCESS_DIED
from shared.kafka.deaths import COMMIT_TIMEOUT_S, Caution, DeathCount
from shared.kafka.unreadable import stand_in
from shared.runtime.logs import get_logger, where

_log = get_logger(__name__)


class CarefulIntake:
    """Stands between the records that arrive and the starter, from the recovery of a partition until it has begun."""

    def __init__(
        self,
        count: DeathCount,
        tracker: OffsetTracker[TopicPartition],
        *,
        deliver: Callable[[Sequence[Any], int], None],
        failed: Callable[[], int],
        commit: Callable[[], Awaitable[None]],
        resume: Callable[[TopicPartition], None],
    ) -> None:
        """Create; nothing is held back until `recovered`.

        Args:
            deliver: gives records to the starter, with the epoch in which they were fetched.
            failed: number of requests that could not be answered.
            commit: commits all recovered partitions, whether or not there is progress, with the counts.
            resume: lets the consumer read a partition again.
        """
        self._count = count
        self._tracker = tracker
        self._deliver = deliver
        self._failed = failed
        self._commit = commit
        self._resume = resume
        self._new: set[TopicPartition] = set()
        self._held: dict[TopicPartition, asyncio.Queue[tuple[Any, int]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    def recovered(self, partitions: Mapping[TopicPartition, RecoveredOffsets]) -> None:
        """Partitions were recovered, and their records will arrive."""
        self.stop()
        for partition, found in partitions.items():
            self._count.assign(partition, found.commit.offset, found.commit.deaths)
        self._new.update(partitions)

    def stop(self) -> None:
        """Deliver nothing any more: what is held back will arrive again after the next recovery."""
        for task in self._tasks:
            task.cancel()
        self._new.clear()
        self._held.clear()

    def note_change(self) -> None:
        """Requests have started or ended."""
        self._changed.set()

    async def admit(self, records: Sequence[Any], *, epoch: int, consumer: AIOKafkaConsumer) -> Sequence[Any]:
        """Records that have arrived, without those that are held back; commits the counts of new partitions."""
        if epoch != self._tracker.epoch or not (self._new or self._held):
            return records
        admitted: list[Any] = []
        begun: list[TopicPartition] = []
        for record in records:
            partition = TopicPartition(record.topic, record.partition)
            if partition in self._new:
                self._new.discard(partition)
                caution = self._count.caution(partition, record.offset)
                if caution is Caution.NONE:
                    begun.append(partition)
                else:
                    self._hold(partition, consumer, set_aside=caution is Caution.SET_ASIDE)
            held = self._held.get(partition)
            if held is None:
                admitted.append(record)
            else:
                held.put_nowait((record, epoch))
                consumer.pause(partition)
        if begun:
            await self._take(begun)
        return admitted

    def _hold(self, partition: TopicPartition, consumer: AIOKafkaConsumer, *, set_aside: bool) -> None:
        what = "setting a request aside" if set_aside else "starting one request at a time"
        _log.warning(what, topic=partition.topic, partition=partition.partition)
        held: asyncio.Queue[tuple[Any, int]] = asyncio.Queue()
        self._held[partition] = held
        task = asyncio.create_task(self._one_at_a_time(partition, held, consumer, set_aside=set_aside))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one_at_a_time(
        self,
        partition: TopicPartition,
        held: "asyncio.Queue[tuple[Any, int]]",
        consumer: AIOKafkaConsumer,
        *,
        set_aside: bool,
    ) -> None:
        """Deliver the records of a partition one at a time up to its present end, then all that are held back.

        Args:
            set_aside: only the first one, as one without content.
        """
        try:
            end = 0 if set_aside else (await consumer.end_offsets([partition]))[partition]
            while set_aside or self._finished(partition) < end:
                if held.empty():
                    self._resume(partition)
                record, epoch = await held.get()
                if set_aside:
                    record = stand_in(partition, record.offset, PROCESS_DIED, timestamp_ms=record.timestamp)
                    set_aside = False
                await self._take([partition])
                failed = self._failed()
                self._deliver([record], epoch)
                while self._finished(partition) <= record.offset and self._failed() == failed:
                    self._changed.clear()
                    await self._changed.wait()
                if self._finished(partition) <= record.offset:
                    break  # the request could not be answered, and nothing after it can be committed
        except Exception as error:  # noqa: BLE001 - the partition must not stay paused
            _log.warning("requests are started as always", error=type(error).__name__, where=where(error))
        self._count.assign(partition, self._finished(partition), 0)
        await self._take([partition])
        del self._held[partition]
        while not held.empty():
            record, epoch = held.get_nowait()
            self._deliver([record], epoch)
        self._resume(partition)

    def _finished(self, partition: TopicPartition) -> int:
        return self._tracker.finished(partition) or 0

    async def _take(self, partitions: Collection[TopicPartition]) -> None:
        """Count a death from now on."""
        for partition in partitions:
            self._count.take(partition, self._finished(partition))
        try:
            # aiokafka retries a commit for as long as Kafka is unreachable.
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                await self._commit()
        except TimeoutError:
            _log.warning("deaths are not counted: no commit")
