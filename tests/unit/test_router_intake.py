"""What the intake asks of its consumer while a rebalance is settled."""

import asyncio
from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from prometheus_client import CollectorRegistry

from services.router.intake import Intake
from services.router.metrics import RouterMetrics

KNOWN, NEW = TopicPartition("requests", 0), TopicPartition("requests", 1)


class ConsumerStandIn:
    """Says what it was asked for, and answers for the committed offset once it is told to."""

    def __init__(self) -> None:
        self.paused: set[TopicPartition] = set()
        self.answer = asyncio.Event()

    def assignment(self):
        return {KNOWN, NEW}

    def pause(self, *partitions):
        self.paused |= set(partitions)

    def resume(self, *partitions):
        self.paused -= set(partitions)

    async def committed(self, partition):
        await self.answer.wait()
        return 1

    async def commit(self, offsets):
        return None


class Served:
    """Records that were begun; each is done at once."""

    def __init__(self) -> None:
        self.offsets: list[tuple[int, int]] = []

    async def __call__(self, record):
        self.offsets.append((record.partition, record.offset))


def record(partition: TopicPartition, offset: int) -> SimpleNamespace:
    return SimpleNamespace(topic=partition.topic, partition=partition.partition, offset=offset, timestamp=0)


@pytest.fixture
def served() -> Served:
    return Served()


@pytest.fixture
def intake(served: Served) -> Intake:
    return Intake(served, max_in_flight=4, rebalance_grace_s=0.0, metrics=RouterMetrics(CollectorRegistry()))


async def rebalancing(intake: Intake, consumer: ConsumerStandIn) -> asyncio.Task[None]:
    """One partition is known, another comes to it; where the group stands is being asked for."""
    intake.bind(lambda: consumer)
    await intake.on_partitions_assigned([KNOWN])
    await intake.take([record(KNOWN, 0)])
    await intake.on_partitions_revoked([KNOWN])
    task = asyncio.create_task(intake.on_partitions_assigned([KNOWN, NEW]))
    await asyncio.sleep(0)
    return task


async def test_nothing_is_delivered_before_it_is_known_where_the_group_stands(intake, served):
    consumer = ConsumerStandIn()
    task = await rebalancing(intake, consumer)
    assert not task.done()
    assert consumer.paused == {KNOWN, NEW}
    consumer.answer.set()
    await task
    assert consumer.paused == set()
    await intake.take([record(NEW, 0), record(KNOWN, 1)])
    await asyncio.sleep(0)
    assert served.offsets == [(0, 0), (1, 0), (0, 1)]


async def test_a_router_that_stops_takes_nothing_up_again(intake):
    consumer = ConsumerStandIn()
    task = await rebalancing(intake, consumer)
    await intake.drain(0.0)
    consumer.answer.set()
    await task
    assert consumer.paused == {KNOWN, NEW}
