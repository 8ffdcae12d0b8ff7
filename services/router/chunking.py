"""When a piece of a streamed answer is published: not every token is a message."""

from collections import deque
from uuid import uuid4

from shared.messages import ErrorDetail, FinishReason, ResponseChunk


class Chunker:
    """Gathers an answer's text and cuts it into numbered chunks, at most one in an interval."""

    __slots__ = ("_interval_s", "_last_s", "_pending", "_request_id", "_sequence", "_stream")

    def __init__(self, request_id: str, *, interval_s: float) -> None:
        """Begin.

        Args:
            interval_s: between two chunks; 0 makes every piece a chunk.
        """
        self._request_id = request_id
        self._stream = uuid4().hex[:16]
        self._interval_s = interval_s
        self._pending: deque[str] = deque()
        self._sequence = 0
        self._last_s: float | None = None

    @property
    def started(self) -> bool:
        """Whether a chunk was cut."""
        return self._sequence > 0

    def add(self, text: str) -> None:
        """Take new text."""
        if text:
            self._pending.append(text)

    def due_in_s(self, now_s: float) -> float | None:
        """Seconds until what is pending may be cut, 0 for now; null when nothing is pending."""
        if not self._pending:
            return None
        if self._last_s is None:
            return 0.0
        return max(0.0, self._last_s + self._interval_s - now_s)

    def cut(self, now_s: float) -> ResponseChunk:
        """A chunk of all pending text; with an interval of 0 of the oldest piece alone."""
        self._last_s = now_s
        if self._interval_s == 0 and self._pending:
            return self._next(self._pending.popleft())
        return self._next(self._rest())

    def finish(
        self, *, finish_reason: FinishReason | None = None, error: ErrorDetail | None = None
    ) -> list[ResponseChunk]:
        """What is left, and last the final chunk; on an error the pending text is still the producer's."""
        chunks = [self.cut(0.0) for _ in range(len(self._pending) - 1)] if self._interval_s == 0 else []
        last = self._next(self._rest())
        return [*chunks, last.model_copy(update={"final": True, "finish_reason": finish_reason, "error": error})]

    def _rest(self) -> str:
        text = "".join(self._pending)
        self._pending.clear()
        return text

    def _next(self, text: str) -> ResponseChunk:
        chunk = ResponseChunk(request_id=self._request_id, stream=self._stream, sequence=self._sequence, text=text)
        self._sequence += 1
        return chunk
