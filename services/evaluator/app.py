"""Wires the evaluator together; everything it decides is decided elsewhere."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta

from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker
from faststream.kafka.subscriber.usecase import BatchSubscriber
from prometheus_client import CollectorRegistry

from services.evaluator.calls import ModelCalls
from services.evaluator.delivery import Delivery
from services.evaluator.evaluation import Evaluation, GroupOf
from services.evaluator.grid import Grid
from services.evaluator.group_storage import GroupStorage
from services.evaluator.groups import Groups
from services.evaluator.intake import Intake
from services.evaluator.judging import Judge, OpenAIJudge, TritonJudge
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.plan import PlanError, contestants
from services.evaluator.requests import requests
from services.evaluator.session import Session
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.storage import Storage
from services.evaluator.watch import Watch
from shared.fleet import Fleet, FleetError, load_fleet
from shared.inference.attempts import Attempts
from shared.inference.base import StreamTimeouts
from shared.inference.chat import ChatTemplateError
from shared.inference.pool import Pools
from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import DeadLetterPublisher, batch_decoder
from shared.kafka.subscribe import subscribe_compacted
from shared.messages import CarbonIntensity, Footprint, Sample
from shared.runtime.clock import Clock
from shared.runtime.database import migrate, open_pool
from shared.runtime.health import Health
from shared.runtime.service import build_service, run_service
from shared.runtime.settings import DatabaseSettings, FleetSettings, KafkaSettings
from shared.topics import (
    CARBON_INTENSITY,
    DEAD_LETTERS,
    FOOTPRINTS,
    PROMPT_GROUPS,
    QUALITY,
    SAMPLES,
    USAGE,
    TopicSpec,
)

NAME = "evaluator"
DESCRIPTION = "Judges, when the grid is clean, how good the answers of every option are."


class Evaluator:
    """The parts of one evaluator, put together and not yet connected."""

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
        self._database = database
        self._fleet = fleet
        self._clock = clock
        self._contestants = {model.name: contestants(fleet, model.name) for model in fleet.models}
        self._grid = Grid(max_age_s=settings.max_intensity_age_s)
        self._delivery = Delivery(broker, kafka=kafka)
        self._pools = Pools(
            fleet,
            clock=clock,
            circuit_breaker=settings.cool_down_rules,
            on_failure=lambda endpoint: self.metrics.endpoint_failures.labels(endpoint).inc(),
            check_interval_s=settings.endpoint_check_interval_s,
            check_timeout_s=settings.endpoint_check_timeout_s,
            with_judge=settings.judge == "fleet",
        )
        self._calls = ModelCalls(
            fleet=fleet,
            pools=self._pools,
            attempts=Attempts(
                clock=clock,
                retry=settings.retry_rules,
                on_retry=lambda pool: self.metrics.retries.labels(pool).inc(),
                stream_timeouts=StreamTimeouts(settings.first_chunk_timeout_s, settings.first_chunk_timeout_s),
                stream_always=settings.stream,
            ),
            clock=clock,
            report=self._delivery.usage,
            concurrency=settings.concurrency,
            timeout_s=settings.call_timeout_s,
        )
        self._judge_pool = None if fleet.judge is None or settings.judge != "fleet" else fleet.judge.pool
        if settings.judge == "fleet" and self._judge_pool is None:
            raise PlanError(
                "the fleet file has no [judge]: name a pool there, or set SPROUT_EVALUATOR_JUDGE=openai with a URL"
            )
        self.watch = Watch(
            {model.name: settings.zone or fleet.pools_of(model.name)[0].zone for model in fleet.models},
            rules=settings.opportunity_rules,
            threshold_factor=settings.threshold_factor,
            max_intensity_age_s=settings.max_intensity_age_s,
            min_samples=settings.min_samples,
            retry_pause_s=settings.retry_pause_s,
            grid=self._grid,
            clock=clock,
            metrics=self.metrics,
        )
        self.intake = Intake(self._contestants, clock=clock, metrics=self.metrics, tell=self.watch.tell)
        self._broker_started = asyncio.Event()
        self._subscribe(broker, dead_letters, kafka)

    @asynccontextmanager
    async def running(self, health: Health) -> AsyncIterator[None]:
        """What is open while the subscribers run, and what runs beside them."""
        async with AsyncExitStack() as stack:
            pool = await open_pool(self._database, schema=NAME)
            stack.push_async_callback(pool.close)
            await migrate(pool, schema=NAME, package="services.evaluator.migrations")
            stack.push_async_callback(self._pools.close)
            storage = self.intake.storage = Storage(
                pool,
                capacity=self.settings.samples_per_group,
                max_age=timedelta(hours=self.settings.max_sample_age_h),
                max_judged_age=timedelta(hours=self.settings.max_judged_age_h),
            )
            await self.watch.restore(storage)
            group_storage = GroupStorage(pool, storage.watched)
            session = self._session(storage, group_storage, await self._open_judge(stack))
            health.spawn("look after endpoints", self._pools.watch())
            health.spawn("evaluate", self._evaluate(storage, session, health))
            # Background work uses what is closed next.
            stack.push_async_callback(health.cancel_background)
            yield

    def begin(self) -> None:
        """The broker has started: evaluations may publish."""
        self._broker_started.set()

    def _session(self, storage: Storage, group_storage: GroupStorage, judge: Judge) -> Session:
        def begin(evaluation_id: str, model: str, at: datetime, group_of: GroupOf) -> Evaluation:
            return Evaluation(
                evaluation_id,
                model,
                self._contestants[model],
                at=at,
                group_of=group_of,
                calls=self._calls,
                judge=judge,
                metrics=self.metrics,
                max_tokens=self.settings.max_tokens,
                give_up_after=self.settings.give_up_after,
            )

        return Session(
            storage=storage,
            group_storage=group_storage,
            groups=Groups(group_storage, rules=self.settings.learning_rules, levels=self._fleet.levels),
            delivery=self._delivery,
            begin=begin,
            possible=self._reachable,
            grid=self._grid,
            fleet=self._fleet,
            clock=self._clock,
            prompts=self.settings.prompts_per_evaluation,
            min_per_group=self.settings.min_prompts_per_group,
        )

    async def _open_judge(self, stack: AsyncExitStack) -> Judge:
        settings = self.settings
        if self._judge_pool is not None:
            return TritonJudge(self._calls, pool=self._judge_pool, max_tokens=settings.judge_max_tokens)
        judge = OpenAIJudge(
            str(settings.judge_url),
            model=settings.judge_model or "",
            api_key=settings.judge_api_key,
            timeout_s=settings.judge_timeout_s,
            concurrency=settings.concurrency,
            max_tokens=settings.judge_max_tokens,
        )
        stack.push_async_callback(judge.close)
        return judge

    def _reachable(self, model: str) -> bool:
        """Whether every pool that an evaluation of the model needs has a server that answers."""
        needed = {pool for contestant in self._contestants[model] for pool in contestant.pools}
        if self._judge_pool is not None:
            needed.add(self._judge_pool)
        return all(self._pools[pool].reachable for pool in needed)

    async def _evaluate(self, storage: Storage, session: Session, health: Health) -> None:
        await self._broker_started.wait()
        await session.groups.give_up(self._contestants, self._clock.now())
        await session.publish_results()
        await self.watch.run(storage, session, health)

    def _subscribe(self, broker: KafkaBroker, dead_letters: DeadLetterPublisher, kafka: KafkaSettings) -> None:
        settings = self.settings

        def shared_out(spec: TopicSpec, description: str) -> BatchSubscriber:
            """Of several evaluators one reads each record."""
            return broker.subscriber(
                kafka.topic(spec),
                decoder=batch_decoder(spec.message, dead_letters),
                title=spec.name,
                description=description,
                # A record's header `reply_to` names a topic that FastStream would answer to.
                no_reply=True,
                batch=True,
                group_id=kafka.group(NAME),
                max_records=settings.fetch_max_records,
                batch_timeout_ms=settings.poll_ms,
                session_timeout_ms=int(settings.session_timeout_s * 1_000),
                heartbeat_interval_ms=int(settings.session_timeout_s * 1_000 / 4),
                auto_offset_reset="earliest",
            )

        @shared_out(SAMPLES, "Prompts kept aside for evaluations")
        async def on_samples(samples: list[Sample]) -> None:
            await self.intake.keep(samples)

        @shared_out(FOOTPRINTS, "What earlier evaluations took")
        async def on_footprints(footprints: list[Footprint]) -> None:
            await self.intake.note(footprints)

        @subscribe_compacted(broker, kafka, dead_letters, CARBON_INTENSITY)
        async def on_intensities(news: list[CarbonIntensity]) -> None:
            for intensity in news:
                self.watch.learn(intensity)


def build_app(
    *,
    kafka: KafkaSettings | None = None,
    database: DatabaseSettings | None = None,
    settings: EvaluatorSettings | None = None,
    fleet: Fleet | None = None,
    clock: Clock | None = None,
) -> AsgiFastStream:
    """The evaluator, without connecting; what is not given is read from the environment.

    Raises:
        FleetError, ChatTemplateError, PlanError, ValidationError: the configuration does not do; the message says why.
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
    health.add_check("database", evaluator.intake.database_problem)
    app = build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(SAMPLES, CARBON_INTENSITY, FOOTPRINTS, USAGE, QUALITY, PROMPT_GROUPS, DEAD_LETTERS),
        registry=registry,
        health=health,
        lifespan=lambda: evaluator.running(health),
    )
    app.after_startup(evaluator.begin)
    # Before the broker stops, so that nothing is evaluated that could not be published.
    app.on_shutdown(health.cancel_background)
    app.mount("/evaluations", requests(evaluator.watch))
    return app


def main() -> None:
    """Run until told to stop."""
    run_service(build_app, name=NAME, configuration_errors=(FleetError, ChatTemplateError, PlanError))
