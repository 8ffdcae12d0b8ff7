"""Wires carbon_feed together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from faststream.asgi import AsgiFastStream
from prometheus_client import CollectorRegistry

from services import SERVICES
from services.carbon_feed.feed import FeedMetrics, ZoneFeed
from services.carbon_feed.providers.base import ConfigurationError
from services.carbon_feed.settings import CarbonFeedSettings
from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.broker import build_broker
from shared.kafka.leader import Leadership, join_leadership
from shared.kafka.publish import Publisher, declare_publisher
from shared.kafka.subscribe import Subscriber, read_to_end, subscribe_compacted
from shared.messages import CarbonIntensity
from shared.runtime.clock import Clock
from shared.runtime.health import Health
from shared.runtime.logs import get_logger
from shared.runtime.service import build_service, run_service
from shared.runtime.settings import FleetSettings, KafkaSettings
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS

READ_BACK_S = 30.0
"""Wall seconds after which a warning says that the published values have not been read back yet."""

NAME = "carbon_feed"
DESCRIPTION = SERVICES[NAME].description

_log = get_logger(__name__)


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
    broker, dead_letters = build_broker(kafka, service=NAME, clock=clock, registry=registry)
    publisher = declare_publisher(broker, kafka, CARBON_INTENSITY)
    leadership = join_leadership(broker, kafka, service=NAME, registry=registry)
    published = subscribe_compacted(broker, kafka, dead_letters, CARBON_INTENSITY, before="a leader publishes values")
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

    @published
    async def on_published(messages: list[CarbonIntensity]) -> None:
        for message in messages:
            for feed in feeds:
                feed.restore(message)

    async def start_feeds() -> None:
        health.spawn("renew the lease", leadership.renew_forever())
        for feed in feeds:
            work = partial(run_feed, feed, leadership, publisher=publisher, published=published)
            health.spawn(f"feed {feed.zone}", leadership.lead(work))

    @asynccontextmanager
    async def open_providers() -> AsyncIterator[None]:
        try:
            yield
        finally:
            for feed in feeds:
                await feed.close()

    for feed in feeds:
        health.add_check(f"zone {feed.zone}", feed.problem)
    health.role = leadership.role
    app = build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(CARBON_INTENSITY, DEAD_LETTERS),
        registry=registry,
        health=health,
        lifespan=open_providers,
    )
    app.after_startup(start_feeds)
    # Before the broker stops: the feeds could no longer publish.
    app.on_shutdown(health.cancel_background)
    return app


async def run_feed(feed: ZoneFeed, leadership: Leadership, *, publisher: Publisher, published: Subscriber) -> None:
    """Publish a zone's values as the leader, once what was published before has been read back."""

    async def publish(message: CarbonIntensity) -> None:
        await leadership.publish(lambda: publisher.publish(message, key=message.zone.encode()))

    while not await read_to_end([published], within_s=READ_BACK_S):
        _log.warning("nothing is published before the earlier values have been read back", zone=feed.zone)
    await feed.run(publish)


def main() -> None:
    """Run until stopped."""
    run_service(build_app, name=NAME, configuration_errors=(FleetError, ConfigurationError))
