"""How the router's subscriber comes by its batches."""

import asyncio
import time
from collections.abc import Sequence
from types import SimpleNamespace

from services.router.fetching import LONGEST_WAIT_MS, feed


class Consumer:
    """Has records after a while, like aiokafka's."""

    def __init__(self) -> None:
        self.records: list[str] = []
        self.come = asyncio.Event()
        self.looks: list[float] = []

    def put(self, *records: str) -> None:
        self.records.extend(records)
        self.come.set()

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[str, list[str]]:
        self.looks.append(time.monotonic())
        try:
            await asyncio.wait_for(self.come.wait(), timeout_ms / 1_000)
        except TimeoutError:
            return {}
        taken, self.records = self.records[:max_records], self.records[max_records:]
        if not self.records:
            self.come.clear()
        return {"p": taken}


def subscriber(*, least_interval_s: float) -> SimpleNamespace:
    made = SimpleNamespace(max_records=3, taken=[])

    async def take(records: Sequence[str]) -> None:
        made.taken.append(records)

    feed(made, take, least_interval_s=least_interval_s)
    return made


async def test_a_record_is_had_as_soon_as_it_is_there():
    consumer, waiting = Consumer(), subscriber(least_interval_s=0.001)
    first = asyncio.create_task(waiting.get_msg(consumer))
    await asyncio.sleep(LONGEST_WAIT_MS / 5_000)
    consumer.put("a")
    assert await asyncio.wait_for(first, 1.0) == ("a",)
    assert len(consumer.looks) == 1


async def test_records_that_come_fast_share_a_batch():
    consumer, waiting = Consumer(), subscriber(least_interval_s=0.2)
    consumer.put("a")
    assert await waiting.get_msg(consumer) == ("a",)
    consumer.put("b")
    second = asyncio.create_task(waiting.get_msg(consumer))
    await asyncio.sleep(0.05)
    consumer.put("c")
    assert await second == ("b", "c")
    assert consumer.looks[1] - consumer.looks[0] >= 0.19


async def test_no_batch_is_larger_than_asked_and_none_is_no_error():
    consumer, waiting = Consumer(), subscriber(least_interval_s=0.001)
    consumer.put(*"abcd")
    assert await waiting.get_msg(consumer) == ("a", "b", "c")
    assert await waiting.get_msg(consumer) == ("d",)
    assert await waiting.get_msg(consumer) == ()


async def test_records_are_handed_over_as_they_are():
    fed = subscriber(least_interval_s=0.001)
    await fed.consume_one(("a", "b"))
    assert fed.taken == [("a", "b")]
