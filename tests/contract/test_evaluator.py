"""What the evaluator reads from its topics, in memory and on a real broker, with a database in memory."""

import tomllib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.evaluator.app import Evaluator, build_app
from services.evaluator.cost import CallSums, CarbonKey, Energy
from services.evaluator.settings import EvaluatorSettings
from shared.fleet import Fleet, FleetError
from shared.kafka.broker import build_broker
from shared.messages import DeadLetter, Footprint, Sample
from shared.runtime.clock import ManualClock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS, FOOTPRINTS, SAMPLES
from tests.support.contract import Medium
from tests.support.evaluator import intensities, judged_fleet, sample
from tests.support.router import MODEL, ZONE

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)
FLEET = Fleet.model_validate(tomllib.loads(judged_fleet("127.0.0.1:9")))


class MemoryStore:
    """Stores samples and energy in memory; the first `failures` attempts to add samples fail."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.energy: dict[tuple[str, str], Energy] = {}
        self.failures = 0

    async def add(self, samples: list[Sample], *, now: datetime) -> None:
        assert now == NOW
        if self.failures:
            self.failures -= 1
            raise DatabaseUnavailableError("PostgreSQL is unavailable")
        self.samples += samples

    async def add_footprints(self, energy: dict[tuple[str, str], Energy], carbon: dict[CarbonKey, CallSums]) -> None:
        self.energy |= energy


class Fixture:
    """An evaluator with its broker, and a reader of its dead letters."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self.kafka = kafka
        self.store = MemoryStore()
        self.letters: list[DeadLetter] = []
        registry = CollectorRegistry()
        clock = ManualClock(NOW)
        self.broker, dead_letters = build_broker(kafka, service="evaluator", clock=clock, registry=registry)
        self.evaluator = Evaluator(
            self.broker, dead_letters, kafka=kafka, database=DatabaseSettings(),
            settings=EvaluatorSettings(poll_ms=20, database_retry_pause_s=0.01),
            fleet=FLEET, clock=clock, registry=registry,
        )  # fmt: skip
        self.evaluator.inputs.connect(self.store, self.store)  # type: ignore[arg-type]
        self.state = self.evaluator.scheduler.states[MODEL]

        @self.broker.subscriber(kafka.topic(DEAD_LETTERS), auto_offset_reset="earliest")
        async def letters(letter: DeadLetter) -> None:
            self.letters.append(letter)

    async def publish(self, spec: Any, *values: Any) -> None:
        for value in values:
            await self.broker.publish(value, topic=self.kafka.topic(spec), key=ZONE.encode())


@pytest.fixture
async def fixture(medium: Medium) -> AsyncIterator[Fixture]:
    made = Fixture(medium.kafka)
    async with medium.running(made.broker):
        yield made


async def test_samples_of_known_models_reach_the_reservoir(fixture: Fixture, medium: Medium) -> None:
    await fixture.publish(SAMPLES, sample(1), sample(2, model="gpt-9"), sample(3, group="code"))
    await medium.until(lambda: len(fixture.store.samples) == 2)
    assert [(one.request_id, one.group) for one in fixture.store.samples] == [("r1", "qa"), ("r3", "code")]


async def test_an_invalid_sample_becomes_a_dead_letter_and_the_rest_is_stored(fixture: Fixture, medium: Medium) -> None:
    await fixture.publish(SAMPLES, b"{broken", sample(1), b'{"request_id": "x"}')
    await medium.until(lambda: len(fixture.letters) == 2 and len(fixture.store.samples) == 1)
    assert [letter.original_value() for letter in fixture.letters] == [b"{broken", b'{"request_id": "x"}']
    assert [letter.reason for letter in fixture.letters] == ["invalid_json", "invalid_message"]


async def test_a_sample_with_a_nul_in_its_id_is_skipped(fixture: Fixture, medium: Medium) -> None:
    strange = sample(1).model_copy(update={"request_id": "r\0"})
    await fixture.publish(SAMPLES, strange, sample(2))
    await medium.until(lambda: bool(fixture.store.samples))
    assert [one.request_id for one in fixture.store.samples] == ["r2"]
    assert fixture.letters == []


async def test_an_intensity_is_evaluated_with_its_trailing_window(fixture: Fixture, medium: Medium) -> None:
    fixture.state.opportunity.evaluated(NOW - timedelta(hours=24))
    await fixture.publish(CARBON_INTENSITY, intensities(NOW, 400, 420, 300, 220, 200))
    await medium.until(lambda: fixture.state.pending is not None)
    assert (fixture.state.pending.reason, fixture.state.pending.at) == ("low_intensity", NOW)


async def test_a_stale_intensity_triggers_no_evaluation(fixture: Fixture, medium: Medium) -> None:
    fixture.state.opportunity.evaluated(NOW - timedelta(hours=24))
    await fixture.publish(CARBON_INTENSITY, intensities(NOW - timedelta(hours=4), 400, 420, 300, 200, 220))
    await medium.until(lambda: fixture.state.opportunity.adjusted() is not None)
    assert fixture.state.pending is None


async def test_energy_of_evaluations_is_stored_and_that_of_requests_is_not(fixture: Fixture, medium: Medium) -> None:
    for purpose in ("request", "evaluation"):
        footprint = Footprint(
            request_id=purpose, purpose=purpose, model=MODEL, group="qa", pool="p", level="L0", zone=ZONE,
            endpoint="e0", started_at=NOW, finished_at=NOW, processing_s=1.0, completion_tokens=10, energy_j=60.0,
            embodied_g=0.0,
        )  # fmt: skip
        await fixture.publish(FOOTPRINTS, footprint)
    await medium.until(lambda: bool(fixture.store.energy))
    assert fixture.store.energy == {("evaluation", "p"): Energy(60.0, 10)}


@pytest.mark.parametrize("medium", ["kafka"], indirect=True)
@pytest.mark.integration
async def test_samples_are_redelivered_while_the_database_is_unavailable(medium: Medium) -> None:
    fixture = Fixture(medium.kafka)
    fixture.store.failures = 3
    async with medium.running(fixture.broker):
        await fixture.publish(SAMPLES, *(sample(number) for number in range(5)))
        await medium.until(lambda: {one.request_id for one in fixture.store.samples} == {f"r{n}" for n in range(5)})
        assert fixture.store.failures == 0
        assert fixture.letters == []


def test_a_fleet_without_a_judge_is_an_error() -> None:
    with pytest.raises(FleetError, match=r"no \[judge\].*SPROUT_EVALUATOR_JUDGE=openai"):
        build_app(settings=EvaluatorSettings(), fleet=FLEET.model_copy(update={"judge": None}))
