"""Wires the router together; decisions are in the other modules."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from aiokafka import ConsumerRecord
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker
from faststream.kafka.message import KafkaMessage
from opentelemetry.trace import NoOpTracerProvider
from prometheus_client import CollectorRegistry
from pydantic import SkipValidation

from services import SERVICES
from services.router.cancellation import Cancellations
from services.router.consumer import RequestConsumer
from services.router.handler import RequestHandler
from services.router.metrics import Backlog, RouterMetrics
from services.router.policy import PolicyCache
from services.router.publisher import RouterPublisher
from services.router.recovery import KafkaGroupProgress
from services.router.request_class import RequestClasses
from services.router.settings import RouterSettings
from services.router.tracing import TRACER_NAME, TelemetryError, Tracing, tracer_provider
from shared.fleet import Fleet, FleetError, load_fleet
from shared.grouping import GroupingError
from shared.inference.attempts import Attempts
from shared.inference.chat import ChatTemplateError
from shared.inference.load_reports import LoadReporter, subscribe_capacity
from shared.inference.pools import Pools
from shared.kafka.broker import build_broker, unreadable_records
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.deaths import DeathLimits
from shared.kafka.records import IMPLAUSIBLE, PoisonMessageError
from shared.kafka.subscribe import (
    Subscriber,
    read_to_end,
    subscribe_compacted,
    subscribe_newest,
    subscribe_records,
)
from shared.messages import Cancellation, CarbonIntensity, GenerationRequest, Policy, PromptGrouping
from shared.runtime.clock import Clock
from shared.runtime.health import Health
from shared.runtime.logs import get_logger
from shared.runtime.service import VERSION, build_service, run_service
from shared.runtime.settings import FleetSettings, KafkaSettings
from shared.topics import (
    CANCELLATIONS,
    CAPACITY,
    CARBON_INTENSITY,
    DEAD_LETTERS,
    LOAD_REPORTS,
    POLICIES,
    POWER_CURVES,
    PROMPT_GROUPS,
    REPLIES,
    RESPONSE_CHUNKS,
    RESPONSES,
    SAMPLES,
)

NAME = "router"
DESCRIPTION = SERVICES[NAME].description

COMMIT_TIMEOUT_S = 60.0
"""Wall seconds that a commit may take before the router is not ready; one try may take 40."""

HEARTBEAT_MAX_S = 3.0
"""Longest wall time between two heartbeats: a rebalance waits for the next heartbeat of every member."""

POLL_MS = 3
"""Wall milliseconds that FastStream waits for records, and then sleeps if there are none: the longest delay that this
adds to a request. Shorter costs processor time while idle."""

_log = get_logger(__name__)


class Router:
    """The parts of one router, not yet connected."""

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
    ) -> None:
        self.settings = settings
        self._tracer_provider = tracer_provider(NAME, version=VERSION)
        tracer = (self._tracer_provider or NoOpTracerProvider()).get_tracer(TRACER_NAME, VERSION)
        tracing = Tracing(tracer, group=kafka.group(NAME))
        metrics = RouterMetrics(registry)
        self.policies = PolicyCache(fleet, max_intensity_age_s=settings.max_intensity_age_s)
        metrics.watch_ages(self.policies, fleet, clock)
        self.pools = Pools(
            fleet,
            clock=clock,
            circuit_breaker=settings,
            on_failure=lambda endpoint: metrics.endpoint_failures.labels(endpoint).inc(),
            check_interval_s=settings.endpoint_check_interval_s,
            check_timeout_s=settings.endpoint_check_timeout_s,
            beside_evaluators=True,
        )
        self.pools.set_share(0.0)  # no partitions are assigned yet
        metrics.watch_pools(self.pools)
        attempts = Attempts(
            clock=clock,
            retry=settings,
            on_retry=lambda pool: metrics.retries.labels(pool).inc(),
            stream_timeouts=settings.stream_timeouts,
            stream_always=settings.stream_always,
        )
        cancellations = Cancellations()
        handler = RequestHandler(
            fleet=fleet,
            clock=clock,
            settings=settings,
            policies=self.policies,
            pools=self.pools,
            attempts=attempts,
            cancellations=cancellations,
            publisher=RouterPublisher(broker, dead_letters, kafka=kafka, metrics=metrics, tracing=tracing),
            metrics=metrics,
            tracing=tracing,
        )
        classes = RequestClasses(fleet=fleet, kafka=kafka, settings=settings)
        unreadable = unreadable_records(broker, kafka)
        progress = KafkaGroupProgress(
            kafka, kafka.group(NAME), (kafka.topic(RESPONSES), kafka.topic(DEAD_LETTERS)), unreadable
        )
        progress.watch(classes.lanes)
        self.requests = RequestConsumer(
            handler.handle,
            progress,
            settings=settings,
            metrics=metrics,
            capacity=self.pools,
            classes=classes,
            unreadable=unreadable,
            deaths=DeathLimits.of(kafka),
        )
        subscriber = subscribe_requests(broker, self.requests, kafka=kafka, settings=settings)
        self._backlog = Backlog(
            lambda: subscriber.consumer, finished=self.requests.finished, lanes=classes.lanes, metrics=metrics
        )
        self._state_subscribers = (
            *subscribe_state(broker, dead_letters, self.policies, kafka=kafka),
            *subscribe_capacity(broker, dead_letters, self.pools, kafka=kafka),
        )
        subscribe_cancellations(broker, dead_letters, cancellations, kafka=kafka)
        self._load_reporter = LoadReporter(
            broker,
            self.pools,
            kafka=kafka,
            clock=clock,
            service="router",
            interval_s=settings.load_report_interval_s,
        )

    @asynccontextmanager
    async def running(self, health: Health) -> AsyncIterator[None]:
        """Background tasks beside the subscribers."""
        if not self.settings.draw_key_bytes:
            _log.warning("draws have no key, so clients can steer them: set SPROUT_ROUTER_DRAW_KEY_FILE on all routers")
        self.requests.pause()
        health.spawn("load policies", self._load_policies())
        health.spawn("watch endpoints", self.pools.watch())
        health.spawn("watch backlog", self._backlog.watch())
        commits = health.expect_progress("commits", within_s=COMMIT_TIMEOUT_S + self.settings.commit_interval_s)
        health.spawn("commit offsets", self.requests.commit_forever(on_round=commits.made))
        try:
            yield
        finally:
            await self.pools.close()
            if self._tracer_provider is not None:
                await asyncio.to_thread(self._tracer_provider.shutdown)

    def report_load(self, health: Health) -> None:
        """Start to publish load reports; call it once the broker has started, because before it cannot publish."""
        health.spawn("report load", self._load_reporter.run())

    async def shut_down(self) -> None:
        """Finish or cancel all requests; Kafka is still connected."""
        await self.requests.shut_down()
        await self._load_reporter.finish()

    async def _load_policies(self) -> None:
        """Start requests once current policies and carbon intensities have been read."""
        if not await read_to_end(self._state_subscribers, within_s=self.settings.policy_wait_s):
            _log.warning("requests start before all policies have been read")
        self.requests.resume()


def subscribe_requests(
    broker: KafkaBroker, requests: RequestConsumer, *, kafka: KafkaSettings, settings: RouterSettings
) -> Subscriber:
    """Subscribe to the topics of all lanes; records go to the consumer as they are, in batches.

    FastStream spends 30 to 80 us on a message, a tenth of what the router needs for a request: under load a batch of
    many records is one message.
    """

    async def parse_batch(records: tuple["ConsumerRecord[bytes, bytes]", ...]) -> KafkaMessage:
        # FastStream's own parser fails on binary headers. The values are parsed in the tasks of the requests.
        correlation_id = f"{records[0].partition}-{records[0].offset}"
        return KafkaMessage(records, b"", consumer=subscriber.consumer, correlation_id=correlation_id)

    async def raw_records(message: KafkaMessage) -> Any:  # noqa: ANN401 - aiokafka has no types
        return message.raw_message

    subscriber = subscribe_records(
        broker,
        kafka,
        *settings.lane_topics,
        group=NAME,
        max_records=settings.fetch_max_records,
        poll_ms=POLL_MS,
        parser=parse_batch,
        decoder=raw_records,
        group_instance_id=settings.instance_id,
        session_timeout_ms=int(settings.session_timeout_s * 1_000),
        heartbeat_interval_ms=int(min(settings.session_timeout_s / 4, HEARTBEAT_MAX_S) * 1_000),
        max_poll_interval_ms=int(settings.max_poll_interval_s * 1_000),
        rebalance_timeout_ms=int(settings.rebalance_timeout_s * 1_000),
        partition_assignment_strategy=(StickyPartitionAssignor,),
        listener=requests,
    )

    # The annotation describes the messages in the AsyncAPI document; they are not validated here.
    @subscriber
    async def on_requests(records: Annotated[list[GenerationRequest], SkipValidation]) -> None:
        await requests.receive(records)

    requests.set_consumer(lambda: subscriber.consumer)
    return subscriber


def subscribe_cancellations(
    broker: KafkaBroker, dead_letters: DeadLetterPublisher, cancellations: Cancellations, *, kafka: KafkaSettings
) -> None:
    """Subscribe to cancellations; every router reads all of them."""

    @subscribe_newest(broker, kafka, dead_letters, CANCELLATIONS)
    async def on_cancellations(messages: list[Cancellation]) -> None:
        for message in messages:
            cancellations.cancel(message)


def subscribe_state(
    broker: KafkaBroker, dead_letters: DeadLetterPublisher, policies: PolicyCache, *, kafka: KafkaSettings
) -> tuple[Subscriber, ...]:
    """Subscribe to the compacted topics of policies; every router reads all of them from the start."""
    groupings = subscribe_compacted(broker, kafka, dead_letters, PROMPT_GROUPS)
    newest_policies = subscribe_compacted(broker, kafka, dead_letters, POLICIES)
    intensities = subscribe_compacted(broker, kafka, dead_letters, CARBON_INTENSITY)

    @groupings
    async def on_groupings(updates: list[PromptGrouping]) -> None:
        for grouping in updates:
            try:
                stored = policies.groups.update(grouping)
            except GroupingError as error:
                raise PoisonMessageError(IMPLAUSIBLE, str(error)) from error
            if stored:
                _log.info("new prompt groups", model=grouping.model, version=grouping.version)

    @newest_policies
    async def on_policies(updates: list[Policy]) -> None:
        for policy in updates:
            if policies.update(policy):
                _log.info("new policy", model=policy.model, version=policy.version, status=policy.status)

    @intensities
    async def on_intensities(updates: list[CarbonIntensity]) -> None:
        for intensity in updates:
            policies.intensities.update(intensity)

    return groupings, newest_policies, intensities


def build_app(
    *,
    kafka: KafkaSettings | None = None,
    settings: RouterSettings | None = None,
    fleet: Fleet | None = None,
    clock: Clock | None = None,
) -> AsgiFastStream:
    """The router, not connected; arguments that are None are read from the environment.

    Raises:
        FleetError, ChatTemplateError, TelemetryError, ValidationError: the configuration is invalid; the message says
            why.
    """
    kafka = kafka or KafkaSettings()
    settings = settings or RouterSettings()
    fleet = fleet or load_fleet(FleetSettings().file)
    clock = clock or Clock.from_environment()
    registry = CollectorRegistry()
    health = Health()
    # Without FastStream's metrics: `RouterMetrics` counts the same, and they take time for every response.
    broker, dead_letters = build_broker(
        kafka, service=NAME, clock=clock, registry=registry, message_metrics=False, linger_ms=settings.linger_ms
    )
    dead_letters.client_topics.update(map(kafka.topic, settings.lane_topics))
    router = Router(broker, dead_letters, kafka=kafka, settings=settings, fleet=fleet, clock=clock, registry=registry)
    health.add_check("requests", router.requests.problem)
    health.add_check("endpoints", router.pools.unreachable)
    app = build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(
            *settings.lane_topics,
            RESPONSES,
            RESPONSE_CHUNKS,
            REPLIES,
            CANCELLATIONS,
            SAMPLES,
            POLICIES,
            PROMPT_GROUPS,
            CARBON_INTENSITY,
            POWER_CURVES,
            CAPACITY,
            LOAD_REPORTS,
            DEAD_LETTERS,
        ),
        registry=registry,
        health=health,
        lifespan=lambda: router.running(health),
    )

    async def begin() -> None:
        router.report_load(health)

    app.after_startup(begin)
    app.on_shutdown(router.shut_down)
    return app


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    run_service(build_app, name=NAME, configuration_errors=(FleetError, ChatTemplateError, TelemetryError))
