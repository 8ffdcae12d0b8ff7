"""Liveness and readiness of a service, from the progress of its work."""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.runtime.logs import get_logger, where

Check = Callable[[], str | None]
"""A readiness check: returns `None` if all is well, else the problem."""

_log = get_logger(__name__)


class ProgressCollector(Collector):
    """Exports the age of every `Progress` to Prometheus."""

    def __init__(self, health: "Health") -> None:
        self._health = health

    def collect(self) -> Iterable[Metric]:
        """The gauge `sprout_progress_age_seconds`."""
        family = GaugeMetricFamily(
            "sprout_progress_age_seconds", "Wall time since the last round of recurring work ended", labels=["work"]
        )
        for work, progress in self._health.progress.items():
            family.add_metric([work], progress.age_s)
        yield family


class Progress:
    """Time since the last round of recurring work, wall seconds."""

    def __init__(self, *, within_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        """Start counting now.

        Args:
            within_s: longest time between two rounds.
            now_s: clock, for tests.
        """
        self._within_s = within_s
        self._now_s = now_s
        self._last_s = now_s()

    def made(self) -> None:
        """Record the end of a round."""
        self._last_s = self._now_s()

    @property
    def age_s(self) -> float:
        """Seconds since the last round ended."""
        return self._now_s() - self._last_s

    def problem(self) -> str | None:
        """The readiness check."""
        age_s = self.age_s
        return None if age_s <= self._within_s else f"no progress for {age_s:.0f} s (limit {self._within_s:g} s)"


class Health:
    """Readiness checks, and background tasks without which the service must not run on."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.progress: dict[str, Progress] = {}
        self.failure: str | None = None
        self.role: Callable[[], str] | None = None
        """What this copy of the service does, for `/ready`: leader or standby; None where all copies do the same."""

    def add_check(self, name: str, check: Check) -> None:
        """Register a readiness check."""
        self._checks[name] = check

    def expect_progress(self, name: str, *, within_s: float) -> Progress:
        """Expect rounds of recurring work from now on: adds a readiness check and a metric."""
        self.progress[name] = Progress(within_s=within_s)
        self.add_check(name, self.progress[name].problem)
        return self.progress[name]

    def problems(self) -> dict[str, str]:
        """The problems that keep the service from being ready, by check."""
        found = {name: problem for name, check in self._checks.items() if (problem := check()) is not None}
        if self.failure is not None:
            found["failure"] = self.failure
        return found

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` in the background; if it raises, the process stops with an error."""
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
        # The message of an unexpected error may quote a prompt.
        _log.critical(
            "background task failed; stopping", task=task.get_name(), error=type(error).__name__, where=where(error)
        )
        signal.raise_signal(signal.SIGTERM)
