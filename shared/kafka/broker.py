"""The FastStream broker of a service: Kafka with the settings that Sprout's guarantees rest on.

`KafkaStatus` says whether Kafka answers, for readiness.
"""

import asyncio
import logging
from functools import partial
from types import TracebackType
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from faststream.kafka import KafkaBroker
from faststream.kafka.prometheus import KafkaPrometheusMiddleware
from faststream.middlewares import AckPolicy
from prometheus_client import CollectorRegistry

from shared.kafka.careful import CarefulBatches
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.handling import DeadLetterMiddleware
from shared.kafka.publish import ProducerMiddleware, RecoveringProducer
from shared.kafka.unreadable import UnreadableRecords
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings

MAX_REQUEST_BYTES = 8 * 1024 * 1024
BATCH_BYTES = 16 * 1024
"""Size at which a batch of messages is sent, before compression."""

CHECK_INTERVAL_S: Final = 2.0
"""Wall seconds between two checks."""

CHECK_TIMEOUT_S: Final = 4.0
"""Wall seconds that a check may take. Kafka's own clients notice a frozen broker only after 30 to 40 s."""

_log = get_logger(__name__)


class ServiceBroker(KafkaBroker):
    """A FastStream broker whose publishers send through a `RecoveringProducer`.

    FastStream's own producer is left out (`consumer_only`): it cannot be replaced while the service runs.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        *,
        service: str,
        dead_letters: DeadLetterPublisher,
        registry: CollectorRegistry | None,
        linger_ms: int,
        batch_bytes: int,
    ) -> None:
        self.dead_letters = dead_letters
        self.unreadable = UnreadableRecords(kafka)
        self.careful: list[CarefulBatches] = []
        self._recovering_producer = RecoveringProducer(
            **kafka.client_options(),
            client_id=f"sprout.{service}",
            acks="all",
            enable_idempotence=True,
            max_request_size=MAX_REQUEST_BYTES,
            linger_ms=linger_ms,
            max_batch_size=batch_bytes,
            compression_type=None if kafka.compression == "none" else kafka.compression,
        )
        super().__init__(
            kafka.bootstrap_servers,
            client_id=f"sprout.{service}",
            security=kafka.broker_security(),
            sasl_oauth_token_provider=kafka.oauth_tokens,
            consumer_only=True,
            allow_auto_create_topics=False,
            ack_policy=AckPolicy.NACK_ON_ERROR,
            middlewares=(
                *(() if registry is None else (KafkaPrometheusMiddleware(registry=registry, app_name=service),)),
                partial(DeadLetterMiddleware, dead_letters=dead_letters),
                partial(ProducerMiddleware, producer=self._recovering_producer),
            ),
            logger=logging.getLogger(f"faststream.{service}"),
            log_level=logging.DEBUG,
        )

    async def start(self) -> None:
        """Connect the producer, then start the subscribers."""
        await self._recovering_producer.start()
        pausing = asyncio.create_task(self.unreadable.pause_ungrouped())
        try:
            await super().start()
        except BaseException:
            pausing.cancel()
            raise
        await pausing

    async def stop(
        self,
        exc_type: type[BaseException] | None = None,
        exc_val: BaseException | None = None,
        exc_tb: TracebackType | None = None,
    ) -> None:
        """Stop the subscribers, then the producer; does not wait for a Kafka that is unreachable."""
        await asyncio.gather(*(one.finish() for one in self.careful))
        try:
            await super().stop(exc_type, exc_val, exc_tb)
        finally:
            await self._recovering_producer.stop()


def unreadable_records(broker: KafkaBroker, kafka: KafkaSettings) -> UnreadableRecords:
    """The records that the subscribers of a broker must not unpack."""
    return broker.unreadable if isinstance(broker, ServiceBroker) else UnreadableRecords(kafka)


def build_broker(
    kafka: KafkaSettings,
    *,
    service: str,
    clock: Clock,
    registry: CollectorRegistry,
    message_metrics: bool = True,
    linger_ms: int = 0,
    batch_bytes: int = BATCH_BYTES,
) -> tuple[KafkaBroker, DeadLetterPublisher]:
    """A broker that is not connected yet, and the publisher of its dead letters.

    Differs from FastStream's defaults where those would lose or duplicate messages: subscribers create no topics,
    messages are produced idempotently with `acks=all` by a producer that recovers, a handler's unexpected error leads
    to a dead letter, and what is not acknowledged is delivered again rather than skipped.

    Args:
        registry: for the metrics.
        message_metrics: whether FastStream counts received and published messages.
        linger_ms: how long the producer waits for more messages of a batch, wall milliseconds.
        batch_bytes: size at which a batch of messages is sent, before compression.
    """
    dead_letters = DeadLetterPublisher(kafka=kafka, service=service, clock=clock, registry=registry)
    broker = ServiceBroker(
        kafka,
        service=service,
        dead_letters=dead_letters,
        registry=registry if message_metrics else None,
        linger_ms=linger_ms,
        batch_bytes=batch_bytes,
    )
    dead_letters.attach(broker)
    return broker, dead_letters


async def wait_for_kafka(kafka: KafkaSettings, topics: list[str]) -> None:
    """Wait until the broker answers and every topic exists; FastStream itself does not wait.

    Raises:
        TimeoutError: not within `kafka.connect_timeout_s`; the message says what was missing and what to check.
    """
    missing = f"the broker at {kafka.bootstrap_servers}"
    logged = ""
    try:
        async with asyncio.timeout(kafka.connect_timeout_s):
            while missing := await _find_missing(kafka, topics):
                if missing != logged:
                    _log.info("waiting for Kafka", missing=missing)
                    logged = missing
                await asyncio.sleep(0.5)
    except TimeoutError:
        raise TimeoutError(f"Kafka is not ready after {kafka.connect_timeout_s:.0f} s: {missing}") from None


async def _find_missing(kafka: KafkaSettings, topics: list[str]) -> str:
    """What is missing and what to check, for people; empty when nothing is missing."""
    admin = AIOKafkaAdminClient(**kafka.client_options(), request_timeout_ms=5_000)
    try:
        await admin.start()
        missing = sorted(set(topics) - set(await admin.list_topics()))
    except (KafkaError, OSError) as error:
        return f"no broker answers at {kafka.bootstrap_servers} ({type(error).__name__}); {kafka.connection_advice()}"
    finally:
        await admin.close()
    return f"topics {', '.join(missing)}; create them with 'sprout topics create'" if missing else ""


class KafkaStatus:
    """Asks Kafka again and again for the metadata of a topic, on a connection that does nothing else."""

    def __init__(self, kafka: KafkaSettings, topic: str) -> None:
        """Set up.

        Args:
            topic: full name of a topic of the service.
        """
        self._kafka = kafka
        self._topic = topic
        self._problem: str | None = None

    def problem(self) -> str | None:
        """The readiness check; `None` while Kafka answers."""
        return self._problem

    async def check_forever(self) -> None:
        """Check, without end."""
        admin: AIOKafkaAdminClient | None = None
        try:
            while True:
                try:
                    async with asyncio.timeout(CHECK_TIMEOUT_S):
                        if admin is None:
                            admin = AIOKafkaAdminClient(**self._kafka.client_options())
                            await admin.start()
                        await admin.describe_topics([self._topic])
                except Exception as error:  # noqa: BLE001 - whatever it is, the check continues
                    self._note(f"Kafka does not answer ({type(error).__name__})")
                    await _close(admin)
                    admin = None
                else:
                    self._note(None)
                await asyncio.sleep(CHECK_INTERVAL_S)
        finally:
            await _close(admin)

    def _note(self, problem: str | None) -> None:
        if problem is None and self._problem is not None:
            _log.info("Kafka answers")
        elif problem is not None and self._problem is None:
            _log.warning("waiting for Kafka", problem=problem)
        self._problem = problem


async def _close(admin: AIOKafkaAdminClient | None) -> None:
    if admin is not None:
        await admin.close()
