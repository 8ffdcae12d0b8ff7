"""Takes requests from Kafka, works on many at once, and commits what is finished.

FastStream hands over batches of records. Every record becomes a task; when there are as many as allowed, the hand-over
waits, and with it the fetching. See `docs/decisions/0002-router-commits.md` for why offsets are tracked here, and
`docs/decisions/0010-one-answer.md` for how a partition changes hands.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from services.router.gate import Gate, Passage
from services.router.metrics import RouterMetrics
from services.router.offsets import Claim, OffsetTracker, Standing
from services.router.recovery import Source, stored
from services.router.takeover import Group, Takeover
from shared.runtime.logs import get_logger, where

Serve = Callable[[Any, Passage], Awaitable[None]]
"""Answers a record; returns when it is done with for good."""

COMMIT_FAILURES_TOLERATED = 10
"""In a row, before the router says that it is not ready."""

QUIET_S = 5.0
"""Wall seconds for answers that are on their way when the gate is shut."""

LAST_COMMIT_S = 5.0
"""Wall seconds for the commit at a stop."""

_log = get_logger(__name__)


class Intake(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """The records that are being worked on, and their offsets."""

    def __init__(
        self,
        serve: Serve,
        group: Group,
        gate: Gate,
        *,
        max_in_flight: int,
        rebalance_grace_s: float,
        metrics: RouterMetrics,
        room: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Set up; nothing is taken before `take` is called.

        Args:
            room: returns when another request may be begun; records wait for it, and with them the fetching.
            rebalance_grace_s: wall seconds for requests of a partition that is taken away to finish.
        """
        self._serve = serve
        self._gate = gate
        self._room = room
        self._takeover = Takeover(group, self._bound, quiet=self._until_quiet, resume=self._resume)
        gate.watch(self._in_doubt)
        self._capacity = asyncio.Semaphore(max_in_flight)
        self._rebalance_grace_s = rebalance_grace_s
        self._metrics = metrics
        self._tracker: OffsetTracker[TopicPartition] = OffsetTracker()
        self._tasks: dict[asyncio.Task[None], Claim[TopicPartition]] = {}
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
        if not self._assigned or self._takeover.under_way:
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
            self._waiting = record
            if self._room is not None:
                await self._room()
            await self._capacity.acquire()
            self._waiting = None
            claim = None if self._stopping else self._begin(record, epoch)
            if claim is None:
                self._capacity.release()
                self._metrics.not_begun.inc()
                continue
            task = asyncio.create_task(self._work(record, claim))
            self._tasks[task] = claim
            task.add_done_callback(self._ended)
            self._metrics.in_flight.set(len(self._tasks))

    async def commit_forever(self, interval_s: float, *, on_round: Callable[[], None] = lambda: None) -> None:
        """Commit what is finished, every `interval_s` wall seconds; `on_round` is told of every try."""
        while True:
            await asyncio.sleep(interval_s)
            await self._commit(None, everything=self._gate.wants_proof)
            on_round()

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """A rebalance begins: let what runs finish for a moment, let nothing out any more, and commit."""
        self._assigned = False
        await self._takeover.stop()
        self._tracker.suspend(revoked)
        # What is known here of the others may be older than what their last owner committed.
        taken_over = [partition for partition in revoked if self._gate.is_open(partition)]
        await self._settle(taken_over, self._rebalance_grace_s)
        await self._shut(revoked)
        await self._commit(taken_over)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """A rebalance has ended: give up what went to another router; the rest is seen to beside the heartbeats."""
        # A record that is delivered before it is known where the group stands would be refused and never come again,
        # because the consumer has moved past it.
        consumer = self._consumer()
        if consumer is not None:
            consumer.pause(*assigned)
        self._tracker.keep(assigned)
        given_up = await self._give_up_unwanted()
        self._assigned = True
        _log.info("partitions assigned", partitions=len(assigned), given_up=given_up)
        if assigned:
            self._takeover.begin(assigned)

    async def drain(self, grace_s: float) -> None:
        """Stop for good: begin nothing more, let what runs finish within `grace_s` (wall), commit.

        What does not finish in time is given up, and will be delivered again.
        """
        self._stopping = True
        self.release()
        consumer = self._consumer()
        if consumer is not None:
            consumer.pause(*consumer.assignment())
        await self._takeover.stop()
        running = len(self._tasks)
        await self._settle(None, grace_s)
        await self._shut(None)
        unfinished = [task for task in self._tasks if not task.done()]
        await self._give_up(unfinished)
        try:
            # aiokafka goes on for as long as Kafka is away.
            async with asyncio.timeout(LAST_COMMIT_S):
                await self._commit(None)
        except TimeoutError:
            _log.warning("Kafka does not take the last commit: what was finished since the one before comes again")
        _log.info("drained", finished=running - len(unfinished), given_up=len(unfinished))

    async def _resume(self, standings: Mapping[TopicPartition, Standing]) -> None:
        """Go on with partitions, now that it is known where the group stands in them."""
        self._tracker.resume(standings)
        given_up = await self._give_up_unwanted()
        self._gate.open(standings)
        # Proves at once that the group counts on this router.
        await self._commit(standings, everything=True)
        consumer = self._consumer()
        if consumer is not None and not self._stopping:
            for partition, standing in standings.items():
                # As Kafka has it after a rebalance: what is known here is recognised.
                consumer.seek(partition, standing.commit.offset)
            consumer.resume(*standings)
        known = sum(len(standing.answered) for standing in standings.values())
        _log.info("partitions taken over", partitions=len(standings), answered_before=known, given_up=given_up)

    def _in_doubt(self) -> None:
        """Kafka may have an answer or not: see what it has, as if another router had owned the partitions until now."""
        consumer = self._consumer()
        # Otherwise nothing more is sent, or a takeover is about to begin anyway.
        if consumer is None or self._stopping or not self._assigned:
            return
        partitions = consumer.assignment()
        consumer.pause(*partitions)
        self._tracker.suspend(partitions)
        self._takeover.begin(partitions)

    async def _until_quiet(self) -> None:
        while not await self._gate.quiet(QUIET_S):
            _log.warning("answers are still on their way to Kafka: partitions are taken over when it is known of each")

    async def _shut(self, partitions: Collection[TopicPartition] | None) -> None:
        self._gate.shut(partitions)
        if not await self._gate.quiet(QUIET_S):
            _log.warning("answers are still on their way to Kafka; the next owner may not see them")

    def _bound(self) -> AIOKafkaConsumer | None:
        return self._consumer()

    def _waiting_age_s(self) -> float:
        """Wall seconds since the record that waits for a free place was sent; it is the oldest of its batch."""
        return 0.0 if self._waiting is None else max(0.0, time.time() - self._waiting.timestamp / 1_000)

    def _begin(self, record: Any, epoch: int) -> Claim[TopicPartition] | None:  # noqa: ANN401
        partition = TopicPartition(record.topic, record.partition)
        claim = self._tracker.begin(
            partition, record.offset, epoch=epoch, timestamp_ms=record.timestamp, now_ms=_now_ms()
        )
        if claim is not None and claim.log_restarted:
            _log.warning("the log has begun again", partition=record.partition, offset=record.offset)
        return claim

    async def _work(self, record: Any, claim: Claim[TopicPartition]) -> None:  # noqa: ANN401
        await self._serve(record, Passage(self._gate, claim.partition, str(Source.of(record))))
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
        """Wait for what can finish."""
        running = [
            task
            for task, claim in self._tasks.items()
            if self._gate.is_open(claim.partition) and (partitions is None or claim.partition in partitions)
        ]
        if running and grace_s > 0:
            await asyncio.wait(running, timeout=grace_s)

    async def _give_up_unwanted(self) -> int:
        """End work on what went to another router, or was answered by one; returns how many there were."""
        unwanted = [task for task, claim in self._tasks.items() if not task.done() and not self._tracker.wanted(claim)]
        await self._give_up(unwanted)
        return len(unwanted)

    async def _give_up(self, tasks: Collection[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            self._metrics.given_up.inc(len(tasks))
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _commit(self, partitions: Collection[TopicPartition] | None, *, everything: bool = False) -> None:
        consumer = self._consumer()
        async with self._commit_lock:
            commits = self._tracker.committable(partitions, now_ms=_now_ms(), everything=everything)
            if not commits or consumer is None:
                return
            began_s = self._gate.now_s()
            try:
                await consumer.commit(stored(commits))
            except (KafkaError, IllegalStateError) as error:
                # Nothing is lost: it is tried again, or the records are redelivered to whoever has them then.
                self._commit_failures += 1
                self._metrics.commits.labels("failed").inc()
                _log.warning("commit failed", error=type(error).__name__)
                return
            self._gate.prove(began_s)
            self._tracker.note_committed(commits)
            self._commit_failures = 0
            self._metrics.commits.labels("ok").inc()


def _now_ms() -> int:
    return int(time.time() * 1_000)
