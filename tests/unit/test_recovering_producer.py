"""The producer that is replaced after an error that it cannot recover from; aiokafka's producer is simulated."""

import asyncio
from types import SimpleNamespace
from typing import ClassVar

import pytest
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    NotLeaderForPartitionError,
    OutOfOrderSequenceNumber,
    ProducerClosed,
)
from faststream.exceptions import IncorrectState

from shared.kafka import producer as module
from shared.kafka.producer import RecoveringProducer


class FakeProducer:
    """Like aiokafka's producer: after `large` or `defect` every message fails; `hold` waits until it is released."""

    made: ClassVar[list["FakeProducer"]] = []
    unreachable = False
    brokers: ClassVar[set[str]] = {"one"}

    def __init__(self, **options):
        self.broken: KafkaError | None = None
        self.released = asyncio.Event()
        self.sent: list[bytes] = []
        self.started = self.stopped = False
        self.client = SimpleNamespace(cluster=SimpleNamespace(brokers=lambda: self.brokers))
        self.made.append(self)

    async def start(self):
        if self.unreachable:
            raise KafkaConnectionError
        self.started = True

    async def stop(self):
        self.stopped = True
        if self.started:
            await self.released.wait()

    async def send(self, topic, value, **options):
        if self.stopped:
            raise ProducerClosed
        if value == b"larger than the producer allows":
            raise MessageSizeTooLargeError
        return asyncio.ensure_future(self._deliver(value))

    async def _deliver(self, value):
        if value == b"hold":
            await self.released.wait()
        elif value == b"busy":
            raise NotLeaderForPartitionError
        elif self.broken is not None:
            raise self.broken
        elif value == b"large":
            self.broken = OutOfOrderSequenceNumber()
            raise MessageSizeTooLargeError
        elif value == b"defect":
            self.broken = KafkaError("Unexpected error during batch delivery")
            raise self.broken
        self.sent.append(value)


@pytest.fixture
async def producer(monkeypatch):
    monkeypatch.setattr(module, "AIOKafkaProducer", FakeProducer)
    monkeypatch.setattr(module, "FLUSH_TIMEOUT_S", 0.05)
    monkeypatch.setattr(FakeProducer, "made", [])
    monkeypatch.setattr(FakeProducer, "unreachable", False)
    made = RecoveringProducer(bootstrap_servers="localhost:9092")
    await made.start()
    return made


async def test_a_producer_that_starts_while_kafka_names_no_broker_is_given_up(producer, monkeypatch):
    monkeypatch.setattr(FakeProducer, "brokers", set())
    another = RecoveringProducer(bootstrap_servers="localhost:9092")
    starting = asyncio.create_task(another.start())
    await asyncio.sleep(0)
    FakeProducer.made[-1].released.set()
    with pytest.raises(KafkaConnectionError):
        await starting
    assert FakeProducer.made[-1].stopped
    assert not another.is_started
    monkeypatch.setattr(FakeProducer, "brokers", {"one"})
    await another.start()
    assert another.is_started


@pytest.mark.parametrize(("value", "error"), [(b"large", MessageSizeTooLargeError), (b"defect", KafkaError)])
async def test_after_an_unrecoverable_error_another_producer_sends(producer, value, error):
    with pytest.raises(error):
        await producer.send("t", value)
    await producer.send("t", b"next")
    old, new = FakeProducer.made
    assert (old.sent, new.sent) == ([], [b"next"])
    assert old.stopped


@pytest.mark.parametrize(
    ("value", "error"),
    [(b"busy", NotLeaderForPartitionError), (b"larger than the producer allows", MessageSizeTooLargeError)],
)
async def test_an_error_that_leaves_the_producer_usable_replaces_nothing(producer, value, error):
    with pytest.raises(error):
        await producer.send("t", value)
    assert len(FakeProducer.made) == 1


async def test_several_failures_at_once_lead_to_one_replacement(producer):
    results = await asyncio.gather(*(producer.send("t", b"large") for _ in range(5)), return_exceptions=True)
    assert {type(result) for result in results} == {MessageSizeTooLargeError, OutOfOrderSequenceNumber}
    assert len(FakeProducer.made) == 2


async def test_messages_in_flight_survive_the_replacement(producer):
    held = asyncio.create_task(producer.send("t", b"hold"))
    await asyncio.sleep(0)
    with pytest.raises(MessageSizeTooLargeError):
        await producer.send("t", b"large")
    old, _ = FakeProducer.made
    old.released.set()
    await held
    assert old.sent == [b"hold"]


async def test_while_kafka_is_unreachable_the_error_is_the_messages_own_and_the_next_one_tries_again(producer):
    FakeProducer.unreachable = True
    with pytest.raises(MessageSizeTooLargeError):
        await producer.send("t", b"large")
    with pytest.raises(OutOfOrderSequenceNumber):
        await producer.send("t", b"next")
    FakeProducer.unreachable = False
    with pytest.raises(OutOfOrderSequenceNumber):
        await producer.send("t", b"next")
    await producer.send("t", b"next")
    assert FakeProducer.made[-1].sent == [b"next"]


async def test_a_message_that_came_too_late_for_the_old_producer_goes_to_the_new_one(producer):
    with pytest.raises(MessageSizeTooLargeError):
        await producer.send("t", b"large")
    old, new = FakeProducer.made
    producer._producer = old

    async def replace(topic, value, **options):
        producer._producer = new
        raise ProducerClosed

    old.send = replace
    await producer.send("t", b"late")
    assert new.sent == [b"late"]


async def test_stopping_does_not_wait_for_a_kafka_that_does_not_respond(producer):
    held = asyncio.create_task(producer.send("t", b"hold"))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await producer.stop()
    held.cancel()
    with pytest.raises(IncorrectState):
        await producer.send("t", b"next")
