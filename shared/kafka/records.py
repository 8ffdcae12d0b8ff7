"""Identity of a request: the position and timestamp of its record, which no producer chooses, unlike its id."""

from dataclasses import dataclass
from typing import Any, Self

from shared.topics import REQUESTS


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
