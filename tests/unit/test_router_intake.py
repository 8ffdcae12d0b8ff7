"""What the intake asks of its consumer and its group while a rebalance is settled."""

import asyncio

import pytest
from aiokafka.errors import IllegalStateError
from aiokafka.structs import OffsetAndMetadata

from services.router.intake import Intake
from services.router.offsets import Commit
from services.router.recovery import stored
from tests.support.intake import KNOWN, NEW, ConsumerStandIn, GroupStandIn, assigned, intake_of, record, settle


class Served:
    """Records that were begun; each is done at once, unless it is held."""

    def __init__(self) -> None:
        self.offsets: list[tuple[int, int]] = []
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, record, passage):
        self.offsets.append((record.partition, record.offset))
        await self.go.wait()


@pytest.fixture
def served() -> Served:
    return Served()


@pytest.fixture
def group() -> GroupStandIn:
    return GroupStandIn()


@pytest.fixture
def consumer() -> ConsumerStandIn:
    return ConsumerStandIn()


@pytest.fixture
def intake(served: Served, group: GroupStandIn, consumer: ConsumerStandIn) -> Intake:
    return intake_of(served, group, consumer)


async def test_nothing_is_delivered_before_it_is_known_where_the_group_stands(intake, served, group, consumer):
    await assigned(intake, KNOWN)
    await intake.take([record(KNOWN, 0)])
    await intake.on_partitions_revoked([KNOWN])
    group.stored, group.answer = dict(consumer.committed), asyncio.Event()
    await assigned(intake, KNOWN, NEW)
    assert intake.problem() == "no partitions assigned yet, or a rebalance is under way"
    assert consumer.paused == {KNOWN, NEW}
    group.answer.set()
    await settle()
    assert intake.problem() is None
    assert consumer.paused == set()
    await intake.take([record(NEW, 0), record(KNOWN, 1)])
    await settle()
    assert served.offsets == [(0, 0), (1, 0), (0, 1)]


async def test_a_router_that_stops_takes_nothing_up_again(intake, group, consumer):
    group.answer.clear()
    await assigned(intake, KNOWN, NEW)
    await intake.drain(0.0)
    group.answer.set()
    await settle()
    assert consumer.paused == {KNOWN, NEW}


async def test_a_group_without_commits_is_given_one_before_anything_is_begun(intake, group, consumer):
    group.answer.clear()
    await assigned(intake, KNOWN)
    first = consumer.committed[KNOWN]
    assert first.offset == 0
    assert first.metadata.startswith("since-ms=")


async def test_a_commit_without_a_time_is_kept_and_given_one(intake, group, consumer):
    group.stored = {KNOWN: OffsetAndMetadata(41, "")}
    await assigned(intake, KNOWN)
    assert consumer.committed[KNOWN].offset == 41
    assert consumer.committed[KNOWN].metadata.startswith("since-ms=")


async def test_what_was_answered_before_is_finished_and_what_runs_of_it_is_given_up(intake, served, group, consumer):
    await assigned(intake, KNOWN)
    served.go.clear()
    await intake.take([record(KNOWN, 0), record(KNOWN, 1)])
    await settle()
    assert intake.in_flight == 2
    await intake.on_partitions_revoked([KNOWN])
    group.stored, group.answered = stored({KNOWN: Commit(0, 5)}), {KNOWN: {1: 1, 2: 2}}
    await assigned(intake, KNOWN)
    assert intake.in_flight == 1
    await intake.take([record(KNOWN, offset) for offset in range(4)])
    served.go.set()
    await settle()
    assert served.offsets == [(0, 0), (0, 1), (0, 3)]
    await intake.on_partitions_revoked([KNOWN])
    assert consumer.committed[KNOWN].offset == 4


async def test_it_asks_again_where_the_group_stands_until_it_is_told(intake, group, consumer, monkeypatch):
    monkeypatch.setattr("services.router.takeover.PAUSE_S", 0.0)
    failures = iter([OSError("away"), RuntimeError("unforeseen")])

    async def commits(_):
        for failure in failures:
            raise failure
        return {}

    monkeypatch.setattr(group, "commits", commits)
    await assigned(intake, KNOWN)
    await settle()
    assert intake.problem() is None


async def test_partitions_that_could_not_be_resumed_are_tried_again(intake, consumer, monkeypatch):
    monkeypatch.setattr("services.router.takeover.PAUSE_S", 0.0)
    failures = iter([RuntimeError("unforeseen")])
    resume = consumer.resume

    def failing(*partitions):
        for failure in failures:
            raise failure
        resume(*partitions)

    monkeypatch.setattr(consumer, "resume", failing)
    await assigned(intake, KNOWN)
    await settle()
    assert consumer.paused == set()
    assert intake.problem() is None


async def test_a_partition_that_was_never_taken_over_is_given_back_as_it_is(intake, group, consumer, monkeypatch):
    async def refused(_):
        raise IllegalStateError("not a member any more")

    await assigned(intake, KNOWN)
    await intake.take([record(KNOWN, 0)])
    await settle()
    with monkeypatch.context() as patch:
        patch.setattr(consumer, "commit", refused)
        await intake.on_partitions_revoked([KNOWN])
    # Meanwhile another router owned it and went further.
    consumer.committed = dict(stored({KNOWN: Commit(9, 5)}))
    group.stored, group.answer = dict(consumer.committed), asyncio.Event()
    await assigned(intake, KNOWN)
    await intake.on_partitions_revoked([KNOWN])
    assert consumer.committed[KNOWN].offset == 9


async def test_a_stop_does_not_wait_for_a_kafka_that_is_away(intake, consumer, monkeypatch):
    monkeypatch.setattr("services.router.intake.LAST_COMMIT_S", 0.05)
    await assigned(intake, KNOWN)
    await intake.take([record(KNOWN, 0)])
    await settle()

    async def hanging(_):
        await asyncio.Event().wait()

    monkeypatch.setattr(consumer, "commit", hanging)
    async with asyncio.timeout(2.0):
        await intake.drain(0.0)
