"""An intake's surroundings: a consumer and a group that keep what they are told."""

import asyncio
from types import SimpleNamespace

from aiokafka import TopicPartition
from aiokafka.structs import OffsetAndMetadata
from prometheus_client import CollectorRegistry

from services.router.gate import Gate
from services.router.intake import Intake, Serve
from services.router.metrics import RouterMetrics
from services.router.offsets import Standing

KNOWN, NEW = TopicPartition("requests", 0), TopicPartition("requests", 1)


class ConsumerStandIn:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.paused: set[TopicPartition] = set()
        self.committed: dict[TopicPartition, OffsetAndMetadata] = {}
        self.position: dict[TopicPartition, int] = {}

    def assignment(self):
        return {KNOWN, NEW}

    def pause(self, *partitions):
        self.paused |= set(partitions)

    def resume(self, *partitions):
        self.paused -= set(partitions)

    def seek(self, partition, offset):
        self.position[partition] = offset

    async def beginning_offsets(self, partitions):
        return dict.fromkeys(partitions, 0)

    async def commit(self, offsets):
        self.committed |= offsets


class GroupStandIn:
    """Answers, once it is told to, where the group stands."""

    def __init__(self) -> None:
        self.stored: dict[TopicPartition, OffsetAndMetadata] = {}
        self.answered: dict[TopicPartition, dict[int, int]] = {}
        self.answer = asyncio.Event()
        self.answer.set()

    async def commits(self, partitions):
        return {one: self.stored[one] for one in partitions if one in self.stored}

    async def standings(self, commits):
        await self.answer.wait()
        return {one: Standing(commit, self.answered.get(one, {})) for one, commit in commits.items()}


def record(partition: TopicPartition, offset: int) -> SimpleNamespace:
    return SimpleNamespace(topic=partition.topic, partition=partition.partition, offset=offset, timestamp=offset)


def intake_of(serve: Serve, group: GroupStandIn, consumer: ConsumerStandIn) -> Intake:
    made = Intake(
        serve,
        group,
        Gate(session_timeout_s=10.0),
        max_in_flight=4,
        rebalance_grace_s=0.0,
        metrics=RouterMetrics(CollectorRegistry()),
    )
    made.bind(lambda: consumer)
    return made


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def assigned(intake: Intake, *partitions: TopicPartition) -> None:
    await intake.on_partitions_assigned(partitions)
    await settle()
