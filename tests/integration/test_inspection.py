"""The inspection before a start, on real Kafka: it finds exactly the records that take too much memory."""

from functools import partial

import pytest
from aiokafka import TopicPartition

from shared.kafka.inspection import find_unreadable
from shared.topics import FOOTPRINTS, POLICIES
from tests.support.traffic import producing

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("inspecting")]

LARGE = b"a" * 100_000_000
RECORDS = 3
"""Of one batch; each alone is small enough."""


async def test_single_records_and_whole_batches_are_found_and_nothing_else(kafka):
    policies, footprints = kafka.topic(POLICIES), kafka.topic(FOOTPRINTS)
    groups = {policies: [None], footprints: [kafka.group("optimizer"), kafka.group("evaluator")]}
    options = {"compression_type": "gzip", "max_request_size": 2**28, "max_batch_size": 2**28}
    async with producing(kafka) as small, producing(kafka, **options) as large:
        for topic, partition in ((policies, 0), (footprints, 3)):
            send = partial(small.producer.send_and_wait, topic, b"{}", key=b"k", partition=partition)
            await send()
            if topic == policies:
                await large.producer.send_and_wait(topic, LARGE, key=b"k", partition=partition)
            else:
                batch = large.producer.create_batch()
                for _ in range(RECORDS):
                    batch.append(key=b"k", value=LARGE[: len(LARGE) // RECORDS], timestamp=None)
                await (await large.producer.send_batch(batch, topic, partition=partition))
            await send()
    found = await find_unreadable(kafka, groups)
    assert found == {
        TopicPartition(policies, 0): [range(1, 2)],
        TopicPartition(footprints, 3): [range(1, 1 + RECORDS)],
    }


async def test_without_kafka_the_service_starts_without_an_inspection(kafka):
    nowhere = kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:9"})
    nowhere.model_fields_set.add("bootstrap_servers")
    assert await find_unreadable(nowhere, {"policies": [None]}) == {}
