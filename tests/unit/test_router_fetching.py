"""How the router's subscriber comes by its batches."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace

from services.router.fetching import LONGEST_WAIT_MS, feed


class Consumer:
    """Has records after a while, like aiokafka's."""

    def __init__(self) -> None:
        self.records: list[str] = []
        self.come = asyncio.Event()
        self.looks = 0

    def put(self, *records: str) -> None:
        self.records.extend(records)
        self.come.set()

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[str, list[str]]:
        self.looks += 1
        try:
            await asyncio.wait_for(self.come.wait(), timeout_ms / 1_000)
        except TimeoutError:
            return {}
        taken, self.records = self.records[:max_records], self.records[max_records:]
        if not self.records:
            self.come.clear()
        return {"p": taken}


def subscriber() -> SimpleNamespace:
    made = SimpleNamespace(max_records=3, taken=[])

    async def take(records: Sequence[str]) -> None:
        made.taken.append(records)

    feed(made, take)
    return made


async def test_a_record_is_had_as_soon_as_it_is_there():
    consumer, waiting = Consumer(), subscriber()
    first = asyncio.create_task(waiting.get_msg(consumer))
    await asyncio.sleep(LONGEST_WAIT_MS / 5_000)
    consumer.put("a")
    assert await asyncio.wait_for(first, 1.0) == ("a",)
    assert consumer.looks == 1


async def test_no_batch_is_larger_than_asked_and_none_is_no_error():
    consumer, waiting = Consumer(), subscriber()
    consumer.put(*"abcd")
    assert await waiting.get_msg(consumer) == ("a", "b", "c")
    assert await waiting.get_msg(consumer) == ("d",)
    assert await waiting.get_msg(consumer) == ()


async def test_records_are_handed_over_as_they_are():
    fed = subscriber()
    await fed.consume_one(("a", "b"))
    assert fed.taken == [("a", "b")]
