"""Records that stopped a router, on real Kafka: it stays ready, under 256 MiB, and answers all ordinary requests.

A new attack is one line of `ATTACKS`.
"""

import asyncio
import base64
import json
import os
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from shared.messages import DeadLetter, PromptGrouping
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS, MEBIBYTE, POLICIES, PROMPT_GROUPS, RESPONSES
from tests.support.deadlines import DEADLINE_S
from tests.support.processes import memory_mib, restart_exited
from tests.support.router import MODEL, ZONE, intensity, page, policy, producing, reading, request, until_committed

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("inspecting")]

MEMORY_LIMIT_MIB = 256
PEAK = "VmHWM"
ORDINARY = 40
TURN = b'{"role":"user","content":""},'


def turns(size: int, *, name: str | None = "attack") -> bytes:
    """A conversation of empty turns."""
    start = b"" if name is None else b'"id":%s,' % json.dumps(name).encode()
    return b"{" + start + b'"messages":[' + TURN * (size // len(TURN)) + b'{"role":"user","content":"Why?"}]}'


def prompt(text: str) -> bytes:
    return json.dumps({"id": "attack", "prompt": text}, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Attack:
    """A record, how it is sent, and what becomes of it.

    Attributes:
        answer: error code of the response; None if there is none.
        letter: reason of the dead letter; None if there is none.
    """

    make: Callable[[], bytes | None]
    answer: str | None
    letter: str | None
    compression: str | None = None
    times: int = 1
    options: dict[str, Any] = field(default_factory=dict)


ATTACKS = {
    "gzip, 10 MB of turns": Attack(lambda: turns(10_000_000), "prompt_too_large", None, "gzip"),
    "gzip, 20 MB of turns": Attack(lambda: turns(20_000_000), "prompt_too_large", None, "gzip"),
    "gzip, 20 MB without an id": Attack(lambda: turns(20_000_000, name=None), None, "too_large", "gzip"),
    "gzip, 20 MB of brackets": Attack(lambda: b"[" * 20_000_000, None, "too_large", "gzip"),
    "gzip, 60 MB of turns": Attack(lambda: turns(60_000_000), "prompt_too_large", None, "gzip"),
    "zstd, 20 MB of turns": Attack(lambda: turns(20_000_000), "prompt_too_large", None, "zstd"),
    "lz4, 20 MB of turns": Attack(lambda: turns(20_000_000), "prompt_too_large", None, "lz4"),
    "snappy, 10 MB of turns": Attack(lambda: turns(10_000_000), "prompt_too_large", None, "snappy"),
    "120 times 1 MiB of turns": Attack(lambda: turns(MEBIBYTE - 500), "prompt_too_large", None, times=120),
    "30 times 1 MiB of emoji": Attack(lambda: prompt("\N{SEEDLING}" * 199_000 + "x" * 900), "ok", None, times=30),
    "1 MiB of arrays": Attack(lambda: b'{"id":"attack","x":[' + b"[]," * 300_000 + b"[]]}", "invalid_request",
                              "invalid_message"),
    "a time outside the calendar": Attack(
        lambda: b'{"id":"attack","prompt":"a","deadline":"0001-01-01T00:00:00+14:00"}', "invalid_request",
        "invalid_message",
    ),
    "a record timestamp of the year 1": Attack(lambda: b'{"id":"attack","prompt":"Question number 1?"}', "ok", None,
                                               options={"timestamp_ms": 1}),
    "deep nesting": Attack(lambda: b'{"id":"attack","x":' + b"[" * 100_000, None, "invalid_json"),
    "a number of 5,000 digits": Attack(lambda: b'{"id":"attack","prompt":' + b"9" * 5_000 + b"}", None, "invalid_json"),
    "20,000 headers": Attack(lambda: prompt("Question number 1?"), "ok", None,
                             options={"headers": [("n", b"v")] * 20_000}),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
async def test_a_router_survives_and_answers_all_ordinary_requests(name, kafka, routers, producer):
    attack = ATTACKS[name]
    await producer.prepare({"L1": 1.0})
    router = routers.start()
    value = attack.make()
    async with reading(kafka) as answers, reading(kafka, DEAD_LETTERS) as letters:
        async with producing(
            kafka, compression_type=attack.compression, max_request_size=2**28, max_batch_size=2**28
        ) as hostile:
            await producer.ask(*(request(number) for number in range(ORDINARY // 2)))
            for _ in range(attack.times):
                await hostile.raw(value, **attack.options)
            await producer.ask(*(request(number) for number in range(ORDINARY // 2, ORDINARY)))
        await answers.ids([f"r{number}" for number in range(ORDINARY)])
        await until_committed(kafka)
        await answers.read_to_end()
        await letters.read_to_end()
        responses = answers.responses()
        kept = [DeadLetter.model_validate_json(record.value) for record in letters.records]
    attacked = responses.pop("attack", None)
    assert {response.status for response in responses.values()} == {"ok"}
    found = None if attacked is None else "ok" if attacked.error is None else attacked.error.code
    assert found == attack.answer
    assert [letter.reason for letter in kept] == [attack.letter] * (attack.letter is not None)
    assert all(len(letter.value_base64) <= MEBIBYTE * 4 / 3 + 4 for letter in kept)
    process = routers.supervisor.process(router)
    process.check()  # it has not exited
    assert '"ready"' in await asyncio.to_thread(page, f"{process.spec.url}/ready")
    assert memory_mib(process.pid, PEAK) < MEMORY_LIMIT_MIB


@pytest.mark.parametrize(
    "compression",
    ["gzip", pytest.param("zstd", marks=pytest.mark.extended), pytest.param("lz4", marks=pytest.mark.extended)],
)
async def test_a_record_that_ends_the_process_is_set_aside_after_one_restart(compression, kafka, routers, producer):
    """A router is killed at 256 MiB, as in a container, and started again."""
    await producer.prepare({"L1": 1.0})
    router = routers.start()
    killed: set[int] = set()
    async with reading(kafka) as answers, reading(kafka, DEAD_LETTERS) as letters:
        async with producing(
            kafka, compression_type=compression, max_request_size=2**28, max_batch_size=2**28
        ) as hostile:
            await producer.ask(*(request(number) for number in range(ORDINARY // 2)))
            bomb = await hostile.raw(turns(130_000_000), key=b"k")
            await producer.ask(*(request(number) for number in range(ORDINARY // 2, ORDINARY)))
        wanted = {f"r{number}" for number in range(ORDINARY)}
        async with asyncio.timeout(DEADLINE_S):
            while wanted - answers.responses().keys():
                if not restart_exited(routers.supervisor, [router]):
                    pid = routers.supervisor.process(router).pid
                    # The largest so far: this process may be looking at another time than the router unpacks.
                    if memory_mib(pid, PEAK) > MEMORY_LIMIT_MIB:
                        os.kill(pid, signal.SIGKILL)
                        killed.add(pid)
                await answers._poll(20)
        await until_committed(kafka)
        await answers.read_to_end()
        await letters.read_to_end()
        kept = [DeadLetter.model_validate_json(record.value) for record in letters.records]
    assert len(killed) == 1
    assert len(answers.records) == ORDINARY
    assert [(one.reason, one.partition, one.offset, one.value_base64) for one in kept] == [
        ("unreadable", bomb.partition, bomb.offset, "")
    ]
    assert memory_mib(routers.supervisor.process(router).pid, PEAK) < MEMORY_LIMIT_MIB


@pytest.mark.extended
async def test_a_router_starts_with_a_bomb_on_each_topic_that_it_reads(kafka, routers, producer):
    """Also on `responses`, from which a router learns which requests are answered."""
    await producer.prepare({"L1": 1.0})
    router = routers.start()
    async with reading(kafka) as answers, reading(kafka, DEAD_LETTERS) as letters:
        await producer.ask(request(0))
        await answers.ids(["r0"])
        await answers.consumer.stop()  # it would unpack the bomb
        routers.supervisor.process(router).kill()
        async with producing(kafka, compression_type="gzip", max_request_size=2**28, max_batch_size=2**28) as hostile:
            for spec in (POLICIES, CARBON_INTENSITY, PROMPT_GROUPS, RESPONSES):
                # Ahead: Kafka rejects responses that are too old when they arrive, and it is compressed slowly.
                ahead_ms = int(time.time() * 1_000) + 60_000
                await hostile.producer.send_and_wait(
                    kafka.topic(spec), turns(130_000_000), key=b"k", partition=0, timestamp_ms=ahead_ms
                )
        router = routers.start()
        await letters.read(until=3)
        kept = {(one.topic, one.reason) for one in map(_letter, letters.records)}
    assert kept == {(kafka.topic(spec), "unreadable") for spec in (POLICIES, CARBON_INTENSITY, PROMPT_GROUPS)}
    process = routers.supervisor.process(router)
    metrics = await asyncio.to_thread(page, f"{process.spec.url}/metrics")
    assert f'sprout_router_policy_age_seconds{{model="{MODEL}"}} NaN' not in metrics
    assert memory_mib(process.pid, PEAK) < MEMORY_LIMIT_MIB


async def test_control_messages_of_2125_and_bombs_are_not_believed_at_a_start(kafka, routers, producer):
    """They were written before the router starts, and the good messages before them stay valid."""
    made = await producer.prepare({"L1": 1.0})
    in_2125 = datetime(2125, 1, 1, tzinfo=UTC)
    points = "<f8", [2**23], base64.b64encode(zlib.compress(bytes(2**26), 9)).decode()
    array = dict(zip(("dtype", "shape", "data"), points, strict=True))
    arrays = dict.fromkeys(("telling", "mean", "spread", "weights", "intercept", *map(str, range(27))), array)
    bomb = PromptGrouping(
        model=MODEL, version="bomb", learned_at=datetime.now(UTC), names=("g",), features=2, classifier=2, arrays=arrays
    )  # fmt: skip
    soon = made.model_copy(update={"version": 9, "created_at": datetime.now(UTC)})
    await producer.post(POLICIES, policy({"L0": 1.0}, version=2, created_at=in_2125, valid_until=in_2125), MODEL)
    await producer.post(POLICIES, soon.model_copy(update={"valid_until": in_2125}), MODEL)
    await producer.post(POLICIES, soon.model_copy(update={"schema_version": 2}), MODEL)
    await producer.post(POLICIES, soon, "another")
    await producer.post(CARBON_INTENSITY, intensity(in_2125), ZONE)
    await producer.producer.send_and_wait(
        kafka.topic(POLICIES),
        soon.model_dump_json()
        .replace(soon.model_dump(mode="json")["created_at"], "0001-01-01T00:00:00+14:00")
        .encode(),
        key=MODEL.encode(),
    )
    async with producing(kafka, max_request_size=2**23, max_batch_size=2**23) as large:
        await large.post(PROMPT_GROUPS, bomb, MODEL)
    router = routers.start()
    async with reading(kafka) as answers, reading(kafka, DEAD_LETTERS) as letters:
        await producer.ask(*(request(number) for number in range(20)))
        await answers.ids(f"r{number}" for number in range(20))
        decisions = {response.decision.policy_version for response in answers.responses().values()}
        await letters.read(until=7)
        reasons = Counter(DeadLetter.model_validate_json(record.value).reason for record in letters.records)
    assert decisions == {made.version}
    assert reasons == {"implausible": 6, "invalid_message": 1}
    process = routers.supervisor.process(router)
    assert memory_mib(process.pid, PEAK) < MEMORY_LIMIT_MIB
    metrics = await asyncio.to_thread(page, f"{process.spec.url}/metrics")
    assert f'sprout_dead_letters_total{{reason="implausible",topic="{kafka.topic(POLICIES)}"}} 4.0' in metrics


def _letter(record: Any) -> DeadLetter:
    return DeadLetter.model_validate_json(record.value)
