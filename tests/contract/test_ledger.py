"""What the ledger makes of the messages of other services, in memory; on real Kafka: tests/integration."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from faststream.kafka import TestKafkaBroker
from prometheus_client import CollectorRegistry
from router_support import ZONE, intensity, policy

from services.ledger.app import Ledger
from services.ledger.settings import LedgerSettings
from shared.broker import build_broker
from shared.clock import Clock
from shared.dead_letters import RetryLaterError
from shared.fleet import Directive, Endpoint, Fleet, Model, Pool
from shared.messages import DeadLetter, UsageRecord
from shared.settings import KafkaSettings
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS, POLICIES, USAGE

KAFKA = KafkaSettings()
START = datetime(2024, 2, 1, tzinfo=UTC)
FLEET = Fleet(
    directives=(Directive(level="L0"),),
    models=(Model(name="m", chat_template="chatml"),),
    pools=(Pool(name="p", model="m", zone=ZONE, endpoints=(Endpoint(name="e0", grpc="localhost:1"),)),),
)


class Memory:
    """Stands for PostgreSQL."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.away = False

    async def add(self, table: str, rows: list[dict[str, Any]]) -> None:
        if self.away:
            raise ConnectionRefusedError
        self.tables.setdefault(table, []).extend(rows)

    put = add

    def note(self, error: BaseException | None) -> None:
        pass


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory()
    monkeypatch.setattr("services.ledger.app.Storage", lambda: made)
    return made


@pytest.fixture
def broker(memory: Memory) -> Any:
    registry = CollectorRegistry()
    broker, office = build_broker(KAFKA, service="ledger", clock=Clock(), registry=registry)
    settings = LedgerSettings(retry_s=0.01)
    Ledger(broker, office, kafka=KAFKA, settings=settings, fleet=FLEET, clock=Clock(), registry=registry)
    return broker


def usage(name: str) -> UsageRecord:
    return UsageRecord(
        id=name, purpose="judge", evaluation_id="ev", model="j", pool="p", level="L0", zone=ZONE, endpoint="e0",
        group="qa\x00", started_at=START, finished_at=START + timedelta(seconds=2), completion_tokens=1,
        prompt_tokens=2**40,
    )  # fmt: skip


async def test_a_broken_record_becomes_a_dead_letter_and_the_others_are_kept(broker, memory):
    letters: list[DeadLetter] = []

    @broker.subscriber(KAFKA.topic(DEAD_LETTERS))
    async def keep(letter: DeadLetter) -> None:
        letters.append(letter)

    async with TestKafkaBroker(broker) as running:
        await running.publish_batch(usage("a"), b"{broken", usage("b"), topic=KAFKA.topic(USAGE))
    assert [row["id"] for row in memory.tables["calls"]] == ["a", "b"]
    assert [letter.reason for letter in letters] == ["invalid_json"]


async def test_what_postgresql_cannot_store_is_kept_in_the_nearest_form(broker, memory):
    async with TestKafkaBroker(broker) as running:
        await running.publish_batch(usage("a"), topic=KAFKA.topic(USAGE))
    (row,) = memory.tables["calls"]
    assert (row["grp"], row["prompt_tokens"], row["propensity"]) == ("qa\ufffd", 2**31 - 1, 1.0)


async def test_while_postgresql_is_away_the_batch_is_asked_for_again(broker, memory):
    memory.away = True
    async with TestKafkaBroker(broker) as running:
        with pytest.raises(RetryLaterError):
            await running.publish_batch(usage("a"), topic=KAFKA.topic(USAGE))
    assert memory.tables == {}


async def test_policies_and_intensities_are_kept_whole(broker, memory):
    made, value = policy({"L0": 1.0}), intensity(START)
    async with TestKafkaBroker(broker) as running:
        await running.publish_batch(made, topic=KAFKA.topic(POLICIES))
        await running.publish_batch(value, topic=KAFKA.topic(CARBON_INTENSITY))
    assert type(made).model_validate(memory.tables["policies"][0]["policy"]) == made
    assert [(row["zone"], row["intensity_g_per_kwh"]) for row in memory.tables["intensity"]] == [(ZONE, 300.0)]
