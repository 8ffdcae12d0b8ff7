"""The router as a process, on real Kafka and a real Triton server with the stand-in model."""

import asyncio
import base64
import math
import re
from collections import Counter
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from deploy.local.processes import free_ports
from shared.grouping import unpack
from shared.messages import DeadLetter, ResponseChunk, Sample
from shared.topics import DEAD_LETTERS, POLICIES, PROMPT_GROUPS, REQUESTS, RESPONSE_CHUNKS, SAMPLES
from tests.support.deadlines import until
from tests.support.grouping import judged_kinds, learned_grouping, sum_of
from tests.support.grouping import question as question_text
from tests.support.router import (
    ENDLESS_PROMPT,
    LEVELS,
    LONG_PROMPT,
    MODEL,
    ZONE,
    fleet_toml,
    policy,
    question,
    reading,
    request,
    until_committed,
    until_page,
)

pytestmark = pytest.mark.integration

GONE = "127.0.0.1:9"
"""An address where nothing listens."""


async def test_five_hundred_concurrent_requests_get_one_response_each_as_the_policy_says(kafka, routers, producer):
    made = await producer.prepare({"L0": 0.2, "L1": 0.5, "L2": 0.3})
    await producer.ask(*(request(number, task="qa", metadata={"n": str(number)}) for number in range(500)))
    routers.start(SPROUT_ROUTER_SAMPLE_SHARE="0.2")
    async with reading(kafka) as answers, reading(kafka, SAMPLES) as samples:
        await answers.ids(f"r{number}" for number in range(500))
        await until_committed(kafka)
        await answers.read_to_end()
        assert len(answers.records) == 500
        for name, response in answers.responses().items():
            decision, usage, timing = response.decision, response.usage, response.timing
            assert response.status == "ok", response
            assert response.text == f"{decision.level} says: " + "word " * LEVELS[decision.level][0]
            assert usage.completion_tokens == LEVELS[decision.level][0]
            assert (usage.source, usage.prompt_tokens > 5) == ("server", True)
            assert (decision.source, decision.policy_version, decision.group) == ("policy", 1, "qa")
            assert decision.propensity == made.overall[f"p/{decision.level}"]
            assert decision.propensities == made.overall
            assert (response.endpoint, decision.zone, response.finish_reason) == ("e0", ZONE, "stop")
            assert timing.received_at <= timing.started_at <= timing.first_token_at <= timing.finished_at
            assert (timing.finished_at - timing.started_at).total_seconds() >= 0.9 * LEVELS[decision.level][1]
            assert response.metadata == {"n": name.removeprefix("r")}
        drawn = Counter(response.decision.level for response in answers.responses().values())
        assert drawn["L0"] == pytest.approx(100, abs=40)
        assert drawn["L1"] == pytest.approx(250, abs=50)
        kept = await samples.read_to_end()
        assert len(kept) == pytest.approx(100, abs=40)
        parsed = Sample.model_validate_json(kept[0].value)
        assert (parsed.model, parsed.group, kept[0].key) == (MODEL, "qa", b"qa")


async def test_a_policy_for_learned_groups_is_applied_by_the_prompt(kafka, routers, producer):
    learned = learned_grouping(MODEL, judged_kinds(200, seed=1)).message
    groups, rng = unpack(learned), np.random.default_rng(5)
    texts = {f"r{number}": (sum_of, question_text)[number % 2](rng) for number in range(40)}
    rows = {name: {f"p/{('L1', 'L2')[place % 2]}": 1.0} for place, name in enumerate(learned.names)}
    await producer.post(PROMPT_GROUPS, learned, MODEL)
    await producer.prepare({"L0": 1.0}, group_version=learned.version, groups=rows)
    await producer.ask(*(request(int(name[1:]), task="qa", prompt=text) for name, text in texts.items()))
    router = routers.start(SPROUT_ROUTER_SAMPLE_SHARE="1")
    async with reading(kafka) as answers, reading(kafka, SAMPLES) as samples:
        await answers.ids(texts)
        decisions = {name: response.decision for name, response in answers.responses().items()}
        assert {name: one.group for name, one in decisions.items()} == {
            name: groups.assign(text) for name, text in texts.items()
        }
        assert all(one.propensities == rows[one.group] for one in decisions.values())
        assert len({one.level for one in decisions.values()}) == 2
        # Samples have the task label; the evaluator assigns groups itself.
        assert {Sample.model_validate_json(one.value).group for one in await samples.read(until=40)} == {"qa"}

        await producer.prepare({"L0": 1.0}, version=2, group_version="unknown", groups=rows)
        await until(lambda: routers.log(router), lambda log: '"version": 2' in log)
        await producer.ask(request(100, task="qa"))
        await answers.ids(["r100"])
        last = answers.responses()["r100"].decision
        assert (last.group, last.level) == ("qa", "L0")


async def test_an_invalid_request_becomes_a_dead_letter_and_others_are_answered(kafka, routers, producer):
    await producer.prepare({"L2": 1.0})
    bad: list[bytes | None] = [b"{broken", b"[]", None, b"\xff\xfe", b'{"id": "x"}', b'{"prompt": "a", "messages": []}']
    for number, value in enumerate(bad):
        await producer.raw(value, key=b"k", headers=[("trace", b"\xff\x00")])
        await producer.ask(request(number))
    nameless = await producer.raw(b'{"prompt": "Question number 3?"}', headers=[("trace", b"\xff")], partition=4)
    routers.start()
    async with reading(kafka) as answers, reading(kafka, DEAD_LETTERS) as letters:
        await answers.read(until=len(bad) + 2)
        responses = answers.responses()
        assert responses.pop("x").error.code == "invalid_request"  # its id can be read
        assert set(responses) == {f"r{number}" for number in range(len(bad))} | {
            f"{kafka.topic(REQUESTS)}-4-{nameless.offset}"
        }
        assert {response.status for response in responses.values()} == {"ok"}
        await letters.read(until=len(bad))
        kept = [DeadLetter.model_validate_json(record.value) for record in letters.records]
        kept.sort(key=lambda letter: letter.offset)
        assert [letter.original_value() for letter in kept] == [value or b"" for value in bad]
        assert [letter.reason for letter in kept] == [
            "invalid_json", "invalid_message", "invalid_json", "invalid_json", "invalid_message", "invalid_message",
        ]  # fmt: skip
        assert "give either 'prompt'" in kept[4].detail
        assert {base64.b64decode(letter.headers["trace"]) for letter in kept} == {b"\xff\x00"}
    await until_committed(kafka)


async def test_rejected_and_failed_requests_get_an_error_code_and_a_remedy(kafka, routers, producer):
    # Before the requests are sent: the deadline of r4 must expire at the model server.
    routers.start(SPROUT_ROUTER_MAX_PROMPT_CHARS="1000")
    now = datetime.now(UTC)
    await producer.ask(
        request(0, model="gpt-9"),
        request(1, directive="L7"),
        request(2, prompt="x" * 1_001),
        request(3, deadline=now - timedelta(seconds=5)),
        request(4, deadline=now + timedelta(seconds=12), prompt=ENDLESS_PROMPT),
        request(5, prompt=None, messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]),
        request(6, directive="L2"),
        request(7, sampling={"max_tokens": 5}, stream=True, model="gpt-9"),
    )
    async with reading(kafka) as answers, reading(kafka, RESPONSE_CHUNKS) as chunks:
        await answers.read(until=8)
        found = answers.responses()
        assert {name: response.error.code for name, response in found.items() if response.error} == {
            "r0": "unknown_model",
            "r1": "unknown_level",
            "r2": "prompt_too_large",
            "r3": "deadline_exceeded",
            "r4": "deadline_exceeded",
            "r5": "invalid_request",
            "r7": "unknown_model",
        }
        assert "available models: m" in found["r0"].error.message
        assert "available levels: L0, L1, L2" in found["r1"].error.message
        assert "'prompt' has 1001 characters" in found["r2"].error.message
        assert "turns must alternate" in found["r5"].error.message
        assert found["r4"].decision.level == "L0"
        assert found["r4"].timing is not None
        forced = found["r6"].decision
        assert (forced.source, forced.level, forced.propensity) == ("forced", "L2", 1.0)
        (chunk,) = await chunks.read(until=1)
        assert (chunk.key, ResponseChunk.model_validate_json(chunk.value).error.code) == (b"r7", "unknown_model")


async def test_a_streamed_answer_has_ordered_chunks_and_a_full_response(kafka, routers, producer):
    await producer.prepare({"L0": 1.0})
    await producer.ask(request(1, stream=True))
    routers.start(SPROUT_ROUTER_CHUNK_INTERVAL_MS="100")
    async with reading(kafka) as answers, reading(kafka, RESPONSE_CHUNKS) as chunks:
        await answers.read(until=1)
        pieces: list[ResponseChunk] = []
        while not (pieces and pieces[-1].final):
            records = await chunks.read(until=len(pieces) + 1)
            pieces = [ResponseChunk.model_validate_json(record.value) for record in records]
        assert [piece.sequence for piece in pieces] == list(range(len(pieces)))
        assert [piece.final for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[-1].finish_reason == "stop"
        assert "".join(piece.text for piece in pieces) == answers.responses()["r1"].text
        assert 1 < len(pieces) < 50  # of 100 tokens in a second, ten times a second


async def test_without_a_policy_or_with_stale_carbon_data_the_reference_is_served(kafka, routers, producer):
    metrics = routers.supervisor.process(routers.start()).spec.url + "/metrics"
    async with reading(kafka) as answers:
        await producer.ask(request(0))
        await answers.read(until=1)
        await producer.post(POLICIES, policy({"L2": 1.0}), MODEL)
        await until_page(metrics, lambda text: known(text, "sprout_router_policy_age_seconds"))
        await producer.ask(request(1))
        await answers.read(until=2)
        await producer.prepare({"L2": 1.0})
        await until_page(metrics, lambda text: known(text, "sprout_router_intensity_age_seconds"))
        await producer.ask(request(2))
        await answers.read(until=3)
        drawn = {name: (one.decision.source, one.decision.level) for name, one in answers.responses().items()}
        assert drawn == {"r0": ("fallback", "L0"), "r1": ("fallback", "L0"), "r2": ("policy", "L2")}


async def test_requests_are_answered_by_another_endpoint_if_one_is_down(kafka, routers, producer, triton):
    routers.fleet.write_text(fleet_toml([GONE, triton.address]))
    await producer.prepare({"L2": 1.0})
    routers.start()
    await producer.ask(*(request(number) for number in range(60)))
    async with reading(kafka) as answers:
        await answers.read(until=60)
        await until_committed(kafka)
        await answers.read_to_end()
        found = answers.responses().values()
        assert len(answers.records) == 60
        assert {(response.status, response.endpoint) for response in found} == {("ok", "e1")}


async def test_without_an_endpoint_requests_fail_at_their_deadline(kafka, routers, producer, triton):
    name = routers.start()
    soon = datetime.now(UTC) + timedelta(seconds=1.5)
    (port,) = free_ports(1)
    routers.supervisor.stop(name)
    routers.fleet.write_text(fleet_toml([f"127.0.0.1:{port}"]))
    router = routers.start_unready()
    await producer.ask(request(0, deadline=soon + timedelta(seconds=3)))
    async with reading(kafka) as answers:
        await answers.read(until=1)
        error = answers.responses()["r0"].error
        assert error.code in {"upstream_error", "deadline_exceeded", "no_endpoint"}
    probe = routers.supervisor.process(router).spec.ready
    await until(lambda: asyncio.to_thread(probe), lambda missing: "no endpoint answers for m" in (missing or ""))


async def test_an_endpoint_gets_at_most_its_limit_and_other_requests_wait_in_kafka(kafka, routers, producer):
    routers.fleet.write_text(routers.fleet.read_text() + "max_in_flight = 2\n")
    await producer.prepare({"L0": 1.0})
    name = routers.start()
    metrics = routers.supervisor.process(name).spec.url + "/metrics"
    await producer.ask(*(request(number, prompt=LONG_PROMPT) for number in range(5)))
    await until_page(
        metrics,
        lambda text: (
            values(text, "sprout_router_in_flight") == [2]
            and any(values(text, "sprout_router_waiting_age_seconds"))
            and sum(values(text, "sprout_router_lag_records")) > 2
        ),
    )
    async with reading(kafka) as answers:
        await answers.ids(f"r{number}" for number in range(5))


async def test_metrics_count_requests_and_tokens(kafka, routers, producer):
    await producer.prepare({"L1": 1.0})
    name = routers.start()
    await producer.ask(*(request(number) for number in range(10)))
    async with reading(kafka) as answers:
        await answers.read(until=10)
    url = routers.supervisor.process(name).spec.url
    text = await until_page(f"{url}/metrics", lambda text: "sprout_router_overhead_seconds_count 10.0" in text)
    assert 'sprout_router_requests_total{level="L1",model="m",outcome="ok",pool="p",source="policy"} 10.0' in text
    assert 'sprout_router_tokens_total{kind="completion",level="L1",model="m",pool="p"} 300.0' in text
    assert "sprout_router_overhead_seconds_count 10.0" in text
    assert 'sprout_router_first_token_seconds_count{model="m"} 10.0' in text
    assert re.search(r'sprout_progress_age_seconds\{work="commits"\} \d', text)
    assert 'sprout_router_policy_age_seconds{model="m"}' in text
    assert question(1) not in routers.log(name)


def known(text: str, metric: str) -> bool:
    """Whether a metric has a value."""
    return not any(math.isnan(value) for value in values(text, metric))


def values(text: str, metric: str) -> list[float]:
    """All values of a metric."""
    return [float(value) for value in re.findall(rf"^{metric}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)]


async def test_metrics_show_the_backlog(kafka, routers, producer):
    """With capacity for two of six requests: two run, one record waits for capacity, six are unfinished."""
    await producer.prepare({"L1": 1.0})
    name = routers.start(SPROUT_ROUTER_MAX_IN_FLIGHT="2")
    url = routers.supervisor.process(name).spec.url
    await producer.ask(*(request(number, prompt=LONG_PROMPT) for number in range(6)))
    text = await until_page(
        f"{url}/metrics",
        lambda text: (
            sum(values(text, "sprout_router_lag_records")) > 2
            and values(text, "sprout_router_in_flight") == [2]
            and any(values(text, "sprout_router_waiting_age_seconds"))
        ),
    )
    assert len(values(text, "sprout_router_lag_records")) <= 2 * REQUESTS.partitions
    async with reading(kafka) as answers:
        await answers.read(until=6)
    text = await until_page(
        f"{url}/metrics",
        lambda text: (
            len(lags := values(text, "sprout_router_lag_records")) == 2 * REQUESTS.partitions and not any(lags)
        ),
    )
    assert values(text, "sprout_router_waiting_age_seconds") == [0]
    assert values(text, "sprout_router_in_flight") == [0]
