"""How the ledger stores the messages of other services; a fake takes the place of its database."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from faststream.kafka import KafkaBroker
from prometheus_client import CollectorRegistry

from services.ledger.app import Ledger
from services.ledger.calls import NewCall, storable
from services.ledger.settings import LedgerSettings
from shared.fleet import Directive, Fleet, Model
from shared.kafka.broker import build_broker
from shared.kafka.handling import RetryLaterError
from shared.messages import DeadLetter, UsageRecord
from shared.pools import Endpoint, Pool
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS, POLICIES, USAGE
from tests.support.contract import Medium
from tests.support.router import ZONE, intensity, policy

START = datetime(2024, 2, 1, tzinfo=UTC)
FLEET = Fleet(
    directives=(Directive(level="L0"),),
    models=(Model(name="m", chat_template="chatml"),),
    pools=(Pool(name="p", model="m", zone=ZONE, endpoints=(Endpoint(name="e0", grpc="localhost:1"),)),),
)


class MemoryStorage:
    """The tables in memory; can be made unavailable."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.available = True
        self.failed_writes = 0

    async def add(self, table: str, rows: list[dict[str, Any]]) -> None:
        if not self.available:
            self.failed_writes += 1
            raise DatabaseUnavailableError
        self.tables.setdefault(table, []).extend(rows)

    put = add

    async def add_calls(self, calls: list[NewCall]) -> None:
        await self.add("open_calls", [call._asdict() for call in calls])


@pytest.fixture
def memory() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
def broker(memory: MemoryStorage, medium: Medium) -> KafkaBroker:
    registry = CollectorRegistry()
    broker, dead_letters = build_broker(medium.kafka, service="ledger", clock=Clock(), registry=registry)
    settings = LedgerSettings(retry_s=0.01, poll_ms=20)
    Ledger(
        broker, dead_letters, kafka=medium.kafka, settings=settings, fleet=FLEET, clock=Clock(), registry=registry,
        storage=memory,
    )  # fmt: skip
    return broker


def usage(name: str) -> UsageRecord:
    return UsageRecord(
        id=name, purpose="judge", evaluation_id="ev", model="j", pool="p", level="L0", zone=ZONE, endpoint="e0",
        group="qa\x00", started_at=START, finished_at=START + timedelta(seconds=2), completion_tokens=1,
        prompt_tokens=2**40,
    )  # fmt: skip


async def test_an_invalid_record_becomes_a_dead_letter_and_the_others_are_stored(broker, memory, medium):
    letters: list[DeadLetter] = []

    @broker.subscriber(medium.kafka.topic(DEAD_LETTERS), auto_offset_reset="earliest")
    async def keep(letter: DeadLetter) -> None:
        letters.append(letter)

    async with medium.running(broker):
        await broker.publish_batch(usage("a"), b"{broken", usage("b"), topic=medium.kafka.topic(USAGE), partition=0)
        await medium.until(lambda: len(memory.tables.get("open_calls", [])) == 2 and bool(letters))
    assert {row["id"] for row in memory.tables["open_calls"]} == {"a", "b"}
    assert [letter.reason for letter in letters] == ["invalid_json"]


async def test_values_that_postgresql_cannot_store_are_replaced_by_the_nearest(broker, memory, medium):
    async with medium.running(broker):
        await broker.publish_batch(usage("a"), topic=medium.kafka.topic(USAGE))
        await medium.until(lambda: "open_calls" in memory.tables)
    (row,) = memory.tables["open_calls"]
    assert (storable(row["labels"].grp), row["prompt_tokens"], row["labels"].propensity) == ("qa\ufffd", 2**31 - 1, 1.0)


@pytest.mark.parametrize("medium", ["memory"], indirect=True)
async def test_while_postgresql_is_unavailable_the_batch_is_not_acknowledged(broker, memory, medium):
    memory.available = False
    async with medium.running(broker):
        with pytest.raises(RetryLaterError):
            await broker.publish_batch(usage("a"), topic=medium.kafka.topic(USAGE))
    assert memory.tables == {}


@pytest.mark.parametrize("medium", ["kafka"], indirect=True)
@pytest.mark.integration
async def test_a_batch_that_arrived_while_postgresql_was_unavailable_is_redelivered(broker, memory, medium):
    memory.available = False
    async with medium.running(broker):
        await broker.publish_batch(usage("a"), usage("b"), topic=medium.kafka.topic(USAGE), partition=0)
        await medium.until(lambda: memory.failed_writes >= 2)
        memory.available = True
        await medium.until(lambda: {row["id"] for row in memory.tables.get("open_calls", [])} == {"a", "b"})


async def test_policies_and_intensities_are_stored_completely(broker, memory, medium):
    made, value = policy({"L0": 1.0}), intensity(START)
    async with medium.running(broker):
        await broker.publish(made, topic=medium.kafka.topic(POLICIES), key=b"m")
        await broker.publish(value, topic=medium.kafka.topic(CARBON_INTENSITY), key=ZONE.encode())
        await medium.until(lambda: {"policies", "intensity"} <= set(memory.tables))
    assert type(made).model_validate(memory.tables["policies"][0]["policy"]) == made
    assert [(row["zone"], row["intensity_g_per_kwh"]) for row in memory.tables["intensity"]] == [(ZONE, 300.0)]
