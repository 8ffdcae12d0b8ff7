"""A producer that Kafka does not take from any more is replaced.

An idempotent producer numbers the batches of every partition, and Kafka takes them in order alone. aiokafka numbers a
batch before it is sent and never gives a number back: after one that Kafka has refused for good, every later batch of
that partition is out of order for Kafka, until there is a producer with a new identity.
"""

import asyncio
import logging
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    KafkaError,
    OutOfOrderSequenceNumber,
    ProducerFenced,
    UnknownProducerId,
)
from faststream.kafka import KafkaBroker
from faststream.kafka.publisher.producer import AioKafkaFastProducerImpl
from faststream.kafka.publisher.state import EmptyProducerState, ProducerState, RealProducer
from faststream.kafka.response import KafkaPublishCommand

from shared.kafka.publish import TOO_LARGE

BROKEN: Final = (
    *TOO_LARGE,
    OutOfOrderSequenceNumber,
    UnknownProducerId,
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    ProducerFenced,
)
"""After which a producer's numbers and Kafka's are not the same any more."""

FLUSH_S: Final = 5.0
"""Wall seconds for the other messages of a producer that is replaced."""

_log = logging.getLogger(__name__)


class RenewingProducer(AioKafkaFastProducerImpl):
    """FastStream's producer, which a failure for good does not make useless.

    Whoever published still gets the error; another attempt is made with a producer that Kafka has not heard of.
    """

    def __init__(self, broker: KafkaBroker) -> None:
        """For a broker that is not connected yet."""
        super().__init__(parser=None, decoder=None)
        self._broker = broker
        self._renewal: asyncio.Task[None] | None = None

    async def publish(self, cmd: KafkaPublishCommand) -> Any:  # noqa: ANN401 - as FastStream has it
        """Publish a message.

        Raises:
            KafkaError: it could not be published.
        """
        used = self._producer
        try:
            return await super().publish(cmd)
        except KafkaError as error:
            if isinstance(error, BROKEN) or _is_dead(used):
                await self._renew(used, error)
            raise

    async def disconnect(self) -> None:
        """Stop; messages that Kafka does not take within `FLUSH_S` are not waited for."""
        state, self._producer = self._producer, EmptyProducerState()
        if state:
            await _put_down(state.producer)

    async def _renew(self, broken: ProducerState, error: KafkaError) -> None:
        if self._producer is broken and (self._renewal is None or self._renewal.done()):
            self._renewal = asyncio.create_task(self._replace(broken, error))
        if self._renewal is not None:
            # Others wait for it too: it does not end with the request that found the producer broken.
            await asyncio.shield(self._renewal)

    async def _replace(self, broken: ProducerState, error: KafkaError) -> None:
        _log.warning("the producer is replaced", extra={"error": type(error).__name__})
        fresh = AIOKafkaProducer(**self._broker._connection_kwargs)  # noqa: SLF001 - as FastStream makes its own
        try:
            await fresh.start()
        except KafkaError:
            await fresh.stop()
            raise
        self._producer = RealProducer(fresh)
        await _put_down(broken.producer)


def _is_dead(state: ProducerState) -> bool:
    """Whether the task that sends has ended, after an error that nobody foresaw."""
    task = state.producer._sender.sender_task if state else None  # noqa: SLF001 - nothing else tells
    return task is not None and task.done()


async def _put_down(producer: AIOKafkaProducer) -> None:
    """Stop a producer; what it cannot send within `FLUSH_S` fails, so that nobody waits for it."""
    try:
        async with asyncio.timeout(FLUSH_S):
            await producer.stop()
    except (TimeoutError, KafkaError):
        producer._message_accumulator.fail_all(KafkaError("the producer was stopped"))  # noqa: SLF001
        try:
            async with asyncio.timeout(FLUSH_S):
                await producer._sender.close()  # noqa: SLF001
                await producer.client.close()
        except (TimeoutError, KafkaError) as error:
            _log.warning("a producer did not end", extra={"error": type(error).__name__})
