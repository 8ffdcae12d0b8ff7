"""Wires the router together; everything it decides is decided elsewhere."""

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker
from faststream.middlewares import AckPolicy
from prometheus_client import CollectorRegistry

from services.router.backlog import Backlog
from services.router.delivery import Delivery
from services.router.fetching import feed
from services.router.gate import Gate
from services.router.intake import Intake
from services.router.knowledge import Knowledge
from services.router.metrics import RouterMetrics
from services.router.recovery import Recovery
from services.router.serving import Serving
from services.router.settings import RouterSettings
from services.router.tracing import Tracing
from shared.fleet import Fleet, FleetError, load_fleet
from shared.inference.attempts import Attempts
from shared.inference.chat import ChatTemplateError
from shared.inference.pool import Pools
from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.subscribe import Subscriber, read_to_end, subscribe_compacted
from shared.messages import CarbonIntensity, GenerationRequest, Policy, PromptGrouping
from shared.runtime.clock import Clock
from shared.runtime.health import Health
from shared.runtime.logs import get_logger
from shared.runtime.service import VERSION, build_service, run_service
from shared.runtime.settings import FleetSettings, KafkaSettings
from shared.runtime.tracing import TelemetryError, tracer_provider
from shared.topics import (
    CARBON_INTENSITY,
    DEAD_LETTERS,
    POLICIES,
    PROMPT_GROUPS,
    REQUESTS,
    RESPONSE_CHUNKS,
    RESPONSES,
    SAMPLES,
)

NAME = "router"
DESCRIPTION = "Draws a generation directive for every request, has a model answer it, publishes the answer."

LONGEST_COMMIT_S = 60.0
"""Wall seconds that a commit may take before the router says that it is not ready: one try may take 40."""

LONGEST_HEARTBEAT_S = 3.0
"""Wall seconds between two heartbeats: so late may a router hear of a rebalance, and the whole group waits for it."""

_log = get_logger(__name__)


class Router:
    """The parts of one router, put together and not yet connected."""

    def __init__(
        self,
        broker: KafkaBroker,
        dead_letters: DeadLetterPublisher,
        *,
        kafka: KafkaSettings,
        settings: RouterSettings,
        fleet: Fleet,
        clock: Clock,
        registry: CollectorRegistry,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self._tracing = tracing
        self.metrics = RouterMetrics(registry)
        self.knowledge = Knowledge(fleet, max_intensity_age_s=settings.max_intensity_age_s)
        self.pools = Pools(
            fleet,
            clock=clock,
            circuit_breaker=settings.cool_down_rules,
            on_failure=lambda endpoint: self.metrics.endpoint_failures.labels(endpoint).inc(),
            check_interval_s=settings.endpoint_check_interval_s,
            check_timeout_s=settings.endpoint_check_timeout_s,
        )
        serving = Serving(
            fleet=fleet,
            clock=clock,
            limits=settings.limits,
            knowledge=self.knowledge,
            pools=self.pools,
            attempts=Attempts(
                clock=clock,
                retry=settings.retry_rules,
                on_retry=lambda pool: self.metrics.retries.labels(pool).inc(),
                stream_timeouts=settings.stream_timeouts,
                stream_always=settings.stream_always,
            ),
            delivery=Delivery(broker, dead_letters, kafka=kafka, metrics=self.metrics, tracing=tracing),
            metrics=self.metrics,
            control_sequences=settings.control_sequences,
            chunk_interval_s=settings.chunk_interval_ms / 1_000,
            sample_share=settings.sample_share,
            tracing=tracing,
        )
        self.intake = Intake(
            serving.serve,
            Recovery(kafka, kafka.group(NAME), (kafka.topic(RESPONSES), kafka.topic(DEAD_LETTERS))),
            Gate(session_timeout_s=settings.session_timeout_s),
            max_in_flight=settings.max_in_flight,
            rebalance_grace_s=settings.rebalance_grace_s,
            metrics=self.metrics,
            room=self.pools.wait_for_capacity,
        )
        self._state_topics = self._subscribe_state(broker, dead_letters, kafka)
        self._backlog = self._subscribe_requests(broker, kafka)
        self._watch_ages(fleet, clock)

    @asynccontextmanager
    async def running(self, health: Health) -> AsyncIterator[None]:
        """What runs beside the subscribers."""
        self.intake.hold()
        health.spawn("learn what is in force", self._learn_first())
        health.spawn("look after endpoints", self.pools.watch())
        health.spawn("watch the backlog", self._backlog.watch())
        commits = health.expect_progress("commits", within_s=LONGEST_COMMIT_S + self.settings.commit_interval_s)
        health.spawn(
            "commit offsets", self.intake.commit_forever(self.settings.commit_interval_s, on_round=commits.made)
        )
        try:
            yield
        finally:
            await self.pools.close()
            if self._tracing is not None:
                await self._tracing.close()

    async def drain(self) -> None:
        """Finish what is running; before the broker is stopped."""
        await self.intake.drain(self.settings.drain_grace_s)

    def _subscribe_requests(self, broker: KafkaBroker, kafka: KafkaSettings) -> Backlog:
        settings = self.settings
        subscriber = broker.subscriber(
            kafka.topic(REQUESTS),
            # A record's header `reply_to` names a topic that FastStream would answer to.
            no_reply=True,
            batch=True,
            max_records=settings.fetch_max_records,
            group_id=kafka.group(NAME),
            group_instance_id=settings.instance_id,
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.MANUAL,
            session_timeout_ms=int(settings.session_timeout_s * 1_000),
            heartbeat_interval_ms=int(min(settings.session_timeout_s / 4, LONGEST_HEARTBEAT_S) * 1_000),
            max_poll_interval_ms=int(settings.max_poll_interval_s * 1_000),
            rebalance_timeout_ms=int(settings.rebalance_timeout_s * 1_000),
            partition_assignment_strategy=(StickyPartitionAssignor,),
            listener=self.intake,
            title="requests",
            description="Prompts to be answered",
        )

        @subscriber
        async def on_requests(requests: list[GenerationRequest]) -> None:
            """Tells the AsyncAPI document what the topic holds; `feed` leads the records past it."""

        feed(subscriber, self.intake.take)
        self.intake.bind(lambda: subscriber.consumer)
        return Backlog(lambda: subscriber.consumer, finished=self.intake.finished, metrics=self.metrics)

    def _subscribe_state(
        self, broker: KafkaBroker, dead_letters: DeadLetterPublisher, kafka: KafkaSettings
    ) -> tuple[Subscriber, ...]:
        """Compacted topics: every router reads all of them from the start."""
        groupings = subscribe_compacted(broker, kafka, dead_letters, PROMPT_GROUPS)
        policies = subscribe_compacted(broker, kafka, dead_letters, POLICIES)
        intensities = subscribe_compacted(broker, kafka, dead_letters, CARBON_INTENSITY)

        @groupings
        async def on_groupings(news: list[PromptGrouping]) -> None:
            for grouping in news:
                if self.knowledge.groups.learn(grouping):
                    _log.info("prompt groups", model=grouping.model, version=grouping.version)

        @policies
        async def on_policies(news: list[Policy]) -> None:
            for policy in news:
                if self.knowledge.learn_policy(policy):
                    _log.info("policy", model=policy.model, version=policy.version, status=policy.status)

        @intensities
        async def on_intensities(news: list[CarbonIntensity]) -> None:
            for intensity in news:
                self.knowledge.learn_intensity(intensity)

        return groupings, policies, intensities

    async def _learn_first(self) -> None:
        """Let requests in once the policies and intensities that are in force have been read."""
        if not await read_to_end(self._state_topics, within_s=self.settings.policy_wait_s):
            _log.warning("serving begins without all policies having been read")
        self.intake.release()

    def _watch_ages(self, fleet: Fleet, clock: Clock) -> None:
        def policy_age(model: str) -> Callable[[], float]:
            def age_s() -> float:
                policy = self.knowledge.policy(model)
                return math.nan if policy is None else (clock.now() - policy.created_at).total_seconds()

            return age_s

        def intensity_age(zone: str) -> Callable[[], float]:
            def age_s() -> float:
                age = self.knowledge.intensity_age_s(zone, clock.now())
                return math.nan if age is None else age

            return age_s

        for model in fleet.models:
            self.metrics.watch_policy(model.name, policy_age(model.name))
        for zone in fleet.zones:
            self.metrics.watch_intensity(zone, intensity_age(zone))


def build_app(
    *,
    kafka: KafkaSettings | None = None,
    settings: RouterSettings | None = None,
    fleet: Fleet | None = None,
    clock: Clock | None = None,
) -> AsgiFastStream:
    """The router, without connecting; what is not given is read from the environment.

    Raises:
        FleetError, ChatTemplateError, TelemetryError, ValidationError: the configuration does not do; the message
            says why.
    """
    kafka = kafka or KafkaSettings()
    settings = settings or RouterSettings()
    fleet = fleet or load_fleet(FleetSettings().file)
    clock = clock or Clock.from_environment()
    registry = CollectorRegistry()
    health = Health()
    broker, dead_letters = build_broker(
        kafka, service=NAME, clock=clock, registry=registry, linger_ms=settings.linger_ms
    )
    router = Router(
        broker,
        dead_letters,
        kafka=kafka,
        settings=settings,
        fleet=fleet,
        clock=clock,
        registry=registry,
        tracing=_tracing(kafka),
    )
    health.add_check("intake", router.intake.problem)
    health.add_check("endpoints", router.pools.unreachable)
    app = build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(REQUESTS, RESPONSES, RESPONSE_CHUNKS, SAMPLES, POLICIES, PROMPT_GROUPS, CARBON_INTENSITY, DEAD_LETTERS),
        registry=registry,
        health=health,
        lifespan=lambda: router.running(health),
    )
    app.on_shutdown(router.drain)
    return app


def main() -> None:
    """Run until told to stop."""
    run_service(build_app, name=NAME, configuration_errors=(FleetError, ChatTemplateError, TelemetryError))


def _tracing(kafka: KafkaSettings) -> Tracing | None:
    provider = tracer_provider(NAME, version=VERSION)
    return None if provider is None else Tracing(provider, version=VERSION, group=kafka.group(NAME))
