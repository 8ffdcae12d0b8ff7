"""Lets an answer out only while this router owns the partition that its request came from.

A router may lose a partition without knowing it: stopped by the machine for longer than its session lasts, it goes on
where it was, while another router has answered in its stead. So what proves that the group still counts on this router,
an accepted commit, is good for a while (the lease), shorter than the session that it prolonged. In a rebalance the gate
is shut before the partitions are given back, and what is on its way is waited for: whoever takes over finds either an
answer or none, never one that comes later.

Nor is an answer sent again that Kafka may have: where it does not say whether it has, the gate is shut until somebody
has looked.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Final, TypeVar

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from shared.kafka.publish import TOO_LARGE

T = TypeVar("T")

LEASE_SHARE: Final = 0.7
"""Of the session's timeout: how long an accepted commit is proof enough."""

RENEWAL_SHARE: Final = 0.3
"""Of the lease: how old the last proof may become before the next is sought."""


class Gate:
    """Open for some partitions, shut for all others."""

    def __init__(self, *, session_timeout_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        """Set up, shut.

        Args:
            session_timeout_s: after which silence the group gives a router up; wall.
        """
        self.lease_s = session_timeout_s * LEASE_SHARE
        self._now_s = now_s
        self._proved_s: float | None = None
        self._open: set[TopicPartition] = set()
        self._passing: Counter[TopicPartition] = Counter()
        self._changed = asyncio.Event()
        self._on_doubt: Callable[[], None] = lambda: None

    def watch(self, on_doubt: Callable[[], None]) -> None:
        """Have somebody told, every time that Kafka may have a message or not and the gate was shut for it."""
        self._on_doubt = on_doubt

    def prove(self, at_s: float) -> None:
        """The group accepted a commit that was begun at `at_s`, by the gate's own clock."""
        self._proved_s = at_s if self._proved_s is None else max(self._proved_s, at_s)
        self._announce()

    @property
    def wants_proof(self) -> bool:
        """Whether a commit is due for the lease's sake."""
        return bool(self._open) and not self._held_for(self.lease_s * RENEWAL_SHARE)

    def is_open(self, partition: TopicPartition) -> bool:
        """Whether answers may pass, provided that the lease holds."""
        return partition in self._open

    def open(self, partitions: Collection[TopicPartition]) -> None:
        """Partitions are owned, and all that was answered before is known."""
        self._open.update(partitions)
        self._announce()

    def shut(self, partitions: Collection[TopicPartition] | None = None) -> None:
        """Let no further answer pass; of all partitions, unless some are named."""
        self._open = set() if partitions is None else self._open.difference(partitions)

    async def quiet(self, timeout_s: float) -> bool:
        """Wait until nothing is on its way through a shut gate; whether that came within `timeout_s` (wall)."""
        try:
            async with asyncio.timeout(timeout_s):
                while any(partition not in self._open for partition in self._passing):
                    await self._change()
        except TimeoutError:
            return False
        return True

    async def through(self, partition: TopicPartition, publish: Callable[[], Awaitable[T]]) -> T:
        """Publish, once the gate is open and the lease holds.

        Raises:
            KafkaError: of `publish`; unless it is one of `TOO_LARGE`, Kafka may have the message all the same.
        """
        while partition not in self._open or not self._held_for(self.lease_s):
            await self._change()
        self._passing[partition] += 1
        try:
            return await publish()
        except TOO_LARGE:
            raise
        except KafkaError:
            self.shut()
            self._on_doubt()
            raise
        finally:
            self._passing[partition] -= 1
            if not self._passing[partition]:
                del self._passing[partition]
                self._announce()

    def now_s(self) -> float:
        """The gate's own clock."""
        return self._now_s()

    def _held_for(self, seconds: float) -> bool:
        return self._proved_s is not None and self._now_s() - self._proved_s <= seconds

    def _announce(self) -> None:
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


@dataclass(frozen=True, slots=True)
class Passage:
    """A record's way through the gate, for all that may be said of it only once.

    Attributes:
        source: names the record in the headers of what is said of it; see `services.router.recovery`.
    """

    gate: Gate
    partition: TopicPartition
    source: str

    async def through(self, publish: Callable[[], Awaitable[T]]) -> T:
        """Publish, once it is certain that nobody else answers this record."""
        return await self.gate.through(self.partition, publish)
