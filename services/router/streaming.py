"""Publishes a streamed answer's chunks while the answer is being generated."""

import asyncio

from services.router.chunking import Chunker
from services.router.delivery import Delivery
from services.router.gate import Passage
from shared.messages import ErrorDetail, FinishReason


class ChunkStream:
    """The chunks of one request; text is offered without waiting, and leaves in order."""

    def __init__(self, request_id: str, delivery: Delivery, *, interval_s: float) -> None:
        """Begin.

        Args:
            interval_s: wall seconds between two chunks.
        """
        self._chunker = Chunker(request_id, interval_s=interval_s)
        self._delivery = delivery
        self._wake = asyncio.Event()
        self._ending = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        """Whether the producer may have seen a part of the answer."""
        return self._chunker.started

    def offer(self, text: str) -> None:
        """Take new text."""
        self._chunker.add(text)
        self._wake.set()
        if self._pump is None:
            self._pump = asyncio.create_task(self._run())

    async def end(
        self, passage: Passage, *, finish_reason: FinishReason | None = None, error: ErrorDetail | None = None
    ) -> None:
        """Publish the last chunk, after all others, once it is certain that nobody else answers the request."""
        self._ending.set()
        self._wake.set()
        if self._pump is not None:
            await self._pump
        for chunk in self._chunker.finish(finish_reason=finish_reason, error=error):
            await self._delivery.chunk(chunk, passage if chunk.final else None)

    async def abandon(self) -> None:
        """Stop without a last chunk; the request will be redelivered."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)

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
                await self._delivery.chunk(self._chunker.cut(now()))

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the end of the answer."""
        try:
            async with asyncio.timeout(seconds):
                await self._ending.wait()
        except TimeoutError:
            return
