"""Wires carbon_feed together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from faststream.asgi import AsgiFastStream
from prometheus_client import CollectorRegistry

from services import SERVICES
from services.carbon_feed.feed import FeedMetrics, ZoneFeed
from services.carbon_feed.providers.base import ConfigurationError
from services.carbon_feed.settings import CarbonFeedSettings
from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.broker import build_broker
from shared.kafka.publish import declare_publisher, publish_with_retry
from shared.messages import CarbonIntensity
from shared.runtime.clock import Clock
from shared.runtime.health import Health
from shared.runtime.service import build_service, run_service
from shared.runtime.settings import FleetSettings, KafkaSettings
from shared.topics import CARBON_INTENSITY

NAME = "carbon_feed"
DESCRIPTION = SERVICES[NAME].description


def build_app(
    *,
    kafka: KafkaSettings | None = None,
    settings: CarbonFeedSettings | None = None,
    fleet: Fleet | None = None,
    clock: Clock | None = None,
) -> AsgiFastStream:
    """The service, without connecting; arguments that are `None` are read from the environment.

    Raises:
        FleetError, ConfigurationError, ValidationError: the configuration cannot be used; the message says why.
    """
    kafka = kafka or KafkaSettings()
    settings = settings or CarbonFeedSettings()
    fleet = fleet or load_fleet(FleetSettings().file)
    clock = clock or Clock.from_environment()
    registry = CollectorRegistry()
    health = Health()
    broker, _ = build_broker(kafka, service=NAME, clock=clock, registry=registry)
    publisher = declare_publisher(broker, kafka, CARBON_INTENSITY)
    metrics = FeedMetrics(registry)
    feeds = [
        ZoneFeed(
            zone,
            providers,
            scope=settings.scope_of(zone),
            clock=clock,
            window=settings.window,
            poll_s=settings.poll_s,
            retry_s=settings.retry_s,
            metrics=metrics,
        )
        for zone, providers in settings.chains(fleet).items()
    ]

    async def publish(message: CarbonIntensity) -> None:
        await publish_with_retry(lambda: publisher.publish(message, key=message.zone.encode()))

    async def start_feeds() -> None:
        for feed in feeds:
            health.spawn(f"feed {feed.zone}", feed.run(publish))

    @asynccontextmanager
    async def open_providers() -> AsyncIterator[None]:
        try:
            yield
        finally:
            for feed in feeds:
                await feed.close()

    for feed in feeds:
        health.add_check(f"zone {feed.zone}", feed.problem)
    app = build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(CARBON_INTENSITY,),
        registry=registry,
        health=health,
        lifespan=open_providers,
    )
    app.after_startup(start_feeds)
    return app


def main() -> None:
    """Run until stopped."""
    run_service(build_app, name=NAME, configuration_errors=(FleetError, ConfigurationError))
