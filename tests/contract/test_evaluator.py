"""What the evaluator reads from its topics, in memory and on a real broker; its database is stood in for."""

import tomllib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.evaluator.app import Evaluator, build_app
from services.evaluator.plan import PlanError
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.spending import Energy
from shared.fleet import Fleet
from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import RetryLaterError
from shared.messages import DeadLetter, Footprint, Sample
from shared.runtime.clock import ManualClock
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS, FOOTPRINTS, SAMPLES
from tests.support.contract import Medium
from tests.support.evaluator import grid, judged_fleet, sample
from tests.support.router import MODEL, ZONE

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)
FLEET = Fleet.model_validate(tomllib.loads(judged_fleet("127.0.0.1:9")))


class Memory:
    """A storage that keeps in memory what it is given, and is away as often as told."""

    problem = None

    def __init__(self, *, away: int = 0) -> None:
        self.samples: list[Sample] = []
        self.energy: dict[tuple[str, str], Energy] = {}
        self.away = away

    async def keep(self, samples: list[Sample], *, now: datetime) -> None:
        assert now == NOW
        if self.away:
            self.away -= 1
            raise RetryLaterError("away")
        self.samples += samples

    async def add_energy(self, book: dict[tuple[str, str], Energy]) -> None:
        self.energy |= book

    async def pause(self) -> None:
        return


class Desk:
    """An evaluator with its broker, and a reader of its dead letters."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self.kafka = kafka
        self.storage = Memory()
        self.letters: list[DeadLetter] = []
        registry = CollectorRegistry()
        clock = ManualClock(NOW)
        self.broker, dead_letters = build_broker(kafka, service="evaluator", clock=clock, registry=registry)
        self.evaluator = Evaluator(
            self.broker, dead_letters, kafka=kafka, database=DatabaseSettings(), settings=EvaluatorSettings(poll_ms=20),
            fleet=FLEET, clock=clock, registry=registry,
        )  # fmt: skip
        self.evaluator.intake.storage = self.storage  # type: ignore[assignment]
        (self.watched,) = self.evaluator.watch._models.values()

        @self.broker.subscriber(kafka.topic(DEAD_LETTERS), auto_offset_reset="earliest")
        async def letters(letter: DeadLetter) -> None:
            self.letters.append(letter)

    async def publish(self, spec: Any, *values: Any) -> None:
        for value in values:
            await self.broker.publish(value, topic=self.kafka.topic(spec), key=b"k")


@pytest.fixture
async def desk(medium: Medium) -> AsyncIterator[Desk]:
    made = Desk(medium.kafka)
    async with medium.running(made.broker):
        yield made


async def test_samples_of_known_models_reach_the_reservoir(desk: Desk, medium: Medium) -> None:
    await desk.publish(SAMPLES, sample(1), sample(2, model="gpt-9"), sample(3, group="code"))
    await medium.until(lambda: len(desk.storage.samples) == 2)
    assert [(one.request_id, one.group) for one in desk.storage.samples] == [("r1", "qa"), ("r3", "code")]


async def test_what_is_no_sample_becomes_a_dead_letter_and_the_rest_is_kept(desk: Desk, medium: Medium) -> None:
    await desk.publish(SAMPLES, b"{broken", sample(1), b'{"request_id": "x"}')
    await medium.until(lambda: len(desk.letters) == 2 and len(desk.storage.samples) == 1)
    assert [letter.original_value() for letter in desk.letters] == [b"{broken", b'{"request_id": "x"}']
    assert [letter.reason for letter in desk.letters] == ["invalid_json", "invalid_message"]


async def test_a_sample_that_a_database_could_not_name_is_passed_over(desk: Desk, medium: Medium) -> None:
    strange = sample(1).model_copy(update={"request_id": "r\0"})
    await desk.publish(SAMPLES, strange, sample(2))
    await medium.until(lambda: bool(desk.storage.samples))
    assert [one.request_id for one in desk.storage.samples] == ["r2"]
    assert desk.letters == []


async def test_intensities_are_followed_with_their_whole_window(desk: Desk, medium: Medium) -> None:
    desk.watched.opportunity.evaluated(NOW - timedelta(hours=24))
    await desk.publish(CARBON_INTENSITY, grid(NOW, 400, 420, 300, 200, 220))
    await medium.until(lambda: desk.watched.occasion is not None)
    assert (desk.watched.occasion.trigger, desk.watched.occasion.at) == ("local_minimum", NOW)


async def test_a_stale_intensity_is_no_reason_to_evaluate(desk: Desk, medium: Medium) -> None:
    desk.watched.opportunity.evaluated(NOW - timedelta(hours=24))
    await desk.publish(CARBON_INTENSITY, grid(NOW - timedelta(hours=4), 400, 420, 300, 200, 220))
    await medium.until(lambda: desk.watched.opportunity.adjusted() is not None)
    assert desk.watched.occasion is None


async def test_the_energy_of_evaluations_is_noted_and_that_of_requests_is_not(desk: Desk, medium: Medium) -> None:
    for purpose in ("request", "evaluation"):
        footprint = Footprint(
            request_id=purpose, purpose=purpose, model=MODEL, group="qa", pool="p", level="L0", zone=ZONE,
            endpoint="e0", started_at=NOW, finished_at=NOW, processing_s=1.0, completion_tokens=10, energy_j=60.0,
            embodied_g=0.0,
        )  # fmt: skip
        await desk.publish(FOOTPRINTS, footprint)
    await medium.until(lambda: bool(desk.storage.energy))
    assert desk.storage.energy == {("evaluation", "p"): Energy(60.0, 10)}


@pytest.mark.parametrize("medium", ["kafka"], indirect=True)
@pytest.mark.integration
async def test_samples_that_came_while_the_database_was_away_are_read_again(medium: Medium) -> None:
    desk = Desk(medium.kafka)
    desk.storage.away = 3
    async with medium.running(desk.broker):
        await desk.publish(SAMPLES, *(sample(number) for number in range(5)))
        await medium.until(lambda: {one.request_id for one in desk.storage.samples} == {f"r{n}" for n in range(5)})
        assert desk.storage.away == 0
        assert desk.letters == []


def test_a_fleet_without_a_judge_is_a_mistake_that_is_named() -> None:
    with pytest.raises(PlanError, match=r"no \[judge\].*SPROUT_EVALUATOR_JUDGE=openai"):
        build_app(settings=EvaluatorSettings(), fleet=FLEET.model_copy(update={"judge": None}))
