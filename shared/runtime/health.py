"""Is the service alive, and is it ready? Answered from real progress, not from being started."""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.runtime.logs import get_logger, where

Check = Callable[[], str | None]
"""Returns None when all is well, else what is wrong."""

_log = get_logger(__name__)


class ProgressCollector(Collector):
    """Tells Prometheus of a service's progress, as it is when asked."""

    def __init__(self, health: "Health") -> None:
        self._health = health

    def collect(self) -> Iterable[Metric]:
        """The one metric."""
        family = GaugeMetricFamily(
            "sprout_progress_age_seconds", "Wall time since work that never ends last came round", labels=["work"]
        )
        for work, progress in self._health.progress.items():
            family.add_metric([work], progress.age_s)
        yield family


class Progress:
    """When work that never ends last came round; in wall time."""

    def __init__(self, *, within_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        """Begin now.

        Args:
            within_s: a round may take so long.
        """
        self._within_s = within_s
        self._now_s = now_s
        self._last_s = now_s()

    def made(self) -> None:
        """A round is over."""
        self._last_s = self._now_s()

    @property
    def age_s(self) -> float:
        """Seconds since the last round was over."""
        return self._now_s() - self._last_s

    def problem(self) -> str | None:
        """What stands against readiness."""
        age_s = self.age_s
        return (
            None if age_s <= self._within_s else f"no progress for {age_s:.0f} s, at most {self._within_s:g} are usual"
        )


class Health:
    """Readiness checks, and background tasks whose death is the service's death."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.progress: dict[str, Progress] = {}
        self.failure: str | None = None

    def add_check(self, name: str, check: Check) -> None:
        """Register a readiness check."""
        self._checks[name] = check

    def expect_progress(self, name: str, *, within_s: float) -> Progress:
        """Expect rounds of some work from now on; it is a readiness check, and a metric of the service."""
        self.progress[name] = Progress(within_s=within_s)
        self.add_check(name, self.progress[name].problem)
        return self.progress[name]

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
        self.failure = f"{task.get_name()}: {type(error).__name__}"
        # The text of an unforeseen error may quote what was worked on.
        _log.critical(
            "background task failed; stopping", task=task.get_name(), error=type(error).__name__, where=where(error)
        )
        signal.raise_signal(signal.SIGTERM)
