"""Records that unpack to a multiple of their size, on every topic of every service, on real Kafka and PostgreSQL.

A new bomb is one line of `BOMBS`, a new service or topic one entry of `TOPICS`.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from shared.messages import DeadLetter
from shared.topics import (
    CAPACITY,
    CARBON_INTENSITY,
    DEAD_LETTERS,
    FOOTPRINTS,
    POLICIES,
    POWER_CURVES,
    PROMPT_GROUPS,
    QUALITY,
    RESPONSES,
    SAMPLES,
    USAGE,
    TopicSpec,
)
from tests.support.contract import EXAMPLES
from tests.support.evaluator import judged_fleet
from tests.support.processes import memory_mib, restart_exited, start_service
from tests.support.router import page, producing, reading

pytestmark = pytest.mark.integration

TOPICS: dict[str, tuple[int, tuple[TopicSpec, ...]]] = {
    "ledger": (256, (RESPONSES, USAGE, CARBON_INTENSITY, POLICIES, QUALITY, PROMPT_GROUPS, CAPACITY)),
    "optimizer": (256, (CARBON_INTENSITY, PROMPT_GROUPS, QUALITY, POWER_CURVES, FOOTPRINTS)),
    "evaluator": (1024, (SAMPLES, FOOTPRINTS, CARBON_INTENSITY, POWER_CURVES, CAPACITY)),
}
"""Memory limit of each service, MiB, and what it reads."""


@dataclass(frozen=True)
class Bomb:
    """A record, and what becomes of it.

    Attributes:
        size: unpacked, bytes.
        letter: reason of the dead letter.
        restarts: most restarts of the service.
    """

    size: int
    letter: str
    restarts: int
    compression: str = "gzip"


BOMBS = {
    "gzip, 10 MB": Bomb(10_000_000, "too_large", 0),
    "zstd, 20 MB": Bomb(20_000_000, "too_large", 0, "zstd"),
    "gzip, 130 MB": Bomb(130_000_000, "unreadable", 1),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("service", TOPICS)
async def test_a_bomb_on_every_topic_stops_no_service(service, name, kafka, database, supervisor, tmp_path):
    """The service reads what came before the bombs and what comes after them; it is killed at its limit."""
    bomb, (limit, topics) = BOMBS[name], TOPICS[service]
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet("127.0.0.1:9"))
    value = b'{"x":"' + b"a" * bomb.size + b'"}'
    async with producing(kafka) as producer:
        await post_examples(producer, topics)
        process = start_service(service, supervisor, kafka=kafka, database=database, fleet=fleet)
        async with (
            reading(kafka, DEAD_LETTERS) as letters,
            producing(
                kafka, compression_type=bomb.compression, max_request_size=2**28, max_batch_size=2**28
            ) as hostile,
        ):
            for spec in topics:
                await hostile.producer.send_and_wait(kafka.topic(spec), value, key=b"bomb", partition=0)
            # Known to be read when its dead letter comes: one after each bomb.
            for spec in topics:
                await producer.producer.send_and_wait(kafka.topic(spec), b"[", key=b"after", partition=0)
            wanted = {(kafka.topic(spec), reason) for spec in topics for reason in (bomb.letter, "invalid_json")}
            deaths, peak = await run_limited(
                supervisor, process, limit, until=lambda: reasons(letters, wanted), letters=letters
            )
    running = supervisor.process(process)
    assert '"ready"' in await asyncio.to_thread(page, f"{running.spec.url}/ready")
    assert deaths <= bomb.restarts
    assert peak < limit
    found = Counter(key for record in letters.records if (key := key_of(record)) in wanted)
    if bomb.restarts == 0:
        assert found == dict.fromkeys(wanted, 1)
    supervisor.stop(process)


async def post_examples(producer: Any, topics: tuple[TopicSpec, ...]) -> None:
    for spec in topics:
        await producer.producer.send_and_wait(
            producer.kafka.topic(spec), EXAMPLES[spec.name].model_dump_json().encode(), key=b"before", partition=0
        )


def key_of(record: Any) -> tuple[str, str]:
    letter = DeadLetter.model_validate_json(record.value)
    return letter.topic, letter.reason


def reasons(letters: Any, wanted: set[tuple[str, str]]) -> bool:
    return wanted <= {key_of(record) for record in letters.records}


async def run_limited(
    supervisor: Any, process: str, limit: int, *, until: Callable[[], bool], letters: Any
) -> tuple[int, int]:
    """Kill the process at its memory limit and start it again, until a condition holds.

    Returns:
        How often it was killed, and its largest memory since the last start, MiB.
    """
    deaths = peak = 0
    async with asyncio.timeout(120):
        while not until():
            await letters._poll(20)
            if restart_exited(supervisor, [process]):
                peak = 0
                continue
            with suppress(FileNotFoundError):
                pid = supervisor.process(process).pid
                now = memory_mib(pid)
                peak = max(peak, memory_mib(pid, "VmHWM"))
                if now > limit:
                    os.kill(pid, signal.SIGKILL)
                    deaths += 1
        await asyncio.to_thread(supervisor.process(process).wait_ready)
    return deaths, max(peak, memory_mib(supervisor.process(process).pid, "VmHWM"))
