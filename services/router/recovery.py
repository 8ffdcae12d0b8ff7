"""Recovers the progress of the consumer group in partitions that this router has been assigned.

Every response and every dead letter of the router carries a header that identifies its record. The metadata of every
commit holds a lower bound of the publish time of responses to records beyond the committed offset. The new owner of a
partition reads the output topics from that time to their end, so it knows which records are answered.
"""

import time
from collections.abc import Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol

from aiokafka import AIOKafkaConsumer, ConsumerRecord, OffsetAndMetadata, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from faststream.kafka import KafkaBroker

from services.router.offsets import Commit, RecoveredOffsets
from shared.kafka.deaths import split_deaths, with_deaths
from shared.kafka.records import RecordId
from shared.kafka.since import SinceReader
from shared.kafka.workarounds import read_commits
from shared.runtime.settings import KafkaSettings
from shared.topics import DEAD_LETTERS, RESPONSES, SOURCE_HEADER

CLOCK_MARGIN_MS: Final = 10_000
"""Tolerated step back of a machine's clock between a commit and a response."""

_POLL_MS: Final = 200
_METADATA_PREFIX: Final = "since-ms="

Place = tuple[str, int]
"""A partition of requests: topic without prefix, number."""


def to_kafka(commits: Mapping[TopicPartition, Commit]) -> dict[TopicPartition, OffsetAndMetadata]:
    """Commits in Kafka's format."""
    return {
        partition: OffsetAndMetadata(commit.offset, with_deaths(f"{_METADATA_PREFIX}{commit.since_ms}", commit.deaths))
        for partition, commit in commits.items()
    }


def from_kafka(stored: OffsetAndMetadata) -> Commit | None:
    """A commit from Kafka's format; None if there is no commit, or none by a router."""
    metadata, deaths = split_deaths(str(stored.metadata or ""))
    since = metadata.removeprefix(_METADATA_PREFIX)
    if stored.offset < 0 or not since.isdecimal():
        return None
    return Commit(stored.offset, int(since), deaths)


def collect_answered(
    records: Collection["ConsumerRecord[bytes, bytes]"],
    commits: Mapping[Place, Commit],
    found: dict[Place, dict[int, int]],
) -> None:
    """Collect the records of responses and dead letters, if they are at or beyond the committed offset.

    Args:
        found: output: timestamps of answered records, by offset.
    """
    for record in records:
        for name, value in record.headers:
            source = RecordId.parse_header(value) if name == SOURCE_HEADER and value is not None else None
            if source is None:
                continue
            place = source.topic, source.partition
            commit = commits.get(place)
            if commit is not None and source.offset >= commit.offset:
                found.setdefault(place, {})[source.offset] = source.timestamp_ms


class GroupProgress(Protocol):
    """Reads the progress of the consumer group; `KafkaGroupProgress`."""

    async def committed(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, OffsetAndMetadata]:
        """The last commits of the group, without partitions that have none."""

    async def recovered(self, commits: Mapping[TopicPartition, Commit]) -> Mapping[TopicPartition, RecoveredOffsets]:
        """The same commits with the records beyond them that are answered."""


async def recover(
    progress: GroupProgress, consumer: AIOKafkaConsumer, partitions: Collection[TopicPartition]
) -> Mapping[TopicPartition, RecoveredOffsets]:
    """The progress of the group in partitions, which are assigned to the consumer and paused.

    Partitions without a router's commit get one first. The next owner then finds a time from which to read.

    Raises:
        KafkaError: Kafka could not be read.
    """
    stored = await progress.committed(partitions)
    commits = {partition: commit for partition, one in stored.items() if (commit := from_kafka(one)) is not None}
    first = [partition for partition in partitions if partition not in commits]
    if first:
        begins = await consumer.beginning_offsets(first)
        now_ms = int(time.time() * 1_000)
        initial = {one: Commit(stored[one].offset if one in stored else begins[one], now_ms) for one in first}
        await consumer.commit(to_kafka(initial))
        commits |= initial
    return await progress.recovered(commits)


def answered_reader(broker: KafkaBroker, kafka: KafkaSettings, *, group: str, lanes: Collection[str]) -> SinceReader:
    """What reads the output topics, which have one message for each finished record.

    Args:
        group: full name of the consumer group.
        lanes: full names of its topics.
    """
    return SinceReader(
        broker,
        kafka,
        RESPONSES,
        DEAD_LETTERS,
        how="Whenever partitions of requests have been assigned, from the time on that their last commit has up to the "
        "present end: which of the requests after it are answered? By the copy that takes them over.",
        group=group,
        committed=lanes,
        prefix=_METADATA_PREFIX,
        margin_ms=CLOCK_MARGIN_MS,
    )


@dataclass(frozen=True, slots=True)
class KafkaGroupProgress:
    """Reads the progress of a group from Kafka.

    Attributes:
        answered: reads the output topics.
    """

    kafka: KafkaSettings
    group: str
    answered: SinceReader

    async def committed(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, OffsetAndMetadata]:
        """The last commits of the group, without partitions that have none.

        Raises:
            KafkaError: Kafka could not be read.
        """
        admin = AIOKafkaAdminClient(**self.kafka.client_options())
        try:
            await admin.start()
            return await read_commits(admin, self.group, partitions)
        finally:
            await admin.close()

    async def recovered(self, commits: Mapping[TopicPartition, Commit]) -> dict[TopicPartition, RecoveredOffsets]:
        """The same commits with the records beyond them that are answered.

        Raises:
            KafkaError: the output topics could not be read.
        """
        places = {one: (one.topic.removeprefix(self.kafka.topic_prefix), one.partition) for one in commits}
        by_place = {places[one]: commit for one, commit in commits.items()}
        since_ms = max(0, min(commit.since_ms for commit in commits.values()) - CLOCK_MARGIN_MS)
        found: dict[Place, dict[int, int]] = {}
        async with aclosing(self.answered.read(since_ms)) as reading:
            async for records in reading:
                collect_answered(records, by_place, found)
        return {
            partition: RecoveredOffsets(commit, found.get(places[partition], {}))
            for partition, commit in commits.items()
        }
