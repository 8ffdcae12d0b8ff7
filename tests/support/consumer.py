"""A request consumer with stand-ins for its Kafka consumer and for the progress of its group."""

import asyncio
import tomllib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata
from prometheus_client import CollectorRegistry

from services.router.consumer import RequestConsumer
from services.router.metrics import RouterMetrics
from services.router.offsets import RecoveredOffsets
from services.router.request_class import RequestClasses
from services.router.settings import RouterSettings
from services.router.starter import Capacity, Handle
from shared.fleet import Fleet
from shared.kafka.deaths import DeathLimits
from shared.kafka.unreadable import UnreadableRecords
from shared.runtime.settings import KafkaSettings
from tests.support.fleets import fleet_toml

KNOWN, NEW = TopicPartition("requests", 0), TopicPartition("requests", 1)


class KafkaConsumerStandIn:
    """Records the calls of the request consumer."""

    def __init__(self) -> None:
        self.paused: set[TopicPartition] = set()
        self.committed: dict[TopicPartition, OffsetAndMetadata] = {}
        self.position: dict[TopicPartition, int] = {}
        self.end = 0
        self.assigned = {KNOWN, NEW}

    def assignment(self):
        return self.assigned

    def partitions_for_topic(self, topic):
        return {0, 1}

    def pause(self, *partitions):
        self.paused |= set(partitions)

    def resume(self, *partitions):
        self.paused -= set(partitions)

    def seek(self, partition, offset):
        self.position[partition] = offset

    async def beginning_offsets(self, partitions):
        return dict.fromkeys(partitions, 0)

    async def end_offsets(self, partitions):
        return dict.fromkeys(partitions, self.end)

    async def commit(self, offsets):
        self.committed |= offsets


class Handled:
    """Keeps the records that were started; each ends at once while `go` is set."""

    def __init__(self) -> None:
        self.offsets: list[tuple[int, int]] = []
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, record, fence):
        self.offsets.append((record.partition, record.offset))
        await self.go.wait()


class GroupProgressStandIn:
    """Reports the commits and answered records that a test sets, while `answer` is set."""

    def __init__(self) -> None:
        self.stored: dict[TopicPartition, OffsetAndMetadata] = {}
        self.answered: dict[TopicPartition, dict[int, int]] = {}
        self.answer = asyncio.Event()
        self.answer.set()

    async def committed(self, partitions):
        return {one: self.stored[one] for one in partitions if one in self.stored}

    async def recovered(self, commits):
        await self.answer.wait()
        return {one: RecoveredOffsets(commit, self.answered.get(one, {})) for one, commit in commits.items()}


def record(partition: TopicPartition, offset: int, value: bytes = b"{}") -> SimpleNamespace:
    return SimpleNamespace(
        topic=partition.topic,
        partition=partition.partition,
        offset=offset,
        timestamp=offset,
        key=None,
        value=value,
        headers=(),
    )


class UnlimitedCapacity:
    """There is always capacity; records the share."""

    share = 1.0

    def on_capacity(self, callback: Callable[[], None]) -> None:
        self.freed = callback

    def has_capacity(self, model: str) -> bool:
        return True

    def is_limited(self, model: str) -> bool:
        return False

    def set_share(self, share: float) -> None:
        self.share = share


def request_consumer(
    handle: Handle,
    progress: GroupProgressStandIn,
    consumer: KafkaConsumerStandIn,
    unreadable: UnreadableRecords | None = None,
    *,
    fleet: Fleet | None = None,
    capacity: Capacity | None = None,
    registry: CollectorRegistry | None = None,
    **settings: Any,
) -> RequestConsumer:
    given = {
        "lanes": {"requests": 1},
        "session_timeout_s": 10.0,
        "max_in_flight": 4,
        "rebalance_grace_s": 0.0,
        "drain_grace_s": 0.0,
        **settings,
    }
    checked = RouterSettings.model_validate(given)
    fleet = fleet or Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
    requests = RequestConsumer(
        handle,
        progress,
        settings=checked,
        metrics=RouterMetrics(registry or CollectorRegistry()),
        capacity=capacity or UnlimitedCapacity(),
        classes=RequestClasses(fleet=fleet, kafka=KafkaSettings(topic_prefix=""), settings=checked),
        unreadable=unreadable or UnreadableRecords(KafkaSettings()),
        deaths=DeathLimits.of(KafkaSettings()),
    )
    requests.set_consumer(lambda: consumer)
    return requests


async def receive(requests: RequestConsumer, *records: SimpleNamespace) -> None:
    """Deliver records, and start them if nothing prevents it."""
    await requests.receive(records)
    await asyncio.sleep(0)


async def run_ready() -> None:
    """Run all tasks that are ready, and those that they wake."""
    for _ in range(10):
        await asyncio.sleep(0)


async def assigned(requests: RequestConsumer, *partitions: TopicPartition) -> None:
    """Assign partitions, and recover them if nothing prevents it."""
    await requests.on_partitions_assigned(partitions)
    await run_ready()
