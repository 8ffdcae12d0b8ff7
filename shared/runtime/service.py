"""Runs a service: the FastStream application with health, readiness and metrics over HTTP, until it is stopped.

Every service has metrics of its build and process, and of the lag of its consumers.
"""

import asyncio
import gc
import json
import platform
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Literal

import uvicorn
import uvloop
from aiokafka.errors import IllegalStateError, KafkaError
from faststream.asgi import AsgiFastStream, AsgiResponse, get
from faststream.asgi.types import ASGIApp, Receive, Scope, Send
from faststream.kafka import KafkaBroker
from faststream.specification import AsyncAPI
from prometheus_client import CollectorRegistry, Gauge, GCCollector, ProcessCollector, make_asgi_app
from pydantic import ValidationError

from shared.kafka.admin import warn_of_drift
from shared.kafka.broker import KafkaStatus, ServiceBroker, unreadable_records, wait_for_kafka
from shared.kafka.records import describe
from shared.runtime.health import Health, ProgressCollector
from shared.runtime.logs import configure_logging, get_logger, printable
from shared.runtime.settings import HttpSettings, KafkaSettings, LogSettings
from shared.topics import TopicSpec

VERSION = "0.1.0"

KEEP_ALIVE_S = 75
"""Wall seconds until an idle connection is closed: longer than common clients and proxies keep one for their next
request, which would otherwise meet a connection that is being closed."""

GC_THRESHOLDS = (20_000, 20, 50)
"""Thresholds of Python's garbage collector. With the default of 700 allocations it would run every few requests and,
with hundreds of requests in flight, free nothing; see `docs/decisions/0014-processor-time.md`."""

_log = get_logger(__name__)

Lifespan = Callable[[], AbstractAsyncContextManager[None]]
"""Opens what must be open while the broker runs (pools, clients), and closes it."""

LAG_INTERVAL_S: Final = 5.0
"""Wall seconds between two measurements of the lag."""

POSITION_TIMEOUT_S: Final = 1.0
"""Longest wait for the position of a consumer that has none yet, wall."""


class Service(AsgiFastStream):
    """A FastStream application that may have an HTTP API beside health, readiness and metrics.

    Attributes:
        api: gets every request that no route of FastStream takes.
        send_timeout_s: a client that takes nothing for this long is disconnected, wall; None: never.
        http: uvicorn's parser of HTTP, by its name or class. Of its own ones only the default limits headers.
    """

    api: ASGIApp | None = None
    send_timeout_s: float | None = None
    http: type[asyncio.Protocol] | Literal["h11"] = "h11"

    async def not_found(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request to the API; see FastStream."""
        if self.api is None or scope["type"] != "http":
            await super().not_found(scope, receive, send)
        else:
            await self.api(scope, receive, send)


def build_service(
    broker: KafkaBroker,
    *,
    name: str,
    description: str,
    kafka: KafkaSettings,
    topics: tuple[TopicSpec, ...],
    registry: CollectorRegistry,
    health: Health,
    lifespan: Lifespan | None = None,
) -> Service:
    """Build a service; connects to nothing.

    It serves `/health` (liveness), `/ready` (200, or 503 with the reasons) and `/metrics` (Prometheus).

    Args:
        topics: every topic that the service reads or writes; it waits for them before it starts.
        lifespan: entered before the broker starts, left after it has stopped.
    """

    @get(description="Liveness")
    async def live(scope: Scope) -> AsgiResponse:  # noqa: ARG001
        if health.failure is None:
            return _json(200, {"status": "alive"})
        return _json(503, {"status": "failed", "reason": health.failure})

    @get(description="Readiness")
    async def ready(scope: Scope) -> AsgiResponse:  # noqa: ARG001
        problems = health.problems()
        role = {} if health.role is None else {"role": health.role()}
        if problems:
            return _json(503, {"status": "not ready", **role, "problems": problems})
        return _json(200, {"status": "ready", **role})

    @asynccontextmanager
    async def service_lifespan() -> AsyncIterator[None]:
        await wait_for_kafka(kafka, [kafka.topic(spec) for spec in topics])
        await warn_of_drift(kafka, topics)
        await unreadable_records(broker, kafka).inspect()
        async with lifespan() if lifespan is not None else _nothing():
            health.spawn("measure lag", lag.run())
            try:
                health.spawn("check Kafka", kafka_status.check_forever())
                yield
            finally:
                await health.cancel_background()

    started = False

    def note_started() -> None:
        nonlocal started
        started = True
        _log.info("started", service=name, version=VERSION)

    kafka_status = KafkaStatus(kafka, kafka.topic(topics[0]))
    health.add_check("kafka", kafka_status.problem)
    registry.register(ProgressCollector(health))
    register_build_and_process(registry, service=name, version=VERSION)
    lag = LagMeter(broker, registry)
    if isinstance(broker, ServiceBroker):
        health.add_check("dead letters", broker.dead_letters.problem)
    health.add_check("broker", lambda: None if started else "not started yet")
    return Service(
        broker,
        logger=None,
        specification=AsyncAPI(title=f"Sprout {name}", version=VERSION, description=description),
        lifespan=service_lifespan,
        after_startup=(note_started,),
        asgi_routes=(
            ("/health", live),
            ("/ready", ready),
            ("/metrics", make_asgi_app(registry)),
        ),
    )


def run_service(
    build: Callable[[], AsgiFastStream], *, name: str, configuration_errors: tuple[type[Exception], ...] = ()
) -> None:
    """Serve until SIGINT or SIGTERM; exits with status 1 when the service could not start.

    Args:
        build: builds the service from its environment.
        configuration_errors: errors of `build` of which only the message is printed; `ValidationError` is always one.
    """
    try:
        http, logs = HttpSettings(), LogSettings()
        app = build()
    except ValidationError as error:
        sys.exit(printable(f"{name}: {describe(error, root=error.title)}", keep="\n"))
    except configuration_errors as error:
        sys.exit(printable(f"{name}: {error}", keep="\n"))
    configure_logging(name, logs)
    config = uvicorn.Config(
        app,
        host=http.host,
        port=http.port,
        http=app.http if isinstance(app, Service) else "h11",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)
    send_timeout_s = app.send_timeout_s if isinstance(app, Service) else None
    sockets = None if send_timeout_s is None else [_bind(config, send_timeout_s)]
    gc.collect()
    gc.freeze()  # modules and settings live as long as the process
    gc.set_threshold(*GC_THRESHOLDS)
    uvloop.run(server.serve(sockets))
    if not server.started:
        _log.critical("could not start; see the error above", service=name)
        sys.exit(1)


def _bind(config: uvicorn.Config, send_timeout_s: float) -> socket.socket:
    """The listening socket, whose connections the kernel ends when sent data is not taken in time.

    An application cannot: asyncio closes a connection only after what was written has been sent.
    """
    listening = config.bind_socket()
    listening.set_inheritable(False)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1_000 * send_timeout_s))
    return listening


def _json(status: int, body: dict[str, object]) -> AsgiResponse:
    return AsgiResponse(json.dumps(body).encode(), status, {"Content-Type": "application/json"})


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


def register_build_and_process(registry: CollectorRegistry, *, service: str, version: str) -> None:
    """Export `sprout_build_info`, Prometheus' usual `process_*` metrics, and those of Python's garbage collector."""
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    build = Gauge(
        "sprout_build_info", "1; the build is in the labels", ["service", "version", "python"], registry=registry
    )
    build.labels(service, version, platform.python_version()).set(1)


class LagMeter:
    """Measures how many records the subscribers of a service have not been given yet."""

    def __init__(self, broker: KafkaBroker, registry: CollectorRegistry) -> None:
        self._broker = broker
        self._lag = Gauge(
            "sprout_consumer_lag_records",
            "Records of the assigned partitions that were not handed to the service yet; group is empty where every "
            "copy reads all",
            ["topic", "group"],
            registry=registry,
        )

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            await asyncio.sleep(LAG_INTERVAL_S)
            await self.measure()

    async def measure(self) -> None:
        """Measure once; a topic that cannot be measured now keeps its value."""
        lags: dict[tuple[str, str], int] = {}
        for subscriber in self._broker.subscribers:
            consumer: Any = getattr(subscriber, "consumer", None)
            if consumer is None:
                continue
            try:
                async with asyncio.timeout(POSITION_TIMEOUT_S):
                    for partition in consumer.assignment():
                        end = consumer.highwater(partition)
                        if end is None:
                            continue
                        name = partition.topic, getattr(subscriber, "group_id", None) or ""
                        lags[name] = lags.get(name, 0) + max(0, end - await consumer.position(partition))
            except (KafkaError, IllegalStateError, TimeoutError):
                continue
        for (topic, group), lag in lags.items():
            self._lag.labels(topic, group).set(lag)
