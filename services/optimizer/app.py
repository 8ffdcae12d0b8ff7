"""Wires the optimizer together; everything it decides is decided elsewhere."""

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker
from faststream.middlewares import AckPolicy
from prometheus_client import CollectorRegistry

from services import SERVICES
from services.optimizer import migrations
from services.optimizer.linear import warm_up
from services.optimizer.metrics import OptimizerMetrics
from services.optimizer.optimizing import Optimizing
from services.optimizer.settings import OptimizerSettings
from services.optimizer.store import Store
from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import DeadLetterPublisher, batch_decoder
from shared.kafka.publish import publish_with_retry
from shared.kafka.subscribe import POLL_MS, Subscriber, read_to_end, subscribe_compacted
from shared.messages import CarbonIntensity, Footprint, Policy, PromptGrouping, Quality
from shared.runtime.clock import Clock
from shared.runtime.database import migrate, open_pool
from shared.runtime.health import Health
from shared.runtime.logs import get_logger
from shared.runtime.service import build_service, run_service
from shared.runtime.settings import DatabaseSettings, FleetSettings, KafkaSettings
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS, FOOTPRINTS, POLICIES, PROMPT_GROUPS, QUALITY

NAME = "optimizer"
DESCRIPTION = SERVICES[NAME].description

_log = get_logger(__name__)


def subscribe(
    broker: KafkaBroker,
    dead_letters: DeadLetterPublisher,
    optimizing: Optimizing,
    *,
    kafka: KafkaSettings,
    settings: OptimizerSettings,
) -> tuple[Subscriber, ...]:
    """Register the consumers: the compacted topics from their start at each start, footprints as a group.

    Returns:
        Those of the compacted topics.
    """
    groupings = subscribe_compacted(broker, kafka, dead_letters, PROMPT_GROUPS)
    intensities = subscribe_compacted(broker, kafka, dead_letters, CARBON_INTENSITY)
    evaluations = subscribe_compacted(broker, kafka, dead_letters, QUALITY)
    footprints = broker.subscriber(
        kafka.topic(FOOTPRINTS),
        decoder=batch_decoder(Footprint, dead_letters),
        title="footprints",
        description="What every call took",
        # A record's header `reply_to` names a topic that FastStream would answer to.
        no_reply=True,
        batch=True,
        batch_timeout_ms=POLL_MS,
        max_records=settings.batch_records,
        group_id=kafka.group(NAME),
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.NACK_ON_ERROR,
    )

    @groupings
    async def on_groupings(news: list[PromptGrouping]) -> None:
        optimizing.learn_groupings(news)

    @intensities
    async def on_intensities(news: list[CarbonIntensity]) -> None:
        optimizing.learn_intensities(news)

    @evaluations
    async def on_quality(news: list[Quality]) -> None:
        optimizing.learn_quality(news)

    @footprints
    async def on_footprints(news: list[Footprint]) -> None:
        await optimizing.learn_footprints(news)

    return groupings, intensities, evaluations


def build_app(
    *,
    kafka: KafkaSettings | None = None,
    settings: OptimizerSettings | None = None,
    database: DatabaseSettings | None = None,
    fleet: Fleet | None = None,
    clock: Clock | None = None,
) -> AsgiFastStream:
    """The optimizer, without connecting; what is not given is read from the environment.

    Raises:
        FleetError, ValidationError: the configuration does not do; the message says why.
    """
    kafka = kafka or KafkaSettings()
    settings = settings or OptimizerSettings()
    fleet = fleet or load_fleet(FleetSettings().file)
    clock = clock or Clock.from_environment()
    database = database or DatabaseSettings()
    registry = CollectorRegistry()
    metrics = OptimizerMetrics(registry)
    health = Health()
    broker, dead_letters = build_broker(kafka, service=NAME, clock=clock, registry=registry)
    publisher = broker.publisher(kafka.topic(POLICIES), title="policies", description="Probabilities of the options")

    async def publish(policy: Policy) -> None:
        await publish_with_retry(lambda: publisher.publish(policy, key=policy.model.encode()))

    optimizing = Optimizing(fleet=fleet, clock=clock, settings=settings, metrics=metrics, publish=publish)
    followed = subscribe(broker, dead_letters, optimizing, kafka=kafka, settings=settings)
    _watch_ages(optimizing, metrics, fleet, clock)

    async def make_policies() -> None:
        if not await read_to_end(followed, within_s=settings.state_wait_s):
            _log.warning("policies are made without all that is in force having been read")
        await optimizing.run()

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        pool = await open_pool(database, schema=NAME)
        try:
            await migrate(pool, schema=NAME, package=migrations.__name__)
            await optimizing.restore(Store(pool, remembered_footprints=settings.remembered_footprints))
            health.spawn("make policies", make_policies())
            yield
        finally:
            await health.cancel_background()
            optimizing.close()
            await pool.close()

    health.add_check("database", optimizing.problem)
    return build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(CARBON_INTENSITY, PROMPT_GROUPS, QUALITY, FOOTPRINTS, POLICIES, DEAD_LETTERS),
        registry=registry,
        health=health,
        lifespan=running,
    )


def main() -> None:
    """Run until told to stop."""
    warm_up()
    run_service(build_app, name=NAME, configuration_errors=(FleetError,))


def _watch_ages(optimizing: Optimizing, metrics: OptimizerMetrics, fleet: Fleet, clock: Clock) -> None:
    def watch(what: str, name: str, age_s: Callable[[], float | None]) -> None:
        def known_or_nan() -> float:
            age = age_s()
            return math.nan if age is None else age

        metrics.watch_age(what, name, known_or_nan)

    for model in fleet.models:
        watch("policy", model.name, lambda name=model.name: optimizing.policy_age_s(name))  # type: ignore[misc]
        watch("evaluation", model.name, lambda name=model.name: optimizing.evaluation_age_s(name))  # type: ignore[misc]
    for zone in fleet.zones:
        watch("intensity", zone, lambda zone=zone: optimizing.grid.age_s(zone, clock.now()))  # type: ignore[misc]
