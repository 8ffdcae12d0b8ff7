"""Every Kafka topic, declared once: message, key, partitions, retention, compaction.

`sprout topics create` creates them (`shared.kafka.admin`); no service does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from shared.messages import (
    Cancellation,
    CarbonIntensity,
    DeadLetter,
    EndpointCurve,
    Footprint,
    GenerationRequest,
    GenerationResponse,
    LoadReport,
    Message,
    Policy,
    PoolCapacity,
    PromptGrouping,
    Quality,
    Reply,
    ResponseChunk,
    Sample,
    UsageRecord,
)

MINUTE_MS: Final = 60_000
HOUR_MS: Final = 60 * MINUTE_MS
DAY_MS: Final = 24 * HOUR_MS
MEBIBYTE: Final = 1024 * 1024

SOURCE_HEADER: Final = "sprout-request"
"""Header of the router's answers and dead letters: the record that they are for, see `shared.kafka.records`."""

REDRIVEN_HEADER: Final = "sprout-redriven"
"""Header of a message that `sprout dead-letters redrive` has sent: position of its dead letter, partition:offset."""


@dataclass(frozen=True, slots=True)
class HeaderSpec:
    """A Kafka header of a topic's messages, for the AsyncAPI documents."""

    description: str
    required: bool = False
    pattern: str | None = None


TRACE_HEADERS: Final = {
    "traceparent": HeaderSpec("W3C trace context, where traces are on", pattern="^[0-9a-f]{2}-[0-9a-f]{32}-"),
    "tracestate": HeaderSpec("W3C trace state"),
}
PUBLISHED_HEADERS: Final = {
    "content-type": HeaderSpec("Always application/json", required=True, pattern="^application/json$"),
    "correlation_id": HeaderSpec("Request id; elsewhere a random id", required=True),
}
SOURCE_HEADERS: Final = {
    SOURCE_HEADER: HeaderSpec(
        "From the router: record that this is for, partition:offset:timestamp in `requests`, in another topic "
        "topic:partition:offset:timestamp",
        pattern="^([^:]+:)?[0-9]+:[0-9]+:-?[0-9]+$",
    )
}


class Cleanup(StrEnum):
    """Kafka's `cleanup.policy`."""

    DELETE = "delete"
    COMPACT = "compact"
    COMPACT_DELETE = "compact,delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicSpec:
    """A topic's name (without prefix), message, and broker configuration.

    Attributes:
        description: of the messages, for the AsyncAPI documents.
        key: of the messages, in words.
        headers: Kafka headers, by name; default: those of every message that a service publishes.
        correlation: field by which an answer is matched to its request.
        max_age_ms: the broker rejects messages whose timestamp is older when they arrive; None: it accepts any.
        partitions: upper limit of the members of a consumer group; only the request path needs many.
        retention_ms: `None`: messages are removed by compaction only.
        max_message_bytes: largest record batch that the broker accepts.
    """

    name: str
    description: str
    message: type[Message]
    key: str
    cleanup: Cleanup
    partitions: int
    retention_ms: int | None = None
    max_message_bytes: int = MEBIBYTE
    headers: Mapping[str, HeaderSpec] = field(default_factory=lambda: PUBLISHED_HEADERS)
    correlation: str | None = None
    max_age_ms: int | None = None

    def configuration(self) -> dict[str, str]:
        """The topic-level configuration of the broker."""
        settings = {"cleanup.policy": self.cleanup.value, "max.message.bytes": str(self.max_message_bytes)}
        if self.retention_ms is not None:
            # Kafka removes whole segments: a record stays until the newest one of its segment is as old.
            segment_ms = min(DAY_MS, max(self.retention_ms // 7, 10 * MINUTE_MS))
            settings |= {"retention.ms": str(self.retention_ms), "segment.ms": str(segment_ms)}
        if self.max_age_ms is not None:
            settings["message.timestamp.before.max.ms"] = str(self.max_age_ms)
        if self.cleanup is not Cleanup.DELETE:
            # Consumers read these topics from the beginning: compact them often.
            settings |= {"segment.ms": str(HOUR_MS), "min.cleanable.dirty.ratio": "0.1"}
        return settings


REQUESTS: Final = TopicSpec(
    name="requests",
    description="Prompts to be answered",
    message=GenerationRequest,
    key="producer's choice, else request id",
    cleanup=Cleanup.DELETE,
    partitions=12,
    retention_ms=7 * DAY_MS,
    headers=TRACE_HEADERS,
    correlation="id",
)
RESPONSES: Final = TopicSpec(
    name="responses",
    description="Answers, and errors in place of answers",
    message=GenerationResponse,
    key="request id",
    cleanup=Cleanup.DELETE,
    partitions=12,
    retention_ms=7 * DAY_MS,
    headers=PUBLISHED_HEADERS | SOURCE_HEADERS | TRACE_HEADERS,
    correlation="request_id",
    max_age_ms=3_000,  # shorter than the time for which a router that could still send owns its requests: fencing.py
)
RESPONSE_CHUNKS: Final = TopicSpec(
    name="response-chunks",
    description="Pieces of streamed answers",
    message=ResponseChunk,
    key="request id",
    cleanup=Cleanup.DELETE,
    partitions=12,
    retention_ms=HOUR_MS,
    headers=PUBLISHED_HEADERS | TRACE_HEADERS,
    correlation="request_id",
)
REPLIES: Final = TopicSpec(
    name="replies",
    description="Answers to the requests of gateways; every gateway reads the partition that its requests name",
    message=Reply,
    key="request id",
    cleanup=Cleanup.DELETE,
    partitions=32,
    retention_ms=HOUR_MS,
    max_message_bytes=2 * MEBIBYTE,  # a response of the largest size, and what is around it
    headers=PUBLISHED_HEADERS | TRACE_HEADERS,
    correlation="request_id",
)
CANCELLATIONS: Final = TopicSpec(
    name="cancellations",
    description="Requests whose answers nobody waits for any more",
    message=Cancellation,
    key="request id",
    cleanup=Cleanup.DELETE,
    partitions=1,
    retention_ms=HOUR_MS,
)
SAMPLES: Final = TopicSpec(
    name="samples",
    description="Prompts kept for evaluation",
    message=Sample,
    key="prompt group",
    cleanup=Cleanup.DELETE,
    partitions=3,
    retention_ms=7 * DAY_MS,
    headers=PUBLISHED_HEADERS | TRACE_HEADERS,
)
USAGE: Final = TopicSpec(
    name="usage",
    description="Calls on model servers that the evaluator made",
    message=UsageRecord,
    key="usage record id",
    cleanup=Cleanup.DELETE,
    partitions=3,
    retention_ms=7 * DAY_MS,
)
CARBON_INTENSITY: Final = TopicSpec(
    name="carbon-intensity",
    description="Carbon intensity of each zone's grid",
    message=CarbonIntensity,
    key="zone",
    cleanup=Cleanup.COMPACT_DELETE,
    partitions=1,
    retention_ms=60 * DAY_MS,
    max_message_bytes=4 * MEBIBYTE,
)
FOOTPRINTS: Final = TopicSpec(
    name="footprints",
    description="Energy and carbon of every call on a model server",
    message=Footprint,
    key="request id",
    cleanup=Cleanup.DELETE,
    partitions=6,
    retention_ms=30 * DAY_MS,
)
QUALITY: Final = TopicSpec(
    name="quality",
    description="Results of evaluations",
    message=Quality,
    key="evaluation id",
    cleanup=Cleanup.DELETE,
    partitions=1,
    retention_ms=365 * DAY_MS,
)
PROMPT_GROUPS: Final = TopicSpec(
    name="prompt-groups",
    description="Prompt groups learned from judged prompts",
    message=PromptGrouping,
    key="model",
    cleanup=Cleanup.COMPACT,
    partitions=1,
    max_message_bytes=4 * MEBIBYTE,
)
POLICIES: Final = TopicSpec(
    name="policies",
    description="Probabilities of the options, per model",
    message=Policy,
    key="model",
    cleanup=Cleanup.COMPACT,
    partitions=1,
)
LOAD_REPORTS: Final = TopicSpec(
    name="load-reports",
    description="What every router and evaluator has running on the model servers",
    message=LoadReport,
    key="instance",
    cleanup=Cleanup.DELETE,
    partitions=1,
    retention_ms=HOUR_MS,
)
POWER_CURVES: Final = TopicSpec(
    name="power-curves",
    description="Power and speed of every endpoint by batch size",
    message=EndpointCurve,
    key="endpoint",
    cleanup=Cleanup.COMPACT,
    partitions=1,
)
CAPACITY: Final = TopicSpec(
    name="capacity",
    description="Endpoints that every pool needs",
    message=PoolCapacity,
    key="pool",
    cleanup=Cleanup.COMPACT,
    partitions=1,
)
DEAD_LETTERS: Final = TopicSpec(
    name="dead-letters",
    description="Messages that could not be processed, with the reason",
    message=DeadLetter,
    key="original key",
    cleanup=Cleanup.DELETE,
    partitions=1,
    retention_ms=90 * DAY_MS,
    max_message_bytes=8 * MEBIBYTE,
    headers=PUBLISHED_HEADERS | SOURCE_HEADERS,
)

TOPICS: Final = (
    REQUESTS,
    RESPONSES,
    RESPONSE_CHUNKS,
    REPLIES,
    CANCELLATIONS,
    SAMPLES,
    USAGE,
    CARBON_INTENSITY,
    FOOTPRINTS,
    QUALITY,
    PROMPT_GROUPS,
    POLICIES,
    LOAD_REPORTS,
    POWER_CURVES,
    CAPACITY,
    DEAD_LETTERS,
)


def requests_topic(name: str) -> TopicSpec:
    """The topic of a lane, which is like `requests`; see `shared.kafka.topic_settings`."""
    return REQUESTS if name == REQUESTS.name else replace(REQUESTS, name=name)


ANSWERS: Final = {REQUESTS.name: RESPONSES}
"""Topic of the answers, by topic of the requests."""
