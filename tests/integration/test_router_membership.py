"""Routers are killed, stopped, added and removed, on real Kafka and Triton with the stand-in model."""

import asyncio
import json

import pytest

from shared.topics import LOAD_REPORTS
from tests.support.deadlines import DEADLINE_S, until
from tests.support.router import LONG_PROMPT, reading, request, until_committed, until_page

pytestmark = pytest.mark.integration


async def test_a_killed_router_loses_no_request(kafka, routers, producer):
    await producer.prepare({"L0": 0.5, "L1": 0.5})
    await producer.ask(*(request(number) for number in range(600)))
    # Few at once: when it is killed, it has not answered all.
    first = routers.start(SPROUT_ROUTER_MAX_IN_FLIGHT="50")
    async with reading(kafka) as answers:
        await answers.read(until=150)
        routers.supervisor.kill(first)
        before = len(answers.records)
        assert before < 600
        routers.start()
        seen = await answers.ids(f"r{number}" for number in range(600))
        assert len(seen) == 600
        levels: dict[str, set[str]] = {}
        await until_committed(kafka)
        await answers.read_to_end()
        for record in answers.records:
            levels.setdefault(record.key.decode(), set()).add(json.loads(record.value)["decision"]["level"])
        assert all(len(drawn) == 1 for drawn in levels.values())  # a redelivered request draws the same option


async def test_a_router_whose_start_outlasts_the_interval_of_load_reports_becomes_ready(kafka, routers):
    """As on a busy machine: no report may be published before the broker has started."""
    name = await asyncio.to_thread(routers.start, SPROUT_ROUTER_LOAD_REPORT_INTERVAL_S="0.05")
    async with reading(kafka, LOAD_REPORTS) as reports:
        await reports.read(until=1)
    assert "background task failed" not in routers.log(name)


async def test_a_stopped_router_finishes_running_requests_and_starts_no_more(kafka, routers, producer):
    name = routers.start(SPROUT_ROUTER_MAX_IN_FLIGHT="4")
    await producer.ask(*(request(number, prompt=LONG_PROMPT) for number in range(12)))
    url = routers.supervisor.process(name).spec.url
    await until_page(f"{url}/metrics", lambda text: "sprout_router_in_flight 4.0" in text)
    await asyncio.to_thread(routers.stop_gently, name, within_s=DEADLINE_S)
    async with reading(kafka) as answers:
        await answers.read_to_end()
        assert len(answers.records) == 4
        routers.start(SPROUT_ROUTER_MAX_IN_FLIGHT="100")
        seen = await answers.ids(f"r{number}" for number in range(12))
        await until_committed(kafka)
        await answers.read_to_end()
        assert len(answers.records) == sum(seen.values()) == 12  # no request was answered twice


async def test_added_and_removed_routers_lose_no_request_and_answer_none_twice(kafka, routers, producer):
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
                routers.stop_gently(leaving, within_s=DEADLINE_S)
        seen = await answers.ids(f"r{number}" for number in range(asked))
        await until_committed(kafka)
        await answers.read_to_end()
        assert len(seen) == asked
        assert len(answers.records) == asked


async def test_a_static_member_that_restarts_causes_no_rebalance(kafka, routers, producer):
    await producer.prepare({"L1": 1.0})
    # Longer than a restart takes on a busy machine.
    session = {"SPROUT_ROUTER_SESSION_TIMEOUT_S": "60"}
    names = [routers.start(SPROUT_ROUTER_INSTANCE_ID=f"member-{number}", **session) for number in range(2)]
    stays, dies = names
    # Once alone, and once with the other one.
    before = await until(lambda: routers.log(stays).count("partitions assigned"), lambda found: found >= 2)
    async with reading(kafka) as answers:
        await producer.ask(*(request(number) for number in range(400)))
        await answers.read(until=100)
        routers.supervisor.kill(dies)
        routers.start(SPROUT_ROUTER_INSTANCE_ID="member-1", **session)
        seen = await answers.ids(f"r{number}" for number in range(400))
        await until_committed(kafka)
        await answers.read_to_end()
    assert len(answers.records) == sum(seen.values()) == 400
    assert routers.log(stays).count("partitions assigned") == before
