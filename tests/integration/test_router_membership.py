"""Routers that are killed, asked to stop, come and go, on real Kafka and Triton with the stand-in model."""

import asyncio
import json

import pytest

from tests.support.router import LONG_PROMPT, committed, reading, request

pytestmark = pytest.mark.integration


async def test_a_router_that_is_killed_loses_nothing(kafka, routers, producer):
    await producer.prepare({"L0": 0.5, "L1": 0.5})
    await producer.ask(*(request(number) for number in range(600)))
    first = routers.start()
    async with reading(kafka) as answers:
        await answers.read(until=150)
        routers.supervisor.kill(first)
        before = len(answers.records)
        assert before < 600
        routers.start()
        seen = await answers.ids(f"r{number}" for number in range(600))
        assert len(seen) == 600
        levels: dict[str, set[str]] = {}
        await answers.read(settle_s=0.5)
        for record in answers.records:
            levels.setdefault(record.key.decode(), set()).add(json.loads(record.value)["decision"]["level"])
        assert all(len(drawn) == 1 for drawn in levels.values())  # a redelivered request draws the same


async def test_a_router_that_is_asked_to_stop_finishes_what_is_running_and_begins_nothing_new(kafka, routers, producer):
    name = routers.start(SPROUT_ROUTER_MAX_IN_FLIGHT="4")
    await producer.ask(*(request(number, prompt=LONG_PROMPT) for number in range(12)))
    await asyncio.sleep(1.0)
    took_s = routers.stop_gently(name, within_s=15)
    assert 1.0 < took_s < 8.0  # the running four last four seconds
    async with reading(kafka) as answers:
        await answers.read(settle_s=0.5)
        assert len(answers.records) == 4
        routers.start(SPROUT_ROUTER_MAX_IN_FLIGHT="100")
        seen = await answers.ids(f"r{number}" for number in range(12))
        await answers.read(settle_s=0.5)
        assert len(answers.records) == sum(seen.values()) == 12  # nothing was answered twice
    await asyncio.sleep(0.5)
    assert all(offset == end for offset, end in (await committed(kafka)).values())


async def test_routers_that_come_and_go_lose_nothing_and_repeat_nothing(kafka, routers, producer):
    await producer.prepare({"L1": 1.0})
    first = routers.start()
    async with reading(kafka) as answers:
        asked = 0
        for leaving in (None, None, first):
            await producer.ask(*(request(number) for number in range(asked, asked + 300)))
            asked += 300
            if leaving is None:
                routers.start()
            else:
                routers.stop_gently(leaving, within_s=20)
        seen = await answers.ids(f"r{number}" for number in range(asked))
        await answers.read(settle_s=1.0)
        assert len(seen) == asked
        assert len(answers.records) == asked
    await asyncio.sleep(0.5)
    assert all(offset == end for offset, end in (await committed(kafka)).values())


async def test_a_member_by_name_that_dies_and_returns_moves_nothing(kafka, routers, producer):
    await producer.prepare({"L1": 1.0})
    # Longer than a restart takes on a busy machine.
    session = {"SPROUT_ROUTER_SESSION_TIMEOUT_S": "60"}
    names = [routers.start(SPROUT_ROUTER_INSTANCE_ID=f"member-{number}", **session) for number in range(2)]
    stays, dies = names
    settled = routers.log(stays).count("partitions assigned")
    async with reading(kafka) as answers:
        await producer.ask(*(request(number) for number in range(400)))
        await answers.read(until=100)
        routers.supervisor.kill(dies)
        routers.start(SPROUT_ROUTER_INSTANCE_ID="member-1", **session)
        seen = await answers.ids(f"r{number}" for number in range(400))
        await answers.read(settle_s=1.0)
    assert len(answers.records) == sum(seen.values()) == 400
    assert routers.log(stays).count("partitions assigned") == settled
