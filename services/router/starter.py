"""Starts waiting requests as soon as there is capacity, and follows those that run.

`services.router.fair_queue` decides which request is next. A request that waits is registered like one that runs: it
keeps its offset from being committed, and a rebalance that leaves its partition here leaves it in the queue.
"""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Protocol

from aiokafka import TopicPartition

from services.router.admission import held_bytes, parsed_bytes
from services.router.fair_queue import FairQueue, QueuedRequest
from services.router.fencing import PublishFence, RecordFence
from services.router.metrics import RouterMetrics
from services.router.partitions import Partitions
from services.router.request_class import RequestClasses
from shared.kafka.records import RecordId
from shared.runtime.logs import get_logger, where

Handle = Callable[[Any, RecordFence], Awaitable[None]]
"""Answers a record; returns when its response or dead letter is published."""

_log = get_logger(__name__)


class Capacity(Protocol):
    """Capacity of the model servers, of which this router uses its share; see `shared.inference.pools.Pools`."""

    def on_capacity(self, callback: Callable[[], None]) -> None:
        """Call back when a server may have capacity again."""

    def has_capacity(self, model: str) -> bool:
        """Whether a server of the model can take another request."""

    def is_limited(self, model: str) -> bool:
        """Whether the model's servers have a limit."""

    def set_share(self, share: float) -> None:
        """Set the share of all requests that this router gets, in [0, 1]."""


class RequestStarter:
    """The requests that wait and those that run.

    Attributes:
        queue: the requests that wait.
        failed: number of requests that could not be answered.
    """

    def __init__(
        self,
        handle: Handle,
        partitions: Partitions,
        fence: PublishFence,
        *,
        classes: RequestClasses,
        capacity: Capacity,
        metrics: RouterMetrics,
        on_progress: Callable[[], None],
    ) -> None:
        """Create a starter; it starts requests when they are delivered.

        Args:
            on_progress: called when requests have started or ended.
        """
        self.queue: FairQueue = classes.queue()
        self.failed = 0
        self._handle = handle
        self._partitions = partitions
        self._fence = fence
        self._classes = classes
        self._capacity = capacity
        self._metrics = metrics
        self._on_progress = on_progress
        self._tasks: dict[asyncio.Task[None], QueuedRequest] = {}
        self._is_scheduled = False
        # Tasks and callbacks keep the context in which they were created, and with FastStream's they would keep all
        # records of its batch in memory.
        self._context = contextvars.Context()
        capacity.on_capacity(self.start_soon)
        metrics.watch_requests(self.queue, classes, in_flight=lambda: len(self._tasks))

    @property
    def in_flight(self) -> int:
        """Number of requests being processed."""
        return len(self._tasks)

    @property
    def may_start(self) -> bool:
        """Whether requests may start: this router knows its partitions and what was answered, and does not stop."""
        partitions = self._partitions
        return not (partitions.rebalancing or partitions.stopping or partitions.recovering)

    def deliver(self, record: Any, *, epoch: int) -> None:  # noqa: ANN401 - aiokafka has no types
        """Register a record and let it wait, unless it is to be skipped.

        Args:
            epoch: of the offset tracker when the record was fetched.
        """
        try:
            claim = self._partitions.begin(record, epoch=epoch, now_ms=now_ms())
            if claim is None:
                self._metrics.skipped_records.inc()
                return
            if claim.log_restarted:
                _log.warning(
                    "offsets of a partition went backwards; was the topic recreated?",
                    partition=record.partition,
                    offset=record.offset,
                )
            tenant, model = self._classes.of(record.value)
            lane = self._classes.lanes[record.topic]
            held = held_bytes(record)
            request = QueuedRequest(record, claim, lane, tenant, model, held, held + parsed_bytes(record.value))
        except Exception as error:  # noqa: BLE001 - the batch's other records must be delivered
            self._count_failure(error)
            return
        self.queue.put(request)
        self.start_soon()

    def start_soon(self) -> None:
        """Start requests that wait, in the next step of the event loop."""
        if not self._is_scheduled and self.queue.waiting:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._start_waiting, context=self._context)

    async def wait_for_running(self, partitions: Collection[TopicPartition] | None, grace_s: float) -> None:
        """Wait for running requests whose responses can still be published.

        Args:
            partitions: None for all.
            grace_s: longest wait, wall seconds.
        """
        running = [
            task
            for task, request in self._tasks.items()
            if self._fence.is_open(request.claim.partition)
            and (partitions is None or request.claim.partition in partitions)
        ]
        if running and grace_s > 0:
            await asyncio.wait(running, timeout=grace_s)

    async def drop_lost(self) -> int:
        """Drop requests of lost partitions, and those answered elsewhere; returns how many were running."""
        tracker = self._partitions.tracker
        self.queue.drop(lambda request: not tracker.still_owned(request.claim))
        return await self._cancel(lambda request: not tracker.still_owned(request.claim))

    async def drop_all(self) -> int:
        """Drop all requests; returns how many were running."""
        self.queue.drop(lambda _: True)
        return await self._cancel(lambda _: True)

    def _start_waiting(self) -> None:
        self._is_scheduled = False
        if not self.may_start:
            return
        while (request := self.queue.next(self._capacity.has_capacity)) is not None:
            self._start(request)
            if request.model is not None and self._capacity.is_limited(request.model):
                # It takes its capacity in the first step of its task.
                self.start_soon()
                break
        self._on_progress()

    def _start(self, request: QueuedRequest) -> None:
        self._partitions.tracker.start(request.claim, now_ms=now_ms())
        task = asyncio.create_task(self._process(request))
        self._tasks[task] = request
        task.add_done_callback(self._on_done)

    async def _process(self, request: QueuedRequest) -> None:
        record, claim = request.record, request.claim
        source = RecordId(request.lane, record.partition, record.offset, record.timestamp)
        await self._handle(record, RecordFence(self._fence, claim.partition, source))
        self._partitions.tracker.finish(claim)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self.queue.ended(self._tasks.pop(task))
        if not task.cancelled() and (error := task.exception()) is not None:
            self._count_failure(error)
        self.start_soon()
        self._on_progress()

    def _count_failure(self, error: BaseException) -> None:
        # This router never commits the record's offset, so the record is redelivered after a restart.
        self.failed += 1
        _log.error("a request failed", error=type(error).__name__, where=where(error))

    async def _cancel(self, is_lost: Callable[[QueuedRequest], bool]) -> int:
        tasks = [task for task, request in self._tasks.items() if not task.done() and is_lost(request)]
        for task in tasks:
            task.cancel()
        if tasks:
            self._metrics.cancelled_requests.inc(len(tasks))
            await asyncio.gather(*tasks, return_exceptions=True)
        return len(tasks)


def now_ms() -> int:
    """Wall time, milliseconds since the Unix epoch."""
    return int(time.time() * 1_000)
