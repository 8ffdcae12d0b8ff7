"""What the request consumer does with its Kafka consumer: assignment, recovery, and shutdown."""

import asyncio

from aiokafka import ConsumerRebalanceListener, ConsumerRecord
from aiokafka.errors import IllegalStateError
from aiokafka.structs import OffsetAndMetadata
from faststream.kafka import KafkaBroker, TestKafkaBroker

from services.router.app import subscribe_requests
from services.router.offsets import Commit
from services.router.recovery import to_kafka
from services.router.settings import RouterSettings
from shared.kafka.unreadable import UnreadableRecords
from shared.runtime.settings import KafkaSettings
from shared.topics import REQUESTS
from tests.support.consumer import (
    KNOWN,
    NEW,
    UnlimitedCapacity,
    assigned,
    receive,
    record,
    request_consumer,
    run_ready,
)
from tests.support.deadlines import until


async def test_faststream_delivers_records_as_they_are():
    class Received(ConsumerRebalanceListener):
        def __init__(self) -> None:
            self.records: list[ConsumerRecord] = []

        def set_consumer(self, get_consumer):
            assert get_consumer() is None  # before the broker starts

        async def receive(self, records):
            self.records.extend(records)

        async def on_partitions_revoked(self, revoked): ...

        async def on_partitions_assigned(self, assigned): ...

    broker, kafka, received = KafkaBroker(), KafkaSettings(topic_prefix="t."), Received()
    subscribe_requests(broker, received, kafka=kafka, settings=RouterSettings())
    values = [b'{"prompt": "why?"}', b"{broken", b'{"prompt": 3}']
    async with TestKafkaBroker(broker):
        for value in values:
            await broker.publish(value, topic=kafka.topic(REQUESTS), headers={"reply_to": "elsewhere"})
    assert [record.value for record in received.records] == values
    assert {record.topic for record in received.records} == {"t.requests"}


async def test_the_routers_share_follows_its_partitions(handled, progress, consumer):
    capacity = UnlimitedCapacity()
    requests = request_consumer(handled, progress, consumer, capacity=capacity)
    await assigned(requests, KNOWN)
    assert capacity.share == 0.5
    await assigned(requests, KNOWN, NEW)
    assert capacity.share == 1.0
    await assigned(requests)
    assert capacity.share == 0.0


async def test_no_record_is_delivered_before_recovery(requests, handled, progress, consumer):
    await assigned(requests, KNOWN)
    await receive(requests, record(KNOWN, 0))
    await requests.on_partitions_revoked([KNOWN])
    progress.stored, progress.answer = dict(consumer.committed), asyncio.Event()
    assert "rebalance is under way" in requests.problem()
    await assigned(requests, KNOWN, NEW)
    assert "recovering partitions" in requests.problem()
    assert consumer.paused == {KNOWN, NEW}
    progress.answer.set()
    await until(lambda: requests.problem() is None)
    assert consumer.paused == set()
    await receive(requests, record(NEW, 0), record(KNOWN, 1))
    await until(lambda: len(handled.offsets) == 3)
    assert handled.offsets == [(0, 0), (1, 0), (0, 1)]


async def test_after_shutdown_no_partition_is_resumed(requests, progress, consumer):
    progress.answer.clear()
    await assigned(requests, KNOWN, NEW)
    await requests.shut_down()
    progress.answer.set()
    await run_ready()
    assert consumer.paused == {KNOWN, NEW}
    assert requests.problem() == "shutting down"


async def test_a_partition_without_a_commit_gets_one_before_requests_start(requests, progress, consumer):
    progress.answer.clear()
    await assigned(requests, KNOWN)
    first = consumer.committed[KNOWN]
    assert first.offset == 0
    assert first.metadata.startswith("since-ms=")


async def test_a_commit_without_a_time_keeps_its_offset_and_gets_a_time(requests, progress, consumer):
    progress.stored = {KNOWN: OffsetAndMetadata(41, "")}
    await assigned(requests, KNOWN)
    assert consumer.committed[KNOWN].offset == 41
    assert consumer.committed[KNOWN].metadata.startswith("since-ms=")


async def test_answered_records_are_finished_and_their_running_requests_cancelled(
    requests, handled, progress, consumer
):
    await assigned(requests, KNOWN)
    handled.go.clear()
    await receive(requests, record(KNOWN, 0), record(KNOWN, 1))
    await until(lambda: len(handled.offsets) == 2)
    assert requests.in_flight == 2
    await requests.on_partitions_revoked([KNOWN])
    progress.stored, progress.answered = to_kafka({KNOWN: Commit(0, 5)}), {KNOWN: {1: 1, 2: 2}}
    await assigned(requests, KNOWN)
    assert requests.in_flight == 1
    await receive(requests, *(record(KNOWN, offset) for offset in range(4)))
    handled.go.set()
    await until(lambda: requests.in_flight == 0)
    assert handled.offsets == [(0, 0), (0, 1), (0, 3)]
    await requests.on_partitions_revoked([KNOWN])
    assert consumer.committed[KNOWN].offset == 4


async def test_recovery_is_tried_until_it_succeeds(requests, progress, monkeypatch):
    monkeypatch.setattr("services.router.consumer.RECOVERY_PAUSE_S", 0.0)
    failures = iter([OSError("unreachable"), RuntimeError("unexpected")])

    async def committed(_):
        for failure in failures:
            raise failure
        return {}

    monkeypatch.setattr(progress, "committed", committed)
    await assigned(requests, KNOWN)
    await until(lambda: requests.problem() is None)


async def test_partitions_that_could_not_be_resumed_are_recovered_again(requests, consumer, monkeypatch):
    monkeypatch.setattr("services.router.consumer.RECOVERY_PAUSE_S", 0.0)
    failures = iter([RuntimeError("unexpected")])
    resume = consumer.resume

    def failing(*partitions):
        for failure in failures:
            raise failure
        resume(*partitions)

    monkeypatch.setattr(consumer, "resume", failing)
    await assigned(requests, KNOWN)
    await until(lambda: requests.problem() is None)
    assert consumer.paused == set()


async def test_a_partition_that_was_not_recovered_is_not_committed(requests, progress, consumer, monkeypatch):
    async def refused(_):
        raise IllegalStateError("not a member any more")

    await assigned(requests, KNOWN)
    await receive(requests, record(KNOWN, 0))
    await until(lambda: requests.in_flight == 0)
    with monkeypatch.context() as patch:
        patch.setattr(consumer, "commit", refused)
        await requests.on_partitions_revoked([KNOWN])
    # Meanwhile another router owned it and made progress.
    consumer.committed = dict(to_kafka({KNOWN: Commit(9, 5)}))
    progress.stored, progress.answer = dict(consumer.committed), asyncio.Event()
    await assigned(requests, KNOWN)
    await requests.on_partitions_revoked([KNOWN])
    assert consumer.committed[KNOWN].offset == 9


async def test_shutdown_does_not_wait_for_an_unreachable_kafka(requests, consumer, monkeypatch):
    monkeypatch.setattr("services.router.consumer.LAST_COMMIT_S", 0.01)
    await assigned(requests, KNOWN)
    await receive(requests, record(KNOWN, 0))
    await until(lambda: requests.in_flight == 0)

    async def hanging(_):
        await asyncio.Event().wait()

    monkeypatch.setattr(consumer, "commit", hanging)
    await requests.shut_down()


async def test_running_requests_may_finish_on_shutdown(handled, progress, consumer):
    requests = request_consumer(handled, progress, consumer, drain_grace_s=60.0)
    await assigned(requests, KNOWN)
    handled.go.clear()
    await receive(requests, record(KNOWN, 0))
    await until(lambda: handled.offsets == [(0, 0)])
    shutdown = asyncio.create_task(requests.shut_down())
    await until(lambda: requests.problem() == "shutting down")
    await receive(requests, record(KNOWN, 1))
    handled.go.set()
    await shutdown
    assert handled.offsets == [(0, 0)]
    assert consumer.committed[KNOWN].offset == 1


class UnreadableStandIn(UnreadableRecords):
    """Offsets 2 and 3 of partition 0 would end the process."""

    def after(self, partition, offset):
        return [range(2, 4)] if partition == KNOWN and offset < 4 else []

    async def read(self, partition, offsets):
        return [record(partition, offset) for offset in offsets]


async def test_records_that_would_end_the_process_are_set_aside_and_those_before_them_are_handled(
    progress, consumer, handled
):
    requests = request_consumer(handled, progress, consumer, unreadable=UnreadableStandIn(KafkaSettings()))
    await assigned(requests, KNOWN, NEW)
    await until(lambda: consumer.position == {KNOWN: 4, NEW: 0})
    await until(lambda: len(handled.offsets) == 3)
    assert handled.offsets == [(0, 0), (0, 1), (0, 2)]
    await until(lambda: consumer.paused == set())
    await receive(requests, record(KNOWN, 4))
    await until(lambda: len(handled.offsets) == 4)
    assert requests.finished(KNOWN) == 5
