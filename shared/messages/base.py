"""The base classes of all messages, and the messages of the topic `dead-letters`."""

import base64
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

SCHEMA_VERSION: Literal[1] = 1


def _as_utc(timestamp: datetime) -> datetime:
    try:
        return timestamp.astimezone(UTC)
    except OverflowError:
        raise ValueError("the timestamp is outside the years 1 to 9999 in UTC") from None


UtcDatetime = Annotated[AwareDatetime, AfterValidator(_as_utc)]
"""A timestamp with a time zone, normalised to UTC; one without a time zone is invalid."""

Identifier = Annotated[str, StringConstraints(min_length=1, max_length=256)]
"""A name or id: not empty, at most 256 characters."""

RECORD = (
    "The request's record, as topic (without prefix)/partition/offset/timestamp in ms: unlike the id, no producer "
    "chooses it; null from earlier routers"
)
"""Description of the field `record`, which identifies a request in several messages."""

Zone = Annotated[str, StringConstraints(min_length=1, max_length=64)]
"""A grid zone, named as Electricity Maps does: `US-CAL-CISO`."""

Level = Annotated[str, StringConstraints(pattern=r"^L[0-9]+$")]
"""A directive level: `L0`, `L1`, ..."""

FORBIDDEN = "!"
"""Prefix of a level that a request forbids."""

RequestedDirective = Annotated[str, StringConstraints(pattern=rf"^{FORBIDDEN}?L[0-9]+$")]
"""A level that a request forces (`L1`) or forbids (`!L1`)."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Value(BaseModel):
    """A part of a message: immutable; unknown fields, which a newer sender may have added, are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Message(Value):
    """A message on a topic. Evolution is additive only: fields are added with defaults, never renamed."""

    schema_version: int = Field(
        default=SCHEMA_VERSION,
        ge=1,
        description="Major version of the message's schema; a newer one is refused on topics that steer services",
    )


class RequestMessage(Message):
    """A message about one request."""

    request_id: Identifier
    record: Identifier | None = Field(default=None, description=RECORD)

    @property
    def identity(self) -> str:
        """What identifies the request: its record; in messages of an earlier router its id."""
        return self.record or self.request_id


class DeadLetter(Message):
    """A message that could not be processed, with its original bytes and the reason."""

    service: str
    topic: str
    partition: int
    offset: int
    key_base64: str | None = Field(default=None, description="Original key; only the beginning of a very long one")
    value_base64: str = Field(description="The original value, byte for byte; only its beginning if it is too large")
    headers: dict[str, str] = Field(
        default_factory=dict, description="Original headers, values in base64; at most 256 KiB of them"
    )
    truncated_bytes: int = Field(default=0, ge=0, description="Bytes cut off the end of a value too large to carry")
    reason: str = Field(
        description="Short code: invalid_json, invalid_message, too_large, implausible, unreadable, process_died, "
        "handler_error"
    )
    detail: str = Field(description="What is wrong, by field; quotes nothing of the content")
    failed_at: UtcDatetime

    def original_value(self) -> bytes:
        """The bytes of the original message."""
        return base64.b64decode(self.value_base64)


def option_key(pool: str, level: str) -> str:
    """The name of an option, which is one way to serve a request: `<pool>/<level>`."""
    return f"{pool}/{level}"


def split_option(option: str) -> tuple[str, str]:
    """The (pool, level) of an option's name.

    Raises:
        ValueError: the name is not `<pool>/<level>`.
    """
    pool, separator, level = option.rpartition("/")
    if not (pool and separator and level):
        raise ValueError(f"option must be named <pool>/<level>, got {option!r}")
    return pool, level
