"""The FastStream broker of a service: Kafka with the settings that Sprout's guarantees rest on."""

import asyncio
import logging

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from faststream.kafka import KafkaBroker
from faststream.kafka.prometheus import KafkaPrometheusMiddleware
from faststream.middlewares import AckPolicy
from prometheus_client import CollectorRegistry

from shared.kafka.dead_letters import DeadLetterMiddleware, DeadLetterPublisher
from shared.kafka.refusal import KafkaRefusedError, refusal
from shared.kafka.renewal import RenewingProducer
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings

LARGEST_REQUEST_BYTES = 8 * 1024 * 1024

_log = get_logger(__name__)


def build_broker(
    kafka: KafkaSettings,
    *,
    service: str,
    clock: Clock,
    registry: CollectorRegistry,
    linger_ms: int = 0,
) -> tuple[KafkaBroker, DeadLetterPublisher]:
    """A broker that is not connected yet, and the dead_letters that keeps its poison messages.

    Differs from FastStream's defaults where they would lose or invent something: topics are never created by a
    subscriber, records are produced idempotently with `acks=all`, a producer that Kafka does not take from any more is
    replaced, an unhandled error leads to a dead letter, and what remains unacknowledged is redelivered rather than
    skipped.
    """
    dead_letters = DeadLetterPublisher(kafka=kafka, service=service, clock=clock)
    broker = KafkaBroker(
        kafka.bootstrap_servers,
        client_id=f"sprout.{service}",
        allow_auto_create_topics=False,
        acks="all",
        enable_idempotence=True,
        security=kafka.broker_security(),
        max_request_size=LARGEST_REQUEST_BYTES,
        linger_ms=linger_ms,
        ack_policy=AckPolicy.NACK_ON_ERROR,
        middlewares=(
            KafkaPrometheusMiddleware(registry=registry, app_name=service),
            DeadLetterMiddleware(dead_letters),
        ),
        logger=logging.getLogger(f"faststream.{service}"),
        log_level=logging.DEBUG,
    )
    broker.config.broker_config.producer = RenewingProducer(broker)
    dead_letters.attach(broker)
    return broker, dead_letters


async def wait_for_kafka(kafka: KafkaSettings, topics: list[str]) -> None:
    """Wait until the broker answers and every topic exists; FastStream itself gives up at once.

    Raises:
        KafkaRefusedError: the broker answers and does not accept the credentials, or its certificate is not trusted.
        TimeoutError: not within `kafka.connect_attempts_s`; the message says what was missing.
    """
    waiting_for = f"the broker at {kafka.bootstrap_servers}"
    announced = ""
    try:
        async with asyncio.timeout(kafka.connect_attempts_s):
            while True:
                waiting_for = await _still_missing(kafka, topics)
                if not waiting_for:
                    return
                if waiting_for != announced:
                    _log.info("waiting for Kafka", missing=waiting_for)
                    announced = waiting_for
                await asyncio.sleep(0.5)
    except TimeoutError:
        raise TimeoutError(
            f"Kafka is not ready after {kafka.connect_attempts_s:.0f} s: {waiting_for}. Check SPROUT_KAFKA_BOOTSTRAP_"
            "SERVERS and SPROUT_KAFKA_SECURITY_PROTOCOL; create missing topics with 'sprout topics create'"
        ) from None


async def _still_missing(kafka: KafkaSettings, topics: list[str]) -> str:
    """What is not there yet, in words; empty when nothing is."""
    admin = AIOKafkaAdminClient(**kafka.client_options(), request_timeout_ms=5_000)
    try:
        await admin.start()
        missing = sorted(set(topics) - set(await admin.list_topics()))
    except (KafkaError, OSError) as error:
        refused = await refusal(kafka)
        if refused is not None:
            raise KafkaRefusedError(refused) from None
        return f"no broker answers at {kafka.bootstrap_servers} in {kafka.security_protocol} ({type(error).__name__})"
    finally:
        await admin.close()
    return f"topics {', '.join(missing)}" if missing else ""
