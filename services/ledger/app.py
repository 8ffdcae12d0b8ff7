"""Assembles the ledger from its parts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker
from prometheus_client import CollectorRegistry

from services import SERVICES
from services.ledger import sql
from services.ledger.earlier import EarlierVersions
from services.ledger.ingest import Backlog, Ingest, subscribe_reports
from services.ledger.loop import AttributionLoop
from services.ledger.meters import scrapers_of
from services.ledger.metrics import LedgerMetrics
from services.ledger.outbox import CurvePublisher, FootprintOutbox
from services.ledger.reports import AwakeEndpoints, RunningCalls
from services.ledger.settings import LedgerSettings
from services.ledger.settlement import IntervalSettlement
from services.ledger.sql import Storage
from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.publish import declare_batch_publisher, declare_publisher
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseMetrics, migrate, open_pool
from shared.runtime.health import Health
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
    RESPONSES,
    USAGE,
)

NAME = "ledger"
DESCRIPTION = SERVICES[NAME].description
LINGER_MS = 5
BATCH_BYTES = 256 * 1024
"""Large batches: footprints are published by the thousand, and compress better."""

LONGEST_ROUND_S = 300.0
"""Wall seconds that one round of settlement may take before the ledger reports that it is not ready."""


class Ledger:
    """The parts of one ledger, assembled and not yet connected."""

    def __init__(
        self,
        broker: KafkaBroker,
        dead_letters: DeadLetterPublisher,
        *,
        kafka: KafkaSettings,
        settings: LedgerSettings,
        fleet: Fleet,
        clock: Clock,
        registry: CollectorRegistry,
        storage: Storage | None = None,
    ) -> None:
        self.settings = settings
        self.storage = storage or Storage()
        metrics = LedgerMetrics(registry)
        self._database_metrics = DatabaseMetrics(registry)
        self.scrapers = scrapers_of(fleet, settings=settings, storage=self.storage, clock=clock, metrics=metrics)
        ingest = Ingest(
            broker,
            dead_letters,
            kafka=kafka,
            settings=settings,
            storage=self.storage,
            metrics=metrics,
            service=NAME,
        )
        running, awake = RunningCalls(fleet, settings=settings, clock=clock), AwakeEndpoints()
        subscribe_reports(broker, dead_letters, kafka=kafka, running=running, awake=awake)
        self.settlement = IntervalSettlement(
            fleet, settings=settings, storage=self.storage, metrics=metrics, awake=awake, clock=clock
        )
        self.earlier = EarlierVersions(self.storage)
        self.loop = AttributionLoop(
            Backlog(ingest.call_subscribers, clock=clock),
            self.settlement,
            FootprintOutbox(declare_batch_publisher(broker, kafka, FOOTPRINTS), storage=self.storage, metrics=metrics),
            CurvePublisher(declare_publisher(broker, kafka, POWER_CURVES)),
            running=running,
            earlier=self.earlier,
            storage=self.storage,
            settings=settings,
            metrics=metrics,
            clock=clock,
        )

    @asynccontextmanager
    async def running(self, health: Health, database: DatabaseSettings) -> AsyncIterator[None]:
        """Keep the database and the scrapers open while the broker runs."""
        pool = await open_pool(
            database, schema=NAME, server_settings=sql.SERVER_SETTINGS, metrics=self._database_metrics
        )
        self.storage.attach(pool)
        try:
            with self.storage.status.watch():
                # Before the tables change: an earlier version must not settle with them.
                await self.earlier.lock(pool)
                await migrate(pool, schema=NAME, package="services.ledger.migrations")
            health.spawn("keep earlier versions from settling", self.earlier.keep_locked())
            health.spawn("check PostgreSQL", self.storage.status.check_forever(database))
            for number, scraper in enumerate(self.scrapers):
                health.spawn(f"read meters {number}", scraper.run())
            yield
        finally:
            await health.cancel_background()
            await self.earlier.unlock()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.stop_grace_s):
                    await pool.close()


def build_app(
    *,
    kafka: KafkaSettings | None = None,
    database: DatabaseSettings | None = None,
    settings: LedgerSettings | None = None,
    fleet: Fleet | None = None,
    clock: Clock | None = None,
) -> AsgiFastStream:
    """Build the ledger without connecting; arguments that are None are read from the environment.

    Raises:
        FleetError, ValidationError: the configuration is not valid.
    """
    kafka = kafka or KafkaSettings()
    database = database or DatabaseSettings()
    settings = settings or LedgerSettings()
    fleet = fleet or load_fleet(FleetSettings().file)
    clock = clock or Clock.from_environment()
    registry = CollectorRegistry()
    health = Health()
    broker, dead_letters = build_broker(
        kafka, service=NAME, clock=clock, registry=registry, linger_ms=LINGER_MS, batch_bytes=BATCH_BYTES
    )
    ledger = Ledger(broker, dead_letters, kafka=kafka, settings=settings, fleet=fleet, clock=clock, registry=registry)
    health.add_check("postgresql", ledger.storage.status.problem)
    health.add_check("settlement", ledger.loop.settlement_problem)
    health.add_check("backlog", ledger.loop.backlog_problem)
    health.add_check("unsettled calls", ledger.loop.age_problem)
    health.add_check("energy counters", ledger.settlement.meter_problem)
    for number, scraper in enumerate(ledger.scrapers):
        health.add_check(f"meters {number}", scraper.problem)

    async def begin() -> None:
        rounds = health.expect_progress("settling", within_s=LONGEST_ROUND_S + settings.settle_interval_s)
        health.spawn("settle", ledger.loop.run(on_round=rounds.made))
        health.spawn("publish", ledger.loop.run_publishing())
        health.spawn("roll up", ledger.loop.run_rolling_up())
        health.spawn("remove old rows", ledger.loop.remove_old_rows())

    app = build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(
            RESPONSES,
            USAGE,
            CARBON_INTENSITY,
            POLICIES,
            QUALITY,
            PROMPT_GROUPS,
            LOAD_REPORTS,
            CAPACITY,
            FOOTPRINTS,
            POWER_CURVES,
            DEAD_LETTERS,
        ),
        registry=registry,
        health=health,
        lifespan=lambda: ledger.running(health, database),
    )
    app.after_startup(begin)
    app.on_shutdown(ledger.loop.finish)
    return app


def main() -> None:
    """Run the service until SIGINT or SIGTERM."""
    run_service(build_app, name=NAME, configuration_errors=(FleetError,))
