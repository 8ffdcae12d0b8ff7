"""Liveness, readiness and background tasks of a service."""

import asyncio
import signal
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from shared.runtime.health import Health, Progress, ProgressCollector


@pytest.fixture
def stops() -> Iterator[list[int]]:
    """The SIGTERMs that the process sends to itself."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_a_late_round_is_a_problem():
    now_s = 100.0
    progress = Progress(within_s=5.0, now_s=lambda: now_s)
    assert progress.problem() is None
    now_s = 106.0
    assert (progress.age_s, progress.problem()) == (6.0, "no progress for 6 s (limit 5 s)")
    progress.made()
    assert (progress.age_s, progress.problem()) == (0.0, None)


def test_progress_is_a_readiness_check_and_a_metric():
    health, registry = Health(), CollectorRegistry()
    registry.register(ProgressCollector(health))
    health.expect_progress("commits", within_s=-1.0)
    assert list(health.problems()) == ["commits"]
    assert registry.get_sample_value("sprout_progress_age_seconds", {"work": "commits"}) >= 0


async def test_a_failed_background_task_stops_the_service_and_its_error_is_not_quoted(stops, caplog):
    health = Health()

    async def die() -> None:
        raise RuntimeError("the prompt was ...")

    task = health.spawn("commit offsets", die())
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert stops == [signal.SIGTERM]
    assert health.failure == "commit offsets: RuntimeError"
    assert health.problems() == {"failure": "commit offsets: RuntimeError"}
    assert "the prompt was" not in caplog.text


async def test_a_background_task_that_ends_or_is_cancelled_is_not_a_failure(stops):
    health = Health()
    ended = health.spawn("once", asyncio.sleep(0))
    health.spawn("for ever", asyncio.sleep(60))
    await ended
    await health.cancel_background()
    assert (stops, health.failure) == ([], None)
