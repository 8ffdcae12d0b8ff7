"""Decoders and handlers of subscribers, which make a dead letter of what cannot be processed.

- Single messages: `DeadLetterMiddleware`, which `build_broker` installs, publishes a dead letter for a message that its
  handler cannot parse or process, and acknowledges it.
- Batches: `decode_records` publishes a dead letter for every record that is invalid; the handler receives the others.
  When it fails, `handle_batch` calls it with one record at a time.
"""

import base64
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

from aiokafka import ConsumerRecord
from aiokafka.errors import KafkaError
from faststream import BaseMiddleware, ContextRepo
from faststream.exceptions import HandlerException, StopConsume
from faststream.kafka import KafkaMessage
from pydantic import ValidationError

from shared.kafka.dead_letters import HANDLER_ERROR, DeadLetterPublisher
from shared.kafka.records import PoisonMessageError, check_size, describe, parse, parse_record
from shared.messages import Message
from shared.runtime.logs import get_logger, where
from shared.topics import TopicSpec

_log = get_logger(__name__)


class RetryLaterError(RuntimeError):
    """The message is valid but the handler cannot process it now; it is delivered again."""


class ParsedRecord(NamedTuple):
    """A record of a batch with its message."""

    record: "ConsumerRecord[bytes, bytes]"
    message: Message


async def decode_records(
    spec: TopicSpec, records: "Sequence[ConsumerRecord[bytes, bytes]]", dead_letters: DeadLetterPublisher
) -> list[ParsedRecord]:
    """Parse records of a topic; publishes a dead letter for each invalid one.

    A record without a value (a tombstone of a compacted topic) is skipped.

    Raises:
        KafkaError: a dead letter could not be published.
    """
    parsed: list[ParsedRecord] = []
    for record in records:
        if record.value is None:
            continue
        try:
            parsed.append(ParsedRecord(record, parse_record(spec, record, dead_letters.clock)))
        except PoisonMessageError as error:
            await dead_letters.publish(record, error)
    return parsed


async def raw_records(message: KafkaMessage) -> "tuple[ConsumerRecord[bytes, bytes], ...]":
    """A decoder for a batch subscriber, whose handler parses the records: see `decode_records`."""
    return _records_of(message.raw_message)


async def handle_batch(
    batch: Sequence[ParsedRecord],
    handler: Callable[[list[Any]], Awaitable[Any]],
    dead_letters: DeadLetterPublisher,
) -> None:
    """Call a handler with the messages of a batch; if it fails, with one message at a time.

    So a message that the handler cannot process becomes a dead letter and costs no other. A handler must therefore
    accept a message that it has processed before.

    Raises:
        RetryLaterError, KafkaError: Kafka delivers the batch again.
    """
    if not batch:
        return
    failed: list[tuple[ParsedRecord, PoisonMessageError]] = []
    try:
        await handler([one.message for one in batch])
    except Exception as error:
        if is_redelivered(error):
            raise
        failed = [(batch[0], _as_poison(error))] if len(batch) == 1 else await _handle_singly(batch, handler, error)
    for one, poison in failed:
        await dead_letters.publish(one.record, poison)
    dead_letters.note_processed(batch[0].record.topic, len(batch) - len(failed))


async def _handle_singly(
    batch: Sequence[ParsedRecord], handler: Callable[[list[Any]], Awaitable[Any]], error: Exception
) -> list[tuple[ParsedRecord, PoisonMessageError]]:
    """Call a handler with one message at a time, after it failed with an error; returns those that fail."""
    _log.warning("a batch failed, trying its records one by one", records=len(batch), error=type(error).__name__)
    failed: list[tuple[ParsedRecord, PoisonMessageError]] = []
    for one in batch:
        try:
            await handler([one.message])
        except Exception as single:
            if is_redelivered(single):
                raise
            failed.append((one, _as_poison(single)))
    return failed


def message_decoder(spec: TopicSpec) -> Callable[[KafkaMessage], Awaitable[Message]]:
    """A decoder for a subscriber of single messages; `DeadLetterMiddleware` handles its errors."""

    async def decode(message: KafkaMessage) -> Message:
        (record,) = _records_of(message.raw_message)
        check_size(record, spec.max_message_bytes)
        return parse(spec.message, record.value)

    return decode


async def parse_any_headers(
    raw: Any,  # noqa: ANN401 - a record or a batch of records
    parse_text: Callable[[Any], Awaitable[KafkaMessage]],
) -> KafkaMessage:
    """A FastStream parser for records with binary header values, at which FastStream's own parser fails.

    The handler sees such values in base64; the raw message, from which a dead letter is made, keeps them as they are.
    """
    if all(_is_text(content) for record in _records_of(raw) for _, content in record.headers):
        return await parse_text(raw)
    encoded = tuple(_with_text_headers(record) for record in _records_of(raw))
    message = await parse_text(encoded if isinstance(raw, (tuple, list)) else encoded[0])
    message.raw_message = raw
    return message


class DeadLetterMiddleware(BaseMiddleware[Any, Any]):
    """Turns a message that cannot be processed into a dead letter and acknowledges it."""

    def __init__(self, msg: Any, /, *, context: ContextRepo, dead_letters: DeadLetterPublisher) -> None:  # noqa: ANN401
        super().__init__(msg, context=context)
        self._dead_letters = dead_letters

    async def after_processed(
        self,
        exc_type: type[BaseException] | None = None,  # noqa: ARG002
        exc_val: BaseException | None = None,
        exc_tb: TracebackType | None = None,  # noqa: ARG002
    ) -> bool | None:
        """Publish a dead letter for every record of a message that failed; `True`: FastStream acknowledges it."""
        if exc_val is None or is_redelivered(exc_val):
            return False
        if not isinstance(exc_val, Exception):
            return False  # cancellation: the message stays unacknowledged
        poison = _as_poison(exc_val)
        for record in self._records():
            await self._dead_letters.publish(record, poison)
        return True

    def _records(self) -> "tuple[ConsumerRecord[bytes, bytes], ...]":
        if self.msg is None:
            return ()
        return _records_of(self.msg)


def is_redelivered(error: BaseException) -> bool:
    """Whether a message is delivered again after an error, which is not the message's fault."""
    return isinstance(error, (HandlerException, StopConsume, RetryLaterError, KafkaError))


def _records_of(raw: Any) -> "tuple[ConsumerRecord[bytes, bytes], ...]":  # noqa: ANN401
    """The records of a FastStream raw message: one, or a batch (a list with the in-memory test broker)."""
    return tuple(raw) if isinstance(raw, (tuple, list)) else (raw,)


def _with_text_headers(record: "ConsumerRecord[bytes, bytes]") -> "ConsumerRecord[bytes, bytes]":
    headers = tuple(
        (name, content if _is_text(content) else base64.b64encode(content or b"")) for name, content in record.headers
    )
    return replace(record, headers=headers)


def _as_poison(error: Exception) -> PoisonMessageError:
    if isinstance(error, PoisonMessageError):
        return error
    if isinstance(error, ValidationError):
        return PoisonMessageError("invalid_message", describe(error))
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return PoisonMessageError("invalid_json", type(error).__name__)
    # The text of an unexpected error may quote the message.
    _log.error("handler failed", error=type(error).__name__, where=where(error))
    return PoisonMessageError(HANDLER_ERROR, type(error).__name__)


def _is_text(content: bytes | None) -> bool:
    if content is None:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
