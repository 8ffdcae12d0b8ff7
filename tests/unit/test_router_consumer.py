"""What the request consumer does with its Kafka consumer in rebalances, after unknown outcomes, and on shutdown."""

import asyncio
import gc
import json
import tomllib
import weakref
from contextvars import ContextVar
from types import SimpleNamespace

import pytest
from aiokafka import ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import IllegalStateError, InvalidTimestampError, KafkaTimeoutError, MessageSizeTooLargeError
from aiokafka.structs import OffsetAndMetadata
from faststream.kafka import KafkaBroker, TestKafkaBroker
from prometheus_client import CollectorRegistry

from services.router.app import subscribe_requests
from services.router.consumer import RequestConsumer
from services.router.offsets import Commit
from services.router.recovery import to_kafka
from services.router.settings import RouterSettings
from shared.fleet import Fleet
from shared.kafka.publish import publish_with_retry
from shared.kafka.unreadable import UnreadableRecords
from shared.runtime.settings import KafkaSettings
from shared.topics import REQUESTS
from tests.support.consumer import (
    KNOWN,
    NEW,
    GroupProgressStandIn,
    KafkaConsumerStandIn,
    UnlimitedCapacity,
    assigned,
    receive,
    record,
    request_consumer,
    run_ready,
)
from tests.support.deadlines import until
from tests.support.fleets import fleet_toml


class Handled:
    """Keeps the records that were started; each ends at once while `go` is set."""

    def __init__(self) -> None:
        self.offsets: list[tuple[int, int]] = []
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, record, fence):
        self.offsets.append((record.partition, record.offset))
        await self.go.wait()


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
def handled() -> Handled:
    return Handled()


@pytest.fixture
def responses() -> Responses:
    return Responses()


@pytest.fixture
def progress() -> GroupProgressStandIn:
    return GroupProgressStandIn()


@pytest.fixture
def consumer() -> KafkaConsumerStandIn:
    return KafkaConsumerStandIn()


@pytest.fixture
def requests(handled: Handled, progress: GroupProgressStandIn, consumer: KafkaConsumerStandIn) -> RequestConsumer:
    return request_consumer(handled, progress, consumer)


@pytest.fixture
def answering(progress: GroupProgressStandIn, consumer: KafkaConsumerStandIn, responses: Responses) -> RequestConsumer:
    """A request consumer whose records are answered through the fence."""

    async def handle(record, fence):
        await publish_with_retry(lambda: fence.publish(lambda _: responses.send(record.offset)))

    return request_consumer(handle, progress, consumer)


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


async def test_the_routers_share_follows_its_partitions(requests):
    await assigned(requests, KNOWN)
    assert requests._capacity.share == 0.5
    await assigned(requests, KNOWN, NEW)
    assert requests._capacity.share == 1.0
    await assigned(requests)
    assert requests._capacity.share == 0.0


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


async def test_requests_wait_while_paused(requests, handled):
    await assigned(requests, KNOWN)
    requests.pause()
    delivery = asyncio.create_task(receive(requests, record(KNOWN, 0)))
    await run_ready()
    assert handled.offsets == []
    assert "still loading" in requests.problem()
    requests.resume()
    await delivery
    await until(lambda: handled.offsets == [(0, 0)])


async def test_a_running_request_does_not_keep_its_callers_context_in_memory(progress, consumer):
    """FastStream's context has the whole batch of a record."""

    class Batch:
        """Can be referenced weakly."""

    batch: ContextVar[Batch | None] = ContextVar("batch", default=None)
    seen: list[Batch | None] = []
    go = asyncio.Event()

    async def handle(record, fence):
        seen.append(batch.get())
        await go.wait()

    requests = request_consumer(handle, progress, consumer)
    await assigned(requests, KNOWN)
    batch.set(Batch())
    kept = weakref.ref(batch.get())
    await receive(requests, record(KNOWN, 0))
    await run_ready()
    assert seen == [None]
    batch.set(None)
    gc.collect()
    assert kept() is None
    go.set()


async def test_a_request_waits_for_a_free_place(requests, handled):
    await assigned(requests, KNOWN)
    handled.go.clear()
    await receive(requests, *(record(KNOWN, offset) for offset in range(5)))
    await run_ready()
    assert len(handled.offsets) == 4
    handled.go.set()
    await until(lambda: len(handled.offsets) == 5)


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


TENANTS = '[[tenants]]\nname = "a"\n[[tenants]]\nname = "b"\n[[tenants]]\nname = "capped"\nmax_in_flight = 1\n'
FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"]) + TENANTS))
BATCH = TopicPartition("requests-batch", 0)


def ask(partition: TopicPartition, offset: int, tenant: str) -> SimpleNamespace:
    return record(partition, offset, json.dumps({"tenant": tenant, "prompt": "Why?"}).encode())


async def test_a_tenant_behind_many_requests_of_another_is_not_kept_waiting(progress, consumer, handled):
    requests = request_consumer(handled, progress, consumer, fleet=FLEET)
    await assigned(requests, KNOWN)
    handled.go.clear()
    await receive(requests, *(ask(KNOWN, offset, "a") for offset in range(50)))
    await receive(requests, *(ask(KNOWN, offset, "b") for offset in range(50, 54)))
    await run_ready()
    assert [offset for _, offset in handled.offsets] == [0, 1, 2, 3]
    handled.go.set()
    await until(lambda: requests.finished(KNOWN) == 54)
    assert max(handled.offsets.index((0, offset)) for offset in range(50, 54)) < 12


async def test_a_tenant_at_its_limit_leaves_places_to_others_and_strangers_share_one_part(progress, consumer, handled):
    requests = request_consumer(handled, progress, consumer, fleet=FLEET)
    await assigned(requests, KNOWN)
    handled.go.clear()
    tenants = ("capped", "capped", "x1", "x2", "x3", "x4", "a")
    await receive(requests, *(ask(KNOWN, offset, tenant) for offset, tenant in enumerate(tenants)))
    await run_ready()
    assert sorted(offset for _, offset in handled.offsets) == [0, 2, 3, 6]


async def test_nothing_beyond_a_waiting_record_is_committed(progress, consumer, handled):
    requests = request_consumer(handled, progress, consumer, fleet=FLEET)
    await assigned(requests, KNOWN)
    handled.go.clear()
    await receive(requests, ask(KNOWN, 0, "capped"), ask(KNOWN, 1, "capped"))
    handled.go.set()
    await receive(requests, *(ask(KNOWN, offset, "a") for offset in range(2, 9)))
    await until(lambda: requests.in_flight == 0)
    handled.go.clear()
    await receive(requests, ask(KNOWN, 9, "capped"), ask(KNOWN, 10, "capped"), ask(KNOWN, 11, "a"))
    await run_ready()
    await requests.shut_down()
    assert (0, 10) not in handled.offsets
    assert consumer.committed[KNOWN].offset == 9


async def test_waiting_records_stay_through_a_rebalance_that_leaves_their_partition_here(progress, consumer, handled):
    requests = request_consumer(handled, progress, consumer)
    await assigned(requests, KNOWN, NEW)
    handled.go.clear()
    await receive(requests, *(record(KNOWN, offset) for offset in range(6)), *(record(NEW, one) for one in range(3)))
    await run_ready()
    assert len(handled.offsets) == 4
    await requests.on_partitions_revoked([KNOWN, NEW])
    handled.go.set()
    await until(lambda: requests.in_flight == 0)
    await run_ready()
    assert len(handled.offsets) == 4  # none starts during a rebalance
    progress.stored, progress.answered = to_kafka({KNOWN: Commit(4, 5)}), {KNOWN: {4: 4}}
    await assigned(requests, KNOWN)
    await receive(requests, *(record(KNOWN, offset) for offset in range(4, 8)))
    await until(lambda: requests.finished(KNOWN) == 8)
    assert handled.offsets == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 5), (0, 6), (0, 7)]


async def test_a_lane_of_which_enough_records_wait_is_paused_and_others_are_read(progress, consumer, handled):
    lanes = {"requests": 3, "requests-batch": 1}
    consumer.assigned = {KNOWN, BATCH}
    requests = request_consumer(handled, progress, consumer, lanes=lanes, max_waiting=8)
    await assigned(requests, KNOWN, BATCH)
    handled.go.clear()
    await receive(requests, *(record(BATCH, offset) for offset in range(3)))
    assert consumer.paused == set()
    await receive(requests, *(record(BATCH, offset) for offset in range(3, 12)))
    assert consumer.paused == {BATCH}
    await run_ready()
    await receive(requests, record(KNOWN, 0))
    assert consumer.paused == {BATCH}
    handled.go.set()
    await until(lambda: consumer.paused == set())
    await until(lambda: len(handled.offsets) == 13)


async def test_a_lane_whose_oldest_request_does_not_end_is_paused_at_last(progress, consumer):
    go = asyncio.Event()

    async def handle(record, fence):
        if record.offset == 0:
            await go.wait()

    requests = request_consumer(handle, progress, consumer, max_waiting=10)
    await assigned(requests, KNOWN)
    offset = 0
    while not consumer.paused:
        await receive(requests, record(KNOWN, offset))
        await run_ready()
        offset += 1
        assert offset < 100
    assert offset >= 20
    go.set()
    await until(lambda: consumer.paused == set())


async def test_after_recovery_a_full_lane_stays_paused(progress, consumer, handled):
    requests = request_consumer(handled, progress, consumer, max_waiting=2)
    await assigned(requests, KNOWN)
    handled.go.clear()
    await receive(requests, *(record(KNOWN, offset) for offset in range(8)))
    assert consumer.paused == {KNOWN, NEW}
    await requests.on_partitions_revoked([KNOWN])
    await assigned(requests, KNOWN)
    await until(lambda: requests.problem() is None)
    assert consumer.paused == {KNOWN, NEW}
    handled.go.set()
    await until(lambda: consumer.paused == set())


class OneAtATime(UnlimitedCapacity):
    """Servers of model `m` with one slot, which a request takes when it is handled."""

    def __init__(self) -> None:
        self.taken = 0

    def has_capacity(self, model: str) -> bool:
        return self.taken == 0

    def is_limited(self, model: str) -> bool:
        return True


async def test_a_request_takes_its_capacity_before_the_next_one_starts(progress, consumer):
    capacity, started, go = OneAtATime(), [], asyncio.Event()

    async def handle(record, fence):
        capacity.taken += 1
        started.append(record.offset)
        await go.wait()
        capacity.taken -= 1

    requests = request_consumer(handle, progress, consumer, capacity=capacity)
    await assigned(requests, KNOWN)
    await receive(requests, *(record(KNOWN, offset) for offset in range(3)))
    await run_ready()
    assert started == [0]
    go.set()
    await until(lambda: len(started) == 3)
    capacity.freed()  # nothing waits


async def test_metrics_show_what_waits_by_lane_and_known_tenant(progress, consumer, handled):
    registry = CollectorRegistry()
    requests = request_consumer(handled, progress, consumer, fleet=FLEET, registry=registry)
    await assigned(requests, KNOWN)
    handled.go.clear()
    tenants = ["a"] * 6 + ["stranger-1", "stranger-2"]
    await receive(requests, *(ask(KNOWN, offset, tenant) for offset, tenant in enumerate(tenants)))
    await run_ready()

    def value(name, **labels):
        return registry.get_sample_value(f"sprout_router_{name}", labels)

    assert value("in_flight") == 4
    waiting = [value("waiting_records", lane="requests", tenant=tenant) for tenant in ("a", "b", "")]
    assert sum(waiting) == 4
    assert waiting[1] == 0
    assert value("waiting_records", lane="requests", tenant="stranger-1") is None
    assert value("waiting_bytes") > 4 * 640
    assert value("waiting_age_seconds") > 0
