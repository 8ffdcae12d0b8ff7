"""Counting the processes that died with a record in hand: the decision, the count, and batches of a subscriber."""

from collections.abc import Sequence
from typing import Any

import pytest
from aiokafka import ConsumerRebalanceListener, OffsetAndMetadata, TopicPartition
from aiokafka.errors import KafkaError
from pydantic import ValidationError

from shared.kafka.careful import CarefulBatches
from shared.kafka.deaths import Caution, DeathCount, DeathLimits, split_deaths, with_deaths
from shared.kafka.handling import RetryLaterError
from shared.runtime.settings import KafkaSettings
from tests.support.consumer import record

LIMITS = DeathLimits(careful=2, set_aside=3)
A, B = TopicPartition("t", 0), TopicPartition("t", 1)


@pytest.mark.parametrize(
    ("deaths", "caution"),
    [(0, Caution.NONE), (1, Caution.NONE), (2, Caution.ONE_AT_A_TIME), (3, Caution.SET_ASIDE), (9, Caution.SET_ASIDE)],
)
def test_caution_follows_from_the_number_of_deaths(deaths, caution):
    assert LIMITS.caution(deaths) is caution


def test_the_limits_are_settings():
    assert DeathLimits.of(KafkaSettings()) == LIMITS
    with pytest.raises(ValidationError, match="SET_ASIDE_AFTER_DEATHS must be larger"):
        KafkaSettings(careful_after_deaths=3, set_aside_after_deaths=3)


@pytest.mark.parametrize("metadata", ["", "since-ms=17", "of another program deaths=", "xdeaths=3"])
@pytest.mark.parametrize("deaths", [0, 1, 12])
def test_the_count_is_the_end_of_the_metadata(metadata, deaths):
    assert split_deaths(with_deaths(metadata, deaths)) == (metadata, deaths)


def test_a_commit_carries_the_count_until_there_is_progress():
    count = DeathCount(LIMITS)
    count.assign(A, 5, 1)
    assert count.deaths(A, 5) == 1  # nothing is in hand yet
    count.take(A, 5)
    assert count.deaths(A, 5) == 2
    assert count.deaths(A, 6) == 0
    count.committed(A, 5)
    assert count.deaths(A, 5) == 2
    count.committed(A, 6)
    assert not count.partitions


def test_an_orderly_end_does_not_count():
    count = DeathCount(LIMITS)
    count.assign(A, 5, 1)
    count.assign(B, 7, 0)
    count.take(A, 5)
    assert count.release([B]) == {}
    assert count.release() == {A: 5}
    assert count.deaths(A, 5) == 1
    assert count.release() == {}


def test_a_process_does_not_take_its_own_count_for_a_death():
    count = DeathCount(LIMITS)
    count.assign(A, 5, 1)
    count.take(A, 5)
    count.assign(A, 5, 2)
    count.take(A, 5)
    assert count.deaths(A, 5) == 2
    count.assign(A, 5, 3)
    assert count.caution(A, 5) is Caution.SET_ASIDE
    assert count.caution(A, 4) is Caution.NONE  # fetched before the assignment


class Kafka:
    """The committed offsets of a group, which outlive the processes; `commits` of the present process."""

    def __init__(self) -> None:
        self.stored: dict[TopicPartition, OffsetAndMetadata] = {}
        self.commits: list[dict[TopicPartition, tuple[int, str]]] = []
        self.reachable = True

    async def commit(self, commits: dict[TopicPartition, OffsetAndMetadata]) -> None:
        if not self.reachable:
            raise KafkaError("unreachable")
        self.stored |= commits
        self.commits.append({one: (commit.offset, str(commit.metadata)) for one, commit in commits.items()})


class Letters:
    """Dead letters: reason, partition and offset."""

    def __init__(self) -> None:
        self.published: list[tuple[str, int, int]] = []

    async def publish(self, one: Any, error: Any) -> None:
        assert one.value is None
        self.published.append((error.reason, one.partition, one.offset))


class Listener(ConsumerRebalanceListener):
    async def on_partitions_revoked(self, revoked): ...

    async def on_partitions_assigned(self, assigned): ...


class DiedError(BaseException):
    """The process has died."""


class Batches(CarefulBatches):
    """Of one process; handling dies at the offsets `deadly` of partition `A`."""

    def __init__(self, kafka: Kafka, letters: Letters, *, deadly: Sequence[int] = ()) -> None:
        super().__init__(KafkaSettings(), letters, group="g", max_records=4, listener=Listener())
        self.kafka, self.deadly = kafka, deadly
        self.handled: list[list[int]] = []
        self.attach(lambda: kafka, self.note)

    async def note(self, records: Sequence[Any]) -> None:
        if any(one.partition == A.partition and one.offset in self.deadly for one in records):
            raise DiedError
        self.handled.append([one.offset for one in records])

    async def _committed(self, partitions):
        if not self.kafka.reachable:
            raise KafkaError("unreachable")
        return {one: self.kafka.stored[one] for one in partitions if one in self.kafka.stored}


@pytest.fixture
def kafka() -> Kafka:
    return Kafka()


@pytest.fixture
def letters() -> Letters:
    return Letters()


async def live(batches: Batches, end: int) -> None:
    """Read partition `A` in batches of four from its commit on, acknowledging as FastStream does."""
    await batches.on_partitions_assigned([A, B])
    while (offset := max(0, batches.kafka.stored.get(A, OffsetAndMetadata(0, "")).offset)) < end:
        await batches.handle([record(A, one) for one in range(offset, min(end, offset + 4))])
        await batches.kafka.commit({A: OffsetAndMetadata(min(end, offset + 4), "")})


async def test_one_commit_and_nothing_else_while_no_process_dies(kafka, letters):
    batches = Batches(kafka, letters)
    await live(batches, 12)
    assert batches.handled == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert kafka.commits[0] == {A: (0, "deaths=1")}
    assert len(kafka.commits) == 1 + 3  # those of FastStream


async def test_a_deadly_record_is_found_and_set_aside(kafka, letters):
    handled: list[int] = []
    deaths = 0
    while True:
        batches = Batches(kafka, letters, deadly=[6])
        try:
            await live(batches, 12)
        except DiedError:
            deaths += 1
        finally:
            handled += [offset for offsets in batches.handled for offset in offsets]
        if kafka.stored[A].offset == 12:
            break
    assert deaths == 4  # the first one with a later batch than the first in hand, which nobody counts
    assert letters.published == [("process_died", 0, 6)]
    assert set(handled) == set(range(12)) - {6}
    assert kafka.stored[A] == OffsetAndMetadata(12, "")


async def test_after_the_suspects_batches_are_handled_as_always(kafka, letters):
    kafka.stored[A] = OffsetAndMetadata(0, "deaths=2")
    batches = Batches(kafka, letters)
    await live(batches, 12)
    assert batches.handled == [[0], [1], [2], [3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [commit[A] for commit in kafka.commits[:5]] == [
        *((offset, "deaths=3") for offset in range(4)),
        (4, ""),
    ]


async def test_a_record_of_another_partition_does_not_count_for_the_suspects(kafka, letters):
    kafka.stored[A] = OffsetAndMetadata(0, "deaths=2")
    batches = Batches(kafka, letters)
    await batches.on_partitions_assigned([A, B])
    await batches.handle([record(B, 0), record(A, 0), record(B, 1)])
    assert batches.handled == [[0], [0, 1]]
    assert kafka.commits == [{A: (0, "deaths=3")}, {A: (1, "")}, {B: (0, "deaths=1")}]


async def test_a_rebalance_and_an_orderly_stop_with_records_in_hand_do_not_count(kafka, letters):
    kafka.stored[A] = OffsetAndMetadata(0, "deaths=1")
    batches = Batches(kafka, letters, deadly=[0])
    await batches.on_partitions_assigned([A])
    with pytest.raises(DiedError):
        await batches.handle([record(A, 0)])
    assert kafka.stored[A].metadata == "deaths=2"
    await batches.on_partitions_revoked([A])
    assert kafka.stored[A].metadata == "deaths=1"
    await batches.on_partitions_assigned([A])
    await batches.finish()
    assert kafka.stored[A].metadata == "deaths=1"


async def test_after_a_rebalance_has_begun_the_suspects_in_hand_do_not_count(kafka, letters):
    kafka.stored[A] = OffsetAndMetadata(0, "deaths=2")
    batches = Batches(kafka, letters)

    async def rebalance_at_1(records):
        await Batches.note(batches, records)
        if records[0].offset == 1:
            await batches.on_partitions_revoked([A])

    batches.attach(lambda: kafka, rebalance_at_1)
    await batches.on_partitions_assigned([A])
    await batches.handle([record(A, offset) for offset in range(4)])
    assert batches.handled == [[0], [1], [2], [3]]
    assert kafka.stored[A] == OffsetAndMetadata(1, "deaths=2")


async def test_a_batch_that_is_tried_again_stays_in_hand(kafka, letters):
    class Retried(Batches):
        async def note(self, records):
            raise RetryLaterError("PostgreSQL is unavailable")

    batches = Retried(kafka, letters)
    await batches.on_partitions_assigned([A])
    for _ in range(5):
        with pytest.raises(RetryLaterError):
            await batches.handle([record(A, 0)])
    assert kafka.stored[A].metadata == "deaths=1"


async def test_without_kafka_records_are_handled_and_nothing_is_counted(kafka, letters):
    kafka.stored[A] = OffsetAndMetadata(0, "deaths=3")
    kafka.reachable = False
    batches = Batches(kafka, letters)
    await batches.on_partitions_assigned([A])
    await batches.handle([record(A, 0), record(A, 1)])
    assert batches.handled == [[0, 1]]
    assert letters.published == []
