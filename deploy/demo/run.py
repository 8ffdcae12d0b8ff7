"""Runs the demo: starts the stack, lets a producer live through the day, waits for the books, stops everything."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
from rich.console import Console

from deploy.demo.day import DemoDay
from deploy.demo.observer import Observer, Tally
from deploy.demo.producer import Producer
from deploy.demo.progress import Progress
from deploy.demo.prompts import prompts_of
from deploy.demo.traffic import PlannedRequest, plan_traffic
from deploy.demo.tuning import LATENESS_WALL_S, service_settings
from deploy.local.config import StackConfig
from deploy.local.models import ModelServers
from deploy.local.stack import LocalStack
from deploy.local.state import BrokerKind
from tools.reporting import Report, collect_report

ANSWERS_WAIT_S = 60.0
"""Wall seconds after the last request in which the last answers must come."""
BOOKS_WAIT_S = 30.0
"""Wall seconds after the last answer in which the ledger must have settled every call."""
LEAD_S = 12.0
"""Wall seconds before the day begins in which the services start."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoRun:
    """What came of it.

    Attributes:
        tally: what a producer saw.
        report: what the ledger's books say.
        seconds: wall time from the first process to the last one stopped.
    """

    day: DemoDay
    sent: int
    tally: Tally
    report: Report
    broker: BrokerKind
    seconds: float


async def run_demo(day: DemoDay, config: StackConfig, models: ModelServers, *, console: Console, say: Say) -> DemoRun:
    """Play a day through a local stack of its own.

    Raises:
        WorkloadError: the workload cannot be used.
        LOCAL_ERRORS: the stack could not be started, or a process of it ended.
        KafkaError: a request could not be published.
    """
    began = time.monotonic()
    plan = plan_traffic(
        prompts_of(day.workload, tasks=day.pace.tasks),
        start=day.start,
        hours=day.hours,
        requests=day.requests,
        seed=day.seed,
    )
    async with LocalStack(config, models, say=say) as stack:
        day_run = _DayRun(day, stack, console=console, say=say)
        async with _alongside(stack.watch()):
            await day_run.play(plan)
            report = await day_run.close_books()
        broker = stack.state.broker
    return DemoRun(day, day_run.producer.sent, day_run.tally, report, broker, time.monotonic() - began)


def stack_config(day: DemoDay, config: StackConfig) -> StackConfig:
    """A stack's configuration for a day: its replay, its model, its services' settings."""
    return config.model_copy(
        update={
            "event_start": day.start,
            "rate": day.rate,
            "lead_s": LEAD_S,
            "model": day.model,
            "workload": day.workload,
            "zone": day.zone,
            "carbon": {day.zone: day.trace},
            "settings": service_settings(day),
        }
    )


class _DayRun:
    """One day on a running stack."""

    def __init__(self, day: DemoDay, stack: LocalStack, *, console: Console, say: Say) -> None:
        self._day = day
        self._stack = stack
        self._console = console
        self._say = say
        self.producer = Producer(stack.kafka, stack.clock, model=day.model, max_tokens=day.pace.max_tokens)
        self._observer = Observer(stack.kafka)

    @property
    def tally(self) -> Tally:
        """What a producer saw so far."""
        return self._observer.tally

    async def play(self, plan: list[PlannedRequest]) -> None:
        """Send the day's requests and wait for their answers, showing how it goes."""
        self._say(f"the day begins: {len(plan):,} requests in {self._day.duration_s:.0f} s")
        progress = Progress(self._day, self._stack.clock, self.tally, self.producer, self._console)
        async with AsyncExitStack() as beside:
            await beside.enter_async_context(_alongside(self._observer.watch()))
            await beside.enter_async_context(_alongside(progress.show()))
            await self.producer.send(plan)
            await _until(lambda: self.tally.answered >= len(plan), ANSWERS_WAIT_S)
            # A second answer to a request would come right behind the first ones.
            await asyncio.sleep(LATENESS_WALL_S)

    async def close_books(self) -> Report:
        """Wait until the ledger has settled every call, then ask it for the report."""
        self._say("the day is over; waiting for the ledger to settle its books")
        pool = await asyncpg.create_pool(
            self._stack.database.url.get_secret_value(),
            min_size=1,
            max_size=2,
            server_settings={"search_path": "ledger", "application_name": "sprout.demo"},
        )
        try:
            report = await collect_report(pool)
            deadline = time.monotonic() + BOOKS_WAIT_S
            while not _complete(report, self.tally) and time.monotonic() < deadline:
                await asyncio.sleep(1.0)
                report = await collect_report(pool)
        finally:
            await pool.close()
        return report


def _complete(report: Report, tally: Tally) -> bool:
    """Whether every answer that a producer saw has its footprint, and the evaluator's calls too."""
    answered = tally.answered - sum(tally.errors.values())
    return report.requests.settled >= answered and report.requests.unsettled == 0


async def _until(reached: Callable[[], bool], wait_s: float) -> bool:
    """Wait for something to become true; returns whether it did."""
    deadline = time.monotonic() + wait_s
    while not reached():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True


@asynccontextmanager
async def _alongside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` beside the block; should it fail, so does the block, with the same error; it ends with the block."""
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work)
            yield
            task.cancel()
    except BaseExceptionGroup as errors:
        if len(errors.exceptions) == 1:
            raise errors.exceptions[0] from None
        raise
