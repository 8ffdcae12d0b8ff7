"""Publishes the chunks of a streamed answer while it is being generated."""

import asyncio
from collections import deque
from uuid import uuid4

from services.router.fencing import RecordFence
from services.router.publisher import RouterPublisher
from shared.messages import Decision, ErrorDetail, FinishReason, Reply, ResponseChunk


class Chunker:
    """Collects the text of an answer and cuts it into numbered chunks, at most one per interval."""

    __slots__ = ("_interval_s", "_last_s", "_pending", "_request_id", "_sequence", "_stream")

    def __init__(self, request_id: str, *, interval_s: float) -> None:
        """Create a chunker.

        Args:
            interval_s: seconds between two chunks; 0 publishes every piece as a chunk.
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
        """Add new text."""
        if text:
            self._pending.append(text)

    def due_in_s(self, now_s: float) -> float | None:
        """Seconds until the pending text may be cut, 0 for now; None if no text is pending."""
        if not self._pending:
            return None
        if self._last_s is None:
            return 0.0
        return max(0.0, self._last_s + self._interval_s - now_s)

    def cut(self, now_s: float) -> ResponseChunk:
        """A chunk of all pending text; with an interval of 0, of the oldest piece."""
        self._last_s = now_s
        if self._interval_s == 0 and self._pending:
            return self._next(self._pending.popleft())
        return self._next(self._remaining_text())

    def finish(
        self, *, finish_reason: FinishReason | None = None, error: ErrorDetail | None = None
    ) -> list[ResponseChunk]:
        """The remaining chunks, the final one last; after an error they still contain the pending text."""
        chunks = [self.cut(0.0) for _ in range(len(self._pending) - 1)] if self._interval_s == 0 else []
        last = self._next(self._remaining_text())
        return [*chunks, last.model_copy(update={"final": True, "finish_reason": finish_reason, "error": error})]

    def _remaining_text(self) -> str:
        text = "".join(self._pending)
        self._pending.clear()
        return text

    def _next(self, text: str) -> ResponseChunk:
        chunk = ResponseChunk(request_id=self._request_id, stream=self._stream, sequence=self._sequence, text=text)
        self._sequence += 1
        return chunk


class ChunkStream:
    """The chunks of one request: accepts text without waiting, publishes in order."""

    def __init__(
        self, request_id: str, publisher: RouterPublisher, *, interval_s: float, reply_partition: int | None = None
    ) -> None:
        """Create a stream.

        Args:
            interval_s: wall seconds between two chunks.
            reply_partition: publish the chunks as replies to this partition instead.
        """
        self.decision: Decision | None = None
        """Which option serves the request; published with the first chunk of the replies."""
        self._reply_partition = reply_partition
        self._chunker = Chunker(request_id, interval_s=interval_s)
        self._publisher = publisher
        self._wake = asyncio.Event()
        self._ending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        """Whether the client may have received a part of the answer."""
        return self._chunker.started

    def offer(self, text: str) -> None:
        """Add new text."""
        self._chunker.add(text)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def end(
        self, fence: RecordFence, *, finish_reason: FinishReason | None = None, error: ErrorDetail | None = None
    ) -> None:
        """Publish the remaining chunks; the final one through the fence."""
        self._ending.set()
        self._wake.set()
        if self._task is not None:
            await self._task
        for chunk in self._chunker.finish(finish_reason=finish_reason, error=error):
            await self._publish(chunk, fence if chunk.final else None)

    async def cancel(self) -> None:
        """Stop without a final chunk; the request will be redelivered."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        now = asyncio.get_running_loop().time
        while not self._ending.is_set():
            self._wake.clear()
            wait_s = self._chunker.due_in_s(now())
            if wait_s is None:
                await self._wake.wait()
            elif wait_s > 0:
                await self._pause(wait_s)
            else:
                await self._publish(self._chunker.cut(now()))

    async def _publish(self, chunk: ResponseChunk, fence: RecordFence | None = None) -> None:
        if self._reply_partition is None:
            await self._publisher.publish_chunk(chunk, fence)
            return
        decision = self.decision if chunk.sequence == 0 else None
        reply = Reply(request_id=chunk.request_id, chunk=chunk, decision=decision)
        await self._publisher.publish_reply(reply, self._reply_partition)

    async def _pause(self, seconds: float) -> None:
        """Wait, at most until the end of the answer."""
        try:
            async with asyncio.timeout(seconds):
                await self._ending.wait()
        except TimeoutError:
            return
