"""Lanes: the topics from which routers take requests, each with its weight.

Every lane is a topic like `requests`. While requests wait, a lane gets its weight's part of a router's places.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.topics import REQUESTS, REQUESTS_BATCH, TOPICS, TopicSpec, requests_topic

Weight = Annotated[int, Field(ge=1, le=1_000)]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def _split(lanes: object) -> object:
    """Weights by name from `requests:4,night:1`."""
    if not isinstance(lanes, str):
        return lanes
    found: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in lanes.split(","))):
        name, separator, weight = entry.partition(":")
        if not separator or name in found:
            raise ValueError(f"{entry!r} is not a lane: give TOPIC:WEIGHT, each topic once, as requests:4")
        found[name] = weight
    return found


def _check(lanes: dict[str, int]) -> dict[str, int]:
    for name in lanes:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a topic: use lower-case letters, digits, '.', '_' and '-'")
    if REQUESTS.name not in lanes:
        raise ValueError(f"the lane {REQUESTS.name} is missing: add {REQUESTS.name}:WEIGHT")
    taken = {spec.name for spec in TOPICS if spec.message is not REQUESTS.message}.intersection(lanes)
    if taken:
        raise ValueError(f"{', '.join(sorted(taken))} is a topic of other messages: name the lane differently")
    return lanes


class LaneFields(BaseModel):
    """The lanes; a settings class may inherit the field."""

    lanes: Annotated[dict[str, Weight], NoDecode, BeforeValidator(_split), AfterValidator(_check)] = Field(
        default={REQUESTS.name: 9, REQUESTS_BATCH.name: 1},
        description="Topics of requests without their prefix, each with its weight: requests:4,night:1. While requests "
        "wait, a lane gets its weight's part of the places",
    )

    @property
    def lane_topics(self) -> tuple[TopicSpec, ...]:
        """The topics of all lanes."""
        return tuple(requests_topic(name) for name in self.lanes)


class LaneSettings(LaneFields, BaseSettings):
    """The lanes of the routers, for tools that create topics or access: `SPROUT_ROUTER_LANES`."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_ROUTER_", extra="ignore")

    @property
    def further_topics(self) -> tuple[TopicSpec, ...]:
        """The topics of lanes that `shared.topics.TOPICS` does not declare."""
        return tuple(spec for spec in self.lane_topics if spec not in TOPICS)

    @property
    def of_batches(self) -> str:
        """The lane of batches where nobody names one: `requests-batch`, or `requests` if routers do not read that."""
        return REQUESTS_BATCH.name if REQUESTS_BATCH.name in self.lanes else REQUESTS.name


def all_topics() -> tuple[TopicSpec, ...]:
    """Every topic: the declared ones and those of the lanes in `SPROUT_ROUTER_LANES`.

    Raises:
        ValidationError: the variable is invalid.
    """
    return (*TOPICS, *LaneSettings().further_topics)
