"""Publish fence: lets a response out only while this router owns the partition of its request.

A router can lose a partition without noticing, for example while its process is suspended for longer than the session
timeout: another router has answered in the meantime. Every accepted commit proves ownership, so it renews a lease that
is shorter than the session it extended. Responses are published only within the lease. In a rebalance the fence is
closed before partitions are given back, and sends under way are waited for: the next owner sees a response or none,
never one that arrives later.

A response is not sent again while it is unknown whether Kafka has it. The fence then closes for all partitions until
the consumer has read back what was published.

A process can also be suspended after the check, with responses that are not sent yet. Therefore each response carries
the time of its check as timestamp, and the broker rejects it if it is older than `max_age_ms` of the topic `responses`
when it arrives. Nobody else can own the partition before: the lease leaves more of the session than that (with a
session timeout of at least 6 s, and clocks of router and broker that differ by less than the rest, 0.6 s).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Final, TypeVar

from aiokafka import TopicPartition
from aiokafka.errors import InvalidTimestampError, KafkaError

from shared.kafka.publish import TOO_LARGE
from shared.kafka.records import RecordId
from shared.runtime.logs import get_logger

T = TypeVar("T")

Send = Callable[[int], Awaitable[T]]
"""Sends a message with a timestamp, milliseconds since the Unix epoch."""

LEASE_SHARE: Final = 0.4
"""Duration of the lease as a share of the session timeout."""

RENEWAL_SHARE: Final = 0.3
"""Age of the last renewal, as a share of the lease, at which the next one is due."""

_log = get_logger(__name__)


class PublishFence:
    """Open for some partitions, closed for all others."""

    def __init__(
        self,
        *,
        session_timeout_s: float,
        now_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """Create a closed fence.

        Args:
            session_timeout_s: session timeout of the consumer group, wall seconds.
        """
        self.lease_s = session_timeout_s * LEASE_SHARE
        self._now_s = now_s
        self._wall_s = wall_s
        self._renewed_at_s: float | None = None
        self._open: set[TopicPartition] = set()
        self._sending: Counter[TopicPartition] = Counter()
        self._changed = asyncio.Event()
        self._on_unknown_outcome: Callable[[], None] = lambda: None

    def on_unknown_outcome(self, callback: Callable[[], None]) -> None:
        """Call back every time a send ends without a known outcome, after the fence has closed."""
        self._on_unknown_outcome = callback

    def renew_lease(self, at_s: float) -> None:
        """Renew the lease by a commit that the group accepted.

        Args:
            at_s: start of the commit, by the clock of the fence.
        """
        self._renewed_at_s = at_s if self._renewed_at_s is None else max(self._renewed_at_s, at_s)
        self._changed.set()

    @property
    def renewal_due(self) -> bool:
        """Whether a commit is due to renew the lease."""
        return bool(self._open) and not self._renewed_within(self.lease_s * RENEWAL_SHARE)

    def is_open(self, partition: TopicPartition) -> bool:
        """Whether responses may be published while the lease is valid."""
        return partition in self._open

    def open(self, partitions: Collection[TopicPartition]) -> None:
        """Let responses of these partitions out: they are owned, and all published responses are known."""
        self._open.update(partitions)
        self._changed.set()

    def close(self, partitions: Collection[TopicPartition] | None = None) -> None:
        """Let no further response out; of all partitions if None."""
        self._open = set() if partitions is None else self._open.difference(partitions)

    async def wait_drained(self, timeout_s: float) -> bool:
        """Wait until no send of a closed partition is under way.

        Args:
            timeout_s: wall seconds.

        Returns:
            False after the timeout.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while any(partition not in self._open for partition in self._sending):
                    await self._change()
        except TimeoutError:
            return False
        return True

    async def publish(self, partition: TopicPartition, send: Send[T]) -> T:
        """Send once the fence is open for the partition and the lease is valid.

        Args:
            send: gets the time of the check, the timestamp of the message.

        Raises:
            KafkaError: of `send`; unless it is one of `TOO_LARGE`, Kafka may have the message nevertheless.
        """
        # The time first: the process can be suspended between any two statements.
        at_s = self._wall_s()
        while partition not in self._open or not self._renewed_within(self.lease_s):
            await self._change()
            at_s = self._wall_s()
        self._sending[partition] += 1
        try:
            return await send(int(at_s * 1_000))
        except TOO_LARGE:
            raise
        except KafkaError as error:
            if isinstance(error, InvalidTimestampError) and self._open:  # once for all that are rejected together
                _log.warning(
                    "Kafka rejected a response as too old: this process was suspended, Kafka is slow, or its clock and "
                    "this one differ by seconds"
                )
            self.close()
            self._on_unknown_outcome()
            raise
        finally:
            self._sending[partition] -= 1
            if not self._sending[partition]:
                del self._sending[partition]
                self._changed.set()

    def now_s(self) -> float:
        """The clock of the fence."""
        return self._now_s()

    def _renewed_within(self, seconds: float) -> bool:
        return self._renewed_at_s is not None and self._now_s() - self._renewed_at_s <= seconds

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


@dataclass(frozen=True, slots=True)
class RecordFence:
    """The fence for the messages that may be published only once for a record.

    Attributes:
        source: identifies the record in messages and their headers.
    """

    fence: PublishFence
    partition: TopicPartition
    source: RecordId

    async def publish(self, send: Send[T]) -> T:
        """Send once no other router can answer this record."""
        return await self.fence.publish(self.partition, send)
