"""Runs a demo: starts a stack, replays the traffic, waits for the ledger, and stops the stack."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import asyncpg
from rich.console import Console

from deploy.local.config import StackConfig
from deploy.local.model_servers import ModelServers
from deploy.local.stack import LocalStack
from shared.fleet import load_fleet
from tools.demo.clients import Observer, Producer, Tally
from tools.demo.day import LATENESS_WALL_S, DemoDay, World, stack_config
from tools.demo.progress import Progress
from tools.demo.traffic import PlannedRequest, mean_tokens, plan_traffic, prompts_of
from tools.reporting import Report, collect_report

ANSWERS_WAIT_S = 60.0
"""After the last request the wait for answers ends when none has come for this long, wall seconds."""
SETTLEMENT_WAIT_S = 90.0
"""Longest wait for the ledger to settle every call after the last answer, wall seconds."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoRun:
    """The results of a demo.

    Attributes:
        sent: number of requests that Kafka acknowledged.
        tally: counts of the services' messages.
        report: the report from the ledger's database.
        seconds: wall time, from starting the stack until it was stopped.
    """

    day: DemoDay
    sent: int
    tally: Tally
    report: Report
    seconds: float


async def run_demo(
    day: DemoDay, config: StackConfig, models: ModelServers, *, world: World = "sprout", console: Console, say: Say
) -> DemoRun:
    """Start a stack, replay the day, and stop the stack.

    Args:
        config: folders of the stack; the rest follows from the day.
        world: with Sprout, or the same day without it.

    Raises:
        WorkloadError: the workload cannot be used.
        STACK_ERRORS: the stack could not be started, or one of its processes exited.
        KafkaError: a request could not be published.
    """
    began = time.monotonic()
    prompts = prompts_of(day.workload, model=day.model, tasks=day.pace.tasks)
    day = replace(day, mean_tokens=mean_tokens(prompts))
    plan = plan_traffic(
        prompts,
        start=day.start,
        hours=day.hours,
        requests=day.requests,
        seed=day.seed,
    )
    async with LocalStack(stack_config(day, config, world), models, say=say) as stack:
        replay = _Replay(day, stack, console=console, say=say)
        async with _alongside(stack.watch()):
            await replay.run(plan)
            report = await replay.settled_report()
    return DemoRun(day, replay.producer.sent, replay.tally, report, time.monotonic() - began)


class _Replay:
    """The replay of a day on a running stack."""

    def __init__(self, day: DemoDay, stack: LocalStack, *, console: Console, say: Say) -> None:
        self._day = day
        self._stack = stack
        self._console = console
        self._say = say
        self.producer = Producer(stack.kafka, stack.clock, model=day.model, max_tokens=day.pace.max_tokens)
        self._observer = Observer(stack.kafka)

    @property
    def tally(self) -> Tally:
        """Counts of the services' messages so far."""
        return self._observer.tally

    async def run(self, plan: list[PlannedRequest]) -> None:
        """Send the requests and wait for their answers, showing the progress."""
        self._say(f"replaying {self._day.hours:g} hours with {len(plan):,} requests in {self._day.duration_s:.0f} s")
        progress = Progress(self._day, self._stack.clock, self.tally, self.producer, self._console)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(_alongside(self._observer.observe()))
            await stack.enter_async_context(_alongside(progress.show()))
            await self.producer.send(plan)
            await self._all_answered(len(plan))
            # A duplicate answer would arrive now.
            await asyncio.sleep(LATENESS_WALL_S)

    async def _all_answered(self, requests: int) -> None:
        """Wait for the answers, however slow the machine is, as long as some arrive."""
        answered, deadline = self.tally.answered, time.monotonic() + ANSWERS_WAIT_S
        while self.tally.answered < requests and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            if self.tally.answered > answered:
                answered, deadline = self.tally.answered, time.monotonic() + ANSWERS_WAIT_S

    async def settled_report(self) -> Report:
        """Wait until the ledger has settled every call, and make the report."""
        self._say("every request was sent; waiting until the ledger has attributed all energy")
        pool = await asyncpg.create_pool(
            self._stack.database.url.get_secret_value(),
            min_size=1,
            max_size=2,
            server_settings={"search_path": "ledger", "application_name": "sprout.demo"},
        )
        try:
            fleet, stretch = load_fleet(self._stack.config.state_dir / "fleet.toml"), self._day.stretch
            report = await collect_report(pool, fleet=fleet, stretch=stretch)
            deadline = time.monotonic() + SETTLEMENT_WAIT_S
            while not _complete(report, self.tally) and time.monotonic() < deadline:
                await asyncio.sleep(1.0)
                report = await collect_report(pool, fleet=fleet, stretch=stretch)
            # The meters run before the first request and after the last one too.
            of_day = await collect_report(
                pool, since=self._day.start, until=self._day.end, fleet=fleet, stretch=stretch
            )
        finally:
            await pool.close()
        return replace(report, metered=of_day.metered)


def _complete(report: Report, tally: Tally) -> bool:
    """Whether every answered request and every call of the evaluator has a footprint."""
    answered = tally.answered - sum(tally.errors.values())
    return report.requests.settled >= answered and report.requests.unsettled == 0


@asynccontextmanager
async def _alongside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine during the block and cancel it at the end; if it fails, the block raises the same error."""
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work)
            yield
            task.cancel()
    except BaseExceptionGroup as errors:
        if len(errors.exceptions) == 1:
            raise errors.exceptions[0] from None
        raise
