"""Works on batches: publishes their lines as requests, collects the answers, and writes the files.

A gateway that fails leaves its batches to others, whose lease they get. What it had published and not stored is
published again, so a line may be answered twice; its first stored result is kept.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal

import asyncpg
from aiokafka.errors import KafkaError
from faststream.exceptions import IncorrectState

from services.gateway.accounts import Accounts
from services.gateway.admission import Admission
from services.gateway.batch_lines import InputLine, LineReader, LineSplitter, Result, Task
from services.gateway.batch_state import Event, Status
from services.gateway.batch_store import Batch, BatchStore, LeaseLostError
from services.gateway.batches import BatchError
from services.gateway.errors import ApiError
from services.gateway.estimates import Estimates
from services.gateway.file_store import FileStore
from services.gateway.keys import ApiKey
from services.gateway.metrics import GatewayMetrics
from services.gateway.replies import PendingAnswer, ReplyInbox
from services.gateway.schema import ChatRequest
from services.gateway.settings import GatewaySettings
from services.gateway.translate import Answers, to_request
from shared.fleet import Fleet
from shared.kafka.publish import TOO_LARGE
from shared.messages import Cancellation, GenerationRequest, GenerationResponse
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.logs import get_logger, where

RENEW_S: Final = 2.0
"""Longest time between two renewals of a lease, which also show that the batch was cancelled, wall."""

POLL_S: Final = 1.0
"""How long a new batch, or one whose gateway died, is not noticed, wall."""

PAUSE_S: Final = 2.0
"""Before a request that failed is published again, wall."""

ATTEMPTS: Final = 3
"""Attempts of a line whose model server fails or whose answer gets lost."""

GRACE_S: Final = 15.0
"""After a request's deadline in which the router's answer may still arrive, wall."""

CLEANING_S: Final = 600.0
"""Between two removals of expired files, wall."""

LINES_AT_ONCE: Final = 16
"""Lines that are read before other work of the gateway gets its turn."""

_AGAIN: Final = frozenset({"no_endpoint", "upstream_error"})
_ENDINGS: Final = {
    "batch_expired": "the batch was not done within its completion window",
    "batch_cancelled": "the batch was cancelled",
}
Ending = Literal["batch_expired", "batch_cancelled"]

_log = get_logger(__name__)


@dataclass(kw_only=True, slots=True)
class BatchRunner:
    """Works on a few batches at once.

    Attributes:
        publish: publishes a request to the lane of batches.
        cancel: publishes a cancellation.
        reply_partition: that this gateway reads.
    """

    files: FileStore
    batches: BatchStore
    accounts: Accounts
    inbox: ReplyInbox
    estimates: Estimates
    fleet: Fleet
    settings: GatewaySettings
    clock: Clock
    metrics: GatewayMetrics
    publish: Callable[[GenerationRequest], Awaitable[None]]
    cancel: Callable[[Cancellation], Awaitable[None]]
    reply_partition: int
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
        """Work on a batch as far as it goes, and give up its lease."""
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
        self._cancelled = batch.status is Status.CANCELLING
        self._key = ApiKey(batch.key_id, "", batch.tenant)
        self._retry = runner.batches.status.retry
        self._reader = LineReader(batch.id, batch.endpoint)
        self._results = _ResultWriter(runner, batch.id)

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
            self._cancelled = self._cancelled or batch.status is Status.CANCELLING

    async def _steps(self) -> None:
        batches = self._runner.batches
        if self._batch.status is Status.VALIDATING:
            await self._count()
        if self._batch.status in {Status.IN_PROGRESS, Status.CANCELLING}:
            await self._answer_all()
        if self._batch.status is Status.IN_PROGRESS:
            await self._move(Event.ANSWERED)
        if self._batch.status in {Status.FINALIZING, Status.CANCELLING}:
            async with self._runner.writing:
                self._batch = await self._retry(lambda: batches.write_files(self._batch))
        _log.info("a batch has ended", batch=self._batch.id, status=self._batch.status, lines=self._batch.total)

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
        """Get a result for every line that has none."""
        slots = self._runner.slots
        finished = await self._retry(lambda: self._runner.batches.finished_lines(self._batch.id))
        async with asyncio.TaskGroup() as writing:
            writer = writing.create_task(self._results.run())
            async with asyncio.TaskGroup() as answering:
                async for line in self._lines():
                    item = self._reader.read(line)
                    if line.number in finished:
                        continue
                    # Before it takes a slot: batches of other keys need none of this key's tokens.
                    admitted = await self._admit(item) if isinstance(item, Task) else item
                    await slots.acquire()
                    answering.create_task(self._finish(admitted)).add_done_callback(lambda _: slots.release())
            writer.cancel()

    async def _admit(self, task: Task) -> tuple[Task, Admission] | Result:
        """Count a line against the limits of the batch's key; waits while too few tokens are left in this minute."""
        accounts = self._runner.accounts
        try:
            message = self._message(task, self._runner.clock.now())
            while (ending := self._ending()) is None:
                admitted = await self._retry(lambda: accounts.admit_line(self._key, message))
                if isinstance(admitted, Admission):
                    return task, admitted
                while admitted > 0 and self._ending() is None:
                    await asyncio.sleep(min(POLL_S, admitted))
                    admitted -= POLL_S
        except ApiError as error:
            return self._reader.refused(task.number, task.custom_id, error)
        return self._reader.unprocessed(task.number, task.custom_id, ending, _ENDINGS[ending])

    async def _finish(self, admitted: tuple[Task, Admission] | Result) -> None:
        """Get the result of a line, and store it."""
        result = admitted if isinstance(admitted, Result) else await self._result(*admitted)
        await self._results.write(result)
        self._runner.metrics.batch_lines.labels(result.outcome).inc()

    async def _result(self, task: Task, admission: Admission) -> Result:
        accounts, estimates = self._runner.accounts, self._runner.estimates
        with self._runner.inbox.expect(self._reader.request_id(task.number)) as pending:
            try:
                result = await self._answer(task, admission, pending)
            except ApiError as error:
                result = self._reader.refused(task.number, task.custom_id, error)
            except Exception as error:  # noqa: BLE001 - a defect that one line shows must not stop the batch
                _log.error("a line of a batch failed", batch=self._batch.id, line=task.number,
                           error=type(error).__name__, where=where(error))  # fmt: skip
                internal = ApiError(500, "the gateway failed on this line", kind="server_error", code="internal_error")
                result = self._reader.refused(task.number, task.custom_id, internal)
        if pending.response is None:
            accounts.finish(admission, None)
        else:
            accounts.answered(admission, pending.response, estimates)
        return result

    async def _answer(self, task: Task, admission: Admission, pending: PendingAnswer) -> Result:
        """Publish the request of a line until it is answered, or the batch ends.

        Raises:
            ApiError: the answer is an error.
        """
        attempts = 0
        while (ending := self._ending()) is None:
            created = self._runner.clock.now()
            message = self._message(task, created).model_copy(update={"directive": admission.request.directive})
            if not await self._publish(message):
                await asyncio.sleep(PAUSE_S)
                continue
            response = await self._response(pending, message)
            if response is None or _is_worth_another_attempt(response):
                attempts += 1
            elif not _is_late(response):
                return self._answered(task, response, created)
            if attempts >= ATTEMPTS:
                if response is not None and response.error is not None:
                    raise ApiError.of_response(response.error)
                raise ApiError(504, "there was no answer in time", kind="timeout_error", code="timeout")
            pending.response = None
            if attempts:
                await asyncio.sleep(PAUSE_S)
        return self._reader.unprocessed(task.number, task.custom_id, ending, _ENDINGS[ending])

    def _message(self, task: Task, now: datetime) -> GenerationRequest:
        settings, clock = self._runner.settings, self._runner.clock
        limit = now + timedelta(seconds=settings.batch_request_s * clock.rate)
        message = to_request(
            task.body,
            headers={},
            fleet=self._runner.fleet,
            tenant=self._batch.tenant,
            reply_partition=self._runner.reply_partition,
            now=now,
            deadline=min(limit, self._batch.expires_at),
        )
        return message.model_copy(update={"id": self._reader.request_id(task.number)})

    async def _publish(self, message: GenerationRequest) -> bool:
        """Publish a request; returns whether Kafka has it for certain.

        Raises:
            ApiError: it is too large.
        """
        try:
            async with asyncio.timeout(self._runner.settings.publish_timeout_s):
                await self._runner.publish(message)
        except TOO_LARGE:
            raise ApiError(
                413, "the request is too large: shorten the prompt", param="messages", code="context_length_exceeded"
            ) from None
        except (KafkaError, TimeoutError, IncorrectState):
            return False
        return True

    async def _response(self, pending: PendingAnswer, message: GenerationRequest) -> GenerationResponse | None:
        """Wait for the response; None if the batch ends, or if none arrives in time."""
        deadline = message.deadline or self._batch.expires_at
        while pending.response is None:
            if self._cancelled:
                cancellation = Cancellation(request_id=str(message.id), cancelled_at=self._runner.clock.now())
                with contextlib.suppress(KafkaError, TimeoutError, IncorrectState):
                    async with asyncio.timeout(self._runner.settings.publish_timeout_s):
                        await self._runner.cancel(cancellation)
                return None
            if self._runner.clock.wall_seconds_until(deadline) < -GRACE_S:
                return None
            await pending.wait(POLL_S)
        return pending.response

    def _answered(self, task: Task, response: GenerationResponse, created: datetime) -> Result:
        if response.error is not None:
            raise ApiError.of_response(response.error)
        answers = Answers(
            request_id=response.request_id,
            model=task.body.model,
            created=int(created.timestamp()),
            chat=isinstance(task.body, ChatRequest),
        )
        estimate = self._runner.estimates.of(response.model, response.decision, response.usage)
        return self._reader.answered(task, answers.whole(response, estimate).model_dump(mode="json"))

    def _ending(self) -> Ending | None:
        """Why no further line is answered."""
        if self._cancelled:
            return "batch_cancelled"
        return "batch_expired" if self._runner.clock.now() >= self._batch.expires_at else None


class _ResultWriter:
    """Stores the results of a batch: all that have arrived during a statement with the next one."""

    def __init__(self, runner: BatchRunner, batch_id: str) -> None:
        self._runner = runner
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
        batches = self._runner.batches
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            taken, self._waiting = self._waiting, []
            results = [result for result, _ in taken]
            await batches.status.retry(lambda: batches.add_results(self._batch_id, results))  # noqa: B023
            for _, stored in taken:
                if not stored.done():
                    stored.set_result(None)


def _is_worth_another_attempt(response: GenerationResponse) -> bool:
    """Whether the model server failed."""
    return response.error is not None and response.error.code in _AGAIN


def _is_late(response: GenerationResponse) -> bool:
    """Whether the request waited too long, or the answer was cut off because of that."""
    return response.finish_reason == "deadline" or (
        response.error is not None and response.error.code == "deadline_exceeded"
    )
