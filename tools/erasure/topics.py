"""What the topics hold of a person. Kafka removes no single record, so this says when the last one goes."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from shared.kafka.topic_settings import LaneSettings
from shared.messages import GenerationRequest
from shared.runtime.settings import KafkaSettings
from shared.topics import (
    CANCELLATIONS,
    DEAD_LETTERS,
    FOOTPRINTS,
    REPLIES,
    REQUESTS,
    RESPONSE_CHUNKS,
    RESPONSES,
    SAMPLES,
    TopicSpec,
)
from tools.cli.offsets import existing_partitions
from tools.erasure.subjects import Subjects

PERSONAL_TOPICS: Final = (
    REQUESTS,
    RESPONSES,
    SAMPLES,
    FOOTPRINTS,
    DEAD_LETTERS,
    RESPONSE_CHUNKS,
    REPLIES,
    CANCELLATIONS,
)
"""Topics whose messages belong to a tenant or a request. Chunks and what follows name no tenant: they come last. The
topics of further lanes belong to them, too."""

READERS: Final = ("ledger.responses", "evaluator", "optimizer", "gateway")
"""Consumer groups that copy messages of a topic into a table."""

SEGMENT_MS: Final = 7 * 24 * 3_600_000
"""Kafka's default for the age at which a segment is closed."""

CHECKED_EVERY: Final = timedelta(minutes=5)
"""Kafka's default interval between two removals of old segments."""

POLL_MS: Final = 500
READ_TIMEOUT_S: Final = 60.0


@dataclass(slots=True)
class TopicFindings:
    """What a topic holds of the subjects.

    Attributes:
        topic: without prefix.
        records: of the subjects; None: the topic is too long to be read.
        newest: time of the last of them; of this search if the topic is not read; None if there is none.
        gone_by: when Kafka has removed them, at the latest; None: there is none, or Kafka keeps them for ever.
        pending: whether a service has yet to copy some of them, or perhaps some of them, into its tables.
        known: the subjects that were found.
    """

    topic: str
    records: int | None = 0
    newest: datetime | None = None
    gone_by: datetime | None = None
    pending: bool = False
    known: frozenset[tuple[str, str]] = frozenset()

    @property
    def stays(self) -> bool:
        """Whether Kafka keeps the records for ever."""
        return self.newest is not None and self.gone_by is None


async def search_topics(kafka: KafkaSettings, subjects: Subjects, *, limit: int) -> list[TopicFindings]:
    """Search the topics, up to their present end.

    Args:
        limit: a topic with more records is not read.

    Raises:
        KafkaError: the broker cannot be reached.
        TimeoutError: a topic could not be read to its end.
    """
    specs = (*LaneSettings().further_topics, *PERSONAL_TOPICS)
    names = [kafka.topic(spec) for spec in specs]
    partitions = await existing_partitions(kafka, names)
    longest = await _longest_times(kafka, sorted({one.topic for one in partitions}))
    committed = await _committed(kafka)
    found = []
    for spec, name in zip(specs, names, strict=True):
        of_topic = [one for one in partitions if one.topic == name]
        one = await _search(kafka, spec, of_topic, subjects, limit=limit, committed=committed)
        kept = longest.get(name, longest_time(spec.configuration()))
        if one.newest is not None and kept is not None:
            one.gone_by = one.newest + kept + CHECKED_EVERY
        found.append(one)
    return found


async def _search(
    kafka: KafkaSettings,
    spec: TopicSpec,
    partitions: list[TopicPartition],
    subjects: Subjects,
    *,
    limit: int,
    committed: Mapping[TopicPartition, int],
) -> TopicFindings:
    found = TopicFindings(spec.name)
    if not partitions:
        return found
    consumer: Any = AIOKafkaConsumer(**kafka.client_options(), enable_auto_commit=False)
    await consumer.start()
    try:
        begins: dict[TopicPartition, int] = await consumer.beginning_offsets(partitions)
        ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
        if sum(ends.values()) - sum(begins.values()) > limit:
            found.records, found.newest = None, datetime.now(UTC)
            found.pending = any(ends[one] > committed.get(one, ends[one]) for one in partitions)
            return found
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        async with asyncio.timeout(READ_TIMEOUT_S):
            while [one for one in partitions if await consumer.position(one) < ends[one]]:
                for partition, records in (await consumer.getmany(timeout_ms=POLL_MS)).items():
                    for record in records:
                        _note(found, record, _whose(spec, record, subjects), committed.get(partition))
    finally:
        await consumer.stop()
    return found


def _note(
    found: TopicFindings,
    record: Any,  # noqa: ANN401
    whose: frozenset[tuple[str, str]],
    committed: int | None,
) -> None:
    """Count a record that belongs to some of the subjects."""
    if whose:
        sent_at = datetime.fromtimestamp(record.timestamp / 1_000, UTC)
        found.records = (found.records or 0) + 1
        found.newest = max(found.newest or sent_at, sent_at)
        found.known |= whose
        found.pending |= committed is not None and record.offset >= committed


def _whose(spec: TopicSpec, record: Any, subjects: Subjects) -> frozenset[tuple[str, str]]:  # noqa: ANN401
    if spec is DEAD_LETTERS:
        return subjects.of_dead_letter(record.value)
    position = f"{record.topic}-{record.partition}-{record.offset}" if spec.message is GenerationRequest else ""
    return subjects.of_message(record.value, position=position)


def longest_time(settings: Mapping[str, str | None]) -> timedelta | None:
    """The longest time that Kafka keeps a record of a topic with this configuration; None: for ever.

    Kafka removes whole segments, once their newest record is older than the retention.
    """
    kept_ms = int(settings.get("retention.ms") or -1)
    if kept_ms < 0 or "delete" not in (settings.get("cleanup.policy") or ""):
        return None
    return timedelta(milliseconds=kept_ms + int(settings.get("segment.ms") or SEGMENT_MS))


async def _longest_times(kafka: KafkaSettings, topics: list[str]) -> dict[str, timedelta | None]:
    """`longest_time` of each topic as the broker has it; without those whose configuration may not be read."""
    admin = AIOKafkaAdminClient(**kafka.client_options(), request_timeout_ms=5_000)
    try:
        await admin.start()
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in topics]
        answers = await admin.describe_configs(resources) if resources else []
    finally:
        await admin.close()
    return {
        name: longest_time({entry[0]: entry[1] for entry in entries})
        for answer in answers
        for error, _, _, name, entries in answer.resources
        if not error
    }


async def _committed(kafka: KafkaSettings) -> dict[TopicPartition, int]:
    """The committed offsets of the services that copy records into tables; without a commit, a partition is absent."""
    admin = AIOKafkaAdminClient(**kafka.client_options(), request_timeout_ms=5_000)
    found: dict[TopicPartition, int] = {}
    try:
        await admin.start()
        for group in READERS:
            with suppress(KafkaError):
                offsets = await admin.list_consumer_group_offsets(kafka.group(group))
                found |= {one: entry.offset for one, entry in offsets.items() if entry.offset >= 0}
    finally:
        await admin.close()
    return found
