"""Cancels requests that nobody waits for any more: running ones, and those that this router starts later."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shared.inference.attempts import CancelSignal
from shared.messages import Cancellation

MAX_REMEMBERED: Final = 100_000
"""Cancellations of requests that have not been started; the oldest are forgotten first."""

REMEMBERED_S: Final = 900.0
"""How long they are remembered, wall seconds."""


class Cancellations:
    """The running requests, and the cancellations of requests that have not been started."""

    def __init__(self) -> None:
        self._running: dict[str, list[tuple[str, CancelSignal]]] = {}
        self._remembered: OrderedDict[tuple[str, str | None], float] = OrderedDict()

    def cancel(self, message: Cancellation) -> int:
        """Cancel the running requests that are meant, and remember the cancellation for later ones.

        Returns:
            The number of running requests that were cancelled.
        """
        found = [
            signal
            for record, signal in self._running.get(message.request_id, ())
            if message.record is None or message.record == record
        ]
        for signal in found:
            signal.cancel()
        self._remember(message)
        return len(found)

    @contextmanager
    def watch(self, request_id: str, record: str) -> Iterator[CancelSignal]:
        """The signal to a request, while it is processed, that it is cancelled."""
        signal = CancelSignal()
        entry = (record, signal)
        self._running.setdefault(request_id, []).append(entry)
        if self._is_remembered((request_id, record)) or self._is_remembered((request_id, None)):
            signal.cancel()
        try:
            yield signal
        finally:
            entries = self._running[request_id]
            entries.remove(entry)
            if not entries:
                del self._running[request_id]

    def _remember(self, message: Cancellation) -> None:
        now_s = asyncio.get_running_loop().time()
        self._remembered[message.request_id, message.record] = now_s
        self._remembered.move_to_end((message.request_id, message.record))
        while self._remembered:
            oldest = next(iter(self._remembered))
            if len(self._remembered) <= MAX_REMEMBERED and now_s - self._remembered[oldest] <= REMEMBERED_S:
                break
            del self._remembered[oldest]

    def _is_remembered(self, key: tuple[str, str | None]) -> bool:
        since_s = self._remembered.get(key)
        return since_s is not None and asyncio.get_running_loop().time() - since_s <= REMEMBERED_S
