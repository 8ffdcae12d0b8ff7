"""Requests are identified by their records on real Kafka, whatever ids their producers choose."""

import itertools
import time
from collections import Counter

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import InvalidTimestampError

from services.router.fencing import PublishFence
from services.router.policy import draw
from shared.hashing import uniform
from shared.kafka.producer import RecoveringProducer
from shared.messages import GenerationResponse, Sample
from shared.topics import REQUESTS, RESPONSES, SAMPLES, SOURCE_HEADER
from tests.support.router import MODEL, reading, request, until_committed
from tests.support.traffic import AHEAD_MS

pytestmark = pytest.mark.integration

NUMBER = 60
ROW = {"p/L0": 0.2, "p/L1": 0.5, "p/L2": 0.3}
KEY = "a secret of this deployment"


def drawn(text: str, key: bytes = b"") -> str:
    """The level that a text draws from `ROW`."""
    return draw(ROW, uniform(f"option:{MODEL}", text, key)).removeprefix("p/")


def record_of(sent) -> str:
    return f"requests/{sent.partition}/{sent.offset}/{sent.timestamp}"


async def test_requests_under_one_id_are_answered_and_sampled_each_under_its_record(kafka, routers, producer):
    await producer.prepare({"L1": 1.0})
    routers.start(SPROUT_ROUTER_SAMPLE_SHARE="1", SPROUT_ROUTER_DRAW_KEY=KEY)
    asked = [request(number, id="the same").model_dump_json(exclude_none=True).encode() for number in range(NUMBER)]
    sent = [await producer.raw(value, key=b"%d" % number) for number, value in enumerate(asked)]
    async with reading(kafka) as answers, reading(kafka, SAMPLES) as samples:
        await answers.read(until=NUMBER)
        await until_committed(kafka)
        await answers.read_to_end()
        found = [GenerationResponse.model_validate_json(record.value) for record in answers.records]
        taken = [Sample.model_validate_json(record.value) for record in await samples.read_to_end()]
    assert {(one.request_id, one.status) for one in found} == {("the same", "ok")}
    assert Counter(one.record for one in found) == Counter(record_of(one) for one in sent)
    assert Counter(one.record for one in taken) == Counter(record_of(one) for one in sent)
    for record, response in zip(answers.records, found, strict=True):
        header = response.record.removeprefix("requests/").replace("/", ":")
        assert dict(record.headers)[SOURCE_HEADER] == header.encode()


async def test_ground_ids_draw_as_the_policy_says(kafka, routers, producer):
    """Each id draws the cheapest level if ids decide and there is no key, as the client can compute."""
    await producer.prepare({level.removeprefix("p/"): probability for level, probability in ROW.items()})
    routers.start(SPROUT_ROUTER_DRAW_KEY=KEY)
    ids = list(itertools.islice((one for n in itertools.count() if drawn(one := f"cheap-{n}") == "L2"), 4 * NUMBER))
    now_ms = int(time.time() * 1_000)
    sent = {
        one: await producer.raw(
            request(number, id=one).model_dump_json(exclude_none=True).encode(),
            partition=number % 12,
            timestamp_ms=now_ms - now_ms % 86_400_000,
        )
        for number, one in enumerate(ids)
    }
    async with reading(kafka) as answers:
        await answers.ids(ids)
        levels = {name: one.decision.level for name, one in answers.responses().items()}
    assert levels == {name: drawn(record_of(one), KEY.encode()) for name, one in sent.items()}
    # Four standard errors of 240 draws, which the day's date decides: 0.12.
    assert Counter(levels.values())["L2"] / len(ids) == pytest.approx(ROW["p/L2"], abs=0.12)


async def test_errors_name_their_record_as_well(kafka, routers, producer):
    await producer.prepare({"L1": 1.0})
    routers.start()
    sent = {
        code: await producer.raw(value)
        for code, value in {
            "unknown_model": b'{"id": "x", "prompt": "Why?", "model": "nobody"}',
            "invalid_request": b'{"id": "x", "prompt": 3}',
            "prompt_too_large": b'{"id": "x", "prompt": "%s"}' % (b"y" * 1_000_000),
        }.items()
    }
    async with reading(kafka) as answers:
        await answers.read(until=3)
        found = [GenerationResponse.model_validate_json(record.value) for record in answers.records]
    assert {one.error.code: one.record for one in found} == {code: record_of(one) for code, one in sent.items()}


async def test_kafka_rejects_a_response_of_a_router_that_was_frozen_after_the_check(kafka):
    """Another router may have answered meanwhile. What this one still owns it can send again."""
    partition = TopicPartition(kafka.topic(REQUESTS), 0)
    clock = {"s": time.time() - RESPONSES.max_age_ms / 1_000 - 0.001}
    fence = PublishFence(session_timeout_s=6.0, wall_s=lambda: clock["s"])
    fence.open([partition])
    fence.renew_lease(fence.now_s())
    unknown = []
    fence.on_unknown_outcome(lambda: unknown.append(True))
    producer = RecoveringProducer(**kafka.client_options(), enable_idempotence=True)
    await producer.start()
    try:

        async def send(at_ms: int) -> None:
            await producer.send(kafka.topic(RESPONSES), b"{}", partition=0, timestamp_ms=at_ms)

        with pytest.raises(InvalidTimestampError):
            await fence.publish(partition, send)
        assert unknown == [True]
        assert not fence.is_open(partition)
        fence.open([partition])  # recovered
        fence.renew_lease(fence.now_s())
        clock["s"] = time.time() + AHEAD_MS / 1_000
        await fence.publish(partition, send)
    finally:
        await producer.stop()
    async with reading(kafka) as answers:
        assert len(await answers.read_to_end()) == 1
