"""Topics with fewer partitions than declared: every service works on them, and says so in its log."""

from dataclasses import replace

import pytest

from services import SERVICES
from shared.kafka.admin import create_topics
from shared.topics import FOOTPRINTS, TOPICS
from tests.support.contract import EXAMPLES
from tests.support.deadlines import until
from tests.support.evaluator import judged_fleet
from tests.support.outages import until_ready
from tests.support.processes import start_service
from tests.support.router import producing, reading, request
from tests.support.traffic import committed

pytestmark = pytest.mark.integration

MANY = tuple(spec for spec in TOPICS if spec.partitions > 1)


async def test_every_service_works_on_topics_with_one_partition(supervisor, kafka_settings, database, triton, tmp_path):
    kafka = kafka_settings
    await create_topics(kafka, specs=[replace(spec, partitions=1) for spec in TOPICS])
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet(triton.address))
    settings = {
        "carbon_feed": {"SPROUT_CARBON_FEED_PROVIDERS": '{"GB": [{"kind": "constant", "intensity_g_per_kwh": 100}]}'}
    }
    names = {
        one: start_service(
            one, supervisor, kafka=kafka, database=database, fleet=fleet, settings=settings.get(one), wait=False
        )
        for one in SERVICES
    }
    try:
        await until_ready(supervisor, names.values())
        async with producing(kafka) as producer, reading(kafka) as answers:
            await producer.ask(request(1))
            await answers.ids(["r1"])
            await producer.post(FOOTPRINTS, EXAMPLES[FOOTPRINTS.name], "key")
        for group, topic in (("optimizer", FOOTPRINTS), ("gateway", FOOTPRINTS)):
            one = replace(topic, partitions=1)
            await until(lambda group=group, one=one: committed(kafka, group, topic=one), lambda found: found[0][0] > 0)
        for service, name in names.items():
            log = supervisor.process(name).log.read_text()
            read = [spec.name for spec in MANY if f"{kafka.topic(spec)}" in log]
            assert not read or "the topic has 1 partitions, and is declared with" in log, (service, read)
    finally:
        for name in names.values():
            supervisor.stop(name)
