"""When an answer may go out: only from a router that is known to own the request's partition."""

import asyncio

import pytest
from aiokafka import TopicPartition

from services.router.gate import LEASE_SHARE, Gate, Passage

HERE, THERE = TopicPartition("requests", 0), TopicPartition("requests", 1)


class Clock:
    """A clock that is set by hand."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Publishing:
    """Notes what went out; waits to be let go where it is told to."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self) -> None:
        await self.go.wait()
        self.sent.append("answer")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    made = Gate(session_timeout_s=10.0, now_s=clock)
    made.open({HERE})
    made.prove(clock())
    return made


@pytest.fixture
def publishing() -> Publishing:
    return Publishing()


async def trying(gate: Gate, publishing: Publishing, partition: TopicPartition = HERE) -> asyncio.Task[None]:
    task = asyncio.create_task(Passage(gate, partition, "").through(publishing))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_an_answer_passes_where_the_partition_is_owned(gate, publishing):
    await trying(gate, publishing)
    waiting = await trying(gate, publishing, THERE)
    assert publishing.sent == ["answer"]
    gate.open({THERE})
    await waiting
    assert publishing.sent == ["answer"] * 2


async def test_nothing_passes_before_the_group_has_accepted_a_commit(clock, publishing):
    gate = Gate(session_timeout_s=10.0, now_s=clock)
    gate.open({HERE})
    assert gate.wants_proof
    waiting = await trying(gate, publishing)
    assert publishing.sent == []
    gate.prove(clock())
    await waiting
    assert not gate.wants_proof


async def test_a_router_that_slept_past_its_session_must_prove_itself_again(gate, clock, publishing):
    clock.now_s += 10.0 * LEASE_SHARE + 0.1
    waiting = await trying(gate, publishing)
    gate.prove(clock() - 10.0 * LEASE_SHARE - 0.1)  # a commit that was begun before it slept
    await asyncio.sleep(0)
    assert publishing.sent == []
    gate.prove(clock())
    await waiting
    assert publishing.sent == ["answer"]


async def test_proof_is_sought_long_before_the_lease_ends(gate, clock):
    clock.now_s += gate.lease_s / 2
    assert gate.wants_proof
    gate.shut()
    assert not gate.wants_proof


async def test_what_is_on_its_way_is_waited_for_once_the_gate_is_shut(gate, publishing):
    publishing.go.clear()
    passing = await trying(gate, publishing)
    gate.shut({HERE})
    assert not await gate.quiet(0.01)
    publishing.go.set()
    assert await gate.quiet(1.0)
    await passing
    late = await trying(gate, publishing)
    assert publishing.sent == ["answer"]
    late.cancel()


async def test_other_partitions_are_not_waited_for(gate, publishing):
    gate.open({THERE})
    publishing.go.clear()
    passing = await trying(gate, publishing, THERE)
    gate.shut({HERE})
    assert await gate.quiet(0.01)
    publishing.go.set()
    await passing


async def test_a_failed_attempt_leaves_nothing_behind(gate):
    async def fail() -> None:
        raise OSError("away")

    with pytest.raises(OSError, match="away"):
        await gate.through(HERE, fail)
    gate.shut()
    assert await gate.quiet(0.01)
