"""Poison messages: recognised, kept with their original bytes on `dead-letters`, and passed over.

Three ways in, by the kind of subscriber:

- a subscriber of single messages gets `DeadLetterMiddleware` from `shared.kafka.broker.build_broker`: what its handler
  cannot parse or process becomes a dead letter and is acknowledged;
- a batch subscriber uses `batch_decoder(Model, dead_letters)`: the bad records of a batch become dead letters, the good
  ones reach the handler;
- whoever reads raw records calls `parse` and `DeadLetterPublisher.post`.
"""

import base64
import json
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

from aiokafka import ConsumerRecord
from faststream import BaseMiddleware, ContextRepo
from faststream.exceptions import HandlerException, StopConsume
from faststream.kafka import KafkaBroker, KafkaMessage
from pydantic import ValidationError

from shared.kafka.publish import Publisher, declare_publisher
from shared.messages import DeadLetter, Message
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger, where
from shared.runtime.settings import KafkaSettings
from shared.topics import DEAD_LETTERS

M = TypeVar("M", bound=Message)

LARGEST_CARRIED_BYTES = 4 * 1024 * 1024
"""A larger value is cut: base64 of it must still fit the dead-letter topic's largest message."""

LARGEST_KEY_BYTES = 64 * 1024
"""A longer key is cut; it is carried twice, as the dead letter's own key too."""

LARGEST_HEADERS_BYTES = 256 * 1024
"""Names and values together, of the first headers; those beyond are left out."""

_log = get_logger(__name__)


class PoisonMessageError(ValueError):
    """A message that will never be processable, however often it is redelivered."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class RetryLaterError(RuntimeError):
    """A handler's word that the message is fine but something it needs is away; it will be redelivered."""


def describe(error: ValidationError, *, whole: str = "message") -> str:
    """What is wrong with a message, by field, without any of its content.

    Args:
        whole: the name of what is wrong as a whole.
    """
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [f"{'.'.join(str(part) for part in p['loc']) or whole}: {p['msg']}" for p in problems[:10]]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "; ".join(shown)


def parse(model: type[M], value: bytes | None) -> M:
    """Parse a record's value.

    Raises:
        PoisonMessageError: not JSON, or not such a message.
    """
    if not value:
        raise PoisonMessageError("invalid_json", f"an empty value is not a {model.__name__}")
    try:
        return model.model_validate_json(value)
    except ValidationError as error:
        not_json = any(problem["type"] == "json_invalid" for problem in error.errors(include_input=False))
        raise PoisonMessageError("invalid_json" if not_json else "invalid_message", describe(error)) from error


def dead_letter_for(
    record: "ConsumerRecord[bytes, bytes]", *, service: str, reason: str, detail: str, clock: Clock
) -> DeadLetter:
    """The dead letter of a record."""
    value = record.value or b""
    return DeadLetter(
        service=service,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key_base64=None if record.key is None else _base64(record.key[:LARGEST_KEY_BYTES]),
        value_base64=_base64(value[:LARGEST_CARRIED_BYTES]),
        headers=_carried(record.headers),
        truncated_bytes=max(0, len(value) - LARGEST_CARRIED_BYTES),
        reason=reason,
        detail=detail,
        failed_at=clock.now(),
    )


def _carried(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, str]:
    carried, size = {}, 0
    for name, content in headers:
        size += len(name) + len(content or b"")
        if size > LARGEST_HEADERS_BYTES:
            break
        carried[name] = _base64(content or b"")
    return carried


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


class DeadLetterPublisher:
    """Publishes the dead letters of one service."""

    def __init__(self, *, kafka: KafkaSettings, service: str, clock: Clock) -> None:
        self._kafka = kafka
        self._service = service
        self._clock = clock
        self._publisher: Publisher | None = None

    def attach(self, broker: KafkaBroker) -> None:
        """Publish through this broker; `build_broker` calls this."""
        self._publisher = declare_publisher(broker, self._kafka, DEAD_LETTERS)

    async def publish(
        self,
        record: "ConsumerRecord[bytes, bytes]",
        error: PoisonMessageError,
        *,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Publish a record's dead letter; returns once Kafka has it.

        Args:
            headers: of the dead letter's own message.

        Raises:
            KafkaError: it could not be published; the record must not be acknowledged.
        """
        if self._publisher is None:
            raise RuntimeError("DeadLetterPublisher.attach(broker) must be called before the first message")
        letter = dead_letter_for(
            record, service=self._service, reason=error.reason, detail=error.detail, clock=self._clock
        )
        key = None if record.key is None else record.key[:LARGEST_KEY_BYTES]
        await self._publisher.publish(letter, key=key, headers=headers)
        _log.warning(
            "dead letter",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            reason=error.reason,
            detail=error.detail,
        )


def batch_decoder(model: type[M], dead_letters: DeadLetterPublisher) -> Callable[[KafkaMessage], Awaitable[list[M]]]:
    """A decoder for a batch subscriber: parses every record, posts dead letters for those that do not parse.

    A record without a value (a compacted topic's tombstone) is passed over.
    """

    async def decode(message: KafkaMessage) -> list[M]:
        parsed: list[M] = []
        for record in _records_of(message.raw_message):
            if record.value is None:
                continue
            try:
                parsed.append(parse(model, record.value))
            except PoisonMessageError as error:
                await dead_letters.publish(record, error)
        return parsed

    return decode


def message_decoder(model: type[M]) -> Callable[[KafkaMessage], Awaitable[M]]:
    """A decoder for a subscriber of single messages; a poison message is left to `DeadLetterMiddleware`."""

    async def decode(message: KafkaMessage) -> M:
        return parse(model, message.body)

    return decode


class DeadLetterMiddleware(BaseMiddleware[Any, Any]):
    """Turns a message that cannot be processed into a dead letter and acknowledges it."""

    def __init__(self, msg: Any, /, *, context: ContextRepo, dead_letters: DeadLetterPublisher) -> None:  # noqa: ANN401
        super().__init__(msg, context=context)
        self._dead_letters = dead_letters

    async def on_receive(self) -> None:
        """Encode header values that are not UTF-8 in base64."""
        # FastStream decodes header values as UTF-8 before any handler runs; a producer's binary header must not
        # make its message unreadable.
        for record in self._records():
            if any(not _is_text(content) for _, content in record.headers):
                record.headers = tuple(
                    (name, content if _is_text(content) else _base64(content or b"").encode())
                    for name, content in record.headers
                )
        return await super().on_receive()

    async def after_processed(
        self,
        exc_type: type[BaseException] | None = None,  # noqa: ARG002
        exc_val: BaseException | None = None,
        exc_tb: TracebackType | None = None,  # noqa: ARG002
    ) -> bool | None:
        """Publish a dead letter for every record of a message that failed; `True`: FastStream acknowledges it."""
        if exc_val is None or isinstance(exc_val, (HandlerException, StopConsume, RetryLaterError)):
            return False
        if not isinstance(exc_val, Exception):
            return False  # cancellation: the message stays unacknowledged
        poison = _as_poison(exc_val)
        if poison.reason == "handler_error":
            _log.error("handler failed", error=type(exc_val).__name__, where=where(exc_val))
        for record in self._records():
            await self._dead_letters.publish(record, poison)
        return True

    def _records(self) -> "tuple[ConsumerRecord[bytes, bytes], ...]":
        if self.msg is None:
            return ()
        return _records_of(self.msg)


def _records_of(raw: Any) -> "tuple[ConsumerRecord[bytes, bytes], ...]":  # noqa: ANN401
    """The records of a FastStream raw message: one, or a batch (a list with the in-memory broker)."""
    return tuple(raw) if isinstance(raw, (tuple, list)) else (raw,)


def _as_poison(error: Exception) -> PoisonMessageError:
    if isinstance(error, PoisonMessageError):
        return error
    if isinstance(error, ValidationError):
        return PoisonMessageError("invalid_message", describe(error))
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return PoisonMessageError("invalid_json", type(error).__name__)
    # The text of an unforeseen error may quote the message: its type must do.
    return PoisonMessageError("handler_error", type(error).__name__)


def _is_text(content: bytes | None) -> bool:
    if content is None:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
