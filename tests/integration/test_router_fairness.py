"""Who is answered first when more requests wait than a router has places for, on real Kafka and Triton."""

import asyncio
from collections.abc import Sequence

import pytest

from shared.runtime.settings import KafkaSettings
from shared.topics import REQUESTS, REQUESTS_BATCH, SOURCE_HEADER, TopicSpec
from tests.support.router import (
    ENDLESS_PROMPT,
    Producer,
    fleet_toml,
    reading,
    request,
    until_committed,
    until_page,
)

pytestmark = pytest.mark.integration

PLACES = {"SPROUT_ROUTER_MAX_IN_FLIGHT": "10"}


async def ask(producer: Producer, kafka: KafkaSettings, lane: TopicSpec, numbers: Sequence[int], **changes) -> None:
    """Send requests to a lane."""
    sends = [
        await producer.producer.send(
            kafka.topic(lane),
            request(number, **changes).model_dump_json(exclude_none=True).encode(),
            key=f"r{number}".encode(),
        )
        for number in numbers
    ]
    await asyncio.gather(*sends)


async def order(kafka: KafkaSettings, count: int) -> list[int]:
    """The numbers of the requests in the order of their answers' timestamps."""
    async with reading(kafka) as answers:
        records = await answers.read(until=count)
    assert len(records) == count
    return [int(record.key.decode().removeprefix("r")) for record in sorted(records, key=lambda one: one.timestamp)]


async def test_a_tenant_behind_hundreds_of_requests_of_another_does_not_wait_for_them(kafka, routers, producer, triton):
    routers.fleet.write_text(fleet_toml([triton.address], tenants=("crowd", "few")))
    await producer.prepare({"L2": 1.0})
    await ask(producer, kafka, REQUESTS, range(300), tenant="crowd")
    await ask(producer, kafka, REQUESTS, range(300, 310), tenant="few")
    routers.start(**PLACES)
    answered = await order(kafka, 310)
    last = max(answered.index(number) for number in range(300, 310))
    assert last < 100, f"{last} answers came before the last of the few requests"
    await until_committed(kafka)


async def test_lanes_share_the_places_and_a_killed_routers_requests_are_answered_once(kafka, routers, producer):
    await producer.prepare({"L2": 1.0})
    await ask(producer, kafka, REQUESTS_BATCH, range(200))
    await ask(producer, kafka, REQUESTS, range(200, 240))
    name = routers.start(**PLACES)
    page = f"{routers.supervisor.process(name).spec.url}/metrics"
    await until_page(page, lambda text: 'sprout_router_waiting_records{lane="requests-batch",tenant=""} ' in text)
    async with reading(kafka) as answers:
        await answers.read(until=80)
        routers.supervisor.kill(name)
        routers.start(**PLACES)
        counts = await answers.ids(f"r{number}" for number in range(240))
        await until_committed(kafka)
        await answers.read_to_end()
        assert len(answers.records) == 240, [name for name, count in counts.items() if count > 1]
        headers = {dict(record.headers)[SOURCE_HEADER].count(b":") for record in answers.records}
        assert headers == {2, 3}  # those of another lane than `requests` name it
    answered = await order(kafka, 240)
    last = max(answered.index(number) for number in range(200, 240))
    assert last < 120, f"{last} answers came before the last of the lane with the greater weight"


async def test_a_full_pool_does_not_hold_back_requests_for_another(kafka, routers, producer, triton):
    # Of model `m` one at a time, of model `n` as many as there are places.
    fleet = fleet_toml([triton.address]).replace('grpc = "', 'max_in_flight = 1\ngrpc = "')
    other = fleet[fleet.index("[[pools]]") :].replace('"p"', '"q"').replace('"e0"', '"f0"').replace('"m"', '"n"')
    model = '[[models]]\nname = "n"\nchat_template = "llama-2"\n'
    routers.fleet.write_text(fleet + model + other.replace("max_in_flight = 1\n", ""))
    await producer.prepare({"L2": 1.0})
    await ask(producer, kafka, REQUESTS, range(100), prompt=ENDLESS_PROMPT)
    await ask(producer, kafka, REQUESTS, range(100, 130), model="n", directive="L2")
    routers.start(SPROUT_ROUTER_MAX_IN_FLIGHT="4")
    async with reading(kafka) as answers:
        await answers.ids(f"r{number}" for number in range(100, 130))
        assert len(answers.records) <= 30 + 5  # of the others at most a few, thirty seconds each
