"""Records that unpack to a multiple of their size, on every topic of every service, on real Kafka and PostgreSQL.

A new bomb is one line of `BOMBS`, a new service or topic one entry of `TOPICS`.
"""

import asyncio
from functools import partial
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
from tests.support.evaluator import judged_fleet
from tests.support.processes import memory_mib, start_service
from tests.support.router import page, producing, reading

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("inspecting"), pytest.mark.extended]

TOPICS: dict[str, tuple[int, tuple[TopicSpec, ...]]] = {
    "ledger": (256, (RESPONSES, USAGE, CARBON_INTENSITY, POLICIES, QUALITY, PROMPT_GROUPS, CAPACITY)),
    "optimizer": (256, (CARBON_INTENSITY, PROMPT_GROUPS, QUALITY, POWER_CURVES, FOOTPRINTS)),
    "evaluator": (1024, (SAMPLES, FOOTPRINTS, CARBON_INTENSITY, POWER_CURVES, CAPACITY)),
    "gateway": (512, (FOOTPRINTS, POLICIES, CARBON_INTENSITY, CAPACITY)),
    "carbon_feed": (256, (CARBON_INTENSITY,)),
}
"""Memory limit of each service, MiB, and what it reads."""

SETTINGS = {
    "carbon_feed": {"SPROUT_CARBON_FEED_PROVIDERS": '{"GB": [{"kind": "constant", "intensity_g_per_kwh": 100}]}'}
}

BOMBS: dict[str, tuple[int, str, str]] = {
    "gzip, 10 MB": (10_000_000, "gzip", "too_large"),
    "zstd, 20 MB": (20_000_000, "zstd", "too_large"),
    "gzip, 60 MB": (60_000_000, "gzip", "unreadable"),
    "lz4, 130 MB": (130_000_000, "lz4", "unreadable"),
}
"""Unpacked bytes, compression, and the reason of the dead letter."""

RUNS = [
    ("ledger", "zstd, 20 MB"),
    ("optimizer", "gzip, 60 MB"),
    ("evaluator", "lz4, 130 MB"),
    ("gateway", "gzip, 60 MB"),
    ("carbon_feed", "zstd, 20 MB"),
]
"""Every service with every bomb takes minutes; `pytest -k` of a longer list when something here is changed."""


@pytest.mark.parametrize(("service", "name"), RUNS)
async def test_a_service_starts_with_a_bomb_on_each_of_its_topics(service, name, kafka, database, supervisor, tmp_path):
    """The bombs lie where they were when an earlier process died of them. What is before and after them is read."""
    (size, compression, reason), (limit, topics) = BOMBS[name], TOPICS[service]
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet("127.0.0.1:9"))
    value = b'{"x":"' + b"a" * size + b'"}'
    options = {"compression_type": compression, "max_request_size": 2**28, "max_batch_size": 2**28}
    async with producing(kafka) as producer, producing(kafka, **options) as hostile:
        for spec in topics:
            send = partial(producer.producer.send_and_wait, kafka.topic(spec), partition=0)
            await send(b"[", key=b"before")
            await hostile.producer.send_and_wait(kafka.topic(spec), value, key=b"bomb", partition=0)
            await send(b"[", key=b"after")
    process = start_service(
        service, supervisor, kafka=kafka, database=database, fleet=fleet, settings=SETTINGS.get(service)
    )
    async with reading(kafka, DEAD_LETTERS) as letters:
        await letters.read(until=3 * len(topics))
        found = {(one.topic, one.offset): one.reason for one in map(letter_of, letters.records)}
    reasons = ("invalid_json", reason, "invalid_json")
    assert found == {(kafka.topic(spec), at): why for spec in topics for at, why in enumerate(reasons)}
    running = supervisor.process(process)
    assert '"ready"' in await asyncio.to_thread(page, f"{running.spec.url}/ready")
    assert memory_mib(running.pid, "VmHWM") < limit
    supervisor.stop(process)


def letter_of(record: Any) -> DeadLetter:
    return DeadLetter.model_validate_json(record.value)
