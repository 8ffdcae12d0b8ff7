"""Leader and standby: of several copies of a service one does the work that must be done once.

The copies form a consumer group on a topic with one partition; whoever has the partition is the leader. Kafka gives it
to another copy when the leader leaves, or is not heard of for the session timeout. A leader may not notice that, for
example while its process is suspended. So it works under a lease: every accepted commit proves that it still has the
partition, and renews the lease, which is shorter than the session that the commit extended. Whoever publishes calls
`check` right before. What remains is a message that has already been handed to the Kafka client when the process is
suspended.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final

from aiokafka import ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import IllegalStateError, KafkaError
from faststream.kafka import KafkaBroker
from prometheus_client import CollectorRegistry, Gauge

from shared.access import leader_group
from shared.kafka.publish import publish_with_retry
from shared.kafka.subscribe import join_group
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings
from shared.topics import CARBON_INTENSITY

LEASE_SHARE: Final = 0.7
"""Duration of the lease as a share of the session timeout."""

RENEWAL_SHARE: Final = 0.25
"""Time between two renewals as a share of the lease."""

STOP_S: Final = 5.0
"""Longest wait for the end of the work before the partition is given back; wall seconds."""

_log = get_logger(__name__)


class NotLeaderError(RuntimeError):
    """This copy is not the leader, or cannot prove it any more: another one may do the work."""


class Leadership(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka has no types
    """Whether this copy of a service is the leader, and the work that it does as long as it is."""

    def __init__(self, *, session_timeout_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        """Start as a standby.

        Args:
            session_timeout_s: of the consumer group, wall seconds.
            now_s: clock of the lease; must continue while the process is suspended.
        """
        self._lease_s = session_timeout_s * LEASE_SHARE
        self._now_s = now_s
        self._partition: TopicPartition | None = None
        self._renewed_at_s: float | None = None
        self._changed = asyncio.Event()
        self._working: set[asyncio.Future[None]] = set()
        self._get_consumer: Callable[[], Any] = lambda: None

    def set_consumer(self, get_consumer: Callable[[], Any]) -> None:
        """Set where to find aiokafka's consumer; FastStream creates it when the broker starts."""
        self._get_consumer = get_consumer

    @property
    def is_leader(self) -> bool:
        """Whether this copy may do the leader's work now."""
        return self._partition is not None and self._remaining_s() > 0.0

    def role(self) -> str:
        """The role in words: leader or standby."""
        return "leader" if self.is_leader else "standby"

    def check(self) -> None:
        """Call right before publishing.

        Raises:
            NotLeaderError: another copy may be the leader.
        """
        if not self.is_leader:
            raise NotLeaderError("another copy of this service may be the leader")

    async def publish(self, send: Callable[[], Awaitable[object]]) -> None:
        """Send a message as the leader, again and again while Kafka is unreachable.

        Raises:
            NotLeaderError: before the message was sent.
        """

        async def checked() -> object:
            self.check()
            return await send()

        await publish_with_retry(checked)

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do some work as long as this copy is the leader, each time that it becomes the leader; runs until cancelled.

        Args:
            work: is cancelled when the lease ends. It may also return, or raise `NotLeaderError`.
        """
        while True:
            while not self.is_leader:
                await self._change(None)
            task = asyncio.ensure_future(work())
            self._working.add(task)
            task.add_done_callback(self._on_work_done)
            try:
                while self.is_leader and not _failed(task):
                    await self._change(self._remaining_s())
            finally:
                task.cancel()
                (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(outcome, Exception) and not isinstance(outcome, NotLeaderError):
                raise outcome

    async def renew_forever(self) -> None:
        """Renew the lease while the partition is assigned; runs until cancelled."""
        while True:
            if self._partition is not None:
                await self._renew(self._partition)
            await self._change(self._lease_s * RENEWAL_SHARE)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """A rebalance has ended."""
        consumer = self._get_consumer()
        if consumer is not None and assigned:
            consumer.pause(*assigned)
        self._partition = next((one for one in assigned if one.partition == 0), None)
        _log.info("leader" if self._partition is not None else "standby")
        self._notify()

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:  # noqa: ARG002
        """A rebalance starts: end the work before another copy may begin it."""
        self._partition = self._renewed_at_s = None
        self._notify()
        if self._working:
            await asyncio.wait(self._working, timeout=STOP_S)

    async def _renew(self, partition: TopicPartition) -> None:
        """Commit an offset, which Kafka accepts as long as this copy has the partition; nobody reads it."""
        consumer = self._get_consumer()
        started_s = self._now_s()
        try:
            # aiokafka retries a commit for as long as Kafka is unreachable.
            async with asyncio.timeout(self._lease_s):
                await consumer.commit({partition: 0})
        except (KafkaError, IllegalStateError, TimeoutError) as error:
            _log.debug("the lease was not renewed", error=type(error).__name__)
            return
        if self._partition == partition:
            was_leader = self.is_leader
            self._renewed_at_s = started_s
            if not was_leader:
                self._notify()

    def _remaining_s(self) -> float:
        return 0.0 if self._renewed_at_s is None else self._renewed_at_s + self._lease_s - self._now_s()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _change(self, within_s: float | None) -> None:
        """Wait for a change of the role, at most for some time."""
        try:
            async with asyncio.timeout(within_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _on_work_done(self, task: "asyncio.Future[None]") -> None:
        self._working.discard(task)
        if _failed(task):
            self._notify()


def _failed(task: "asyncio.Future[None]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


def join_leadership(
    broker: KafkaBroker, kafka: KafkaSettings, *, service: str, registry: CollectorRegistry
) -> Leadership:
    """Let this process take part in electing the leader of a service, once the broker has started.

    The group is that of the service with `.leader`. It reads `carbon-intensity`, which all services with a leader read
    anyway, only for its one partition; no record is fetched. Run `Leadership.renew_forever` in the background.

    Args:
        registry: for the gauge `sprout_leader`.
    """
    session_s = kafka.leader_session_timeout_s
    leadership = Leadership(session_timeout_s=session_s)

    subscriber = join_group(
        broker,
        kafka,
        CARBON_INTENSITY,
        group=leader_group(service),
        listener=leadership,
        session_timeout_ms=int(session_s * 1_000),
        heartbeat_interval_ms=int(session_s * 1_000 / 6),
        rebalance_timeout_ms=int((session_s + STOP_S) * 1_000),
        partition_assignment_strategy=(StickyPartitionAssignor,),
    )
    leadership.set_consumer(lambda: subscriber.consumer)
    gauge = Gauge("sprout_leader", "1 if this copy of the service is the leader, 0 if it stands by", registry=registry)
    gauge.set_function(lambda: float(leadership.is_leader))
    return leadership
