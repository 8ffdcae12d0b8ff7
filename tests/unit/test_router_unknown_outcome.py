"""What the request consumer does when it is unknown whether Kafka has a response."""

import asyncio

import pytest
from aiokafka.errors import InvalidTimestampError, KafkaTimeoutError, MessageSizeTooLargeError

from services.router.consumer import RequestConsumer
from shared.kafka.publish import publish_with_retry
from tests.support.consumer import (
    KNOWN,
    GroupProgressStandIn,
    KafkaConsumerStandIn,
    assigned,
    receive,
    record,
    request_consumer,
    run_ready,
)
from tests.support.deadlines import until


class Responses:
    """A topic that accepts what is published, or fails."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.failures: list[Exception] = []

    async def send(self, offset: int) -> None:
        if self.failures:
            raise self.failures.pop()
        self.sent.append(offset)


@pytest.fixture
def responses() -> Responses:
    return Responses()


@pytest.fixture
def answering(progress: GroupProgressStandIn, consumer: KafkaConsumerStandIn, responses: Responses) -> RequestConsumer:
    """A request consumer whose records are answered through the fence."""

    async def handle(record, fence):
        await publish_with_retry(lambda: fence.publish(lambda _: responses.send(record.offset)))

    return request_consumer(handle, progress, consumer)


async def test_a_response_that_kafka_has_after_an_unknown_outcome_is_not_sent_again(
    answering, progress, consumer, responses
):
    await assigned(answering, KNOWN)
    progress.stored, progress.answered = dict(consumer.committed), {KNOWN: {0: 0}}
    responses.failures = [KafkaTimeoutError()]
    await receive(answering, record(KNOWN, 0))
    await until(lambda: answering.in_flight == 0 and not consumer.paused)
    assert responses.sent == []
    assert consumer.position[KNOWN] == 0
    await receive(answering, record(KNOWN, 0), record(KNOWN, 1))
    await until(lambda: answering.in_flight == 0)
    assert responses.sent == [1]
    assert answering.finished(KNOWN) == 2


@pytest.mark.parametrize("error", [KafkaTimeoutError, InvalidTimestampError])
async def test_a_response_that_kafka_does_not_have_is_sent_again(answering, progress, consumer, responses, error):
    await assigned(answering, KNOWN)
    progress.stored = dict(consumer.committed)
    responses.failures = [error()]
    await receive(answering, record(KNOWN, 0), record(KNOWN, 1))
    await until(lambda: answering.in_flight == 0 and not consumer.paused)
    assert sorted(responses.sent) == [0, 1]
    assert answering.finished(KNOWN) == 2


async def test_records_fetched_before_an_unknown_outcome_are_redelivered(answering, progress, consumer, responses):
    await assigned(answering, KNOWN)
    progress.stored = dict(consumer.committed)
    progress.answer.clear()
    responses.failures = [KafkaTimeoutError()]
    await receive(answering, record(KNOWN, 0))
    await until(lambda: bool(consumer.paused))
    await receive(answering, record(KNOWN, 1))
    progress.answer.set()
    await until(lambda: answering.in_flight == 0 and not consumer.paused)
    assert responses.sent == [0]
    assert consumer.position[KNOWN] == 0
    await receive(answering, record(KNOWN, 0), record(KNOWN, 1))
    await until(lambda: answering.in_flight == 0)
    assert responses.sent == [0, 1]


async def test_recovery_waits_for_sends_under_way(answering, progress, consumer, responses):
    await assigned(answering, KNOWN)
    progress.stored = dict(consumer.committed)
    slow, read = asyncio.Event(), asyncio.Event()
    send, committed = responses.send, progress.committed

    async def slowly(offset):
        if offset == 1:
            await slow.wait()
        await send(offset)

    async def noted(partitions):
        read.set()
        return await committed(partitions)

    responses.send, progress.committed = slowly, noted
    await receive(answering, record(KNOWN, 1))
    await run_ready()
    responses.failures = [KafkaTimeoutError()]
    await receive(answering, record(KNOWN, 2))
    await until(lambda: bool(consumer.paused))
    await run_ready()
    assert not read.is_set()
    slow.set()
    await until(lambda: answering.in_flight == 0 and not consumer.paused)
    assert sorted(responses.sent) == [1, 2]


async def test_a_message_that_kafka_rejects_is_no_unknown_outcome(answering, consumer, responses):
    await assigned(answering, KNOWN)
    responses.failures = [MessageSizeTooLargeError()]
    await receive(answering, record(KNOWN, 0))
    await until(lambda: answering.in_flight == 0)
    assert consumer.paused == set()
