"""Dead letters: messages that cannot be processed are published to `dead-letters` with their bytes, and skipped.

`shared.kafka.records` finds such messages, `shared.kafka.handling` makes them dead letters for every kind of
subscriber. The router, which handles raw records, calls `DeadLetterPublisher.publish` itself. A
`Fuse` stops the consumption of a topic when nearly all of its records become dead letters.
"""

import asyncio
import base64
from collections import deque
from collections.abc import Iterable
from typing import Final

from aiokafka import ConsumerRecord
from faststream.kafka import KafkaBroker
from prometheus_client import CollectorRegistry, Counter

from shared.kafka.publish import Publisher, declare_publisher
from shared.kafka.records import IMPLAUSIBLE, PoisonMessageError
from shared.messages import DeadLetter
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings
from shared.topics import DEAD_LETTERS, REQUESTS

MAX_VALUE_BYTES = 4 * 1024 * 1024
"""A longer value is truncated, so that it fits the topic in base64."""

MAX_OVERSIZE_BYTES = 64 * 1024
"""What a dead letter keeps of a value that is larger than its topic allows: enough to recognise it."""

MAX_KEY_BYTES = 64 * 1024
"""A longer key is truncated; a dead letter holds it twice, in its content and as its own key."""

MAX_HEADERS_BYTES = 256 * 1024
"""Limit of the names and values of all headers together; further headers are left out."""

HANDLER_ERROR = "handler_error"
"""Reason of a dead letter whose record is valid: the service failed."""

UNREADABLE = "unreadable"
"""Reason of a dead letter without content: unpacking the record takes more memory than a service has."""

UNREADABLE_DETAIL = "the record takes too much memory to unpack; its content was not kept"

PROCESS_DIED = "process_died"
"""Reason of a dead letter without content: processes died, one after the other, with the record in hand."""

PROCESS_DIED_DETAIL = "several processes died while they handled the record; it was not read again"

SET_ASIDE = {UNREADABLE: UNREADABLE_DETAIL, PROCESS_DIED: PROCESS_DIED_DETAIL}
"""Reasons of dead letters whose records were not parsed, with the detail."""

FUSE_RECORDS: Final = 200
"""Records of a topic that the fuse looks at."""

FUSE_SHARE: Final = 0.95
"""Share of them that must have become dead letters."""

_log = get_logger(__name__)


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

    Attributes:
        client_topics: full names of the topics that clients write.
    """

    def __init__(
        self, *, kafka: KafkaSettings, service: str, clock: Clock, registry: CollectorRegistry | None = None
    ) -> None:
        self._kafka = kafka
        self._service = service
        self.clock = clock
        self.client_topics = {kafka.topic(REQUESTS)}
        self._publisher: Publisher | None = None
        self._fuse = Fuse()
        self._published = Counter(
            "sprout_dead_letters", "Dead letters by topic and reason", ("topic", "reason"), registry=registry
        )

    def attach(self, broker: KafkaBroker) -> None:
        """Publish through this broker; `build_broker` calls this."""
        self._publisher = declare_publisher(broker, self._kafka, DEAD_LETTERS)

    def problem(self) -> str | None:
        """The topics that are not consumed any more because of the fuse; None if there are none."""
        return self._fuse.problem()

    def note_processed(self, topic: str, records: int = 1) -> None:
        """Note records that became no dead letters."""
        self._fuse.note_processed(topic, records)

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
        if self._fuse.has_stopped(record.topic):
            await asyncio.Event().wait()  # ends with the service
        letter = dead_letter_for(
            record, service=self._service, reason=error.reason, detail=error.detail, clock=self.clock
        )
        key = None if record.key is None else record.key[:MAX_KEY_BYTES]
        await self._publisher.publish(letter, key=key, headers=headers)
        self._published.labels(record.topic, error.reason).inc()
        written_by_clients = record.topic in self.client_topics
        if error.reason == HANDLER_ERROR or not (written_by_clients or error.reason == IMPLAUSIBLE):
            self._fuse.note_failed(record.topic)
        _log.warning(
            "dead letter",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            reason=error.reason,
            detail=error.detail,
        )


class Fuse:
    """Counts the last records of every topic; once it has stopped a topic, the topic stays stopped."""

    def __init__(self) -> None:
        self._failed: dict[str, deque[bool]] = {}
        self._stopped: set[str] = set()

    def problem(self) -> str | None:
        """The topics that are not consumed any more, as a readiness check; None if there are none."""
        if not self._stopped:
            return None
        topics = ", ".join(sorted(self._stopped))
        return f"nearly all records of {topics} became dead letters (see the log); a restart tries again"

    def has_stopped(self, topic: str) -> bool:
        """Whether a topic must not be consumed any more."""
        return topic in self._stopped

    def note_processed(self, topic: str, records: int) -> None:
        """Note records that became no dead letters."""
        self._recent(topic).extend([False] * min(records, FUSE_RECORDS))

    def note_failed(self, topic: str) -> None:
        """Note a record that became a dead letter."""
        recent = self._recent(topic)
        recent.append(True)
        if topic not in self._stopped and sum(recent) >= FUSE_SHARE * FUSE_RECORDS:
            self._stopped.add(topic)
            _log.critical("the topic is not consumed any more: nearly all records became dead letters", topic=topic)

    def _recent(self, topic: str) -> deque[bool]:
        return self._failed.setdefault(topic, deque(maxlen=FUSE_RECORDS))
