"""A fuse that stops the consumption of a topic when nearly all of its records become dead letters."""

from collections import deque
from typing import Final

from shared.runtime.logs import get_logger

FUSE_RECORDS: Final = 200
"""Records of a topic that the fuse looks at."""

FUSE_SHARE: Final = 0.95
"""Share of them that must have become dead letters."""

_log = get_logger(__name__)


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
