"""Packing, sleeping endpoints, reference blocks and load reports of a router, on real Kafka and Triton servers."""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from shared.fleet import Switchback
from shared.messages import EndpointCurve, LoadReport, PoolCapacity
from shared.runtime.clock import Clock
from shared.switchback import SwitchbackSchedule
from shared.topics import CAPACITY, LOAD_REPORTS, POWER_CURVES
from tests.support.deadlines import DEADLINE_S, until
from tests.support.router import ENDLESS_PROMPT, LONG_PROMPT, RouterProcess, fleet_toml, reading, request, until_page

pytestmark = pytest.mark.integration


def packing(address: str, *, pool: str = "target_batch = 4", endpoints: int = 3, switchback: str = "share = 0") -> str:
    """A fleet file with a pool that packs; its endpoints are the same server, which the router does not know."""
    return fleet_toml([address] * endpoints, pool=f'dispatch = "pack"\n{pool}', switchback=switchback)


def in_flight(text: str) -> dict[str, float]:
    """Requests in flight by endpoint, from a page of metrics."""
    lines = [line for line in text.splitlines() if line.startswith("sprout_router_endpoint_in_flight{")]
    return {line.split('endpoint="')[1].split('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


async def logged(routers: RouterProcess, name: str, text: str) -> None:
    """Wait until a router's log has a text."""
    await until(lambda: routers.log(name), lambda log: text in log)


async def test_requests_are_packed_and_reported(kafka, routers, producer, triton):
    routers.fleet.write_text(packing(triton.address))
    await producer.prepare({"L0": 1.0})
    name = routers.start(SPROUT_ROUTER_LOAD_REPORT_INTERVAL_S="0.2")
    url = routers.supervisor.process(name).spec.url
    await producer.ask(*(request(number, prompt=LONG_PROMPT) for number in range(6)))
    text = await until_page(f"{url}/metrics", lambda text: sum(in_flight(text).values()) == 6)
    assert in_flight(text) == {"e0": 4, "e1": 2, "e2": 0}
    assert 'sprout_router_endpoints_in_use{pool="p"} 2.0' in text
    assert 'sprout_router_target_batch{endpoint="e0",pool="p"} 4.0' in text
    assert "sprout_router_reference_block 0.0" in text
    async with reading(kafka) as answers, reading(kafka, LOAD_REPORTS) as records:
        await answers.ids(f"r{number}" for number in range(6))
        used = Counter(response.endpoint for response in answers.responses().values())
        assert used == {"e0": 4, "e1": 2}
        await asyncio.to_thread(routers.stop_gently, name, within_s=DEADLINE_S)
        await records.read_to_end()
        reports = [LoadReport.model_validate_json(record.value) for record in records.records]
    assert len({report.instance for report in reports}) == 1
    assert sum(report.pools[0].arrivals for report in reports) == 6
    busiest = max(reports, key=lambda one: sum(load.in_flight for load in one.pools[0].endpoints.values()))
    loads = busiest.pools[0].endpoints
    assert {endpoint: load.in_flight for endpoint, load in loads.items()} == {"e0": 4, "e1": 2, "e2": 0}
    started = {response.timing.started_at for response in answers.responses().values()}
    assert min(started) - timedelta(seconds=1) <= loads["e0"].oldest_started_at <= max(started)
    assert busiest.share == 1.0
    assert [report.final for report in reports] == [False] * (len(reports) - 1) + [True]


async def test_a_learned_curve_gives_the_target(kafka, routers, producer, triton):
    routers.fleet.write_text(packing(triton.address, pool="tpot_objective_ms = 20.0"))
    await producer.prepare({"L0": 1.0})
    curve = EndpointCurve(
        endpoint="e1", pool="p", at=datetime.now(UTC), idle_w=100, step_j=4, token_j=0.1, step_s=0.01, token_s=0.002,
        identifiable=True, intervals=9, mean_batch=3,
    )  # fmt: skip
    await producer.post(POWER_CURVES, curve, "e1")
    url = routers.supervisor.process(routers.start()).spec.url
    text = await until_page(
        f"{url}/metrics", lambda text: 'sprout_router_target_batch{endpoint="e0",pool="p"} 5' in text
    )
    assert 'sprout_router_target_batch{endpoint="e2",pool="p"} 5.0' in text
    await producer.ask(*(request(number, prompt=ENDLESS_PROMPT) for number in range(5)))
    text = await until_page(f"{url}/metrics", lambda text: sum(in_flight(text).values()) == 5)
    assert in_flight(text) == {"e0": 5, "e1": 0, "e2": 0}


async def test_sleeping_endpoints_are_not_used_and_woken_ones_are(kafka, routers, producer, triton):
    routers.fleet.write_text(packing(triton.address, pool="target_batch = 4\nsleep = true"))
    await producer.prepare({"L0": 1.0})

    async def awake(*names: str) -> None:
        now = datetime.now(UTC)
        capacity = PoolCapacity(
            pool="p", at=now, valid_until=now + timedelta(hours=1), requests_per_s=1, in_flight=1, endpoints=3,
            endpoints_needed=len(names), awake=names, reason="test",
        )  # fmt: skip
        await producer.post(CAPACITY, capacity, "p")

    await awake("e1")
    name = routers.start()
    url = routers.supervisor.process(name).spec.url
    await producer.ask(*(request(number, prompt=LONG_PROMPT) for number in range(6)))
    text = await until_page(f"{url}/metrics", lambda text: sum(in_flight(text).values()) == 6)
    assert in_flight(text) == {"e0": 0, "e1": 6, "e2": 0}
    await awake("e0", "e1")
    await logged(routers, name, '"endpoint back in use"')
    await producer.ask(*(request(number, prompt=LONG_PROMPT) for number in range(6, 9)))
    async with reading(kafka) as answers:
        await answers.ids(f"r{number}" for number in range(9))
        used = Counter(response.endpoint for response in answers.responses().values())
    assert used == {"e0": 3, "e1": 6}


async def test_in_a_reference_block_the_reference_serves_and_requests_are_spread(kafka, routers, producer, triton):
    """A block of ten hours takes 20 s. The model server runs in real time."""
    settings = Switchback(share=0.5, block_s=36_000, washout_s=60, key="test")
    schedule = SwitchbackSchedule(settings)
    start = datetime(2024, 2, 3, tzinfo=UTC)
    while schedule.is_reference(start) or not schedule.is_reference(start + timedelta(hours=10)):
        start += timedelta(hours=10)
    routers.clock = Clock.starting(start, rate=1_800.0)
    switchback = 'share = 0.5\nblock_s = 36000\nwashout_s = 60\nkey = "test"'
    routers.fleet.write_text(packing(triton.address, pool="target_batch = 9", switchback=switchback))
    name = routers.start(SPROUT_ROUTER_MAX_INTENSITY_AGE_S="null")
    url = routers.supervisor.process(name).spec.url
    await producer.prepare({"L2": 1.0}, now=routers.clock.now(), valid_s=6 * 86_400)
    await logged(routers, name, '"new policy"')
    async with reading(kafka) as answers:
        for number, reference in enumerate((False, True)):
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    now = routers.clock.now()
                    left = schedule.next_change(now) - now
                    if schedule.is_reference(now) is reference and left > timedelta(hours=5):
                        break
                    await asyncio.sleep(0.05)
            names = [f"r{100 * number + one}" for one in range(9)]
            # Long answers: all are in flight at once.
            made = [
                request(int(one[1:]), prompt=LONG_PROMPT, directive="L1" if one.endswith("8") else None)
                for one in names
            ]
            await producer.ask(*made)
            await answers.ids(names)
            found = [answers.responses()[one] for one in names]
            assert {one.status for one in found} == {"ok"}
            drawn = Counter((one.decision.source, one.decision.level) for one in found)
            used = Counter(one.endpoint for one in found)
            if reference:
                assert drawn == {("switchback", "L0"): 8, ("forced", "L1"): 1}
                assert used == {"e0": 3, "e1": 3, "e2": 3}
                text = await until_page(f"{url}/metrics", lambda text: "sprout_router_switchback_requests" in text)
                assert 'sprout_router_switchback_requests_total{model="m"} 9.0' in text
            else:
                assert drawn == {("policy", "L2"): 8, ("forced", "L1"): 1}
                assert used == {"e0": 9}
