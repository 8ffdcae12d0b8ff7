"""Records that a service must not unpack: it passes them by, with a dead letter that has their position.

`shared.kafka.inspection` finds them before the broker starts. `UnreadableRecords` knows them; subscribers of batches
pass them by with a `PassBy`, the router does so itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import IllegalStateError
from aiokafka.structs import OffsetAndMetadata

from shared.kafka.dead_letters import SET_ASIDE, UNREADABLE, UNREADABLE_DETAIL, DeadLetterPublisher
from shared.kafka.inspection import find_unreadable
from shared.kafka.reading import POLL_MS, Since
from shared.kafka.records import PoisonMessageError
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings

SET_ASIDE_HEADER: Final = "sprout-set-aside"
"""Header of the record that stands for records which were set aside; its value is the reason."""

RETRY_S: Final = 1.0
"""Wall seconds before a partition's records are tried again after an error."""

_log = get_logger(__name__)


class UnreadableRecords:
    """Records of the subscribed topics that this process must not unpack; none before `inspect`."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._groups: dict[str, set[str | None]] = {}
        self._since: Since | None = None
        self._found: dict[TopicPartition, list[range]] = {}
        self._ungrouped: list[PassBy] = []

    def watch(self, topic: str, *, group: str | None) -> None:
        """Inspect what a consumer group will read of a topic; of a consumer without a group, the whole topic."""
        self._groups.setdefault(topic, set()).add(group)

    def watch_since(self, since: Since) -> None:
        """Inspect topics from a time on."""
        self._since = since

    async def inspect(self) -> None:
        """Find the records; call it before the broker starts."""
        if self._groups and self._kafka.inspect_at_start:
            self._found = await find_unreadable(self._kafka, self._groups, self._since)

    def after(self, partition: TopicPartition, offset: int) -> Sequence[range]:
        """Offsets to set aside at or after an offset, in ascending order."""
        return [bad for bad in self._found.get(partition, ()) if bad.stop > offset]

    def add_ungrouped(self, subscriber: "PassBy") -> None:
        """Add a subscriber without a group, for `pause_ungrouped`."""
        self._ungrouped.append(subscriber)

    async def pause_ungrouped(self) -> None:
        """Pause partitions with such records as soon as they are assigned to consumers without a group.

        Runs while the broker starts, in every turn of the event loop: a consumer receives nothing in the turn in which
        it is assigned its partitions.
        """
        waiting = list(self._ungrouped) if self._found else []
        while waiting := [one for one in waiting if not one.pause_assigned()]:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0)

    async def read(self, partition: TopicPartition, offsets: range) -> Sequence[Any]:
        """The records with these offsets, none of them unreadable.

        Raises:
            KafkaError: Kafka could not be read.
        """
        if not offsets:
            return ()
        records: list[Any] = []
        consumer: Any = AIOKafkaConsumer(**self._kafka.client_options(), enable_auto_commit=False)
        await consumer.start()
        try:
            consumer.assign([partition])
            consumer.seek(partition, offsets.start)
            while await consumer.position(partition) < offsets.stop:
                # One at a time: the record after the last one must not be unpacked.
                batches = await consumer.getmany(partition, timeout_ms=POLL_MS, max_records=1)
                records += (record for record in batches.get(partition, ()) if record.offset in offsets)
        finally:
            await consumer.stop()
        return records


def stand_in(
    partition: TopicPartition, offset: int, reason: str = UNREADABLE, *, timestamp_ms: int = -1
) -> "ConsumerRecord[bytes, bytes]":
    """A record without content in place of those that are set aside, for their dead letter.

    Args:
        reason: of the dead letter.
        timestamp_ms: of the record; -1 if it is not known.
    """
    headers = ((SET_ASIDE_HEADER, reason.encode()),)
    return ConsumerRecord(
        partition.topic, partition.partition, offset, timestamp_ms, 0, None, None, None, -1, -1, headers
    )


def set_aside_reason(record: "ConsumerRecord[bytes, bytes]") -> str | None:
    """The reason why a record was set aside, if it is a `stand_in`; None for all others."""
    if record.value is not None:
        return None
    reasons = [reason for reason in SET_ASIDE if (SET_ASIDE_HEADER, reason.encode()) in record.headers]
    return reasons[0] if reasons else None


class PassBy(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """Keeps a subscriber of batches away from unreadable records.

    A partition that has some is paused as soon as it is assigned. The records before each of them are read one by one
    and handled; then its dead letter is published, and the consumer continues after it.
    """

    def __init__(self, unreadable: UnreadableRecords, dead_letters: DeadLetterPublisher, *, commits: bool) -> None:
        """Set up.

        Args:
            commits: whether the consumer belongs to a group.
        """
        self._unreadable = unreadable
        self._dead_letters = dead_letters
        self._commits = commits
        self._tasks: set[asyncio.Task[None]] = set()
        self._get_consumer: Callable[[], Any] = lambda: None
        self._handle: Callable[[Sequence[Any]], Awaitable[None]] | None = None

    def attach(self, get_consumer: Callable[[], Any], handle: Callable[[Sequence[Any]], Awaitable[None]]) -> None:
        """Set where to find aiokafka's consumer, and what handles records."""
        self._get_consumer, self._handle = get_consumer, handle

    def pause_assigned(self) -> bool:
        """For a consumer without a group, which calls no listener: False while it has no partitions yet."""
        consumer = self._get_consumer()
        assigned = () if consumer is None else consumer.assignment()
        self._pause(assigned)
        return bool(assigned)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:  # noqa: ARG002
        """A rebalance starts: the next owner of the partitions passes the records by."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """A rebalance has ended."""
        self._pause(assigned)

    def _pause(self, assigned: Collection[TopicPartition]) -> None:
        partitions = [partition for partition in assigned if self._unreadable.after(partition, 0)]
        if not partitions:
            return
        self._get_consumer().pause(*partitions)
        for partition in partitions:
            task = asyncio.create_task(self._pass_by(partition), name=f"pass by {partition.topic}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_by(self, partition: TopicPartition) -> None:
        """Pass all unreadable records by; tries until it succeeds."""
        while True:
            try:
                await self._pass_by_once(partition)
            except IllegalStateError:
                return  # the partition has been revoked
            except Exception as error:  # noqa: BLE001 - the partition must not stay paused
                _log.warning("could not pass a record by, trying again", error=type(error).__name__)
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _pass_by_once(self, partition: TopicPartition) -> None:
        assert self._handle is not None
        consumer = self._get_consumer()
        offset = await consumer.position(partition)
        for bad in self._unreadable.after(partition, offset):
            await self._handle(await self._unreadable.read(partition, range(offset, bad.start)))
            await self._dead_letters.publish(
                stand_in(partition, max(offset, bad.start)), PoisonMessageError(UNREADABLE, UNREADABLE_DETAIL)
            )
            offset = bad.stop
            consumer.seek(partition, offset)
            if self._commits:
                await consumer.commit({partition: OffsetAndMetadata(offset, "")})
        consumer.resume(partition)
