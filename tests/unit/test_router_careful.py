"""What a router does with the first records of a partition after processes died with them in hand."""

import asyncio

import pytest
from aiokafka import OffsetAndMetadata
from aiokafka.errors import KafkaError

from services.router.offsets import Commit
from services.router.recovery import from_kafka, to_kafka
from shared.kafka.unreadable import set_aside_reason
from tests.support.consumer import KNOWN, NEW, Handled, assigned, receive, record, request_consumer, run_ready
from tests.support.deadlines import until


def stored(offset: int, deaths: int) -> dict:
    return dict(to_kafka({KNOWN: Commit(offset, 5, deaths)}))


def committed(consumer) -> tuple[int, int]:
    """Offset and count of the last commit."""
    found = from_kafka(consumer.committed[KNOWN])
    return found.offset, found.deaths


async def test_the_first_records_count_until_there_is_progress(requests, handled, consumer):
    handled.go.clear()
    await assigned(requests, KNOWN, NEW)
    assert committed(consumer) == (0, 0)
    await receive(requests, record(KNOWN, 0), record(KNOWN, 1))
    await until(lambda: len(handled.offsets) == 2)
    assert committed(consumer) == (0, 1)
    assert from_kafka(consumer.committed[NEW]).deaths == 0  # nothing of it is in hand
    handled.go.set()
    await until(lambda: requests.in_flight == 0)
    await receive(requests, record(NEW, 0))
    assert committed(consumer) == (2, 0)


async def test_a_rebalance_and_a_shutdown_do_not_count(requests, handled, progress, consumer):
    handled.go.clear()
    progress.stored = stored(0, 1)
    await assigned(requests, KNOWN)
    assert committed(consumer) == (0, 1)
    await receive(requests, record(KNOWN, 0))
    assert committed(consumer) == (0, 2)
    await requests.on_partitions_revoked([KNOWN])
    assert committed(consumer) == (0, 1)
    progress.stored = dict(consumer.committed)
    await assigned(requests, KNOWN)
    await receive(requests, record(KNOWN, 0), record(KNOWN, 1))
    assert committed(consumer) == (0, 2)
    await requests.shut_down()
    assert committed(consumer) == (0, 1)


async def test_an_unknown_outcome_does_not_count(requests, handled, progress, consumer):
    handled.go.clear()
    await assigned(requests, KNOWN)
    await receive(requests, record(KNOWN, 0))
    progress.stored = dict(consumer.committed)
    for _ in range(3):
        requests._on_unknown_outcome()
        await until(lambda: requests.problem() is None)
        await receive(requests, record(KNOWN, 0), record(KNOWN, 1))
        progress.stored = dict(consumer.committed)
        assert committed(consumer) == (0, 1)


class OneByOne(Handled):
    """Ends a request when `go` is set, and clears it."""

    async def __call__(self, record, fence):
        await super().__call__(record, fence)
        self.go.clear()


async def test_suspects_are_started_one_at_a_time_each_after_its_commit(progress, consumer):
    handled = OneByOne()
    handled.go.clear()
    requests = request_consumer(handled, progress, consumer)
    progress.stored, consumer.end = stored(0, 2), 3
    await assigned(requests, KNOWN, NEW)
    await receive(requests, *(record(KNOWN, offset) for offset in range(5)), record(NEW, 0))
    await until(lambda: len(handled.offsets) == 2)
    assert consumer.paused == {KNOWN}
    assert sorted(handled.offsets) == [(0, 0), (1, 0)]
    handled.go.set()
    for offset in range(1, 3):
        await until(lambda offset=offset: (0, offset) in handled.offsets)
        assert committed(consumer) == (offset, 3)
        assert requests.in_flight <= 2
        handled.go.set()
    # Beyond what was published when the partition was assigned, all at once.
    await until(lambda: (0, 4) in handled.offsets)
    assert consumer.paused == set()
    handled.go.set()
    await until(lambda: requests.in_flight == 0 or handled.go.set())
    await requests.on_partitions_revoked([KNOWN])
    assert committed(consumer) == (5, 0)


async def test_records_that_are_held_back_are_delivered_again_after_a_rebalance(progress, consumer):
    handled = Handled()
    handled.go.clear()
    requests = request_consumer(handled, progress, consumer)
    progress.stored, consumer.end = stored(0, 2), 3
    await assigned(requests, KNOWN)
    await receive(requests, *(record(KNOWN, offset) for offset in range(3)))
    await until(lambda: len(handled.offsets) == 1)
    await requests.on_partitions_revoked([KNOWN])
    progress.stored = dict(consumer.committed)
    assert committed(consumer) == (0, 2)
    await assigned(requests, KNOWN)
    handled.go.set()
    await receive(requests, *(record(KNOWN, offset) for offset in range(3)))
    await until(lambda: requests.finished(KNOWN) == 3)
    assert handled.offsets == [(0, 0), (0, 1), (0, 2)]


async def test_a_request_that_cannot_be_answered_does_not_hold_the_others_back(progress, consumer):
    started = []

    async def failing(one, fence):
        started.append(one.offset)
        if one.offset == 1:
            raise KafkaError("not published")

    requests = request_consumer(failing, progress, consumer)
    progress.stored, consumer.end = stored(0, 2), 4
    await assigned(requests, KNOWN)
    await receive(requests, *(record(KNOWN, offset) for offset in range(4)))
    await until(lambda: started == [0, 1, 2, 3])


async def test_nothing_else_is_in_hand_while_a_record_is_set_aside(progress, consumer, handled):
    """Another record that ends the process must not do so before the dead letter is published."""
    handled.go.clear()
    requests = request_consumer(handled, progress, consumer)
    progress.stored = stored(7, 3)
    await assigned(requests, KNOWN)
    await receive(requests, *(record(KNOWN, offset) for offset in range(7, 10)))
    await until(lambda: len(handled.offsets) == 1)
    await run_ready()
    assert handled.offsets == [(0, 7)]
    handled.go.set()
    await until(lambda: len(handled.offsets) == 3)
    assert committed(consumer) == (8, 1)


@pytest.mark.parametrize("deaths", [3, 4])
async def test_the_guilty_record_is_set_aside_and_the_others_are_handled(progress, consumer, deaths):
    values = {}

    async def keep(one, fence):
        values[one.offset] = (one.value, set_aside_reason(one), one.timestamp)

    requests = request_consumer(keep, progress, consumer)
    progress.stored = stored(7, deaths)
    await assigned(requests, KNOWN)
    await receive(requests, record(KNOWN, 7), record(KNOWN, 8))
    await until(lambda: requests.finished(KNOWN) == 9)
    assert values == {7: (None, "process_died", 7), 8: (b"{}", None, 8)}
    await requests.on_partitions_revoked([KNOWN])
    assert committed(consumer) == (9, 0)


async def test_without_a_commit_requests_are_started_all_the_same(requests, handled, consumer, monkeypatch):
    monkeypatch.setattr("services.router.careful.COMMIT_TIMEOUT_S", 0.01)
    await assigned(requests, KNOWN)

    async def hanging(_):
        await asyncio.Event().wait()

    monkeypatch.setattr(consumer, "commit", hanging)
    await receive(requests, record(KNOWN, 0))
    await run_ready()
    assert handled.offsets == [(0, 0)]


def test_the_metadata_of_a_commit_has_its_count():
    assert to_kafka({KNOWN: Commit(4, 5, 2)}) == {KNOWN: OffsetAndMetadata(4, "since-ms=5 deaths=2")}
    assert from_kafka(OffsetAndMetadata(4, "since-ms=5 deaths=2")) == Commit(4, 5, 2)
