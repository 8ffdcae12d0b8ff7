"""What every message on a Sprout topic has in common."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

SCHEMA_VERSION: Literal[1] = 1


def _as_utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


UtcDatetime = Annotated[AwareDatetime, AfterValidator(_as_utc)]
"""An instant with a zone, normalised to UTC; a naive timestamp is refused."""

Identifier = Annotated[str, StringConstraints(min_length=1, max_length=256)]
"""A name or id: not empty, at most 256 characters."""

Zone = Annotated[str, StringConstraints(min_length=1, max_length=64)]
"""A grid zone, named as Electricity Maps does: `US-CAL-CISO`."""

Level = Annotated[str, StringConstraints(pattern=r"^L[0-9]+$")]

FORBIDDEN = "!"
"""Before a level that a request forbids."""

Wish = Annotated[str, StringConstraints(pattern=rf"^{FORBIDDEN}?L[0-9]+$")]
"""A directive level: `L0`, `L1`, ..."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Value(BaseModel):
    """A part of a message: immutable, tolerant of fields that a newer sender added."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Message(Value):
    """A message on a topic. Evolution is additive only: fields are added with defaults, never renamed."""

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1, description="Version of the message's schema")


def option_key(pool: str, level: str) -> str:
    """The name of an option, one way to serve a request: `<pool>/<level>`."""
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
