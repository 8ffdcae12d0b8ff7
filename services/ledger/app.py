"""Wires the ledger together; everything it decides is decided elsewhere."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker
from faststream.kafka.subscriber.usecase import BatchSubscriber
from prometheus_client import CollectorRegistry

from services import SERVICES
from services.ledger.backlog import Backlog
from services.ledger.bookkeeping import Bookkeeping
from services.ledger.metrics import LedgerMetrics
from services.ledger.publishing import Publishing
from services.ledger.rows import (
    Row,
    grouping_row,
    intensity_rows,
    policy_row,
    quality_row,
    refusal_row,
    request_row,
    usage_row,
)
from services.ledger.scraping import scrapers_of
from services.ledger.settings import LedgerSettings
from services.ledger.settling import Settler
from services.ledger.storage import AWAY_ERRORS, Storage
from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import DeadLetterPublisher, RetryLaterError, batch_decoder
from shared.messages import (
    CarbonIntensity,
    Footprint,
    GenerationResponse,
    Policy,
    PromptGrouping,
    Quality,
    UsageRecord,
)
from shared.runtime.clock import Clock
from shared.runtime.database import migrate, open_pool
from shared.runtime.health import Health
from shared.runtime.service import build_service, run_service
from shared.runtime.settings import DatabaseSettings, FleetSettings, KafkaSettings
from shared.topics import (
    CARBON_INTENSITY,
    DEAD_LETTERS,
    FOOTPRINTS,
    POLICIES,
    PROMPT_GROUPS,
    QUALITY,
    RESPONSES,
    USAGE,
    TopicSpec,
)

NAME = "ledger"
DESCRIPTION = SERVICES[NAME].description
FETCH_MIN_BYTES = 1_000_000
"""Kafka holds records back until there are so many bytes or the wait is over: few, large batches."""
LINGER_MS = 5

LONGEST_ROUND_S = 300.0
"""Wall seconds that looking and settling may take before the ledger says that it is not ready."""


class Ledger:
    """The parts of one ledger, put together and not yet connected."""

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
    ) -> None:
        self.settings = settings
        self.storage = Storage()
        self.metrics = LedgerMetrics(registry)
        self._kafka = kafka
        self._broker = broker
        self._dead_letters = dead_letters
        self.scrapers = scrapers_of(
            fleet,
            storage=self.storage,
            clock=clock,
            metrics=self.metrics,
            interval_s=settings.scrape_interval_s,
            timeout_s=settings.scrape_timeout_s,
        )
        settler = Settler(
            fleet,
            storage=self.storage,
            metrics=self.metrics,
            rules=settings.rules,
            max_intensity_age_s=settings.max_intensity_age_s,
        )
        publisher = broker.publisher(kafka.topic(FOOTPRINTS), schema=Footprint)

        async def publish(footprint: Footprint) -> None:
            await publisher.publish(footprint, key=footprint.request_id.encode())

        self.bookkeeping = Bookkeeping(
            Backlog(self._subscribe(), [kafka.topic(RESPONSES), kafka.topic(USAGE)], clock=clock),
            settler,
            Publishing(publish, storage=self.storage, metrics=self.metrics),
            storage=self.storage,
            settings=settings,
            metrics=self.metrics,
            clock=clock,
        )

    @asynccontextmanager
    async def running(self, health: Health, database: DatabaseSettings) -> AsyncIterator[None]:
        """Everything that is open while the broker runs."""
        pool = await open_pool(database, schema=NAME)
        try:
            await migrate(pool, schema=NAME, package="services.ledger.migrations")
            self.storage.attach(pool)
            for number, scraper in enumerate(self.scrapers):
                health.spawn(f"read meters {number}", scraper.run())
            yield
        finally:
            await health.cancel_background()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.stop_grace_s):
                    await pool.close()

    def _subscribe(self) -> list[Callable[[], Any]]:
        """All topics, in batches that are acknowledged once they are in PostgreSQL; returns those with calls."""
        responses = self._subscriber(RESPONSES)
        usage = self._subscriber(USAGE)
        intensities = self._subscriber(CARBON_INTENSITY)
        policies = self._subscriber(POLICIES)
        qualities = self._subscriber(QUALITY)
        groupings = self._subscriber(PROMPT_GROUPS)

        @responses
        async def on_responses(batch: list[GenerationResponse]) -> None:
            calls = [request_row(one) for one in batch if one.status == "ok"]
            refusals = [refusal_row(one) for one in batch if one.status == "error"]
            await self._keep(self.storage.add, "calls", calls)
            await self._keep(self.storage.add, "refusals", refusals)

        @usage
        async def on_usage(batch: list[UsageRecord]) -> None:
            await self._keep(self.storage.add, "calls", [usage_row(one) for one in batch])

        @intensities
        async def on_intensities(batch: list[CarbonIntensity]) -> None:
            await self._keep(self.storage.put, "intensity", [row for one in batch for row in intensity_rows(one)])

        @policies
        async def on_policies(batch: list[Policy]) -> None:
            await self._keep(self.storage.add, "policies", [policy_row(one) for one in batch])

        @qualities
        async def on_qualities(batch: list[Quality]) -> None:
            await self._keep(self.storage.put, "quality", [quality_row(one) for one in batch])

        @groupings
        async def on_groupings(batch: list[PromptGrouping]) -> None:
            learned = [grouping_row(one) for one in batch if one.version is not None]
            await self._keep(self.storage.put, "prompt_groups", learned)

        return [lambda: responses.consumer, lambda: usage.consumer]

    def _subscriber(self, spec: TopicSpec) -> BatchSubscriber:
        return self._broker.subscriber(
            self._kafka.topic(spec),
            # A record's header `reply_to` names a topic that FastStream would answer to.
            no_reply=True,
            batch=True,
            max_records=self.settings.batch_records,
            batch_timeout_ms=self.settings.poll_ms,
            fetch_min_bytes=FETCH_MIN_BYTES,
            fetch_max_wait_ms=self.settings.poll_ms,
            group_id=self._kafka.group(f"{NAME}.{spec.name}"),
            auto_offset_reset="earliest",
            decoder=batch_decoder(spec.message, self._dead_letters),
            title=spec.name,
        )

    async def _keep(self, write: Callable[[str, list[Row]], Awaitable[None]], table: str, rows: list[Row]) -> None:
        """Write rows.

        Raises:
            RetryLaterError: PostgreSQL is away; raised after a pause, and the batch is delivered again.
        """
        try:
            await write(table, rows)
        except AWAY_ERRORS as error:
            self.storage.note(error)
            await asyncio.sleep(self.settings.retry_s)
            raise RetryLaterError("PostgreSQL is away") from error


def build_app(
    *,
    kafka: KafkaSettings | None = None,
    database: DatabaseSettings | None = None,
    settings: LedgerSettings | None = None,
    fleet: Fleet | None = None,
    clock: Clock | None = None,
) -> AsgiFastStream:
    """The ledger, without connecting; what is not given is read from the environment.

    Raises:
        FleetError, ValidationError: the configuration does not do; the message says why.
    """
    kafka = kafka or KafkaSettings()
    database = database or DatabaseSettings()
    settings = settings or LedgerSettings()
    fleet = fleet or load_fleet(FleetSettings().file)
    clock = clock or Clock.from_environment()
    registry = CollectorRegistry()
    health = Health()
    broker, dead_letters = build_broker(kafka, service=NAME, clock=clock, registry=registry, linger_ms=LINGER_MS)
    ledger = Ledger(broker, dead_letters, kafka=kafka, settings=settings, fleet=fleet, clock=clock, registry=registry)
    health.add_check("postgresql", ledger.storage.problem)
    health.add_check("backlog", ledger.bookkeeping.problem)
    for number, scraper in enumerate(ledger.scrapers):
        health.add_check(f"meters {number}", scraper.problem)

    async def begin() -> None:
        rounds = health.expect_progress("settling", within_s=LONGEST_ROUND_S + settings.settle_interval_s)
        health.spawn("settle", ledger.bookkeeping.settle_forever(on_round=rounds.made))
        health.spawn("remove old rows", ledger.bookkeeping.clean_forever())

    app = build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(RESPONSES, USAGE, CARBON_INTENSITY, POLICIES, QUALITY, PROMPT_GROUPS, FOOTPRINTS, DEAD_LETTERS),
        registry=registry,
        health=health,
        lifespan=lambda: ledger.running(health, database),
    )
    app.after_startup(begin)
    app.on_shutdown(ledger.bookkeeping.finish)
    return app


def main() -> None:
    """Run until told to stop."""
    run_service(build_app, name=NAME, configuration_errors=(FleetError,))
