"""Takes requests from Kafka, works on many at once, and commits what is finished.

FastStream hands over batches of records. Every record becomes a task; when there are as many as allowed, the hand-over
waits, and with it the fetching. See `docs/decisions/0002-router-commits.md` for why offsets are tracked here.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from services.router.metrics import RouterMetrics
from services.router.offsets import Claim, OffsetTracker
from shared.logs import get_logger, where

Serve = Callable[[Any], Awaitable[None]]
"""Answers a record; returns when it is done with for good."""

COMMIT_FAILURES_TOLERATED = 10
"""In a row, before the router says that it is not ready."""

_log = get_logger(__name__)


class Intake(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """The records that are being worked on, and their offsets."""

    def __init__(
        self,
        serve: Serve,
        *,
        max_in_flight: int,
        rebalance_grace_s: float,
        metrics: RouterMetrics,
    ) -> None:
        """Set up; nothing is taken before `take` is called.

        Args:
            rebalance_grace_s: wall seconds for requests of a partition that is taken away to finish.
        """
        self._serve = serve
        self._capacity = asyncio.Semaphore(max_in_flight)
        self._rebalance_grace_s = rebalance_grace_s
        self._metrics = metrics
        self._tracker: OffsetTracker[TopicPartition] = OffsetTracker()
        self._tasks: dict[asyncio.Task[None], TopicPartition] = {}
        self._open = asyncio.Event()
        self._open.set()
        self._commit_lock = asyncio.Lock()
        self._consumer: Callable[[], AIOKafkaConsumer | None] = lambda: None
        self._assigned = False
        self._stopping = False
        self._commit_failures = 0
        self._unfinished = 0
        self._waiting: Any = None
        metrics.watch_waiting(self._waiting_age_s)

    def bind(self, consumer: Callable[[], AIOKafkaConsumer | None]) -> None:
        """The consumer to commit with, once there is one."""
        self._consumer = consumer

    def hold(self) -> None:
        """Begin nothing until `release`."""
        self._open.clear()

    def release(self) -> None:
        """Begin what is held, and all that follows."""
        self._open.set()

    @property
    def in_flight(self) -> int:
        """Requests that are being worked on."""
        return len(self._tasks)

    def finished(self, partition: TopicPartition) -> int | None:
        """The offset of a partition before which all is finished; null where nothing was begun here."""
        return self._tracker.finished(partition)

    def problem(self) -> str | None:
        """What stands against readiness; null when all is well."""
        if self._stopping:
            return "stopping"
        if not self._open.is_set():
            return "policies and intensities that are in force are being read"
        if not self._assigned:
            return "no partitions assigned yet, or a rebalance is under way"
        if self._commit_failures > COMMIT_FAILURES_TOLERATED:
            return f"the last {self._commit_failures} commits failed"
        if self._unfinished:
            return f"{self._unfinished} records could neither be answered nor kept (see the log); a restart tries again"
        return None

    async def take(self, records: Iterable[Any]) -> None:
        """Begin to work on records; returns when all have been begun or refused."""
        epoch = self._tracker.epoch
        await self._open.wait()
        for record in records:
            if self._capacity.locked():
                self._waiting = record
                await self._capacity.acquire()
                self._waiting = None
            else:
                await self._capacity.acquire()
            partition = TopicPartition(record.topic, record.partition)
            claim = None if self._stopping else self._tracker.begin(partition, record.offset, epoch=epoch)
            if claim is None:
                self._capacity.release()
                self._metrics.not_begun.inc()
                continue
            if claim.log_restarted:
                _log.warning("the log has begun again", partition=partition.partition, offset=claim.offset)
            task = asyncio.create_task(self._work(record, claim))
            self._tasks[task] = partition
            task.add_done_callback(self._ended)
            self._metrics.in_flight.set(len(self._tasks))

    async def commit_forever(self, interval_s: float, *, on_round: Callable[[], None] = lambda: None) -> None:
        """Commit what is finished, every `interval_s` wall seconds; `on_round` is told of every try."""
        while True:
            await asyncio.sleep(interval_s)
            await self._commit(None)
            on_round()

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """A rebalance begins: let what runs finish for a moment, and commit it."""
        self._assigned = False
        self._tracker.suspend(revoked)
        await self._settle(revoked, self._rebalance_grace_s)
        await self._commit(revoked)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """A rebalance has ended: go on with what came back, give up what went to another router."""
        # Asking for the floors takes a while. A record that is delivered meanwhile would be begun, then given up with
        # its partition's state, and never come again, because the consumer has moved past it.
        consumer = self._consumer()
        if consumer is not None:
            consumer.pause(*assigned)
        try:
            floors = {partition: await self._floor(partition) for partition in assigned}
            lost = self._tracker.resume(floors)
        finally:
            if consumer is not None and not self._stopping:
                consumer.resume(*assigned)
        given_up = [task for task, partition in self._tasks.items() if partition in lost]
        await self._give_up(given_up)
        self._assigned = True
        _log.info("partitions assigned", partitions=len(assigned), given_up=len(given_up))

    async def drain(self, grace_s: float) -> None:
        """Stop for good: begin nothing more, let what runs finish within `grace_s` (wall), commit.

        What does not finish in time is given up, and will be delivered again.
        """
        self._stopping = True
        self.release()
        consumer = self._consumer()
        if consumer is not None:
            consumer.pause(*consumer.assignment())
        running = len(self._tasks)
        await self._settle(None, grace_s)
        unfinished = [task for task in self._tasks if not task.done()]
        await self._give_up(unfinished)
        await self._commit(None)
        _log.info("drained", finished=running - len(unfinished), given_up=len(unfinished))

    def _waiting_age_s(self) -> float:
        """Wall seconds since the record that waits for a free place was sent; it is the oldest of its batch."""
        return 0.0 if self._waiting is None else max(0.0, time.time() - self._waiting.timestamp / 1_000)

    async def _work(self, record: Any, claim: Claim[TopicPartition]) -> None:  # noqa: ANN401
        await self._serve(record)
        self._tracker.finish(claim)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._capacity.release()
        self._metrics.in_flight.set(len(self._tasks))
        if not task.cancelled() and (error := task.exception()) is not None:
            # Its offset is never committed by this router, so nothing is lost.
            self._unfinished += 1
            _log.error("a record could not be dealt with", error=type(error).__name__, where=where(error))

    async def _settle(self, partitions: Collection[TopicPartition] | None, grace_s: float) -> None:
        running = [task for task, one in self._tasks.items() if partitions is None or one in partitions]
        if running and grace_s > 0:
            await asyncio.wait(running, timeout=grace_s)

    async def _give_up(self, tasks: Collection[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            self._metrics.given_up.inc(len(tasks))
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _floor(self, partition: TopicPartition) -> int | None:
        """The offset that the group has committed, of a partition that something is known of here."""
        consumer = self._consumer()
        if consumer is None or not self._tracker.knows(partition):
            return None
        try:
            committed = await consumer.committed(partition)
        except KafkaError as error:
            _log.warning("committed offset unknown", partition=partition.partition, error=type(error).__name__)
            return None
        return int(committed or 0)

    async def _commit(self, partitions: Collection[TopicPartition] | None) -> None:
        consumer = self._consumer()
        async with self._commit_lock:
            offsets = self._tracker.committable(partitions)
            if not offsets or consumer is None:
                return
            try:
                await consumer.commit(offsets)
            except (KafkaError, IllegalStateError) as error:
                # Nothing is lost: it is tried again, or the records are redelivered to whoever has them then.
                self._commit_failures += 1
                self._metrics.commits.labels("failed").inc()
                _log.warning("commit failed", error=type(error).__name__)
                return
            self._tracker.note_committed(offsets)
            self._commit_failures = 0
            self._metrics.commits.labels("ok").inc()
