"""What the router does where Kafka does not say whether it has an answer."""

import asyncio
from collections.abc import Callable

import pytest
from aiokafka.errors import KafkaTimeoutError, MessageSizeTooLargeError

from services.router.intake import Intake
from shared.kafka.publish import publish_with_retry
from tests.support.intake import KNOWN, ConsumerStandIn, GroupStandIn, assigned, intake_of, record, settle


class Broker:
    """Takes what is published, or fails."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.failures: list[Exception] = []

    async def publish(self, offset: int) -> None:
        if self.failures:
            raise self.failures.pop()
        self.sent.append(offset)


@pytest.fixture
def group() -> GroupStandIn:
    return GroupStandIn()


@pytest.fixture
def consumer() -> ConsumerStandIn:
    return ConsumerStandIn()


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def publishing(group: GroupStandIn, consumer: ConsumerStandIn, broker: Broker) -> Intake:
    """An intake whose records are answered through the gate."""

    async def serve(record, passage):
        await publish_with_retry(lambda: passage.through(lambda: broker.publish(record.offset)))

    return intake_of(serve, group, consumer)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110 - nobody else tells
            await asyncio.sleep(0.01)


async def test_an_answer_that_kafka_may_have_is_looked_for_and_not_sent_again(publishing, group, consumer, broker):
    await assigned(publishing, KNOWN)
    group.stored, group.answered = dict(consumer.committed), {KNOWN: {0: 0}}
    broker.failures = [KafkaTimeoutError()]
    await publishing.take([record(KNOWN, 0)])
    await until(lambda: publishing.in_flight == 0 and not consumer.paused)
    assert broker.sent == []
    assert consumer.position[KNOWN] == 0
    await publishing.take([record(KNOWN, 0), record(KNOWN, 1)])
    await until(lambda: publishing.in_flight == 0)
    assert broker.sent == [1]
    assert publishing.finished(KNOWN) == 2


async def test_an_answer_that_kafka_has_not_is_sent_again(publishing, group, consumer, broker):
    await assigned(publishing, KNOWN)
    group.stored = dict(consumer.committed)
    broker.failures = [KafkaTimeoutError()]
    await publishing.take([record(KNOWN, 0), record(KNOWN, 1)])
    await until(lambda: publishing.in_flight == 0 and not consumer.paused)
    assert sorted(broker.sent) == [0, 1]
    assert publishing.finished(KNOWN) == 2


async def test_what_was_fetched_before_a_doubt_comes_again(publishing, group, consumer, broker):
    await assigned(publishing, KNOWN)
    group.stored = dict(consumer.committed)
    group.answer.clear()
    broker.failures = [KafkaTimeoutError()]
    await publishing.take([record(KNOWN, 0)])
    await until(lambda: bool(consumer.paused))
    await publishing.take([record(KNOWN, 1)])
    group.answer.set()
    await until(lambda: publishing.in_flight == 0 and not consumer.paused)
    assert broker.sent == [0]
    assert consumer.position[KNOWN] == 0
    await publishing.take([record(KNOWN, 0), record(KNOWN, 1)])
    await until(lambda: publishing.in_flight == 0)
    assert broker.sent == [0, 1]


async def test_nothing_is_read_back_before_it_is_known_of_all_that_is_on_its_way(publishing, group, consumer, broker):
    await assigned(publishing, KNOWN)
    group.stored = dict(consumer.committed)
    slow, asked = asyncio.Event(), asyncio.Event()
    publish, commits = broker.publish, group.commits

    async def slowly(offset):
        if offset == 1:
            await slow.wait()
        await publish(offset)

    async def counted(partitions):
        asked.set()
        return await commits(partitions)

    broker.publish, group.commits = slowly, counted
    await publishing.take([record(KNOWN, 1)])
    await settle()
    broker.failures = [KafkaTimeoutError()]
    await publishing.take([record(KNOWN, 2)])
    await until(lambda: bool(consumer.paused))
    await settle()
    assert not asked.is_set()
    slow.set()
    await until(lambda: publishing.in_flight == 0 and not consumer.paused)
    assert sorted(broker.sent) == [1, 2]


async def test_a_message_that_kafka_refuses_raises_no_doubt(publishing, consumer, broker):
    await assigned(publishing, KNOWN)
    broker.failures = [MessageSizeTooLargeError()]
    await publishing.take([record(KNOWN, 0)])
    await until(lambda: publishing.in_flight == 0)
    assert consumer.paused == set()
