"""The topics of a deployment: its lanes, and how topics differ from their declarations (`SPROUT_TOPICS_*`).

Lanes are the topics from which routers take requests, each with its weight. Every lane is a topic like `requests`.
While requests wait, a lane gets its weight's part of a router's places.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.kafka.records import describe
from shared.topics import REQUESTS, TOPICS, Cleanup, TopicSpec, requests_topic

HOUR_MS = 3_600_000

Weight = Annotated[int, Field(ge=1, le=1_000)]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def _split(lanes: object) -> object:
    """Weights by name from `requests:4,requests-batch:1`."""
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
    taken = {spec.name for spec in TOPICS if spec is not REQUESTS}.intersection(lanes)
    if taken:
        raise ValueError(f"{', '.join(sorted(taken))} is a topic of other messages: name the lane differently")
    return lanes


class LaneFields(BaseModel):
    """The lanes; a settings class may inherit the field."""

    lanes: Annotated[dict[str, Weight], NoDecode, BeforeValidator(_split), AfterValidator(_check)] = Field(
        default={REQUESTS.name: 1},
        description="Topics of requests without their prefix, each with its weight: requests:4,requests-batch:1. While "
        "requests wait, a lane gets its weight's part of the places",
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
        return tuple(spec for spec in self.lane_topics if spec is not REQUESTS)


def all_topics() -> tuple[TopicSpec, ...]:
    """Every topic: the declared ones and those of the lanes in `SPROUT_ROUTER_LANES`.

    Raises:
        ValidationError: the variable is invalid.
    """
    return (*TOPICS, *LaneSettings().further_topics)


class TopicOverride(BaseModel):
    """What one topic has instead of its declaration; None: as declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    partitions: int | None = Field(default=None, ge=1)
    retention_h: float | None = Field(default=None, gt=0, description="Hours; only where records expire")
    replication_factor: int | None = Field(default=None, ge=1)
    min_insync_replicas: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, slots=True)
class TopicTarget:
    """What a topic of this deployment is to be.

    Attributes:
        configuration: of the broker, at the level of the topic.
    """

    partitions: int
    replication_factor: int
    configuration: Mapping[str, str]


class TopicSettings(BaseSettings):
    """Durability and size of the topics.

    The file is TOML with the same names: `replication_factor = 3`, and `partitions = 48` under `[topics.requests]`.
    """

    model_config = SettingsConfigDict(env_prefix="SPROUT_TOPICS_", extra="ignore")

    file: Path | None = Field(default=None, description="TOML file with these settings, instead of the variables")
    replication_factor: int = Field(default=1, ge=1, description="Copies of every partition; 3 in production")
    min_insync_replicas: int = Field(
        default=1,
        ge=1,
        description="Copies that must have a message before Kafka acknowledges it; 2 in production, so that none is "
        "lost with a broker",
    )
    topics: dict[str, TopicOverride] = Field(
        default={},
        validation_alias="sprout_topics_overrides",
        description='By topic, without prefix, JSON: {"requests": {"partitions": 48, "retention_h": 72}}',
    )

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, values: dict[str, object]) -> dict[str, object]:
        """Use the content of the file.

        Raises:
            ValueError: it cannot be read, or variables are set beside it.
        """
        path = values.get("file")
        if path is None:
            return values
        if others := sorted(values.keys() - {"file"}):
            raise ValueError(f"give SPROUT_TOPICS_FILE or the other variables, not both: {', '.join(others)}")
        try:
            content = tomllib.loads(Path(str(path)).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"SPROUT_TOPICS_FILE {path} cannot be read: {error}") from error
        if unknown := sorted(content.keys() - {"replication_factor", "min_insync_replicas", "topics"}):
            raise ValueError(f"SPROUT_TOPICS_FILE {path} has unknown settings: {', '.join(unknown)}")
        if "topics" in content:
            content["sprout_topics_overrides"] = content.pop("topics")
        return {**values, **content}

    @model_validator(mode="after")
    def _check(self) -> Self:
        declared = {spec.name: spec for spec in (*TOPICS, *LaneSettings().lane_topics)}
        for name, override in self.topics.items():
            spec = declared.get(name)
            if spec is None:
                raise ValueError(f"no topic {name!r} is declared; declared: {', '.join(declared)}")
            if override.partitions is not None and spec.partitions == 1 and override.partitions > 1:
                raise ValueError(f"{name} must have one partition: its readers rely on the order of its messages")
            if override.retention_h is not None and spec.cleanup is Cleanup.COMPACT:
                raise ValueError(f"{name} has no retention: its newest message of every key stays")
        for spec in declared.values():
            target = self.target(spec)
            if int(target.configuration["min.insync.replicas"]) > target.replication_factor:
                raise ValueError(
                    f"{spec.name}: min_insync_replicas is larger than replication_factor: nobody could write"
                )
        return self

    def target(self, spec: TopicSpec) -> TopicTarget:
        """What a topic of this deployment is to be."""
        override = self.topics.get(spec.name, TopicOverride())
        if override.retention_h is not None:
            spec = replace(spec, retention_ms=int(override.retention_h * HOUR_MS))
        configuration = spec.configuration()
        configuration["min.insync.replicas"] = str(override.min_insync_replicas or self.min_insync_replicas)
        return TopicTarget(
            partitions=override.partitions or spec.partitions,
            replication_factor=override.replication_factor or self.replication_factor,
            configuration=configuration,
        )


class TopicSettingsError(ValueError):
    """The settings of topics cannot be used; the message says why."""


def load_topic_settings(**given: object) -> TopicSettings:
    """The settings from the environment.

    Args:
        given: replace those of the environment.

    Raises:
        TopicSettingsError: they cannot be used.
    """
    try:
        return TopicSettings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise TopicSettingsError(describe(error, root="SPROUT_TOPICS_*")) from error
