"""Workaround for two faults of aiokafka (0.14.0): its idempotent producer does not recover from a rejected batch, and
not from a Kafka that named no broker when the producer started.

Kafka accepts the batches of an idempotent producer in the order of their sequence numbers only. aiokafka numbers a
batch before sending it and does not take the number back. So after Kafka has rejected one batch (for example as too
large) it rejects every later batch of that partition. Java's producer starts a new epoch then (KIP-360). aiokafka's
sender task can also end with an error. In both cases `RecoveringProducer` replaces the producer. Publishers reach it
by `ProducerMiddleware`, because FastStream's own producer cannot be replaced while the service runs.

A Kafka that is starting or stopping may answer without naming any broker. A client that starts then keeps its first
connection until it knows a broker. If Kafka closes that connection, the client never asks anybody again. A consumer's
start ends with an error after 40 s; that of a producer succeeds at once, so the brokers are looked at after it.

The first is reported: https://github.com/aio-libs/aiokafka/issues/1017. `tests/integration/test_library_faults.py`
fails when aiokafka recovers from it: then `RecoveringProducer` can go, and `consumer_only` in `shared.kafka.broker`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    InvalidTimestampError,
    KafkaConnectionError,
    KafkaError,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    ProducerFenced,
    UnknownProducerId,
)
from faststream import BaseMiddleware, ContextRepo
from faststream.exceptions import IncorrectState
from faststream.kafka import KafkaPublishCommand
from faststream.message import encode_message
from pydantic import BaseModel

from shared.kafka.publish import TOO_LARGE
from shared.runtime.logs import get_logger

UNRECOVERABLE: Final = (
    *TOO_LARGE,
    InvalidTimestampError,
    OutOfOrderSequenceNumber,
    UnknownProducerId,
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    ProducerFenced,
)
"""Errors after which the sequence numbers of a producer and those that Kafka expects differ."""

FLUSH_TIMEOUT_S: Final = 5.0
"""Wall seconds that stopping a producer waits for its unsent messages."""

_log = get_logger(__name__)


class RecoveringProducer:
    """An idempotent aiokafka producer that is replaced after an error it cannot recover from.

    A new producer with a new id takes over; the old one finishes its other messages in the background.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - the options of AIOKafkaProducer
        self._options = options
        self._producer: AIOKafkaProducer | None = None
        self._replacing = asyncio.Lock()
        self._stopping: set[asyncio.Task[None]] = set()

    @property
    def is_started(self) -> bool:
        """Whether `send` may be called."""
        return self._producer is not None

    async def start(self) -> None:
        """Connect.

        Raises:
            KafkaError: Kafka cannot be reached.
        """
        if self._producer is None:
            self._producer = await self._connect()

    async def stop(self) -> None:
        """Stop; waits at most `FLUSH_TIMEOUT_S` for unsent messages, so that it ends while Kafka is unreachable."""
        producer, self._producer = self._producer, None
        if producer is not None:
            self._stop_in_background(producer)
        if not self._stopping:
            return
        _, unfinished = await asyncio.wait(self._stopping, timeout=FLUSH_TIMEOUT_S)
        for task in unfinished:
            _log.warning("stopping without having published every message: Kafka does not respond")
            task.cancel()

    async def send(self, topic: str, value: bytes | None, **options: Any) -> Any:  # noqa: ANN401 - aiokafka's metadata
        """Send a message; returns once Kafka has it.

        Args:
            options: `key`, `partition`, `timestamp_ms`, `headers` of `AIOKafkaProducer.send`.

        Raises:
            KafkaError: it could not be sent, or Kafka did not say whether it has it.
            IncorrectState: the producer is not started, or stopped.
        """
        while True:
            producer = self._running()
            numbered = False
            try:
                sent = await producer.send(topic, value, **options)
                numbered = True
                return await sent
            except ProducerClosed:
                # The producer was replaced before it took the message.
                if producer is self._producer:
                    raise
            except KafkaError as error:
                await self._recover(producer, error, numbered=numbered)
                raise

    async def send_batches(
        self,
        topic: str,
        number: int,
        messages: Iterable[tuple[bytes | None, bytes | None]],
        *,
        headers: Sequence[tuple[str, bytes]],
    ) -> list[Any]:
        """Send many messages to one partition, in batches that are filled here; returns once Kafka has them all.

        That takes a fraction of the time of single messages, for each of which aiokafka hashes the key and makes a
        future.

        Args:
            number: of the partition, modulo the number of partitions that the topic has.
            messages: keys and values.
            headers: of every message.

        Raises:
            KafkaError, IncorrectState: as `send`; some of the messages may have been published.
        """
        producer = self._running()
        sent: list[asyncio.Future[Any]] = []
        try:
            partitions = sorted(await producer.partitions_for(topic))
            partition = partitions[number % len(partitions)]
            batch = producer.create_batch()
            for key, value in messages:
                if batch.append(key=key, value=value, timestamp=None, headers=headers) is None:
                    sent.append(await producer.send_batch(batch, topic, partition=partition))
                    batch = producer.create_batch()
                    batch.append(key=key, value=value, timestamp=None, headers=headers)  # an empty one takes any size
            sent.append(await producer.send_batch(batch, topic, partition=partition))
            return await asyncio.gather(*sent)
        except KafkaError as error:
            for future in sent:
                future.add_done_callback(_ignore_result)
            await self._recover(producer, error, numbered=True)
            raise

    def _running(self) -> AIOKafkaProducer:
        """The current producer.

        Raises:
            IncorrectState: not started, or stopped.
        """
        if self._producer is None:
            raise IncorrectState("the Kafka producer is not running")
        return self._producer

    async def _recover(self, producer: AIOKafkaProducer, error: KafkaError, *, numbered: bool) -> None:
        """Replace a producer after an error that it cannot recover from.

        Args:
            numbered: whether the message had got a sequence number.
        """
        # A sender task that has ended fails every message with a plain KafkaError. A message that is too large for the
        # producer itself never gets a sequence number.
        if type(error) is KafkaError or (
            isinstance(error, UNRECOVERABLE) and (numbered or not isinstance(error, TOO_LARGE))
        ):
            await self._replace(producer, error)

    async def _replace(self, broken: AIOKafkaProducer, reason: KafkaError) -> None:
        """Let a new producer take over from `broken`, unless another call has already done so."""
        async with self._replacing:
            if self._producer is not broken:
                return
            _log.warning("replacing the Kafka producer", error=type(reason).__name__)
            try:
                replacement = await self._connect()
            except (KafkaError, OSError) as error:
                _log.warning("the Kafka producer could not be replaced yet", error=type(error).__name__)
                return
            if self._producer is broken:
                self._producer = replacement
                self._stop_in_background(broken)
            else:
                self._stop_in_background(replacement)

    async def _connect(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(**self._options)
        try:
            await producer.start()
            _require_brokers(producer)
        except BaseException:
            await producer.stop()
            raise
        return producer

    def _stop_in_background(self, producer: AIOKafkaProducer) -> None:
        task = asyncio.create_task(_stop(producer), name="stop Kafka producer")
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)


def _require_brokers(producer: AIOKafkaProducer) -> None:
    """Raise `KafkaConnectionError` unless Kafka has named a broker."""
    if not producer.client.cluster.brokers():
        raise KafkaConnectionError("Kafka names no broker yet")


def _ignore_result(future: "asyncio.Future[Any]") -> None:
    """Note the error of a message whose sender does not wait any more."""
    if not future.cancelled():
        future.exception()


async def _stop(producer: AIOKafkaProducer) -> None:
    try:
        await producer.stop()
    except KafkaError as error:
        _log.warning("a Kafka producer did not stop cleanly", error=type(error).__name__)


class ProducerMiddleware(BaseMiddleware[KafkaPublishCommand, Any]):
    """Sends what a FastStream publisher publishes through the broker's `RecoveringProducer`."""

    def __init__(self, msg: Any, /, *, context: ContextRepo, producer: RecoveringProducer) -> None:  # noqa: ANN401
        super().__init__(msg, context=context)
        self._producer = producer

    async def publish_scope(
        self, call_next: Callable[[KafkaPublishCommand], Awaitable[Any]], cmd: KafkaPublishCommand
    ) -> Any:  # noqa: ANN401 - RecordMetadata, or a future of it
        """Publish a message, or the messages of a batch; see `RecoveringProducer.send` for the errors."""
        if not self._producer.is_started:
            # FastStream's in-memory test broker is not started; otherwise this raises that the broker is not connected.
            return await call_next(cmd)
        bodies = cmd.batch_bodies
        if len(bodies) <= 1:
            key = cmd.key_for(0)
            value, content_type = self._value(cmd.body, key)
            sending = self._producer.send(
                cmd.destination,
                value,
                key=key,
                partition=cmd.partition,
                timestamp_ms=cmd.timestamp_ms,
                headers=self._headers(cmd, content_type),
            )
        else:
            if cmd.partition is None:
                raise ValueError("several messages need a partition: their keys do not choose one")
            _, content_type = self._value(bodies[0], None)
            keys = (cmd.key_for(number) for number in range(len(bodies)))
            sending = self._producer.send_batches(
                cmd.destination,
                cmd.partition,
                ((key, self._value(body, key)[0]) for key, body in zip(keys, bodies, strict=True)),
                headers=self._headers(cmd, content_type),
            )
        return asyncio.ensure_future(sending) if cmd.no_confirm else await sending

    @staticmethod
    def _value(body: Any, key: bytes | None) -> tuple[bytes | None, str | None]:  # noqa: ANN401
        """The value of a message, and its content type."""
        if body is None and key is not None:
            return None, None
        if isinstance(body, BaseModel):
            return body.model_dump_json().encode(), "application/json"
        return encode_message(body, None)

    @staticmethod
    def _headers(cmd: KafkaPublishCommand, content_type: str | None) -> list[tuple[str, bytes]]:
        headers = {"content-type": content_type or "", **cmd.headers_to_publish()}
        return [(name, (content or "").encode()) for name, content in headers.items()]
