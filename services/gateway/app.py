"""Wires the gateway: HTTP API, publishers, replies, policies and keys."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import asyncpg
from aiokafka import TopicPartition
from asyncpg.pool import PoolConnectionProxy
from faststream.asgi import AsgiFastStream
from faststream.kafka import KafkaBroker
from prometheus_client import CollectorRegistry

from services import SERVICES
from services.gateway.accounts import Accounts
from services.gateway.api import Gateway, build_api
from services.gateway.batch_answers import BatchAnswers
from services.gateway.batch_runner import BatchRunner
from services.gateway.batch_store import BatchStore
from services.gateway.estimates import Estimates
from services.gateway.file_store import FileStore
from services.gateway.http import BoundedHttp, HttpLimits
from services.gateway.keys import KeyStore
from services.gateway.messaging import ReplyInbox, RequestPublisher, claim_partition
from services.gateway.metrics import GatewayMetrics
from services.gateway.page import add_page
from services.gateway.settings import GatewaySettings
from services.gateway.status import Monitor
from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.subscribe import (
    Subscriber,
    read_to_end,
    subscribe_batches,
    subscribe_compacted,
    subscribe_partition,
)
from shared.messages import CarbonIntensity, Footprint, Policy, PoolCapacity, Reply
from shared.runtime.clock import Clock
from shared.runtime.database import (
    RETRY_PAUSE_S,
    DatabaseMetrics,
    DatabaseStatus,
    DatabaseUnavailableError,
    migrate,
    open_pool,
)
from shared.runtime.health import Health
from shared.runtime.logs import get_logger
from shared.runtime.service import VERSION, build_service, run_service
from shared.runtime.settings import DatabaseSettings, FleetSettings, HttpSettings, KafkaSettings
from shared.topics import (
    CANCELLATIONS,
    CAPACITY,
    CARBON_INTENSITY,
    DEAD_LETTERS,
    FOOTPRINTS,
    POLICIES,
    REPLIES,
    REQUESTS,
)

NAME = "gateway"
DESCRIPTION = SERVICES[NAME].description

FOOTPRINT_BATCH = 500
STATE_WAIT_S = 10.0
"""Longest wait of a starting gateway for the policies, intensities and plans that Kafka has, wall seconds."""

_log = get_logger(__name__)


class Replies:
    """The subscription to this gateway's replies, and the partition that it reads."""

    def __init__(
        self,
        broker: KafkaBroker,
        dead_letters: DeadLetterPublisher,
        gateway: Gateway,
        monitor: Monitor,
        *,
        kafka: KafkaSettings,
    ) -> None:
        self._topic = kafka.topic(REPLIES)
        self._gateway = gateway
        self._connection: PoolConnectionProxy[asyncpg.Record] | None = None
        self._subscriber = subscribe_partition(broker, kafka, dead_letters, REPLIES, poll_ms=gateway.settings.poll_ms)

        @self._subscriber
        async def on_replies(replies: list[Reply]) -> None:
            own = [one.response for one in replies if one.response is not None and one.request_id in gateway.inbox]
            gateway.inbox.deliver(replies)
            for response in own:
                estimate = gateway.estimates.of(response.model, response.decision, response.usage)
                monitor.note(response, grams=estimate.grams, now=gateway.clock.now())

    async def start(self, pool: asyncpg.Pool) -> None:
        """Claim a partition, and read it from its present end on; the broker has started."""
        consumer = self._subscriber.consumer
        await consumer.position(TopicPartition(self._topic, 0))  # loads the topic's metadata
        numbers = list(consumer.partitions_for_topic(self._topic) or (0,))
        random.shuffle(numbers)
        self._connection = connection = await pool.acquire()  # its lock lives as long as it does
        number = await claim_partition(connection, self._topic, numbers)
        if number is None:
            number = numbers[0]
            _log.warning("all reply partitions are read by other gateways; this one is shared", partition=number)
        partition = TopicPartition(self._topic, number)
        consumer.assign([partition])
        await consumer.seek_to_end(partition)
        await consumer.position(partition)
        self._gateway.reply_partition = number
        _log.info("reading replies", partition=number)


def _subscribe(
    broker: KafkaBroker, kafka: KafkaSettings, dead_letters: DeadLetterPublisher, gateway: Gateway, monitor: Monitor
) -> list[Subscriber]:
    """Subscribe to what every gateway reads, and to footprints, of which each is booked by one gateway.

    Returns:
        The subscribers of the topics that are read from their beginning.
    """
    state = [subscribe_compacted(broker, kafka, dead_letters, spec) for spec in (POLICIES, CARBON_INTENSITY, CAPACITY)]
    known_policies, known_intensities, known_capacities = state

    @known_policies
    async def on_policies(policies: list[Policy]) -> None:
        gateway.estimates.update(policies)
        monitor.update_policies(policies)

    @known_intensities
    async def on_intensities(intensities: list[CarbonIntensity]) -> None:
        monitor.update_intensities(intensities)

    @known_capacities
    async def on_capacities(capacities: list[PoolCapacity]) -> None:
        monitor.update_capacities(capacities)

    @subscribe_batches(broker, kafka, dead_letters, FOOTPRINTS, group=NAME, max_records=FOOTPRINT_BATCH)
    async def on_footprints(footprints: list[Footprint]) -> None:
        try:
            await gateway.ready_accounts().book(footprints)
        except DatabaseUnavailableError:
            await asyncio.sleep(RETRY_PAUSE_S)
            raise

    return state


async def _open_stores(gateway: Gateway, pool: asyncpg.Pool, status: DatabaseStatus) -> None:
    """Give the gateway its tables."""
    settings, clock = gateway.settings, gateway.clock
    gateway.keys = KeyStore(pool, status, cache_s=settings.key_cache_s, timeout_s=settings.admission_timeout_s)
    gateway.accounts = Accounts(
        pool, status, levels=gateway.fleet.levels, settings=settings, clock=clock, metrics=gateway.metrics
    )
    await gateway.accounts.renew()
    gateway.files = FileStore(pool, status, clock)
    gateway.batches = BatchStore(
        pool, status, clock, retention_days=settings.file_retention_days, lease_s=settings.batch_lease_s
    )


def _batch_runner(gateway: Gateway) -> BatchRunner:
    """What works on batches, once replies are read."""
    files, batches = gateway.opened_batches()
    gateway.batch_runner = BatchRunner(
        files=files,
        batches=batches,
        answers_of=partial(
            BatchAnswers,
            status=batches.status,
            accounts=gateway.ready_accounts(),
            inbox=gateway.inbox,
            estimates=gateway.estimates,
            publisher=gateway.publisher,
            reply_partition=gateway.reply_partition or 0,
            fleet=gateway.fleet,
            settings=gateway.settings,
            clock=gateway.clock,
        ),
        settings=gateway.settings,
        metrics=gateway.metrics,
    )
    return gateway.batch_runner


def build_app(
    *,
    kafka: KafkaSettings | None = None,
    database: DatabaseSettings | None = None,
    settings: GatewaySettings | None = None,
    fleet: Fleet | None = None,
    clock: Clock | None = None,
) -> AsgiFastStream:
    """Build the gateway without connecting; arguments that are None are read from the environment.

    Raises:
        FleetError, ValidationError: the configuration is not valid.
    """
    kafka = kafka or KafkaSettings()
    database = database or DatabaseSettings()
    settings = settings or GatewaySettings()
    fleet = fleet or load_fleet(FleetSettings().file)
    clock = clock or Clock.from_environment()
    registry, health, status = CollectorRegistry(), Health(), DatabaseStatus()
    metrics, database_metrics = GatewayMetrics(registry), DatabaseMetrics(registry)
    broker, dead_letters = build_broker(
        kafka, service=NAME, clock=clock, registry=registry, message_metrics=False, linger_ms=settings.linger_ms
    )
    publisher = RequestPublisher(broker, kafka, settings=settings, clock=clock, metrics=metrics)
    gateway = Gateway(
        fleet=fleet,
        settings=settings,
        clock=clock,
        inbox=ReplyInbox(),
        estimates=Estimates(),
        metrics=metrics,
        publisher=publisher,
    )
    metrics.watch_open(lambda: len(gateway.inbox))
    monitor = Monitor(fleet, started_at=clock.now())
    replies = Replies(broker, dead_letters, gateway, monitor, kafka=kafka)

    state = _subscribe(broker, kafka, dead_letters, gateway, monitor)
    pools: list[asyncpg.Pool] = []

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        async with await open_pool(database, schema=NAME, metrics=database_metrics, stateless=True) as pool:
            with status.watch():
                await migrate(pool, schema=NAME, package="services.gateway.migrations")
            await _open_stores(gateway, pool, status)
            pools.append(pool)
            yield

    async def begin() -> None:
        accounts = gateway.ready_accounts()
        health.spawn("check PostgreSQL", status.check_forever(database))
        health.spawn("write requests", accounts.run())
        health.spawn("renew the lease", accounts.keep_lease())
        health.spawn("remove old requests", accounts.remove_old())
        # The gateway is ready when it reads replies: without the policies a budget would not be charged.
        if not await read_to_end(state, within_s=STATE_WAIT_S):
            _log.warning("the first requests are answered before the policies have been read")
        await replies.start(pools[0])
        runner = _batch_runner(gateway)
        health.spawn("batches", runner.run())
        health.spawn("expired files", runner.clean())

    health.add_check("postgresql", status.problem)
    health.add_check("replies", lambda: "no reply partition yet" if gateway.reply_partition is None else None)
    app = build_service(
        broker,
        name=NAME,
        description=DESCRIPTION,
        kafka=kafka,
        topics=(
            REQUESTS,
            publisher.lane,
            CANCELLATIONS,
            REPLIES,
            POLICIES,
            FOOTPRINTS,
            CARBON_INTENSITY,
            CAPACITY,
            DEAD_LETTERS,
        ),
        registry=registry,
        health=health,
        lifespan=running,
    )
    app.after_startup(begin)
    app.send_timeout_s = settings.send_timeout_s
    app.http = BoundedHttp
    api = build_api(gateway, version=VERSION, started_at=clock.now())
    add_page(api, monitor, clock=clock, authenticate=gateway.authenticate, host=HttpSettings().host)
    app.api = HttpLimits(api, settings=settings, metrics=metrics)
    return app


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    run_service(build_app, name=NAME, configuration_errors=(FleetError,))
