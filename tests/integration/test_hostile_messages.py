"""One bad record among 50 good ones costs only itself: the ledger's tables on real Kafka and PostgreSQL.

A new attack is one line of `ATTACKS`: a change of a good response as JSON text, and the reason of its dead letter (None
if it is stored).
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.ledger.ingest import Ingest
from services.ledger.metrics import LedgerMetrics
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Storage
from shared.kafka.broker import build_broker
from shared.messages import DeadLetter
from shared.runtime.clock import Clock
from shared.runtime.database import migrate, open_pool
from shared.topics import DEAD_LETTERS, RESPONSES
from tests.support.contract import EXAMPLES
from tests.support.deadlines import DEADLINE_S
from tests.support.router import producing, reading
from tests.support.traffic import timestamp_ms

pytestmark = pytest.mark.integration

GOOD = EXAMPLES["responses"].model_dump(mode="json")
NUMBER = 50

ATTACKS: dict[str, tuple[dict[str, Any] | bytes, str | None]] = {
    "a time before the year 1": ({"requested_at": "0001-01-01T00:00:00+14:00"}, "invalid_message"),
    "a time after the year 9999": ({"requested_at": "9999-12-31T23:59:59-14:00"}, "invalid_message"),
    "a time of the year 9999": ({"timing": GOOD["timing"] | {"finished_at": "9999-12-31T23:59:59Z"}}, None),
    "a lone surrogate in the id": ({"request_id": "bad\ud800"}, "invalid_json"),
    "a lone surrogate in a label": ({"request_id": "bad", "tenant": "\udfff"}, "invalid_json"),
    "NUL in the id": ({"request_id": "bad\0"}, None),
    "a number of tokens with 100 digits": ({"usage": GOOD["usage"] | {"completion_tokens": 10**100}}, None),
    "a propensity that is no number": (json.dumps(GOOD).replace("0.5", "NaN").encode(), "invalid_message"),
    "100,000 brackets": (b"[" * 100_000, "invalid_json"),
    "no UTF-8": (b'{"request_id": "\xff\xfe"}', "invalid_json"),
    "no value": (b"", "invalid_json"),
}


@pytest.fixture
async def storage(kafka, database) -> AsyncIterator[Storage]:
    registry = CollectorRegistry()
    broker, dead_letters = build_broker(kafka, service="ledger", clock=Clock(), registry=registry)
    pool = await open_pool(database, schema="ledger")
    await migrate(pool, schema="ledger", package="services.ledger.migrations")
    made = Storage()
    made.attach(pool)
    Ingest(
        broker, dead_letters, kafka=kafka, settings=LedgerSettings(), storage=made, metrics=LedgerMetrics(registry),
        service="ledger",
    )  # fmt: skip
    await broker.start()
    try:
        yield pool
    finally:
        await broker.stop()
        await pool.close()


@pytest.mark.parametrize("name", ATTACKS)
async def test_one_bad_response_costs_only_itself(name, kafka, storage):
    change, reason = ATTACKS[name]
    bad = change if isinstance(change, bytes) else json.dumps(GOOD | {"request_id": "bad"} | change).encode()
    values = [json.dumps(GOOD | {"request_id": f"r{number}"}).encode() for number in range(NUMBER)]
    values.insert(NUMBER // 2, bad)
    async with producing(kafka) as producer, reading(kafka, DEAD_LETTERS) as letters:
        options = {"partition": 0, "timestamp_ms": timestamp_ms(RESPONSES)}
        sends = [await producer.producer.send(kafka.topic(RESPONSES), value, **options) for value in values]
        await asyncio.gather(*sends)
        async with asyncio.timeout(DEADLINE_S):
            while len(ids := await stored(storage)) + len(letters.records) <= NUMBER:
                await letters._poll(100)
        kept = [DeadLetter.model_validate_json(record.value) for record in letters.records]
    assert {one for one in ids if one.startswith("r")} == {f"r{number}" for number in range(NUMBER)}
    assert [letter.reason for letter in kept] == [reason] * (reason is not None)


async def stored(pool: Any) -> list[str]:
    return [row["id"] for row in await pool.fetch("SELECT id FROM open_calls")]
