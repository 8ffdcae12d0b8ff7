"""Wires the evaluator: subscribers, stores, model servers, judge, scheduler."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker
from prometheus_client import CollectorRegistry

from services import SERVICES
from services.evaluator.budget import PolicyMemory
from services.evaluator.correctness import CORRECTNESS, CorrectnessMetric
from services.evaluator.evaluation import EvaluationRunner, Publishers
from services.evaluator.generate import ModelCalls
from services.evaluator.group_store import GroupStore
from services.evaluator.judge_clients import judge_pool, open_judge
from services.evaluator.judges import Judge
from services.evaluator.learning import GroupLearner
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.plan import PlanError, candidates_of
from services.evaluator.preference import NOT_WORSE, NotWorseMetric, PreferenceMetric
from services.evaluator.quality import QualityMetric
from services.evaluator.requests import evaluation_endpoint
from services.evaluator.samples import InputConsumer, SampleStore
from services.evaluator.scheduler import Scheduler
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.store import EvaluationStore
from shared.carbon import LatestIntensities
from shared.fleet import Fleet, FleetError, load_fleet
from shared.inference.attempts import Attempts
from shared.inference.base import StreamTimeouts
from shared.inference.chat import ChatTemplateError
from shared.inference.load_reports import LoadReporter, subscribe_capacity
from shared.inference.pools import Pools
from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.leader import join_leadership
from shared.kafka.subscribe import subscribe_batches, subscribe_compacted
from shared.messages import CarbonIntensity, Footprint, Policy, Sample
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseMetrics, DatabaseStatus, DatabaseUnavailableError, migrate, open_pool
from shared.runtime.health import Health
from shared.runtime.service import build_service, run_service
from shared.runtime.settings import DatabaseSettings, FleetSettings, KafkaSettings
from shared.switchback import SwitchbackSchedule
from shared.topics import (
    CAPACITY,
    CARBON_INTENSITY,
    DEAD_LETTERS,
    FOOTPRINTS,
    LOAD_REPORTS,
    POLICIES,
    POWER_CURVES,
    PROMPT_GROUPS,
    QUALITY,
    SAMPLES,
    USAGE,
)

NAME = "evaluator"
DESCRIPTION = SERVICES[NAME].description

STANDBY = "this copy stands by: ask the leader, whose /ready says so, or try again in a moment"
"""Answer of a standby to a request for an evaluation."""


class Evaluator:
    """All parts of one evaluator process, not yet connected."""

    def __init__(
        self,
        broker: KafkaBroker,
        dead_letters: DeadLetterPublisher,
        *,
        kafka: KafkaSettings,
        database: DatabaseSettings,
        settings: EvaluatorSettings,
        fleet: Fleet,
        clock: Clock,
        registry: CollectorRegistry,
    ) -> None:
        self.settings = settings
        self.metrics = EvaluatorMetrics(registry)
        self.database_status = DatabaseStatus()
        self._database = database
        self._database_metrics = DatabaseMetrics(registry)
        self._fleet = fleet
        self._clock = clock
        self._candidates = {model.name: candidates_of(fleet, model.name) for model in fleet.models}
        self._judge_pool = judge_pool(fleet, settings)
        self._intensities = LatestIntensities()
        self.leadership = join_leadership(broker, kafka, service=NAME, registry=registry)
        self._publishers = Publishers(broker, kafka, self.leadership)
        self._policies = PolicyMemory()
        self._pools = Pools(
            fleet,
            clock=clock,
            circuit_breaker=settings,
            on_failure=lambda endpoint: self.metrics.endpoint_failures.labels(endpoint).inc(),
            check_interval_s=settings.endpoint_check_interval_s,
            check_timeout_s=settings.endpoint_check_timeout_s,
            with_judge=settings.judge == "fleet",
        )
        self._load_reporter = LoadReporter(
            broker,
            self._pools,
            kafka=kafka,
            clock=clock,
            service="evaluator",
            interval_s=settings.load_report_interval_s,
        )
        self._calls = ModelCalls(
            fleet=fleet,
            pools=self._pools,
            attempts=Attempts(
                clock=clock,
                retry=settings,
                on_retry=lambda pool: self.metrics.retries.labels(pool).inc(),
                stream_timeouts=StreamTimeouts(settings.first_chunk_timeout_s, settings.first_chunk_timeout_s),
                stream_always=settings.stream,
            ),
            clock=clock,
            publish_usage=self._publishers.usage,
            concurrency=settings.concurrency,
            timeout_s=settings.call_timeout_s,
        )
        self.scheduler = Scheduler(
            {model.name: settings.zone or fleet.pools_of(model.name)[0].zone for model in fleet.models},
            settings=settings,
            intensities=self._intensities,
            switchback=SwitchbackSchedule(fleet.switchback),
            clock=clock,
            metrics=self.metrics,
        )
        self.inputs = InputConsumer(
            self._candidates,
            clock=clock,
            metrics=self.metrics,
            on_new_samples=self.scheduler.on_new_samples,
            retry_pause_s=settings.database_retry_pause_s,
        )
        self._broker_started = asyncio.Event()
        self._subscribe(broker, dead_letters, kafka)
        subscribe_capacity(broker, dead_letters, self._pools, kafka=kafka)

    @asynccontextmanager
    async def running(self, health: Health) -> AsyncIterator[None]:
        """Connect to the database and start background tasks; the broker starts inside this context."""
        async with AsyncExitStack() as stack:
            pool = await open_pool(self._database, schema=NAME, metrics=self._database_metrics)
            stack.push_async_callback(pool.close)
            await migrate(pool, schema=NAME, package="services.evaluator.migrations")
            stack.push_async_callback(self._pools.close)
            settings, status = self.settings, self.database_status
            samples = SampleStore(
                pool,
                status,
                samples_per_group=settings.samples_per_group,
                samples_per_model=settings.samples_per_model,
                max_age=timedelta(hours=settings.max_sample_age_h),
                draw_key=settings.draw_key_bytes,
            )
            store = EvaluationStore(pool, status)
            directives = self._fleet.directive_hashes
            max_judged_age = timedelta(hours=settings.max_judged_age_h)
            group_store = GroupStore(pool, status, max_judged_age=max_judged_age, directives=directives)
            self.inputs.connect(samples, store)
            await self.scheduler.restore(store)
            judge = await stack.enter_async_context(open_judge(self._fleet, settings, self._calls))
            runner = EvaluationRunner(
                samples=samples,
                store=store,
                group_store=group_store,
                status=status,
                learner=GroupLearner(group_store, settings, directives=directives),
                publishers=self._publishers,
                calls=self._calls,
                quality_metrics=self._quality_metrics(judge),
                candidates=self._candidates,
                intensities=self._intensities,
                policies=self._policies,
                fleet=self._fleet,
                clock=self._clock,
                settings=settings,
                metrics=self.metrics,
            )
            health.spawn("check PostgreSQL", status.check_forever(self._database))
            health.spawn("check endpoints", self._pools.watch())
            health.spawn("renew the lease", self.leadership.renew_forever())
            health.spawn("evaluate", self.leadership.lead(partial(self._evaluate, runner, health)))
            health.spawn("report load", self._report_load())
            # Background tasks use what the stack closes, so they end first.
            stack.push_async_callback(health.cancel_background)
            yield

    async def on_broker_started(self) -> None:
        """Allow evaluations, which publish their calls."""
        self._broker_started.set()

    async def obstacle(self, model: str) -> str | None:  # noqa: ARG002 - one copy evaluates all models
        """Why this process cannot evaluate a model now: another copy leads. None: it can.

        Raises:
            DatabaseUnavailableError: PostgreSQL does not answer, or is not connected yet.
        """
        if (problem := self.database_status.problem()) is not None:
            raise DatabaseUnavailableError(problem)
        return None if self.leadership.is_leader else STANDBY

    async def _evaluate(self, runner: EvaluationRunner, health: Health) -> None:
        await self._broker_started.wait()
        await runner.status.retry(lambda: runner.learner.check_directives(self._candidates))
        await runner.status.retry(lambda: runner.learner.withdraw_if_disabled(self._candidates, self._clock.now()))
        await self.scheduler.run(runner, health, is_reachable=self._is_reachable)

    async def _report_load(self) -> None:
        await self._broker_started.wait()
        await self._load_reporter.run()

    async def publish_final_load_report(self) -> None:
        """Report that nothing is running any more; call it when all evaluations have ended."""
        await self._load_reporter.finish()

    def _quality_metrics(self, judge: Judge) -> tuple[QualityMetric, ...]:
        preference = PreferenceMetric(
            judge, self.metrics, rubric=self.settings.rubric, draw_key=self.settings.draw_key_bytes
        )
        settings, metrics = self.settings, list[QualityMetric]([preference])

        def asks_about(metric: str, mode: str) -> Callable[[str], bool]:
            return lambda model: mode == "always" or (mode == "bounded" and self._policies.bounds(model, metric))

        if settings.not_worse != "off":
            metrics.append(NotWorseMetric(preference, asks_judge=asks_about(NOT_WORSE, settings.not_worse)))
        if settings.correctness != "off":
            metrics.append(CorrectnessMetric(judge, asks_judge=asks_about(CORRECTNESS, settings.correctness)))
        return tuple(metrics)

    def _is_reachable(self, model: str) -> bool:
        """Whether every pool that an evaluation of the model needs has a reachable endpoint."""
        needed = {pool for candidate in self._candidates[model] for pool in candidate.pools}
        if self._judge_pool is not None:
            needed.add(self._judge_pool)
        return all(self._pools[pool].reachable for pool in needed)

    def _subscribe(self, broker: KafkaBroker, dead_letters: DeadLetterPublisher, kafka: KafkaSettings) -> None:
        settings = self.settings
        options: dict[str, Any] = {
            "group": NAME,
            "max_records": settings.fetch_max_records,
            "poll_ms": settings.poll_ms,
            "session_timeout_ms": int(settings.session_timeout_s * 1_000),
            "heartbeat_interval_ms": int(settings.session_timeout_s * 1_000 / 4),
        }

        @subscribe_batches(broker, kafka, dead_letters, SAMPLES, **options)
        async def on_samples(samples: list[Sample]) -> None:
            await self.inputs.add_samples(samples)

        @subscribe_batches(broker, kafka, dead_letters, FOOTPRINTS, **options)
        async def on_footprints(footprints: list[Footprint]) -> None:
            await self.inputs.add_footprints(footprints)

        @subscribe_compacted(broker, kafka, dead_letters, POLICIES)
        async def on_policies(policies: list[Policy]) -> None:
            for policy in policies:
                self._policies.update(policy)

        @subscribe_compacted(broker, kafka, dead_letters, CARBON_INTENSITY)
        async def on_intensities(intensities: list[CarbonIntensity]) -> None:
            for intensity in intensities:
                self.scheduler.on_intensity(intensity)


def build_app(
    *,
    kafka: KafkaSettings | None = None,
    database: DatabaseSettings | None = None,
    settings: EvaluatorSettings | None = None,
    fleet: Fleet | None = None,
    clock: Clock | None = None,
) -> AsgiFastStream:
    """Build the evaluator without connecting; arguments that are None are read from the environment.

    Raises:
        FleetError, ChatTemplateError, PlanError, ValidationError: the configuration is invalid; the text says why.
    """
    kafka = kafka or KafkaSettings()
    settings = settings or EvaluatorSettings()
    fleet = fleet or load_fleet(FleetSettings().file)
    clock = clock or Clock.from_environment()
    registry = CollectorRegistry()
    health = Health()
    broker, dead_letters = build_broker(kafka, service=NAME, clock=clock, registry=registry, linger_ms=5)
    evaluator = Evaluator(
        broker,
        dead_letters,
        kafka=kafka,
        database=database or DatabaseSettings(),
        settings=settings,
        fleet=fleet,
        clock=clock,
        registry=registry,
    )
    health.add_check("database", evaluator.database_status.problem)
    health.role = evaluator.leadership.role
    app = build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(
            SAMPLES,
            CARBON_INTENSITY,
            FOOTPRINTS,
            USAGE,
            QUALITY,
            PROMPT_GROUPS,
            POLICIES,
            POWER_CURVES,
            CAPACITY,
            LOAD_REPORTS,
            DEAD_LETTERS,
        ),
        registry=registry,
        health=health,
        lifespan=lambda: evaluator.running(health),
    )
    app.after_startup(evaluator.on_broker_started)
    # Before the broker stops: a running evaluation could no longer publish.
    app.on_shutdown(health.cancel_background)
    app.on_shutdown(evaluator.publish_final_load_report)
    app.mount(
        "/evaluations",
        evaluation_endpoint(evaluator.scheduler, token=settings.http_token, obstacle=evaluator.obstacle),
    )
    return app


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    run_service(build_app, name=NAME, configuration_errors=(FleetError, ChatTemplateError, PlanError))
