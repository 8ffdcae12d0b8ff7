"""Replies of the routers to this gateway's requests: the requests that wait, and the parts of their answers."""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from shared.messages import Decision, GenerationResponse, Reply, ResponseChunk


class PendingAnswer:
    """The answer to one request, as far as it has arrived.

    Attributes:
        response: None until it has arrived.
        decision: None until a part has arrived.
        restarted: the router that began the answer failed, and another one began it again.
    """

    def __init__(self) -> None:
        self.response: GenerationResponse | None = None
        self.decision: Decision | None = None
        self.restarted = False
        self._pieces: deque[str] = deque()
        self._taken = 0
        self._stream: str | None = None
        self._next = 0
        self._arrived = asyncio.Event()

    def add(self, reply: Reply) -> None:
        """Add a part of the answer."""
        if reply.chunk is not None:
            self.decision = self.decision or reply.decision
            self._add_chunk(reply.chunk)
        elif self.response is None and reply.response is not None:
            self.response = reply.response
            self.decision = reply.response.decision or self.decision
        self._arrived.set()

    def wake(self) -> None:
        """End a wait although nothing has arrived."""
        self._arrived.set()

    def take_text(self) -> str:
        """The text that has arrived and was not taken yet; with the response, all that is left of it."""
        text = "".join(self._pieces)
        self._pieces.clear()
        if self.response is not None and self.response.status == "ok":
            text = (self.response.text or "")[self._taken :]
        self._taken += len(text)
        return text

    @property
    def began(self) -> bool:
        """Whether a part of the text was taken."""
        return self._taken > 0

    async def wait(self, seconds: float) -> bool:
        """Wait for the next part, or `wake`; returns whether either came since the last call."""
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            return False
        self._arrived.clear()
        return True

    def _add_chunk(self, chunk: ResponseChunk) -> None:
        if chunk.stream != self._stream:
            if self.began:
                self.restarted = True
                return
            self._pieces.clear()
            self._stream, self._next = chunk.stream, 0
        if chunk.sequence >= self._next:
            self._next = chunk.sequence + 1
            if chunk.text:
                self._pieces.append(chunk.text)


class ReplyInbox:
    """The requests that wait for replies, by request id."""

    def __init__(self) -> None:
        self._pending: dict[str, PendingAnswer] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def waiting(self) -> set[str]:
        """The ids of the requests that wait."""
        return set(self._pending)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    @contextmanager
    def expect(self, request_id: str) -> Iterator[PendingAnswer]:
        """Receive the replies to a request as long as the context is open."""
        pending = PendingAnswer()
        self._pending[request_id] = pending
        try:
            yield pending
        finally:
            del self._pending[request_id]

    def deliver(self, replies: Iterable[Reply]) -> None:
        """Hand over replies; those to requests that do not wait here are dropped."""
        for reply in replies:
            pending = self._pending.get(reply.request_id)
            if pending is not None:
                pending.add(reply)
