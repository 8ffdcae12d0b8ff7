"""Dead letters: messages that cannot be processed are published to `dead-letters` with their bytes, and skipped.

- Single messages: `DeadLetterMiddleware`, which `build_broker` installs, publishes a dead letter for a message that its
  handler cannot parse or process, and acknowledges it.
- Batches: `batch_decoder(spec, dead_letters)` publishes a dead letter for every record that is invalid; the handler
  receives the others. When it fails, `handle_batch` calls it with one record at a time.
- Raw records: the service calls `parse` and `DeadLetterPublisher.publish`.
"""

import asyncio
import base64
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar, get_origin

from aiokafka import ConsumerRecord
from aiokafka.errors import KafkaError
from faststream import BaseMiddleware, ContextRepo
from faststream.exceptions import HandlerException, StopConsume
from faststream.kafka import KafkaBroker, KafkaMessage
from prometheus_client import CollectorRegistry, Counter
from pydantic import BaseModel, ValidationError

from shared.kafka.plausibility import ImplausibleError, check_plausible
from shared.kafka.publish import Publisher, declare_publisher
from shared.messages import DeadLetter, Message, Value
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger, where
from shared.runtime.settings import KafkaSettings
from shared.topics import DEAD_LETTERS, REQUESTS, TopicSpec

M = TypeVar("M", bound=Message)

MAX_VALUE_BYTES = 4 * 1024 * 1024
"""A longer value is truncated, so that it fits the topic in base64."""

MAX_OVERSIZE_BYTES = 64 * 1024
"""What a dead letter keeps of a value that is larger than its topic allows: enough to recognise it."""

MAX_KEY_BYTES = 64 * 1024
"""A longer key is truncated; a dead letter holds it twice, in its content and as its own key."""

MAX_HEADERS_BYTES = 256 * 1024
"""Limit of the names and values of all headers together; further headers are left out."""

FUSE_RECORDS = 200
"""Records of a topic that the fuse looks at."""

FUSE_SHARE = 0.95
"""Share of them that must have become dead letters."""

HANDLER_ERROR = "handler_error"
"""Reason of a dead letter whose record is valid: the service failed."""

IMPLAUSIBLE = "implausible"
"""Reason of a dead letter whose record must not be believed: its writer is at fault, not the reader."""

UNREADABLE = "unreadable"
"""Reason of a dead letter without content: unpacking the record takes more memory than a service has."""

_log = get_logger(__name__)


class PoisonMessageError(ValueError):
    """A message that can never be processed, however often it is delivered."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class RetryLaterError(RuntimeError):
    """The message is valid but the handler cannot process it now; it is delivered again."""


def describe(error: ValidationError, *, root: str = "message") -> str:
    """The problems of a message or of settings, by field; quotes nothing of the content.

    Args:
        root: name for problems that belong to no single field.
    """
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [f"{field_path(p['loc']) or root}: {p['msg']}" for p in problems[:10]]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "; ".join(shown)


def _mappings_of(kind: type[BaseModel]) -> Iterator[str]:
    """Names of the fields with keys that the writer of a message chooses, of a class and all that derive from it."""
    yield from (name for name, info in kind.model_fields.items() if get_origin(info.annotation) is dict)
    for derived in kind.__subclasses__():
        yield from _mappings_of(derived)


_MAPPINGS = frozenset(_mappings_of(Value))


def field_path(location: Sequence[int | str]) -> str:
    """The path of a problem in a message; a key that its writer chose, and what follows, is `*`: `metadata.*`."""
    shown: list[str] = []
    for part in location:
        if isinstance(part, str) and shown and shown[-1] in _MAPPINGS:
            return ".".join((*shown, "*"))
        shown.append(str(part))
    return ".".join(shown)


def parse(model: type[M], value: bytes | None) -> M:
    """Parse the value of a record.

    Raises:
        PoisonMessageError: not JSON, or not such a message. Any exception of a validator counts as that.
    """
    if not value:
        raise PoisonMessageError("invalid_json", f"an empty value is not a {model.__name__}")
    try:
        return model.model_validate_json(value)
    except ValidationError as error:
        not_json = any(problem["type"] == "json_invalid" for problem in error.errors(include_input=False))
        raise PoisonMessageError("invalid_json" if not_json else "invalid_message", describe(error)) from error
    except Exception as error:
        # Pydantic passes on what is no ValueError, such as an OverflowError or a RecursionError.
        raise PoisonMessageError("invalid_message", f"{type(error).__name__} while it was validated") from error


def check_size(record: "ConsumerRecord[bytes, bytes]", limit: int) -> None:
    """Reject a value by its size, before it is parsed.

    The broker limits the compressed size of a batch of records; a small batch may hold a huge value.

    Raises:
        PoisonMessageError: the value is larger than `limit` bytes.
    """
    size = len(record.value or b"")
    if size > limit:
        raise PoisonMessageError("too_large", f"the value has {size} bytes, the limit is {limit}")


def parse_record(spec: TopicSpec, record: "ConsumerRecord[bytes, bytes]", clock: Clock) -> Message:
    """Parse a record of a topic whose messages services rely on.

    Raises:
        PoisonMessageError: it is too large, not such a message, or a control message that is not plausible.
    """
    check_size(record, spec.max_message_bytes)
    message = parse(spec.message, record.value)
    try:
        check_plausible(message, key=record.key, clock=clock)
    except ImplausibleError as error:
        raise PoisonMessageError(IMPLAUSIBLE, str(error)) from error
    except Exception as error:
        raise PoisonMessageError(IMPLAUSIBLE, f"{type(error).__name__} while it was checked") from error
    return message


def dead_letter_for(
    record: "ConsumerRecord[bytes, bytes]", *, service: str, reason: str, detail: str, clock: Clock
) -> DeadLetter:
    """The dead letter of a record."""
    value = record.value or b""
    kept = MAX_OVERSIZE_BYTES if reason == "too_large" else MAX_VALUE_BYTES
    return DeadLetter(
        service=service,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key_base64=None if record.key is None else _base64(record.key[:MAX_KEY_BYTES]),
        value_base64=_base64(value[:kept]),
        headers=_encode_headers(record.headers),
        truncated_bytes=max(0, len(value) - kept),
        reason=reason,
        detail=detail,
        failed_at=clock.now(),
    )


def _encode_headers(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, str]:
    encoded, size = {}, 0
    for name, content in headers:
        size += len(name) + len(content or b"")
        if size > MAX_HEADERS_BYTES:
            break
        encoded[name] = _base64(content or b"")
    return encoded


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


class DeadLetterPublisher:
    """Publishes and counts the dead letters of one service.

    It has a fuse: when nearly all of the last records of a topic became dead letters, as after a faulty deployment, the
    service stops consuming the topic, and is not ready, until it is restarted. The records stay in Kafka. Clients write
    `requests`, so only the service's own errors count there, or a client could stop the service. What is implausible
    does not count anywhere.
    """

    def __init__(
        self, *, kafka: KafkaSettings, service: str, clock: Clock, registry: CollectorRegistry | None = None
    ) -> None:
        self._kafka = kafka
        self._service = service
        self.clock = clock
        self._publisher: Publisher | None = None
        self._failed: dict[str, deque[bool]] = {}
        self._stopped: set[str] = set()
        self._published = Counter(
            "sprout_dead_letters", "Dead letters by topic and reason", ("topic", "reason"), registry=registry
        )

    def attach(self, broker: KafkaBroker) -> None:
        """Publish through this broker; `build_broker` calls this."""
        self._publisher = declare_publisher(broker, self._kafka, DEAD_LETTERS)

    def problem(self) -> str | None:
        """The topics that are not consumed any more because of the fuse; None if there are none."""
        if not self._stopped:
            return None
        topics = ", ".join(sorted(self._stopped))
        return f"nearly all records of {topics} became dead letters (see the log); a restart tries again"

    def note_processed(self, topic: str, records: int = 1) -> None:
        """Note records that became no dead letters."""
        self._recent(topic).extend([False] * records)

    def _recent(self, topic: str) -> deque[bool]:
        return self._failed.setdefault(topic, deque(maxlen=FUSE_RECORDS))

    def _note_failed(self, topic: str) -> None:
        recent = self._recent(topic)
        recent.append(True)
        if topic not in self._stopped and sum(recent) >= FUSE_SHARE * FUSE_RECORDS:
            self._stopped.add(topic)
            _log.critical("the topic is not consumed any more: nearly all records became dead letters", topic=topic)

    async def publish(
        self,
        record: "ConsumerRecord[bytes, bytes]",
        error: PoisonMessageError,
        *,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Publish a record's dead letter; returns once Kafka has it, and never once the fuse has stopped the topic.

        Args:
            headers: of the dead letter itself.

        Raises:
            KafkaError: it could not be published; the record must not be acknowledged.
        """
        if self._publisher is None:
            raise RuntimeError("DeadLetterPublisher.attach(broker) must be called before the first message")
        if record.topic in self._stopped:
            await asyncio.Event().wait()  # ends with the service
        letter = dead_letter_for(
            record, service=self._service, reason=error.reason, detail=error.detail, clock=self.clock
        )
        key = None if record.key is None else record.key[:MAX_KEY_BYTES]
        await self._publisher.publish(letter, key=key, headers=headers)
        self._published.labels(record.topic, error.reason).inc()
        written_by_clients = record.topic == self._kafka.topic(REQUESTS)
        if error.reason == HANDLER_ERROR or not (written_by_clients or error.reason == IMPLAUSIBLE):
            self._note_failed(record.topic)
        _log.warning(
            "dead letter",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            reason=error.reason,
            detail=error.detail,
        )


@dataclass(frozen=True, slots=True)
class ParsedRecord:
    """A record of a batch with its message."""

    record: "ConsumerRecord[bytes, bytes]"
    message: Message


def batch_decoder(
    spec: TopicSpec, dead_letters: DeadLetterPublisher
) -> Callable[[KafkaMessage], Awaitable[list[ParsedRecord]]]:
    """A decoder for a batch subscriber: parses every record and publishes a dead letter for each invalid one.

    A record without a value (a tombstone of a compacted topic) is skipped.
    """

    async def decode(message: KafkaMessage) -> list[ParsedRecord]:
        parsed: list[ParsedRecord] = []
        for record in _records_of(message.raw_message):
            if record.value is None:
                continue
            try:
                parsed.append(ParsedRecord(record, parse_record(spec, record, dead_letters.clock)))
            except PoisonMessageError as error:
                await dead_letters.publish(record, error)
        return parsed

    return decode


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
        (name, content if _is_text(content) else _base64(content or b"").encode()) for name, content in record.headers
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
