"""Is the service alive, and is it ready? Answered from real progress, not from being started."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from shared.logs import get_logger

Check = Callable[[], str | None]
"""Returns None when all is well, else what is wrong."""

_log = get_logger(__name__)


class Health:
    """Readiness checks, and background tasks whose death is the service's death."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure: str | None = None

    def add_check(self, name: str, check: Check) -> None:
        """Register a readiness check."""
        self._checks[name] = check

    def problems(self) -> dict[str, str]:
        """What stands against readiness, by check."""
        found = {name: problem for name, check in self._checks.items() if (problem := check()) is not None}
        if self.failure is not None:
            found["failure"] = self.failure
        return found

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` in the background; should it fail, the process stops with an error rather than limp on."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def cancel_background(self) -> None:
        """Stop every background task and wait for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        self.failure = f"{task.get_name()}: {type(error).__name__}: {error}"
        _log.critical("background task failed; stopping", task=task.get_name(), exc_info=error)
        signal.raise_signal(signal.SIGTERM)
