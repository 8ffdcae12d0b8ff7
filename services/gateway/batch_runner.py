"""Works on batches: claims them, takes each from state to state, and stores the results of its lines.

A gateway that fails leaves its batches to others, whose lease they get. What it had published and not stored is
published again, so a line may be answered twice; its first stored result is kept.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

import asyncpg

from services.gateway.accounts import DeferredError
from services.gateway.admission import Admission
from services.gateway.batch_answers import BatchAnswers
from services.gateway.batch_lines import InputLine, LineSplitter, Result, Task
from services.gateway.batch_state import Event, Status
from services.gateway.batch_store import Batch, BatchStore, LeaseLostError
from services.gateway.batches import BatchError
from services.gateway.file_store import FileStore
from services.gateway.limits import month_end
from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.logs import get_logger, where

RENEW_S: Final = 2.0
"""Longest time between two renewals of a lease, which also show that the batch was cancelled, wall."""

POLL_S: Final = 1.0
"""How long a new batch, or one whose gateway died, is not noticed, wall."""

CLEANING_S: Final = 600.0
"""Between two removals of expired files, wall."""

LINES_AT_ONCE: Final = 16
"""Lines that are read before other work of the gateway gets its turn."""

_log = get_logger(__name__)


@dataclass(kw_only=True, slots=True)
class BatchRunner:
    """Works on a few batches at once.

    Attributes:
        answers_of: what answers the lines of a batch.
    """

    files: FileStore
    batches: BatchStore
    answers_of: Callable[[Batch], BatchAnswers]
    settings: GatewaySettings
    metrics: GatewayMetrics
    slots: asyncio.Semaphore = field(init=False)
    writing: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    _news: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _running: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.slots = asyncio.Semaphore(self.settings.batch_in_flight)

    def wake(self) -> None:
        """Look for a batch at once."""
        self._news.set()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._news.clear()
                batch = await self._claim() if len(self._running) < self.settings.batches_at_once else None
                if batch is not None:
                    self._running.add(batch.id)
                    group.create_task(self._work(batch))
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._news.wait()

    async def clean(self) -> None:
        """Remove what has expired, until cancelled."""
        retention = timedelta(days=self.settings.file_retention_days)
        while True:
            try:
                await self.files.status.retry(lambda: self.files.remove_expired(retention=retention))
            except asyncpg.PostgresError as error:
                _log.warning("expired files cannot be removed", error=type(error).__name__)
            await asyncio.sleep(CLEANING_S)

    async def _claim(self) -> Batch | None:
        try:
            return await self.batches.status.retry(lambda: self.batches.claim(except_ids=self._running))
        except asyncpg.PostgresError as error:
            _log.warning("no batch can be taken", error=type(error).__name__)
            return None

    async def _work(self, batch: Batch) -> None:
        """Work on a batch as far as it goes, and release its lease."""
        self.metrics.batches.inc()
        run = _Run(self, batch)
        try:
            await run.work()
        except LeaseLostError:
            _log.info("a batch has changed or is another gateway's", batch=batch.id)
        except Exception as error:  # noqa: BLE001 - a defect that one batch shows must not stop the others
            _log.error("a batch failed; it is tried again", batch=batch.id, error=type(error).__name__,
                       where=where(error))  # fmt: skip
            await asyncio.sleep(self.settings.batch_lease_s)
        finally:
            self._running.discard(batch.id)
            self.metrics.batches.dec()
            with contextlib.suppress(DatabaseUnavailableError, asyncpg.PostgresError):
                await self.batches.release(batch.id)
            self.wake()


class _Run:
    """The work on one batch, as long as this gateway has its lease."""

    def __init__(self, runner: BatchRunner, batch: Batch) -> None:
        self._runner = runner
        self._batch = batch
        self._answers = runner.answers_of(batch)
        self._retry = runner.batches.status.retry
        self._results = _ResultWriter(runner.batches, batch.id)

    async def work(self) -> None:
        """Go on with the batch to its end.

        Raises:
            LeaseLostError: its state has changed, or another gateway works on it.
        """
        steps, renewing = asyncio.create_task(self._steps()), asyncio.create_task(self._renew())
        try:
            await asyncio.wait((steps, renewing), return_when=asyncio.FIRST_COMPLETED)
            (steps if steps.done() else renewing).result()
        finally:
            steps.cancel()
            renewing.cancel()
            await asyncio.gather(steps, renewing, return_exceptions=True)

    async def _renew(self) -> None:
        pause_s = min(RENEW_S, self._runner.settings.batch_lease_s / 4)
        while True:
            await asyncio.sleep(pause_s)
            batch = await self._retry(lambda: self._runner.batches.renew(self._batch.id))
            if batch.status is Status.CANCELLING:
                self._answers.cancelled = True

    async def _steps(self) -> None:
        batches = self._runner.batches
        if self._batch.status is Status.VALIDATING:
            await self._count()
        if self._batch.status in {Status.IN_PROGRESS, Status.CANCELLING}:
            try:
                await self._answer_all()
            except DeferredError:
                await self._defer()
                return
        if self._batch.status is Status.IN_PROGRESS:
            await self._move(Event.ANSWERED)
        if self._batch.status in {Status.FINALIZING, Status.CANCELLING}:
            async with self._runner.writing:
                self._batch = await self._retry(lambda: batches.write_files(self._batch))
        _log.info("a batch has ended", batch=self._batch.id, status=self._batch.status, lines=self._batch.total)

    async def _defer(self) -> None:
        """Leave the batch, so that it takes no other one's place, until its budget may be there or it expires."""
        clock = self._runner.batches.clock
        until = min(month_end(clock.now()), self._batch.expires_at)
        wait_s = min(self._runner.settings.batch_defer_s, max(POLL_S, clock.wall_seconds_until(until)))
        await self._retry(lambda: self._runner.batches.defer(self._batch.id, wait_s))
        _log.info("a batch waits for a carbon budget", batch=self._batch.id, looks_again_in_s=round(wait_s))

    async def _move(self, event: Event, *, total: int = 0, problem: BatchError | None = None) -> None:
        text = None if problem is None else problem.model_dump_json()
        self._batch = await self._retry(
            lambda: self._runner.batches.move(self._batch, event, total=total, problem=text)
        )

    async def _count(self) -> None:
        """Count the lines; rejects the batch if there are none or too many."""
        total, limit = 0, self._runner.settings.max_batch_lines
        async for _ in self._lines():
            total += 1
            if total > limit:
                problem = BatchError(code="too_many_lines", message=f"the file has more than {limit} lines: split it")
                return await self._move(Event.REJECTED, problem=problem)
        if total == 0:
            problem = BatchError(code="empty_file", message="the file has no lines")
            return await self._move(Event.REJECTED, problem=problem)
        return await self._move(Event.COUNTED, total=total)

    async def _lines(self) -> AsyncIterator[InputLine]:
        """The lines of the input file that are not blank."""
        splitter = LineSplitter(max_bytes=self._runner.settings.max_body_bytes)
        files, number = self._runner.files, 0
        while (data := await self._retry(lambda: files.chunk(self._batch.input_file_id, number))) is not None:  # noqa: B023
            number += 1
            for read, line in enumerate(splitter.feed(data)):
                if read % LINES_AT_ONCE == 0:
                    await asyncio.sleep(0)
                yield line
        for line in splitter.finish():
            yield line

    async def _answer_all(self) -> None:
        """Get a result for every line that has none.

        Raises:
            DeferredError: the rest waits for a carbon budget; those that were admitted have their results.
        """
        slots = self._runner.slots
        finished = await self._retry(lambda: self._runner.batches.finished_lines(self._batch.id))
        deferred: DeferredError | None = None
        async with asyncio.TaskGroup() as writing:
            writer = writing.create_task(self._results.run())
            async with asyncio.TaskGroup() as answering:
                async for line in self._lines():
                    item = self._answers.reader.read(line)
                    if line.number in finished:
                        continue
                    # Before it takes a slot: batches of other keys need none of this key's tokens.
                    try:
                        admitted = await self._answers.admit(item) if isinstance(item, Task) else item
                    except DeferredError as error:
                        deferred = error
                        break
                    await slots.acquire()
                    answering.create_task(self._finish(admitted)).add_done_callback(lambda _: slots.release())
            writer.cancel()
        if deferred is not None:
            raise deferred

    async def _finish(self, admitted: tuple[Task, Admission] | Result) -> None:
        """Get the result of a line, and store it."""
        result = admitted if isinstance(admitted, Result) else await self._answers.result(*admitted)
        await self._results.write(result)
        self._runner.metrics.batch_lines.labels(result.outcome).inc()


class _ResultWriter:
    """Stores the results of a batch: all that have arrived during a statement with the next one."""

    def __init__(self, batches: BatchStore, batch_id: str) -> None:
        self._batches = batches
        self._batch_id = batch_id
        self._waiting: list[tuple[Result, asyncio.Future[None]]] = []
        self._arrived = asyncio.Event()

    async def write(self, result: Result) -> None:
        """Store a result; returns when it is stored."""
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((result, stored))
        self._arrived.set()
        await stored

    async def run(self) -> None:
        """Store results until cancelled."""
        batches = self._batches
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            taken, self._waiting = self._waiting, []
            results = [result for result, _ in taken]
            await batches.status.retry(lambda: batches.add_results(self._batch_id, results))  # noqa: B023
            for _, stored in taken:
                if not stored.done():
                    stored.set_result(None)
