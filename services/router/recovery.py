"""Finds what was already answered of a partition that is taken over.

Every answer and every dead letter of the router names the record that it is for in a header. A commit carries the time
from which on such messages may have been published for the records that follow it. Whoever is assigned the partition
reads the topics from that time to their end, and knows what not to do again.
"""

from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.structs import OffsetAndMetadata

from services.router.offsets import Commit, Standing
from shared.runtime.settings import KafkaSettings

SOURCE_HEADER: Final = "sprout-request"
"""Of an answer or a dead letter: the record it is for, as `Source` writes it."""

_POLL_MS: Final = 200
"""Wall milliseconds to wait for more of what is known to be there."""

MARGIN_MS: Final = 10_000
"""A machine's clock may be set back by so much between a commit and an answer."""

_SINCE: Final = "since-ms="


@dataclass(frozen=True, slots=True)
class Source:
    """A record of the topic of requests; the timestamp tells it from one of an earlier log at the same offset."""

    partition: int
    offset: int
    timestamp_ms: int

    @classmethod
    def of(cls, record: Any) -> Self:  # noqa: ANN401 - FastStream's record
        """Name a record."""
        return cls(record.partition, record.offset, record.timestamp)

    @classmethod
    def parse(cls, header: bytes) -> Self | None:
        """Read a header; null where it is none of ours."""
        try:
            partition, offset, timestamp_ms = map(int, header.decode("ascii").split(":"))
        except ValueError:
            return None
        return cls(partition, offset, timestamp_ms)

    def __str__(self) -> str:
        return f"{self.partition}:{self.offset}:{self.timestamp_ms}"


def stored(commits: Mapping[TopicPartition, Commit]) -> dict[TopicPartition, OffsetAndMetadata]:
    """Commits as Kafka stores them."""
    return {
        partition: OffsetAndMetadata(commit.offset, f"{_SINCE}{commit.since_ms}")
        for partition, commit in commits.items()
    }


def commit_of(found: OffsetAndMetadata) -> Commit | None:
    """What the group stores of a partition; null where it is nothing, or nothing that a router committed."""
    since = str(found.metadata or "").removeprefix(_SINCE)
    if found.offset < 0 or not since.isdecimal():
        return None
    return Commit(found.offset, int(since))


def answered(
    records: Collection["ConsumerRecord[bytes, bytes]"], commits: Mapping[int, Commit], found: dict[int, dict[int, int]]
) -> None:
    """Note for which records at or beyond the committed offsets these messages are.

    Args:
        commits: by partition of the topic of requests.
        found: timestamps of the records that were answered, by partition and offset; added to.
    """
    for record in records:
        for name, value in record.headers:
            source = Source.parse(value) if name == SOURCE_HEADER and value is not None else None
            commit = commits.get(source.partition) if source is not None else None
            if source is not None and commit is not None and source.offset >= commit.offset:
                found.setdefault(source.partition, {})[source.offset] = source.timestamp_ms


@dataclass(frozen=True, slots=True)
class Recovery:
    """Asks Kafka where the group stands.

    Attributes:
        topics: full names of those that are written once for each record.
    """

    kafka: KafkaSettings
    group: str
    topics: tuple[str, ...]

    async def commits(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        """What the group has stored of partitions; those of which it has nothing are left out.

        Raises:
            KafkaError: it could not be asked.
        """
        admin = AIOKafkaAdminClient(**self.kafka.client_options())
        try:
            await admin.start()
            found = await admin.list_consumer_group_offsets(self.group, partitions=list(partitions))
        finally:
            await admin.close()
        return {partition: one for partition, one in found.items() if one.offset >= 0}

    async def standings(self, commits: Mapping[TopicPartition, Commit]) -> dict[TopicPartition, Standing]:
        """Where the group stands, all that was answered beyond its commits included.

        Raises:
            KafkaError: the topics could not be read.
        """
        by_number = {partition.partition: commit for partition, commit in commits.items()}
        since_ms = max(0, min(commit.since_ms for commit in commits.values()) - MARGIN_MS)
        found: dict[int, dict[int, int]] = {}
        consumer = AIOKafkaConsumer(
            *self.topics,
            **self.kafka.client_options(),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        try:
            await consumer.start()
            async for records in _records_since(consumer, since_ms):
                answered(records, by_number, found)
        finally:
            await consumer.stop()
        return {
            partition: Standing(commit, found.get(partition.partition, {})) for partition, commit in commits.items()
        }


async def _records_since(
    consumer: AIOKafkaConsumer, since_ms: int
) -> AsyncIterator[Collection["ConsumerRecord[bytes, bytes]"]]:
    """All that a consumer's topics hold now of messages from `since_ms` on, and of what follows them."""
    partitions = consumer.assignment()
    ends = await consumer.end_offsets(partitions)
    begins = await consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
    left = {partition for partition, begin in begins.items() if begin is not None and begin.offset < ends[partition]}
    for partition in partitions:
        if partition in left:
            consumer.seek(partition, begins[partition].offset)
        else:
            consumer.pause(partition)
    while left:
        for records in (await consumer.getmany(timeout_ms=_POLL_MS)).values():
            yield records
        left = {partition for partition in left if await consumer.position(partition) < ends[partition]}
