"""The publish fence: a response is published only by a router that owns the partition of its request."""

import asyncio

import pytest
from aiokafka import TopicPartition

from services.router.fencing import LEASE_SHARE, PublishFence, RecordFence
from services.router.settings import RouterSettings
from shared.kafka.records import RecordId
from shared.topics import RESPONSES

HERE, THERE = TopicPartition("requests", 0), TopicPartition("requests", 1)


class Clock:
    """A clock that is set by hand."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Sending:
    """Counts what was sent; waits while `go` is not set."""

    def __init__(self) -> None:
        self.sent = 0
        self.sent_at_ms: int | None = None
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, at_ms: int) -> None:
        await self.go.wait()
        self.sent += 1
        self.sent_at_ms = at_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fence(clock: Clock) -> PublishFence:
    made = PublishFence(session_timeout_s=10.0, now_s=clock, wall_s=clock)
    made.open({HERE})
    made.renew_lease(clock())
    return made


@pytest.fixture
def sending() -> Sending:
    return Sending()


async def start(fence: PublishFence, sending: Sending, partition: TopicPartition = HERE) -> asyncio.Task[None]:
    """Start to publish, and continue as far as the fence allows."""
    task = asyncio.create_task(RecordFence(fence, partition, RecordId("requests", 0, 0, 0)).publish(sending))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_a_response_is_published_if_its_partition_is_open(fence, sending):
    await start(fence, sending)
    waiting = await start(fence, sending, THERE)
    assert sending.sent == 1
    fence.open({THERE})
    await waiting
    assert sending.sent == 2


async def test_nothing_is_published_before_the_first_commit(clock, sending):
    fence = PublishFence(session_timeout_s=10.0, now_s=clock, wall_s=clock)
    fence.open({HERE})
    assert fence.renewal_due
    waiting = await start(fence, sending)
    assert sending.sent == 0
    fence.renew_lease(clock())
    await waiting
    assert not fence.renewal_due


async def test_after_the_lease_has_expired_only_a_later_commit_renews_it(fence, clock, sending):
    clock.now_s += 10.0 * LEASE_SHARE + 0.1
    waiting = await start(fence, sending)
    fence.renew_lease(clock() - 10.0 * LEASE_SHARE - 0.1)  # a commit that was started before the process slept
    await asyncio.sleep(0)
    assert sending.sent == 0
    fence.renew_lease(clock())
    await waiting
    assert sending.sent == 1


async def test_a_message_gets_the_time_of_the_check_that_let_it_through(fence, clock, sending):
    fence.close()
    await start(fence, sending)
    clock.now_s += 1.5
    fence.open({HERE})
    await asyncio.sleep(0)
    sending.go.clear()
    clock.now_s += 1.0
    waiting = await start(fence, sending)
    clock.now_s += 60.0  # the process is suspended after the check
    sending.go.set()
    await waiting
    assert sending.sent_at_ms == 102_500


def test_kafka_rejects_a_message_before_another_router_can_own_its_partition():
    session_s = RouterSettings().session_timeout_s
    assert RESPONSES.max_age_ms is not None
    assert PublishFence(session_timeout_s=session_s).lease_s + RESPONSES.max_age_ms / 1_000 + 0.5 < session_s


async def test_renewal_is_due_long_before_the_lease_expires(fence, clock):
    clock.now_s += fence.lease_s / 2
    assert fence.renewal_due
    fence.close()
    assert not fence.renewal_due


async def test_sends_under_way_are_waited_for_after_closing(fence, sending):
    sending.go.clear()
    under_way = await start(fence, sending)
    fence.close({HERE})
    assert not await fence.wait_drained(0.0)
    draining = asyncio.create_task(fence.wait_drained(60.0))
    sending.go.set()
    assert await draining
    await under_way
    late = await start(fence, sending)
    assert sending.sent == 1
    late.cancel()


async def test_other_partitions_are_not_waited_for(fence, sending):
    fence.open({THERE})
    sending.go.clear()
    under_way = await start(fence, sending, THERE)
    fence.close({HERE})
    assert await fence.wait_drained(60.0)
    sending.go.set()
    await under_way


async def test_a_failed_send_is_no_longer_under_way(fence):
    async def fail(_: int) -> None:
        raise OSError("unreachable")

    with pytest.raises(OSError, match="unreachable"):
        await fence.publish(HERE, fail)
    fence.close()
    assert await fence.wait_drained(60.0)
