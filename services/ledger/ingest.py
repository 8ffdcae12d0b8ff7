"""Ingest: messages of other services become rows, and the watermark up to which all calls are in PostgreSQL."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import TypeVar

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from faststream.kafka import KafkaBroker

from services.ledger.calls import NewCall, request_call, storable_row, usage_call
from services.ledger.metrics import LedgerMetrics
from services.ledger.reports import AwakeEndpoints, RunningCalls
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Row, Storage
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.subscribe import Subscriber, subscribe_batches, subscribe_compacted, subscribe_newest
from shared.messages import (
    CarbonIntensity,
    GenerationResponse,
    LoadReport,
    Policy,
    PoolCapacity,
    PromptGrouping,
    Quality,
    UsageRecord,
)
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.settings import KafkaSettings
from shared.topics import (
    CAPACITY,
    CARBON_INTENSITY,
    LOAD_REPORTS,
    POLICIES,
    PROMPT_GROUPS,
    QUALITY,
    RESPONSES,
    USAGE,
    TopicSpec,
)

FETCH_MIN_BYTES = 1_000_000
"""Kafka holds back a fetch until it has this many bytes or the poll time is over: few, large batches."""

RESPONSE_READERS = 2
"""Consumers of the topic with most messages: while PostgreSQL stores a batch of one, another is validated."""

T = TypeVar("T")

Offsets = Mapping[TopicPartition, int]


class Ingest:
    """Subscribes to all topics, in batches that are acknowledged once they are in PostgreSQL."""

    def __init__(
        self,
        broker: KafkaBroker,
        dead_letters: DeadLetterPublisher,
        *,
        kafka: KafkaSettings,
        settings: LedgerSettings,
        storage: Storage,
        metrics: LedgerMetrics,
        service: str,
    ) -> None:
        self._retry_s = settings.retry_s
        self._storage = storage
        self._metrics = metrics

        def subscribe(spec: TopicSpec) -> Subscriber:
            return subscribe_batches(
                broker,
                kafka,
                dead_letters,
                spec,
                group=f"{service}.{spec.name}",
                max_records=settings.batch_records,
                poll_ms=settings.poll_ms,
                fetch_min_bytes=FETCH_MIN_BYTES,
                fetch_max_wait_ms=settings.poll_ms,
            )

        readers = [subscribe(RESPONSES) for _ in range(RESPONSE_READERS)]
        usage = subscribe(USAGE)
        self._intensities = intensities = subscribe(CARBON_INTENSITY)
        policies = subscribe(POLICIES)
        qualities = subscribe(QUALITY)
        groupings = subscribe(PROMPT_GROUPS)
        self.call_subscribers = {kafka.topic(RESPONSES): readers[0], kafka.topic(USAGE): usage}
        """The subscribers of the topics with calls, by topic name."""

        async def on_responses(batch: list[GenerationResponse]) -> None:
            rejected = [rejection_row(one) for one in batch if one.status == "error"]
            await self._add_calls([request_call(one) for one in batch if one.status == "ok"])
            await self._write(storage.add, "rejections", rejected)

        for reader in readers:
            reader(on_responses)

        @usage
        async def on_usage(batch: list[UsageRecord]) -> None:
            await self._add_calls([usage_call(one) for one in batch])

        @intensities
        async def on_intensities(batch: list[CarbonIntensity]) -> None:
            await self._write(storage.put, "intensity", [row for one in batch for row in intensity_rows(one)])

        @policies
        async def on_policies(batch: list[Policy]) -> None:
            await self._write(storage.add, "policies", [policy_row(one) for one in batch])

        @qualities
        async def on_qualities(batch: list[Quality]) -> None:
            await self._write(storage.put, "quality", [quality_row(one) for one in batch])

        @groupings
        async def on_groupings(batch: list[PromptGrouping]) -> None:
            learned = [grouping_row(one) for one in batch if one.version is not None]
            await self._write(storage.put, "prompt_groups", learned)

    def reads_intensities(self) -> bool:
        """Whether this is the one of several ledgers that reads `carbon-intensity`, which has one partition."""
        consumer = self._intensities.consumer
        return consumer is not None and bool(consumer.assignment())

    async def _add_calls(self, calls: list[NewCall]) -> None:
        """Add calls; raises as `_write` does."""
        await self._write(lambda _, rows: self._storage.add_calls(rows), "open_calls", calls)
        self._metrics.read_calls.inc(len(calls))

    async def _write(self, write: Callable[[str, list[T]], Awaitable[None]], table: str, rows: list[T]) -> None:
        """Write rows.

        Raises:
            DatabaseUnavailableError: raised after a pause; Kafka redelivers the batch.
        """
        try:
            await write(table, rows)
        except DatabaseUnavailableError:
            await asyncio.sleep(self._retry_s)
            raise


def subscribe_reports(
    broker: KafkaBroker,
    dead_letters: DeadLetterPublisher,
    *,
    kafka: KafkaSettings,
    running: RunningCalls,
    awake: AwakeEndpoints,
) -> None:
    """Subscribe to the load of routers and evaluators, and to the endpoints that are needed; every ledger reads all."""

    @subscribe_newest(broker, kafka, dead_letters, LOAD_REPORTS)
    async def on_reports(batch: list[LoadReport]) -> None:
        running.update(batch)

    @subscribe_compacted(broker, kafka, dead_letters, CAPACITY)
    async def on_capacity(batch: list[PoolCapacity]) -> None:
        awake.update(batch)


class Watermark:
    """The event time up to which every published call is in PostgreSQL.

    Compares the committed offsets with earlier end offsets of the topics; a commit follows the write to PostgreSQL.
    """

    def __init__(self) -> None:
        self.time: datetime | None = None
        """None until all records of some time have been committed."""
        self._pending: tuple[datetime, Offsets] | None = None

    def observe(self, now: datetime, ends: Offsets, committed: Offsets) -> None:
        """Advance the watermark.

        Args:
            now: event time at which `ends` were read.
            ends: end offsets of all partitions.
            committed: committed offsets, read after `ends`.
        """
        if _reached(ends, committed):
            self.time, self._pending = now, None
        elif self._pending is None:
            self._pending = (now, ends)
        elif _reached(self._pending[1], committed):
            self.time, self._pending = self._pending[0], (now, ends)


class Backlog:
    """Lag and watermark of the topics with calls, whichever process of the consumer group reads them."""

    def __init__(self, subscribers: Mapping[str, Subscriber], *, clock: Clock) -> None:
        """Nothing is known yet.

        Args:
            subscribers: by topic name; their consumers exist once the broker has started.
        """
        self._subscribers = subscribers
        self._clock = clock
        self._watermark = Watermark()

    @property
    def watermark(self) -> datetime | None:
        """Event time up to which every published call is in PostgreSQL; None while unknown."""
        return self._watermark.time

    async def refresh(self) -> int | None:
        """Read the offsets from Kafka, and advance the watermark.

        Returns:
            The number of records that are not read yet; None if Kafka does not respond.
        """
        now = self._clock.now()
        ends: dict[TopicPartition, int] = {}
        committed: dict[TopicPartition, int] = {}
        try:
            for topic, subscriber in self._subscribers.items():
                consumer = subscriber.consumer
                numbers = consumer.partitions_for_topic(topic) if consumer is not None else None
                if consumer is None or not numbers:
                    return None
                partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
                ends |= await consumer.end_offsets(partitions)
                begins = await consumer.beginning_offsets(partitions)
                for partition in partitions:
                    committed[partition] = max(await consumer.committed(partition) or 0, begins[partition])
        except KafkaError:
            return None
        self._watermark.observe(now, ends, committed)
        return sum(max(0, end - committed[partition]) for partition, end in ends.items())


def _reached(ends: Offsets, committed: Offsets) -> bool:
    return all(committed.get(partition, 0) >= end for partition, end in ends.items())


def rejection_row(response: GenerationResponse) -> Row:
    """The row in `rejections` of a response with an error."""
    at = response.timing.finished_at if response.timing is not None else response.requested_at
    return storable_row(
        {
            "id": response.record or response.request_id,
            "request_id": None if response.record is None else response.request_id,
            "model": response.model,
            "code": response.error.code if response.error is not None else "upstream_error",
            "at": at.isoformat(),
        }
    )


def intensity_rows(intensity: CarbonIntensity) -> list[Row]:
    """The rows in `intensity` of the latest value and its history."""
    return [
        {
            "zone": intensity.zone,
            "source": intensity.source,
            "at": point.at.isoformat(),
            "intensity_g_per_kwh": point.intensity_g_per_kwh,
            "estimated": point.estimated,
        }
        for point in (*intensity.history, intensity.latest)
    ]


def policy_row(policy: Policy) -> Row:
    """The row in `policies`, with the whole message as JSON."""
    content = policy.model_dump(mode="json")
    return storable_row({**{name: content[name] for name in ("model", "version", "created_at")}, "policy": content})


def quality_row(quality: Quality) -> Row:
    """The row in `quality`, with the whole message as JSON."""
    content = quality.model_dump(mode="json")
    names = ("evaluation_id", "model", "evaluated_at")
    return storable_row({**{name: content[name] for name in names}, "quality": content})


def grouping_row(grouping: PromptGrouping) -> Row:
    """The row in `prompt_groups` of learned prompt groups, with the counts of earlier judgments by these groups."""
    content = grouping.model_dump(mode="json", include={"model", "version", "learned_at", "prompts", "evidence"})
    return storable_row({**{name: content[name] for name in ("model", "version", "learned_at")}, "grouping": content})
