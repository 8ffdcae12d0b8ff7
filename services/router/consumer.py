"""Consumes requests: hands their records to the starter, and commits the finished ones.

FastStream's subscriber hands over records. `services.router.starter` lets them wait and starts them. A lane of which
enough records wait is paused: Kafka keeps the others. `services.router.partitions` has the states of a partition; this
module does the I/O that they require: pause, resume and seek, wait for requests and sends, commit, recover. Offsets are
committed here, not by FastStream, because requests finish in any order.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from services.router.careful import CarefulIntake
from services.router.fair_queue import RESUME_SHARE
from services.router.fencing import PublishFence
from services.router.metrics import RouterMetrics
from services.router.offsets import Commit
from services.router.partitions import Partitions
from services.router.recovery import GroupProgress, recover, to_kafka
from services.router.request_class import RequestClasses
from services.router.settings import RouterSettings
from services.router.starter import Capacity, Handle, RequestStarter, now_ms
from shared.kafka.deaths import DeathCount, DeathLimits
from shared.kafka.unreadable import UnreadableRecords, stand_in
from shared.runtime.logs import get_logger, where
from shared.topics import REQUESTS

COMMIT_FAILURES_TOLERATED: Final = 10
"""Consecutive failed commits before the router is not ready."""

DRAIN_SENDS_S: Final = 5.0
"""Longest wait for sends under way after the fence has closed; wall seconds."""

LAST_COMMIT_S: Final = 5.0
"""Longest wait for the commit on shutdown; wall seconds."""

TRACKED_MULTIPLE: Final = 2
"""A lane is paused, too, when its records that are unfinished, or finished out of order, are so many times those that
may wait or run: while its oldest request does not end, it must not take more and more memory."""

RECOVERY_PAUSE_S: Final = 0.5
"""Pause before recovery is tried again; wall seconds."""

_log = get_logger(__name__)


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
        classes: RequestClasses,
        unreadable: UnreadableRecords,
        deaths: DeathLimits,
    ) -> None:
        """Create a consumer; it starts requests when `receive` is called.

        Args:
            capacity: of the model servers.
            classes: lanes, tenants and models.
            unreadable: records that would end this process.
            deaths: after which it is careful, and sets a record aside.
        """
        self._progress = progress
        self._settings = settings
        self._metrics = metrics
        self._capacity = capacity
        self._unreadable = unreadable
        self._fence = PublishFence(session_timeout_s=settings.session_timeout_s)
        self._fence.on_unknown_outcome(self._on_unknown_outcome)
        self._partitions = Partitions(self._fence)
        self._starter = RequestStarter(
            handle,
            self._partitions,
            self._fence,
            classes=classes,
            capacity=capacity,
            metrics=metrics,
            on_progress=self._on_progress,
        )
        self._deaths = DeathCount(deaths)
        self._careful = CarefulIntake(
            self._deaths,
            self._partitions.tracker,
            deliver=self._deliver,
            failed=lambda: self._starter.failed,
            commit=lambda: self._commit(None, everything=True),
            resume=self._resume_partition,
        )
        self._lanes = classes.lanes
        self._paused_lanes: set[str] = set()
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._recovery: asyncio.Task[None] | None = None
        self._commit_lock = asyncio.Lock()
        self._commit_failures = 0
        self._get_consumer: Callable[[], AIOKafkaConsumer | None] = lambda: None

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
        return self._starter.in_flight

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
            f"{self._starter.failed} requests could not be answered or dead-lettered (see the log); a restart tries "
            "them again": self._starter.failed > 0,
        }
        return next((problem for problem, applies in problems.items() if applies), None)

    async def receive(self, records: Sequence[Any]) -> None:
        """Let records wait until they are started; pauses lanes of which enough wait."""
        epoch = self._partitions.tracker.epoch
        await self._resumed.wait()
        consumer = self._get_consumer()
        if consumer is not None:
            records = await self._careful.admit(records, epoch=epoch, consumer=consumer)
        self._deliver(records, epoch)
        self._pause_full_lanes()

    def _deliver(self, records: Iterable[Any], epoch: int) -> None:
        for record in records:
            self._starter.deliver(record, epoch=epoch)

    async def commit_forever(self, *, on_round: Callable[[], None]) -> None:
        """Commit finished records at every commit interval; calls `on_round` after every try."""
        while True:
            await asyncio.sleep(self._settings.commit_interval_s)
            await self._commit(None, everything=self._fence.renewal_due)
            on_round()

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """A rebalance starts: wait a moment for running requests, close the fence, and commit."""
        self._partitions.start_rebalance()
        self._careful.stop()
        released = self._deaths.release(revoked)
        await self._stop_recovery()
        open_before = self._partitions.revoke(revoked)
        await self._starter.wait_for_running(open_before, self._settings.rebalance_grace_s)
        await self._close_fence(revoked)
        await self._commit(open_before, everything=bool(released))

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """A rebalance has ended: cancel requests of lost partitions, and start to recover the assigned ones."""
        # Records that are delivered before recovery are refused, and not redelivered: the consumer has moved past them.
        consumer = self._get_consumer()
        if consumer is not None:
            consumer.pause(*assigned)
        self._update_share(assigned, consumer)
        self._partitions.assign(assigned)
        cancelled = await self._starter.drop_lost()
        _log.info("partitions assigned", partitions=len(assigned), cancelled_requests=cancelled)
        if assigned:
            self._start_recovery(assigned)

    async def shut_down(self) -> None:
        """Start no more requests, wait for running ones within the grace period, and commit.

        Requests that wait, or do not finish in time, are dropped, and redelivered to another router.
        """
        self._partitions.shut_down()
        self._careful.stop()
        released = self._deaths.release()
        self.resume()
        consumer = self._get_consumer()
        if consumer is not None:
            consumer.pause(*consumer.assignment())
        await self._stop_recovery()
        running = self.in_flight
        await self._starter.wait_for_running(None, self._settings.drain_grace_s)
        await self._close_fence(None)
        cancelled = await self._starter.drop_all()
        try:
            # aiokafka retries a commit for as long as Kafka is unreachable.
            async with asyncio.timeout(LAST_COMMIT_S):
                await self._commit(None, everything=bool(released))
        except TimeoutError:
            _log.warning("last commit timed out: records finished since the previous commit are redelivered")
        _log.info("drained", finished=running - cancelled, cancelled_requests=cancelled)

    def _update_share(self, assigned: Collection[TopicPartition], consumer: AIOKafkaConsumer | None) -> None:
        found = 0 if consumer is None else sum(len(consumer.partitions_for_topic(one) or ()) for one in self._lanes)
        self._capacity.set_share(min(1.0, len(assigned) / (found or REQUESTS.partitions * len(self._lanes))))

    def _pause_full_lanes(self) -> None:
        consumer = self._get_consumer()
        full = {topic for topic in self._lanes if topic not in self._paused_lanes and self._is_full(topic)}
        if full and consumer is not None:
            consumer.pause(*(one for one in consumer.assignment() if one.topic in full))
            self._paused_lanes |= full

    def _on_progress(self) -> None:
        self._careful.note_change()
        self._resume_lanes()

    def _resume_partition(self, partition: TopicPartition) -> None:
        """Read a partition again, unless its lane or all partitions are paused."""
        consumer = self._get_consumer()
        if consumer is not None and self._starter.may_start and partition.topic not in self._paused_lanes:
            consumer.resume(partition)

    def _resume_lanes(self) -> None:
        """Read lanes again that were paused and have room."""
        consumer = self._get_consumer()
        # Recovery resumes all partitions.
        if not self._paused_lanes or consumer is None or not self._starter.may_start:
            return
        open_again = {topic for topic in self._paused_lanes if not self._is_full(topic, share=RESUME_SHARE)}
        if open_again:
            consumer.resume(*(one for one in consumer.assignment() if one.topic in open_again))
            self._paused_lanes -= open_again

    def _is_full(self, topic: str, *, share: float = 1.0) -> bool:
        queue, tracker = self._starter.queue, self._partitions.tracker
        tracked = tracker.tracked(one for one in self._partitions.assigned if one.topic == topic)
        most = TRACKED_MULTIPLE * (queue.limits.lane_records + queue.limits.places)
        return queue.is_full(self._lanes[topic], share=share) or tracked >= share * most

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
        cancelled = await self._starter.drop_lost()
        self._partitions.open(recovered)
        self._careful.recovered(recovered)
        self._starter.start_soon()
        # Renews the lease at once.
        await self._commit(recovered, everything=True)
        if not self._partitions.stopping:
            for partition, found in recovered.items():
                # As after a rebalance; records that are running or finished here are recognised.
                consumer.seek(partition, await self._set_aside(partition, found.commit.offset))
            consumer.resume(*recovered)
            self._paused_lanes.clear()
            self._pause_full_lanes()
        answered = sum(len(found.answered) for found in recovered.values())
        _log.info(
            "partitions recovered", partitions=len(recovered), answered_before=answered, cancelled_requests=cancelled
        )

    async def _set_aside(self, partition: TopicPartition, offset: int) -> int:
        """Start the records before each one that would end this process, and its dead letter.

        Returns:
            The offset from which the consumer can read.
        """
        for bad in self._unreadable.after(partition, offset):
            records = await self._unreadable.read(partition, range(offset, bad.start))
            await self.receive([*records, stand_in(partition, max(offset, bad.start))])
            offset = bad.stop
        return offset

    def _on_unknown_outcome(self) -> None:
        """Recover all partitions, as if another router had owned them until now."""
        self._careful.stop()
        partitions = self._partitions.unknown_outcome()
        consumer = self._get_consumer()
        if partitions and consumer is not None:
            consumer.pause(*partitions)
            self._start_recovery(partitions)

    async def _close_fence(self, partitions: Collection[TopicPartition] | None) -> None:
        self._partitions.fence_off(partitions)
        if not await self._fence.wait_drained(DRAIN_SENDS_S):
            _log.warning("sends are still under way; the next owner of the partitions may not see them")

    async def _commit(self, partitions: Collection[TopicPartition] | None, *, everything: bool = False) -> None:
        """Commit finished records; an accepted commit renews the lease of the fence."""
        consumer, tracker = self._get_consumer(), self._partitions.tracker
        async with self._commit_lock:
            commits = tracker.committable(partitions, now_ms=now_ms(), everything=everything)
            if not commits or consumer is None:
                return
            started_s = self._fence.now_s()
            try:
                await consumer.commit(to_kafka(self._with_deaths(commits)))
            except (KafkaError, IllegalStateError) as error:
                # The next commit includes these records, or they are redelivered to the next owner.
                self._commit_failures += 1
                self._metrics.commits.labels("failed").inc()
                _log.warning("commit failed", error=type(error).__name__)
                return
            self._fence.renew_lease(started_s)
            tracker.note_committed(commits)
            for partition, commit in commits.items():
                self._deaths.committed(partition, commit.offset)
            self._commit_failures = 0
            self._metrics.commits.labels("ok").inc()

    def _with_deaths(self, commits: Mapping[TopicPartition, Commit]) -> Mapping[TopicPartition, Commit]:
        return {one: replace(commit, deaths=self._deaths.deaths(one, commit.offset)) for one, commit in commits.items()}
