"""The partition of `replies` that a gateway reads, and that its requests name.

A gateway claims a partition by an advisory lock of a session of PostgreSQL: so no two read the same one, and ten cost
each no more than one. The lock ends with its session, for example when PostgreSQL restarts. Then the gateway claims its
partition again. If another one has it by then, the gateway claims a third one, which its next requests name, and goes
on reading the old one until the requests that named it are over.

Nothing but effort depends on the lock. Where two gateways read one partition, because one has not noticed yet that its
session has ended or because there are more gateways than partitions, each drops the replies to the other's requests.
"""

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from asyncpg.pool import PoolConnectionProxy

from shared.runtime.database import DatabaseUnavailableError, translate_errors
from shared.runtime.logs import get_logger
from shared.runtime.workarounds import within

CHECK_S: Final = 2.0
"""Wall seconds between two checks of the lock's session."""

TIMEOUT_S: Final = 4.0
"""Wall seconds that a check may take."""

SHARED_S: Final = 30.0
"""Wall seconds after which a gateway without a lock looks for a free partition again."""

LEAVE_S: Final = 60.0
"""Wall seconds after which a request that named the old partition is open, or was never published."""

_log = get_logger(__name__)


class PartitionLock:
    """The lock on one of the partitions, which lives as long as its session."""

    def __init__(self, pool: asyncpg.Pool, topic: str) -> None:
        self._pool = pool
        self._topic = topic
        self._session: PoolConnectionProxy[asyncpg.Record] | None = None

    async def holds(self) -> bool:
        """Whether the session lives, and with it the lock."""
        if self._session is None:
            return False
        with suppress(DatabaseUnavailableError), translate_errors():
            await within(TIMEOUT_S, self._session.fetchval("SELECT 1"))
            return True
        await self.release()
        return False

    async def claim(self, numbers: list[int]) -> int | None:
        """Lock the first of some partitions that is free, in a new session; None if others hold all of them.

        Raises:
            DatabaseUnavailableError: PostgreSQL does not answer.
        """
        await self.release()
        with translate_errors():
            self._session = session = await self._pool.acquire(timeout=TIMEOUT_S)
            try:
                for number in numbers:
                    if await session.fetchval("SELECT pg_try_advisory_lock(hashtext($1), $2)", self._topic, number):
                        return number
            except BaseException:
                await self.release()
                raise
        await self.release()
        return None

    async def release(self) -> None:
        """End the session, and with it the lock."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(DatabaseUnavailableError), translate_errors():
                session.terminate()  # fails if the server has ended the session: the pool has it back then
                await self._pool.release(session)


class ReadPartitions:
    """The partitions to read: the one that new requests name, and older ones until nothing waits for them."""

    def __init__(self, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self.current: int | None = None
        self._now_s = now_s
        self._left: dict[int, float] = {}
        self._waiting: dict[int, set[str]] = {}

    @property
    def all(self) -> set[int]:
        """The current partition and the older ones."""
        return ({self.current} if self.current is not None else set()) | self._left.keys()

    def move(self, number: int) -> None:
        """Make a partition the current one."""
        if self.current is not None and self.current != number:
            self._left[self.current] = self._now_s()
        self._forget(number)
        self.current = number

    def leave(self, waiting: set[str]) -> None:
        """Forget older partitions that no request waits for any more.

        Args:
            waiting: ids of the requests that wait for replies.
        """
        done = []
        for number, since_s in self._left.items():
            if self._now_s() - since_s < LEAVE_S:
                continue
            self._waiting[number] = self._waiting.get(number, waiting) & waiting
            if not self._waiting[number]:
                done.append(number)
        for number in done:
            self._forget(number)

    def _forget(self, number: int) -> None:
        self._left.pop(number, None)
        self._waiting.pop(number, None)


class ReplyPartition:
    """Keeps a partition claimed, and the consumer reading it."""

    def __init__(
        self,
        topic: str,
        *,
        consumer: Callable[[], AIOKafkaConsumer],
        waiting: Callable[[], set[str]],
        on_move: Callable[[int], None],
    ) -> None:
        """Read nothing yet.

        Args:
            topic: full name of `replies`.
            consumer: exists once the broker has started.
            waiting: ids of the requests that wait for replies.
            on_move: called with the partition that requests are to name from now on.
        """
        self._topic = topic
        self._consumer = consumer
        self._waiting = waiting
        self._on_move = on_move
        self._partitions = ReadPartitions()
        self._following: set[TopicPartition] = set()
        self._numbers: list[int] = []
        self._lock: PartitionLock | None = None
        self._shared_since_s: float | None = None

    async def start(self, pool: asyncpg.Pool) -> None:
        """Claim a partition, and read it from its present end on; the broker has started.

        Tries again as long as Kafka or PostgreSQL does not answer.
        """
        self._lock = lock = PartitionLock(pool, self._topic)
        while True:
            try:
                await self._load_numbers()
                await self._claim(lock)
                await self._read()
            except (DatabaseUnavailableError, KafkaError) as error:
                _log.warning("replies are not read yet, trying again", error=type(error).__name__)
                await asyncio.sleep(CHECK_S)
            else:
                return

    async def _load_numbers(self) -> None:
        consumer = self._consumer()
        if (first := TopicPartition(self._topic, 0)) in consumer.assignment():
            await consumer.position(first)  # loads the topic's metadata
        self._numbers = list(consumer.partitions_for_topic(self._topic) or (0,))
        random.shuffle(self._numbers)

    async def keep(self) -> None:
        """Claim a partition again whenever the lock is lost; runs until cancelled."""
        lost = False
        try:
            while True:
                await asyncio.sleep(CHECK_S)
                try:
                    await self.check()
                except (DatabaseUnavailableError, KafkaError) as error:
                    if not lost:
                        _log.warning("the reply partition is not claimed", error=type(error).__name__)
                    lost = True
                else:
                    lost = False
        finally:
            if self._lock is not None:
                await self._lock.release()

    async def check(self) -> None:
        """Look whether the lock is still there, and leave older partitions that nobody waits for.

        Raises:
            DatabaseUnavailableError, KafkaError: what was not done is done at the next check.
        """
        if self._lock is not None and not await self._lock.holds() and self._is_due():
            await self._claim(self._lock)
        self._partitions.leave(self._waiting())
        await self._read()

    def _is_due(self) -> bool:
        return self._shared_since_s is None or time.monotonic() - self._shared_since_s >= SHARED_S

    async def _claim(self, lock: PartitionLock) -> None:
        """Claim the present partition again, or another one."""
        present = self._partitions.current
        preferred = sorted(self._numbers, key=lambda one: one != present)
        number = await lock.claim(preferred)
        if number is not None:
            _log.info("reply partition claimed", partition=number, before=present)
            self._shared_since_s = None
        else:
            number = preferred[0]
            if self._shared_since_s is None:
                _log.warning("all reply partitions are read by other gateways; this one is shared", partition=number)
            self._shared_since_s = time.monotonic()
        self._partitions.move(number)

    async def _read(self) -> None:
        """Have the consumer read all partitions: those that it reads on from where it is, others from their end.

        Raises:
            KafkaError: the next call tries again.
        """
        wanted = {TopicPartition(self._topic, number) for number in self._partitions.all}
        if wanted != self._following:
            consumer = self._consumer()
            positions = {one: await consumer.position(one) for one in self._following & wanted}
            consumer.assign(sorted(wanted))
            for one, offset in positions.items():
                consumer.seek(one, offset)
            self._following &= wanted
            for one in wanted - self._following:
                await consumer.seek_to_end(one)
                await consumer.position(one)
            self._following = wanted
        if self._partitions.current is not None:
            self._on_move(self._partitions.current)
