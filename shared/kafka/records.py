"""Records of Kafka: the identity of a request's record, and parsing.

A request is identified by the position and timestamp of its record, which no producer chooses, unlike its id. Parsing
checks size before content, shows validation errors without content, and rejects implausible control messages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar, get_origin

from aiokafka import ConsumerRecord
from pydantic import BaseModel, ValidationError

from shared.kafka.plausibility import ImplausibleError, check_plausible
from shared.messages import Message, Value
from shared.runtime.clock import Clock
from shared.topics import REQUESTS, TopicSpec

M = TypeVar("M", bound=Message)

IMPLAUSIBLE: Final = "implausible"
"""Reason of a dead letter whose record must not be used: its writer is at fault, not the reader."""


@dataclass(frozen=True, slots=True)
class RecordId:
    """Identifies a record for as long as its topic exists, and beyond.

    As text `topic/partition/offset/timestamp`: the field `record` of messages.

    Attributes:
        topic: without prefix.
        timestamp_ms: distinguishes the record from one at the same offset of an earlier topic of this name.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int

    @classmethod
    def of(cls, record: Any, topic_prefix: str) -> Self:  # noqa: ANN401 - aiokafka has no types
        """The identity of a record, or of the metadata of a message that was sent alone.

        aiokafka's metadata gives all messages of a batch the timestamp of the first.
        """
        return cls(record.topic.removeprefix(topic_prefix), record.partition, record.offset, record.timestamp)

    @classmethod
    def parse_header(cls, header: bytes) -> Self | None:
        """Parse a header `sprout-request`; None if it is not in the format of `header`."""
        try:
            *topic, partition, offset, timestamp_ms = header.decode("ascii").split(":")
            (name,) = topic or [REQUESTS.name]
            return cls(name, int(partition), int(offset), int(timestamp_ms))
        except ValueError:
            return None

    @property
    def header(self) -> str:
        """The value of the header `sprout-request`.

        `partition:offset:timestamp` for the topic `requests`, as earlier routers write and read it; for other topics
        with `topic:` before it.
        """
        place = f"{self.partition}:{self.offset}:{self.timestamp_ms}"
        return place if self.topic == REQUESTS.name else f"{self.topic}:{place}"

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}/{self.timestamp_ms}"


class PoisonMessageError(ValueError):
    """A message that can never be processed, however often it is delivered."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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
    """Reject a record by its size, before it is parsed.

    The broker limits the compressed size of a batch of records; a small batch may hold a huge record.

    Raises:
        PoisonMessageError: value, key and headers together are larger than `limit` bytes.
    """
    size = len(record.value or b"") + len(record.key or b"")
    for name, content in record.headers:
        size += len(name) + len(content or b"")
    if size > limit:
        raise PoisonMessageError("too_large", f"the record has {size} bytes, the limit is {limit}")


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
