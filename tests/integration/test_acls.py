"""Every service starts, reads and answers with the rights that `sprout topics acls` gives it, and no others."""

import asyncio

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from services import SERVICES
from shared.messages import GenerationResponse
from shared.topics import DEAD_LETTERS, REQUESTS, RESPONSE_CHUNKS, RESPONSES
from tests.support.acls import GuardedKafka, guarded_kafka
from tests.support.deadlines import DEADLINE_S
from tests.support.evaluator import judged_fleet
from tests.support.processes import start_service
from tests.support.router import ZONE, reading, request

pytestmark = pytest.mark.integration

__all__ = ["guarded_kafka"]  # a fixture

SETTINGS = {
    "carbon_feed": {
        "SPROUT_CARBON_FEED_PROVIDERS": f'{{"{ZONE}": [{{"kind": "constant", "intensity_g_per_kwh": 100}}]}}'
    },
    "router": {"SPROUT_ROUTER_SAMPLE_SHARE": "1"},
}


async def test_services_need_no_other_rights(guarded_kafka: GuardedKafka, triton, database, supervisor, tmp_path):
    await guarded_kafka.prepare()
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet(triton.address))

    def start(service: str, name: str = "") -> str:
        kafka = guarded_kafka.user(service)
        settings = {**kafka.environment(), "SPROUT_KAFKA_INSPECT_AT_START": "true", **SETTINGS.get(service, {})}
        return start_service(
            service, supervisor, kafka=kafka, database=database, fleet=fleet, settings=settings, name=name, wait=False
        )

    names = [start(service) for service in SERVICES]
    for name in names:
        await asyncio.to_thread(supervisor.process(name).wait_ready)
    client = guarded_kafka.user("client")
    topics = [client.topic(RESPONSES), client.topic(RESPONSE_CHUNKS)]
    consumer = AIOKafkaConsumer(*topics, **client.client_options(), auto_offset_reset="earliest")
    producer = AIOKafkaProducer(**client.client_options())
    async with consumer, producer, asyncio.timeout(DEADLINE_S):
        # The record without a request makes a dead letter.
        await producer.send_and_wait(client.topic(REQUESTS), b"{", partition=0)
        await producer.send_and_wait(client.topic(REQUESTS), request(1, stream=True).model_dump_json().encode())
        records = [record async for record in _until_answered(consumer, client.topic(RESPONSES))]
    answer = GenerationResponse.model_validate_json(records[-1].value)
    assert (answer.status, answer.request_id) == ("ok", "r1")
    async with reading(guarded_kafka.operator, DEAD_LETTERS) as letters:
        await letters.read(until=1)
    # It takes partitions over, and reads what was answered.
    names.append(start("router", name="second router"))
    await asyncio.to_thread(supervisor.process(names[-1]).wait_ready)
    for name in names:
        log = supervisor.process(name).log.read_text()
        assert "authoriz" not in log.lower(), log
        supervisor.stop(name)


async def _until_answered(consumer, topic):
    async for record in consumer:
        yield record
        if record.topic == topic:
            return
