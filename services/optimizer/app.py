"""Wires the optimizer together."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker
from prometheus_client import CollectorRegistry

from services import SERVICES
from services.optimizer import migrations
from services.optimizer.capacity import CapacityPlanner
from services.optimizer.capacity_service import CapacityService
from services.optimizer.intake import Intake
from services.optimizer.metrics import OptimizerMetrics
from services.optimizer.prices import PoolPrices
from services.optimizer.prior import PriorError, load_priors
from services.optimizer.program import warm_up
from services.optimizer.service import PolicyService
from services.optimizer.settings import OptimizerSettings
from services.optimizer.store import Store
from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.leader import join_leadership
from shared.kafka.publish import declare_publisher
from shared.kafka.subscribe import (
    POLL_MS,
    Subscriber,
    read_to_end,
    subscribe_batches,
    subscribe_compacted,
    subscribe_newest,
)
from shared.messages import (
    CarbonIntensity,
    EndpointCurve,
    Footprint,
    LoadReport,
    Policy,
    PoolCapacity,
    PromptGrouping,
    Quality,
)
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseMetrics, DatabaseStatus, migrate, open_pool
from shared.runtime.health import Health
from shared.runtime.logs import get_logger
from shared.runtime.service import build_service, run_service
from shared.runtime.settings import DatabaseSettings, FleetSettings, KafkaSettings
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
)

NAME = "optimizer"
DESCRIPTION = SERVICES[NAME].description

_log = get_logger(__name__)


def subscribe(
    broker: KafkaBroker,
    dead_letters: DeadLetterPublisher,
    intake: Intake,
    capacity: CapacityService,
    *,
    kafka: KafkaSettings,
    settings: OptimizerSettings,
) -> tuple[Subscriber, ...]:
    """Register the subscribers.

    Footprints are read by a consumer group, of load reports only new ones, and all others from their start.

    Returns:
        Those of the topics that are read from their start.
    """
    groupings = subscribe_compacted(broker, kafka, dead_letters, PROMPT_GROUPS)
    intensities = subscribe_compacted(broker, kafka, dead_letters, CARBON_INTENSITY)
    evaluations = subscribe_compacted(broker, kafka, dead_letters, QUALITY)
    curves = subscribe_compacted(broker, kafka, dead_letters, POWER_CURVES)
    policies = subscribe_compacted(broker, kafka, dead_letters, POLICIES, is_own=True)
    loads = subscribe_newest(broker, kafka, dead_letters, LOAD_REPORTS)
    footprints = subscribe_batches(
        broker, kafka, dead_letters, FOOTPRINTS, group=NAME, max_records=settings.batch_records, poll_ms=POLL_MS
    )

    @groupings
    async def on_groupings(messages: list[PromptGrouping]) -> None:
        intake.update_groupings(messages)

    @intensities
    async def on_intensities(messages: list[CarbonIntensity]) -> None:
        intake.update_intensities(messages)

    @evaluations
    async def on_quality(messages: list[Quality]) -> None:
        intake.add_evaluations(messages)

    @curves
    async def on_curves(messages: list[EndpointCurve]) -> None:
        intake.update_curves(messages)

    @policies
    async def on_policies(messages: list[Policy]) -> None:
        intake.update_policies(messages)

    @loads
    async def on_loads(messages: list[LoadReport]) -> None:
        capacity.add_load_reports(messages)

    @footprints
    async def on_footprints(messages: list[Footprint]) -> None:
        await intake.add_footprints(messages)

    return groupings, intensities, evaluations, curves, policies


def build_app(  # noqa: PLR0915 - it only wires
    *,
    kafka: KafkaSettings | None = None,
    settings: OptimizerSettings | None = None,
    database: DatabaseSettings | None = None,
    fleet: Fleet | None = None,
    clock: Clock | None = None,
) -> AsgiFastStream:
    """The optimizer's application, not connected yet; arguments that are None are read from the environment.

    Raises:
        FleetError, PriorError, ValidationError: the configuration is invalid; the message says why.
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
    policies = declare_publisher(broker, kafka, POLICIES)
    plans = declare_publisher(broker, kafka, CAPACITY)
    status = DatabaseStatus()
    prices = PoolPrices(fleet)
    leadership = join_leadership(broker, kafka, service=NAME, registry=registry)

    async def publish_policy(policy: Policy) -> None:
        await leadership.publish(lambda: policies.publish(policy, key=policy.model.encode()))

    async def publish_plan(plan: PoolCapacity) -> None:
        await leadership.publish(lambda: plans.publish(plan, key=plan.pool.encode()))

    intake = Intake(fleet=fleet, clock=clock, settings=settings, metrics=metrics, prices=prices)
    service = PolicyService(
        intake,
        fleet=fleet,
        clock=clock,
        settings=settings,
        metrics=metrics,
        prices=prices,
        publish=publish_policy,
        priors={} if settings.prior_file is None else load_priors(settings.prior_file, fleet),
    )
    planner = CapacityPlanner(fleet, settings, event_per_wall=clock.rate)
    capacity = CapacityService(
        planner,
        prices,
        publish_plan,
        is_leader=lambda: leadership.is_leader,
        settings=settings,
        clock=clock,
        metrics=metrics,
    )
    read_from_start = subscribe(broker, dead_letters, intake, capacity, kafka=kafka, settings=settings)
    _watch_ages(intake, metrics, fleet)

    broker_started = asyncio.Event()

    async def after_reading(work: Callable[[], Awaitable[None]]) -> None:
        await broker_started.wait()  # the work publishes
        if not await read_to_end(read_from_start, within_s=settings.state_wait_s):
            _log.warning("starting before the topics were read completely")
        await work()

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        pool = await open_pool(database, schema=NAME, metrics=DatabaseMetrics(registry))
        try:
            await migrate(pool, schema=NAME, package=migrations.__name__)
            store = Store(pool, status=status, remembered_footprints=settings.remembered_footprints)
            await intake.restore(store)
            await capacity.restore_profiles(store)
            health.spawn("check PostgreSQL", status.check_forever(database))
            health.spawn("renew the lease", leadership.renew_forever())
            health.spawn("make policies", service.run())
            health.spawn("lead", leadership.lead(partial(after_reading, service.lead)))
            health.spawn("plan capacity", after_reading(capacity.run))
            health.spawn("store arrival profiles", capacity.store_profiles(store))
            yield
        finally:
            await health.cancel_background()
            service.close()
            await pool.close()

    # FastStream calls functions that are not asynchronous in a thread.
    async def on_broker_started() -> None:
        broker_started.set()

    health.add_check("database", status.problem)
    health.role = leadership.role
    app = build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(
            CARBON_INTENSITY,
            PROMPT_GROUPS,
            QUALITY,
            FOOTPRINTS,
            POWER_CURVES,
            LOAD_REPORTS,
            POLICIES,
            CAPACITY,
            DEAD_LETTERS,
        ),
        registry=registry,
        health=health,
        lifespan=running,
    )
    app.after_startup(on_broker_started)
    # Before the broker stops: policies could no longer be published.
    app.on_shutdown(health.cancel_background)
    return app


def main() -> None:
    """Run until stopped by a signal."""
    warm_up()
    run_service(build_app, name=NAME, configuration_errors=(FleetError, PriorError))


def _watch_ages(intake: Intake, metrics: OptimizerMetrics, fleet: Fleet) -> None:
    for model in fleet.models:
        metrics.watch_age("policy", model.name, partial(intake.policy_age_s, model.name))
        metrics.watch_age("evaluation", model.name, partial(intake.evaluation_age_s, model.name))
    for zone in fleet.zones:
        metrics.watch_age("intensity", zone, partial(intake.intensity_age_s, zone))
