"""Subscribers of batches that survive a record which ends the process each time that it is handled.

`shared.kafka.deaths` counts and decides. This module reads the count when the first records after an assignment have
arrived, commits it, hands records on one at a time where it must, and sets the guilty one aside.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Final

from aiokafka import ConsumerRebalanceListener, OffsetAndMetadata, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import IllegalStateError, KafkaError

from shared.kafka.dead_letters import PROCESS_DIED, PROCESS_DIED_DETAIL, DeadLetterPublisher
from shared.kafka.deaths import COMMIT_TIMEOUT_S, Caution, DeathCount, DeathLimits, split_deaths, with_deaths
from shared.kafka.records import PoisonMessageError
from shared.kafka.unreadable import stand_in
from shared.kafka.workarounds import read_commits
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings

FAILURES: Final = (KafkaError, IllegalStateError, TimeoutError, OSError)
"""What a commit or the reading of commits may end with."""

_log = get_logger(__name__)


class CarefulBatches(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """Hands the batches of one consumer of a group to a handler."""

    def __init__(
        self,
        kafka: KafkaSettings,
        dead_letters: DeadLetterPublisher,
        *,
        group: str,
        max_records: int,
        listener: ConsumerRebalanceListener,
    ) -> None:
        """Set up.

        Args:
            group: full name.
            max_records: of one batch: so many could have been in hand when a process died.
            listener: is notified of rebalances, too.
        """
        self._kafka = kafka
        self._dead_letters = dead_letters
        self._group = group
        self._max_records = max_records
        self._listener = listener
        self._count = DeathCount(DeathLimits.of(kafka))
        self._left: dict[TopicPartition, int] = {}
        self._unread: Collection[TopicPartition] = ()
        self._rebalances = 0
        self._get_consumer: Callable[[], Any] = lambda: None
        self._handle: Callable[[Sequence[Any]], Awaitable[None]]

    def attach(self, get_consumer: Callable[[], Any], handle: Callable[[Sequence[Any]], Awaitable[None]]) -> None:
        """Set where to find aiokafka's consumer, and what handles records."""
        self._get_consumer, self._handle = get_consumer, handle

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """A rebalance starts: this process does not count for the next owner of the partitions."""
        self._rebalances += 1
        await self._listener.on_partitions_revoked(revoked)
        await self._release()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """A rebalance has ended; the counts are read once there are records."""
        self._unread = assigned
        self._left.clear()
        await self._listener.on_partitions_assigned(assigned)

    async def finish(self) -> None:
        """The service stops in order: its process does not count."""
        self._rebalances += 1
        await self._release()

    async def handle(self, records: Sequence[Any]) -> None:
        """Handle a batch; raises what the handler raises."""
        if self._unread:
            await self._read_counts()
        waiting = {one.partition for one in self._count.partitions}
        if waiting.isdisjoint({record.partition for record in records}):
            await self._handle(records)
            return
        rebalances = self._rebalances
        by_partition: dict[TopicPartition, list[Any]] = {}
        for record in records:
            by_partition.setdefault(TopicPartition(record.topic, record.partition), []).append(record)
        at_once: list[Any] = []
        for partition, own in by_partition.items():
            caution = self._count.caution(partition, own[0].offset)
            if caution is Caution.ONE_AT_A_TIME:
                await self._handle_one_at_a_time(partition, own, rebalances)
                continue
            if caution is Caution.SET_ASIDE:
                await self._set_aside(partition, own.pop(0).offset, rebalances)
            at_once += own
        if at_once:
            await self._handle_at_once(at_once, rebalances)

    async def _handle_at_once(self, records: Sequence[Any], rebalances: int) -> None:
        begins: dict[TopicPartition, int] = {}
        for record in records:
            partition = TopicPartition(record.topic, record.partition)
            if partition in self._count.partitions:
                begins.setdefault(partition, record.offset)
        await self._take(begins, rebalances)
        await self._handle(records)
        for partition in begins:
            self._count.passed(partition)

    async def _handle_one_at_a_time(self, partition: TopicPartition, records: Sequence[Any], rebalances: int) -> None:
        """Handle records of a partition; after as many as a batch may have had, the partition is read as always."""
        if partition not in self._left:
            _log.warning("reading one record at a time", topic=partition.topic, partition=partition.partition)
            self._left[partition] = self._max_records
        for record in records:
            await self._take({partition: record.offset}, rebalances)
            await self._handle([record])
        if rebalances != self._rebalances:
            return
        # What is handled next, of another partition, must not count for the record after the last one.
        self._count.release([partition])
        self._left[partition] -= len(records)
        if self._left[partition] <= 0:
            self._count.passed(partition)
        await self._commit({partition: OffsetAndMetadata(records[-1].offset + 1, "")}, rebalances)

    async def _set_aside(self, partition: TopicPartition, offset: int, rebalances: int) -> None:
        await self._dead_letters.publish(
            stand_in(partition, offset, PROCESS_DIED), PoisonMessageError(PROCESS_DIED, PROCESS_DIED_DETAIL)
        )
        self._count.assign(partition, offset + 1, 0)
        await self._commit({partition: OffsetAndMetadata(offset + 1, "")}, rebalances)

    async def _take(self, begins: Mapping[TopicPartition, int], rebalances: int) -> None:
        """Count a death from now on, with the records from some offsets on in hand."""
        if rebalances == self._rebalances:
            for partition, offset in begins.items():
                self._count.take(partition, offset)
            await self._commit_counts(begins, rebalances)

    async def _release(self) -> None:
        await self._commit_counts(self._count.release(), self._rebalances)

    async def _commit_counts(self, offsets: Mapping[TopicPartition, int], rebalances: int) -> None:
        counts = {partition: self._count.deaths(partition, offset) for partition, offset in offsets.items()}
        await self._commit({
            partition: OffsetAndMetadata(offset, with_deaths("", counts[partition]))
            for partition, offset in offsets.items()
        }, rebalances)  # fmt: skip

    async def _commit(self, commits: Mapping[TopicPartition, OffsetAndMetadata], rebalances: int) -> None:
        """Commit, unless a rebalance has begun since these records were delivered: their partitions may be lost."""
        consumer = self._get_consumer()
        if consumer is None or not commits or rebalances != self._rebalances:
            return
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                await consumer.commit(dict(commits))
        except FAILURES as error:
            _log.warning("deaths are not counted: no commit", group=self._group, error=type(error).__name__)

    async def _read_counts(self) -> None:
        """Read the counts of the partitions that have been assigned."""
        partitions, self._unread = self._unread, ()
        for lost in [one for one in self._count.partitions if one not in partitions]:
            self._count.passed(lost)
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                stored = await self._committed(partitions)
        except FAILURES as error:
            _log.warning("deaths are not counted: no count", group=self._group, error=type(error).__name__)
            return
        for partition in partitions:
            commit = stored.get(partition)
            if commit is None:  # the group has committed nothing yet
                self._count.assign(partition, 0, 0)
            else:
                self._count.assign(partition, commit.offset, split_deaths(str(commit.metadata or ""))[1])

    async def _committed(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, OffsetAndMetadata]:
        admin = AIOKafkaAdminClient(**self._kafka.client_options())
        try:
            await admin.start()
            return await read_commits(admin, self._group, partitions)
        finally:
            await admin.close()
