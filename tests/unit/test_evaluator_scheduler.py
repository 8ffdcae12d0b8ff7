"""When the scheduler starts evaluations, and what it does after a failure."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from services.evaluator.budget import MIN_PROMPTS, EvaluationSize
from services.evaluator.evaluation import EvaluationResult, EvaluationTrigger
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.scheduler import Scheduler
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.store import InterruptedEvaluation
from shared.carbon import LatestIntensities
from shared.fleet import Switchback
from shared.runtime.clock import ManualClock
from shared.runtime.database import DatabaseStatus
from shared.runtime.health import Health
from shared.switchback import SwitchbackSchedule
from tests.support.deadlines import until
from tests.support.evaluator import intensities
from tests.support.router import ZONE

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)
OFF = Switchback(share=0)
LOCAL_MINIMUM = (400, 420, 300, 200, 220)


class FakeStore:
    """Samples, evaluations and groups of one model in memory."""

    def __init__(self, *, last: datetime | None, interrupted: InterruptedEvaluation | None, samples: int) -> None:
        self.last = last
        self.interrupted = interrupted
        self.samples = samples
        self.checked = asyncio.Event()

    async def last_evaluation(self, model: str) -> datetime | None:
        return self.last

    async def recover_interrupted(self, model: str) -> InterruptedEvaluation | None:
        return self.interrupted

    async def count(self, model: str) -> int:
        self.checked.set()
        return self.samples

    async def delete_expired(self, *, now: datetime) -> None:
        return


class Fixture:
    """A scheduler of one model, and a runner that records triggers and returns prepared results."""

    def __init__(self, *, last=None, interrupted=None, samples=100, results=(), switchback=OFF, **settings) -> None:
        self.triggers: list[EvaluationTrigger] = []
        self.results = list(results)
        self.sizes: list[EvaluationSize] = []
        self.started = asyncio.Event()
        self.reachable = True
        self.store = FakeStore(last=last, interrupted=interrupted, samples=samples)
        self.registry = CollectorRegistry()
        self.scheduler = Scheduler(
            {"m": ZONE},
            settings=EvaluatorSettings(**{"variant": "urgency", **settings}),
            intensities=LatestIntensities(),
            switchback=SwitchbackSchedule(switchback),
            clock=ManualClock(NOW),
            metrics=EvaluatorMetrics(self.registry),
        )
        self.state = self.scheduler.states["m"]

    async def publish_unpublished(self) -> None:
        return

    async def size(self, model: str, reason: str) -> EvaluationSize:
        return self.sizes.pop(0) if self.sizes else EvaluationSize(150, "maximum")

    async def evaluate(self, model: str, trigger: EvaluationTrigger) -> EvaluationResult:
        self.triggers.append(trigger)
        self.started.set()
        return self.results.pop(0) if self.results else EvaluationResult("finished")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        runner = SimpleNamespace(
            samples=self.store,
            store=self.store,
            group_store=self.store,
            status=DatabaseStatus(),
            evaluate=self.evaluate,
            size=self.size,
            publish_unpublished=self.publish_unpublished,
        )
        health = Health()
        await self.scheduler.restore(self.store)  # type: ignore[arg-type]
        health.spawn(
            "schedule",
            self.scheduler.run(runner, health, is_reachable=lambda _: self.reachable),  # type: ignore[arg-type]
        )
        try:
            yield
        finally:
            await health.cancel_background()

    async def evaluations(self, count: int) -> list[EvaluationTrigger]:
        """Wait for so many evaluations."""
        async with asyncio.timeout(10):
            while len(self.triggers) < count:
                self.started.clear()
                await self.started.wait()
        return self.triggers


async def test_the_first_evaluation_starts_with_enough_samples():
    fixture = Fixture(samples=60)
    async with fixture.running():
        assert await fixture.evaluations(1) == [EvaluationTrigger("first", NOW)]


async def test_a_local_minimum_starts_an_evaluation_with_its_intensity():
    fixture = Fixture(last=NOW - timedelta(hours=24))
    async with fixture.running():
        fixture.scheduler.on_intensity(intensities(NOW, *LOCAL_MINIMUM))
        assert await fixture.evaluations(1) == [EvaluationTrigger("local_minimum", NOW, g_per_kwh=220.0)]


async def test_an_interrupted_evaluation_is_repeated_unless_it_is_too_old():
    recent = InterruptedEvaluation("local_minimum", NOW - timedelta(hours=2))
    fixture = Fixture(last=NOW - timedelta(hours=30), interrupted=recent)
    async with fixture.running():
        assert await fixture.evaluations(1) == [EvaluationTrigger("local_minimum", recent.evaluated_at)]
    old = Fixture(last=NOW - timedelta(hours=30), interrupted=InterruptedEvaluation("first", NOW - timedelta(hours=4)))
    async with old.running():
        assert old.scheduler.request("m")
        assert [one.reason for one in await old.evaluations(1)] == ["requested"]


async def test_a_failed_evaluation_is_repeated_with_the_same_trigger():
    fixture = Fixture(results=[EvaluationResult("failed")] * 2, retry_pause_s=0.001)
    async with fixture.running():
        first, *repeated = await fixture.evaluations(3)
        assert repeated == [first, first]

    def evaluations(outcome: str) -> float | None:
        labels = {"model": "m", "trigger": "first", "outcome": outcome}
        return fixture.registry.get_sample_value("sprout_evaluator_evaluations_total", labels)

    assert evaluations("failed") == 2


async def test_after_an_evaluation_of_another_process_its_time_counts():
    last = NOW - timedelta(hours=1)
    fixture = Fixture(results=[EvaluationResult("claimed_by_other", last)], retry_pause_s=0.001)
    async with fixture.running():
        await fixture.evaluations(1)
        assert fixture.scheduler.request("m")
        await fixture.evaluations(2)
        assert [one.reason for one in fixture.triggers] == ["first", "requested"]


async def test_a_request_waits_while_another_process_evaluates():
    fixture = Fixture(last=NOW, results=[EvaluationResult("claimed_by_other")] * 2, retry_pause_s=0.001)
    async with fixture.running():
        assert fixture.scheduler.request("m") == "requested"
        assert [one.reason for one in await fixture.evaluations(3)] == ["requested"] * 3
    assert fixture.state.pending is None


async def test_a_request_says_what_it_waits_for():
    fixture = Fixture(last=NOW)
    assert fixture.scheduler.request("m") == "requested"
    assert fixture.scheduler.request("m") == "requested before, and not begun yet"
    fixture.state.pending = None
    fixture.state.running = asyncio.create_task(asyncio.sleep(0))
    assert fixture.scheduler.request("m") == "requested; begins after the evaluation that is running"
    await fixture.state.running


@pytest.mark.parametrize("missing", ["samples", "servers"])
async def test_without_samples_or_servers_a_request_stays_pending(missing):
    fixture = Fixture(samples=0 if missing == "samples" else 100, last=NOW)
    fixture.reachable = missing != "servers"
    async with fixture.running():
        assert fixture.scheduler.request("m")
        with pytest.raises(KeyError):
            fixture.scheduler.request("unknown")
        for _ in range(2):  # the second check begins after the first one has ended
            fixture.store.checked.clear()
            fixture.scheduler.on_new_samples()
            await fixture.store.checked.wait()
        assert (fixture.triggers, fixture.state.pending.reason) == ([], "requested")
        fixture.store.samples, fixture.reachable = 100, True
        fixture.scheduler.on_new_samples()
        assert [one.reason for one in await fixture.evaluations(1)] == ["requested"]


async def test_no_evaluation_starts_in_a_reference_block_or_shortly_before_one():
    switchback = Switchback(share=0.5, block_s=1_800, washout_s=60)
    schedule = SwitchbackSchedule(switchback)
    fixture = Fixture(switchback=switchback, last=NOW, reference_block_margin_s=600)
    clock = fixture.scheduler._clock

    def postponed() -> float | None:
        labels = {"model": "m", "reason": "reference_block"}
        return fixture.registry.get_sample_value("sprout_evaluator_postponed", labels)

    while schedule.is_reference(clock.now()) or not schedule.is_reference(clock.now() + timedelta(seconds=1_800)):
        clock.advance(timedelta(seconds=1_800))
    start = schedule.next_change(clock.now())
    clock.advance(start - clock.now() - timedelta(seconds=500))
    async with fixture.running():
        assert fixture.scheduler.request("m")
        await until(postponed)
        clock.advance(timedelta(seconds=600))
        assert schedule.is_reference(clock.now())
        fixture.store.checked.clear()
        fixture.scheduler.on_new_samples()
        await fixture.store.checked.wait()
        assert (fixture.triggers, postponed()) == ([], 1)
        while schedule.is_reference(clock.now()) or (
            schedule.next_change(clock.now()) - clock.now() <= timedelta(seconds=600)
        ):
            clock.advance(timedelta(seconds=300))
        fixture.scheduler.on_new_samples()
        assert [one.reason for one in await fixture.evaluations(1)] == ["requested"]
        assert postponed() == 0


@pytest.mark.parametrize("limit", ["carbon_ceiling", "not_worthwhile"])
async def test_an_evaluation_waits_while_too_few_prompts_can_be_paid_for(limit):
    fixture = Fixture(last=NOW - timedelta(hours=24))
    fixture.sizes = [EvaluationSize(MIN_PROMPTS - 1, limit), EvaluationSize(MIN_PROMPTS, limit)]
    async with fixture.running():
        fixture.scheduler.on_intensity(intensities(NOW, *LOCAL_MINIMUM))
        async with asyncio.timeout(10):
            while fixture.state.postponed != limit:  # noqa: ASYNC110 - a state has no event
                await asyncio.sleep(0.01)
        assert fixture.triggers == []
        labels = {"model": "m", "reason": limit}
        assert fixture.registry.get_sample_value("sprout_evaluator_postponed", labels) == 1
        fixture.scheduler.on_new_samples()
        assert await fixture.evaluations(1) == [EvaluationTrigger("local_minimum", NOW, g_per_kwh=220.0)]
        assert fixture.registry.get_sample_value("sprout_evaluator_postponed", labels) == 0
