"""Consumes requests: starts a task for each record, and commits the finished ones.

FastStream's subscriber hands over records. `receive` returns when their requests have been started, and waits while
there is no capacity: Kafka is not read meanwhile. `services.router.partitions` has the states of a partition; this
module does the I/O that they require: pause, resume and seek, wait for requests and sends, commit, recover. Offsets are
committed here, not by FastStream, because requests finish in any order.
"""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Final, Protocol

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from services.router.admission import ByteBudget
from services.router.fencing import PublishFence, RecordFence
from services.router.metrics import RouterMetrics
from services.router.offsets import Claim
from services.router.partitions import Partitions
from services.router.recovery import GroupProgress, recover, to_kafka
from services.router.settings import RouterSettings
from shared.kafka.inspection import find_unreadable, read_range, stand_in
from shared.kafka.records import RecordId
from shared.runtime.logs import get_logger, where
from shared.runtime.settings import KafkaSettings
from shared.topics import REQUESTS


class Suspects:
    """Finds records that would end this process; without Kafka there are none."""

    async def after(self, partition: TopicPartition, offset: int) -> Sequence[range]:  # noqa: ARG002
        """Offsets to set aside at or after an offset, in ascending order."""
        return ()

    async def read(self, partition: TopicPartition, offsets: range) -> Sequence[Any]:  # noqa: ARG002
        """The records with these offsets."""
        return ()


class KafkaSuspects(Suspects):
    """Inspects the records after the committed offsets once, at the start of the process."""

    def __init__(self, kafka: KafkaSettings, topic: str, group: str) -> None:
        self._kafka = kafka
        self._names = (topic, group)
        self._found: asyncio.Task[dict[int, list[range]]] | None = None

    async def after(self, partition: TopicPartition, offset: int) -> Sequence[range]:
        """See `Suspects`; waits for the inspection."""
        if self._found is None:
            self._found = asyncio.create_task(find_unreadable(*self._names))
        # Shielded: a rebalance cancels the recovery that waits, not the inspection.
        found = await asyncio.shield(self._found)
        return [bad for bad in found.get(partition.partition, ()) if bad.stop > offset]

    async def read(self, partition: TopicPartition, offsets: range) -> Sequence[Any]:
        """See `Suspects`."""
        return await read_range(self._kafka, partition, offsets) if offsets else ()


Handle = Callable[[Any, RecordFence], Awaitable[None]]
"""Answers a record; returns when its response or dead letter is published."""

COMMIT_FAILURES_TOLERATED: Final = 10
"""Consecutive failed commits before the router is not ready."""

DRAIN_SENDS_S: Final = 5.0
"""Longest wait for sends under way after the fence has closed; wall seconds."""

LAST_COMMIT_S: Final = 5.0
"""Longest wait for the commit on shutdown; wall seconds."""

RECOVERY_PAUSE_S: Final = 0.5
"""Pause before recovery is tried again; wall seconds."""

_log = get_logger(__name__)


class Capacity(Protocol):
    """Capacity of the model servers, of which this router uses its share; see `shared.inference.pools.Pools`."""

    async def wait_for_capacity(self) -> None:
        """Wait until the model servers can take another request."""

    def set_share(self, share: float) -> None:
        """Set the share of all requests that this router gets, in [0, 1]."""


class RequestConsumer(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """The requests being processed and the partitions they come from."""

    def __init__(
        self,
        handle: Handle,
        progress: GroupProgress,
        *,
        settings: RouterSettings,
        metrics: RouterMetrics,
        capacity: Capacity,
        suspects: Suspects | None = None,
        topic_prefix: str = "",
    ) -> None:
        """Create a consumer; it starts requests when `receive` is called.

        Args:
            capacity: of the model servers.
            suspects: finds records that would end this process.
            topic_prefix: of the names of all topics.
        """
        self._handle = handle
        self._progress = progress
        self._settings = settings
        self._metrics = metrics
        self._capacity = capacity
        self._suspects = suspects or Suspects()
        self._topic_prefix = topic_prefix
        self._fence = PublishFence(session_timeout_s=settings.session_timeout_s)
        self._fence.on_unknown_outcome(self._on_unknown_outcome)
        self._partitions = Partitions(self._fence)
        self._free_places = asyncio.Semaphore(settings.max_in_flight)
        self._bytes = ByteBudget(settings.max_in_flight_bytes)
        self._tasks: dict[asyncio.Task[None], Claim[TopicPartition]] = {}
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._recovery: asyncio.Task[None] | None = None
        self._commit_lock = asyncio.Lock()
        self._commit_failures = 0
        self._failed_requests = 0
        self._waiting_record: Any = None
        self._get_consumer: Callable[[], AIOKafkaConsumer | None] = lambda: None
        metrics.watch_waiting(self._waiting_age_s)

    def set_consumer(self, get_consumer: Callable[[], AIOKafkaConsumer | None]) -> None:
        """Set where to find aiokafka's consumer; FastStream creates it when the broker starts."""
        self._get_consumer = get_consumer

    def pause(self) -> None:
        """Start no request until `resume`."""
        self._resumed.clear()

    def resume(self) -> None:
        """Start requests, beginning with those that waited."""
        self._resumed.set()

    @property
    def in_flight(self) -> int:
        """Number of requests being processed."""
        return len(self._tasks)

    def finished(self, partition: TopicPartition) -> int | None:
        """The offset before which all records are finished; None if no record was started here."""
        return self._partitions.tracker.finished(partition)

    def problem(self) -> str | None:
        """The reason why the router is not ready; None if it is."""
        recovery_runs = self._recovery is not None and not self._recovery.done()
        problems = {
            "shutting down": self._partitions.stopping,
            "still loading current policies and carbon intensities": not self._resumed.is_set(),
            "waiting for partitions: joining the consumer group, or a rebalance is under way": (
                self._partitions.rebalancing
            ),
            "recovering partitions: reading which requests are already answered": (
                recovery_runs or self._partitions.recovering
            ),
            f"the last {self._commit_failures} commits failed": self._commit_failures > COMMIT_FAILURES_TOLERATED,
            f"{self._failed_requests} requests could not be answered or dead-lettered (see the log); a restart tries "
            "them again": self._failed_requests > 0,
        }
        return next((problem for problem, applies in problems.items() if applies), None)

    async def receive(self, records: Iterable[Any]) -> None:
        """Start to process records; returns when all have been started or skipped."""
        epoch = self._partitions.tracker.epoch
        await self._resumed.wait()
        for record in records:
            self._waiting_record = record
            await self._capacity.wait_for_capacity()
            await self._free_places.acquire()
            cost = self._bytes.cost(record)
            try:
                await self._bytes.acquire(cost)
            except asyncio.CancelledError:
                self._free_places.release()
                raise
            self._waiting_record = None
            started = False
            try:
                # In an empty context: a task and its callbacks keep the context in which they were created, and with
                # FastStream's they would keep all records of its batch in memory.
                started = contextvars.Context().run(self._start, record, epoch, cost)
            except Exception as error:  # noqa: BLE001 - the batch's other records must be started
                self._count_failure(error)
            if not started:
                self._release(cost)

    async def commit_forever(self, *, on_round: Callable[[], None]) -> None:
        """Commit finished records at every commit interval; calls `on_round` after every try."""
        while True:
            await asyncio.sleep(self._settings.commit_interval_s)
            await self._commit(None, everything=self._fence.renewal_due)
            on_round()

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """A rebalance starts: wait a moment for running requests, close the fence, and commit."""
        self._partitions.start_rebalance()
        await self._stop_recovery()
        open_before = self._partitions.revoke(revoked)
        await self._wait_for_requests(open_before, self._settings.rebalance_grace_s)
        await self._close_fence(revoked)
        await self._commit(open_before)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """A rebalance has ended: cancel requests of lost partitions, and start to recover the assigned ones."""
        # Records that are delivered before recovery are refused, and not redelivered: the consumer has moved past them.
        consumer = self._get_consumer()
        if consumer is not None:
            consumer.pause(*assigned)
        self._update_share(assigned, consumer)
        self._partitions.assign(assigned)
        cancelled = await self._cancel_lost()
        _log.info("partitions assigned", partitions=len(assigned), cancelled_requests=cancelled)
        if assigned:
            self._start_recovery(assigned)

    async def shut_down(self) -> None:
        """Start no more requests, wait for running ones within the grace period, and commit.

        Requests that do not finish in time are cancelled, and redelivered to another router.
        """
        self._partitions.shut_down()
        self.resume()
        consumer = self._get_consumer()
        if consumer is not None:
            consumer.pause(*consumer.assignment())
        await self._stop_recovery()
        running = len(self._tasks)
        await self._wait_for_requests(None, self._settings.drain_grace_s)
        await self._close_fence(None)
        unfinished = [task for task in self._tasks if not task.done()]
        await self._cancel(unfinished)
        try:
            # aiokafka retries a commit for as long as Kafka is unreachable.
            async with asyncio.timeout(LAST_COMMIT_S):
                await self._commit(None)
        except TimeoutError:
            _log.warning("last commit timed out: records finished since the previous commit are redelivered")
        _log.info("drained", finished=running - len(unfinished), cancelled_requests=len(unfinished))

    def _update_share(self, assigned: Collection[TopicPartition], consumer: AIOKafkaConsumer | None) -> None:
        topic = next((one.topic for one in assigned), "")
        partitions = None if consumer is None else consumer.partitions_for_topic(topic)
        self._capacity.set_share(min(1.0, len(assigned) / (len(partitions or ()) or REQUESTS.partitions)))

    def _release(self, cost: int) -> None:
        """Give back the place of a request and its bytes."""
        self._free_places.release()
        self._bytes.release(cost)

    def _start(self, record: Any, epoch: int, cost: int) -> bool:  # noqa: ANN401 - aiokafka has no types
        """Start the task of a record, which then gives back `cost`; False if it is to be skipped."""
        claim = self._partitions.begin(record, epoch=epoch, now_ms=_now_ms())
        if claim is None:
            self._metrics.skipped_records.inc()
            return False
        if claim.log_restarted:
            _log.warning(
                "offsets of a partition went backwards; was the topic recreated?",
                partition=record.partition,
                offset=record.offset,
            )
        task = asyncio.create_task(self._process(record, claim))
        self._tasks[task] = claim
        self._metrics.in_flight.set(len(self._tasks))
        task.add_done_callback(partial(self._on_task_done, cost))
        return True

    def _start_recovery(self, partitions: Collection[TopicPartition]) -> None:
        # Not in the rebalance callback: no heartbeat is sent there, and recovery may take longer than the session.
        if self._recovery is not None:
            self._recovery.cancel()
        self._recovery = asyncio.create_task(self._recover(partitions))

    async def _stop_recovery(self) -> None:
        task, self._recovery = self._recovery, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _recover(self, partitions: Collection[TopicPartition]) -> None:
        """Recover partitions and open them; tries until it succeeds."""
        while True:
            try:
                await self._recover_once(partitions)
            except Exception as error:  # noqa: BLE001 - partitions must not stay without a router
                _log.warning("recovery failed, trying again", error=type(error).__name__, where=where(error))
                await asyncio.sleep(RECOVERY_PAUSE_S)
            else:
                return

    async def _recover_once(self, partitions: Collection[TopicPartition]) -> None:
        # A send of this router that is still under way would arrive after the responses have been read.
        while not await self._fence.wait_drained(DRAIN_SENDS_S):
            _log.warning("recovery waits for sends under way")
        consumer = self._get_consumer()
        if consumer is None:
            raise IllegalStateError("there is no consumer")
        recovered = await recover(self._progress, consumer, partitions)
        self._partitions.tracker.resume(recovered)
        cancelled = await self._cancel_lost()
        self._partitions.open(recovered)
        # Renews the lease at once.
        await self._commit(recovered, everything=True)
        if not self._partitions.stopping:
            for partition, found in recovered.items():
                # As after a rebalance; records that are running or finished here are recognised.
                consumer.seek(partition, await self._set_aside(partition, found.commit.offset))
            consumer.resume(*recovered)
        answered = sum(len(found.answered) for found in recovered.values())
        _log.info(
            "partitions recovered", partitions=len(recovered), answered_before=answered, cancelled_requests=cancelled
        )

    async def _set_aside(self, partition: TopicPartition, offset: int) -> int:
        """Start the records before each one that would end this process, and its dead letter.

        Returns:
            The offset from which the consumer can read.
        """
        for bad in await self._suspects.after(partition, offset):
            records = await self._suspects.read(partition, range(offset, bad.start))
            await self.receive([*records, stand_in(partition, max(offset, bad.start))])
            offset = bad.stop
        return offset

    def _on_unknown_outcome(self) -> None:
        """Recover all partitions, as if another router had owned them until now."""
        partitions = self._partitions.unknown_outcome()
        consumer = self._get_consumer()
        if partitions and consumer is not None:
            consumer.pause(*partitions)
            self._start_recovery(partitions)

    async def _close_fence(self, partitions: Collection[TopicPartition] | None) -> None:
        self._partitions.fence_off(partitions)
        if not await self._fence.wait_drained(DRAIN_SENDS_S):
            _log.warning("sends are still under way; the next owner of the partitions may not see them")

    async def _process(self, record: Any, claim: Claim[TopicPartition]) -> None:  # noqa: ANN401
        await self._handle(record, RecordFence(self._fence, claim.partition, RecordId.of(record, self._topic_prefix)))
        self._partitions.tracker.finish(claim)

    def _on_task_done(self, cost: int, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._release(cost)
        self._metrics.in_flight.set(len(self._tasks))
        if not task.cancelled() and (error := task.exception()) is not None:
            self._count_failure(error)

    def _count_failure(self, error: BaseException) -> None:
        # This router never commits the record's offset, so the record is redelivered after a restart.
        self._failed_requests += 1
        _log.error("a request failed", error=type(error).__name__, where=where(error))

    async def _wait_for_requests(self, partitions: Collection[TopicPartition] | None, grace_s: float) -> None:
        """Wait for running requests whose responses can still be published; of all partitions if None."""
        running = [
            task
            for task, claim in self._tasks.items()
            if self._fence.is_open(claim.partition) and (partitions is None or claim.partition in partitions)
        ]
        if running and grace_s > 0:
            await asyncio.wait(running, timeout=grace_s)

    async def _cancel_lost(self) -> int:
        """Cancel requests of lost partitions and those that another router has answered; returns their number."""
        tracker = self._partitions.tracker
        lost = [task for task, claim in self._tasks.items() if not task.done() and not tracker.still_owned(claim)]
        await self._cancel(lost)
        return len(lost)

    async def _cancel(self, tasks: Collection[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            self._metrics.cancelled_requests.inc(len(tasks))
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _commit(self, partitions: Collection[TopicPartition] | None, *, everything: bool = False) -> None:
        """Commit finished records; an accepted commit renews the lease of the fence."""
        consumer, tracker = self._get_consumer(), self._partitions.tracker
        async with self._commit_lock:
            commits = tracker.committable(partitions, now_ms=_now_ms(), everything=everything)
            if not commits or consumer is None:
                return
            started_s = self._fence.now_s()
            try:
                await consumer.commit(to_kafka(commits))
            except (KafkaError, IllegalStateError) as error:
                # The next commit includes these records, or they are redelivered to the next owner.
                self._commit_failures += 1
                self._metrics.commits.labels("failed").inc()
                _log.warning("commit failed", error=type(error).__name__)
                return
            self._fence.renew_lease(started_s)
            tracker.note_committed(commits)
            self._commit_failures = 0
            self._metrics.commits.labels("ok").inc()

    def _waiting_age_s(self) -> float:
        """Wall seconds since the record that waits for capacity was sent; it is the oldest of its batch."""
        record = self._waiting_record
        return 0.0 if record is None else max(0.0, time.time() - record.timestamp / 1_000)


def _now_ms() -> int:
    return int(time.time() * 1_000)
