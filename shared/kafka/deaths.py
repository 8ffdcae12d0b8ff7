"""Counts the processes that died with the same record in hand, and decides what the next one does; no I/O.

The count is in the metadata of the committed offset, so it survives the container. Before a process handles its first
records of a partition it commits the same offset with the count raised by one. Progress and an orderly end write
commits without that. So the count is the number of processes that died at this offset.

`shared.kafka.careful` counts for consumers of batches, `services.router.careful` for the router.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Self

from aiokafka import TopicPartition

from shared.runtime.settings import KafkaSettings

COMMIT_TIMEOUT_S: Final = 2.0
"""Longest wait for a commit of the count, or for reading it, wall seconds; afterwards the service goes on without."""

_DEATHS: Final = re.compile(r"(?:^| )deaths=(\d{1,9})$")


class Caution(Enum):
    """How the records of a partition are handled, from the committed offset on.

    Attributes:
        NONE: as always.
        ONE_AT_A_TIME: one after the other, with a commit before each: another death shows which one it was.
        SET_ASIDE: the first one becomes a dead letter, unparsed; the others are handled as always.
    """

    NONE = auto()
    ONE_AT_A_TIME = auto()
    SET_ASIDE = auto()


@dataclass(frozen=True, slots=True)
class DeathLimits:
    """Deaths from which a service is careful, and from which it sets a record aside."""

    careful: int
    set_aside: int

    @classmethod
    def of(cls, kafka: KafkaSettings) -> Self:
        """The limits in the settings."""
        return cls(kafka.careful_after_deaths, kafka.set_aside_after_deaths)

    def caution(self, deaths: int) -> Caution:
        """What follows from the number of processes that died."""
        if deaths >= self.set_aside:
            return Caution.SET_ASIDE
        return Caution.ONE_AT_A_TIME if deaths >= self.careful else Caution.NONE


def with_deaths(metadata: str, deaths: int) -> str:
    """The metadata of a commit with a count."""
    return f"{metadata} deaths={deaths}".lstrip() if deaths else metadata


def split_deaths(metadata: str) -> tuple[str, int]:
    """The metadata of a commit without its count, and the count."""
    found = _DEATHS.search(metadata)
    return (metadata, 0) if found is None else (metadata[: found.start()], int(found[1]))


@dataclass(slots=True)
class _Begin:
    """Where a partition begins.

    Attributes:
        assigned: the committed offset at the assignment.
        offset: of the first record in hand.
        deaths: of earlier processes.
        in_hand: whether this process has records from `offset` on in hand, and its death would count.
    """

    assigned: int
    offset: int
    deaths: int
    in_hand: bool = False


class DeathCount:
    """The counts of one consumer, by partition, from its assignment until there is progress."""

    def __init__(self, limits: DeathLimits) -> None:
        self._limits = limits
        self._begins: dict[TopicPartition, _Begin] = {}

    @property
    def partitions(self) -> Collection[TopicPartition]:
        """The partitions without progress so far."""
        return self._begins.keys()

    def assign(self, partition: TopicPartition, offset: int, deaths: int) -> None:
        """A partition was assigned, whose commit has this offset and count."""
        known = self._begins.get(partition)
        if known is not None and (offset, deaths) == (known.offset, known.deaths + 1):
            deaths = known.deaths  # raised by this process, which lives
        self._begins[partition] = _Begin(offset, offset, deaths)

    def caution(self, partition: TopicPartition, offset: int) -> Caution:
        """How records from an offset on are to be handled."""
        begin = self._begins.get(partition)
        # A record before the committed offset was fetched before a rebalance.
        if begin is None or offset < begin.assigned:
            return Caution.NONE
        return self._limits.caution(begin.deaths)

    def take(self, partition: TopicPartition, offset: int) -> None:
        """The records from an offset on are about to be handled; commit `deaths` before."""
        begin = self._begins.setdefault(partition, _Begin(offset, offset, 0))
        begin.offset, begin.in_hand = offset, True

    def deaths(self, partition: TopicPartition, offset: int) -> int:
        """The count that a commit of an offset carries."""
        begin = self._begins.get(partition)
        return 0 if begin is None or begin.offset != offset else begin.deaths + begin.in_hand

    def release(self, partitions: Collection[TopicPartition] | None = None) -> dict[TopicPartition, int]:
        """Nothing is in hand any more; of all partitions if None.

        Returns:
            The offsets to commit again, so that this process does not count.
        """
        released: dict[TopicPartition, int] = {}
        for partition, begin in self._begins.items():
            if begin.in_hand and (partitions is None or partition in partitions):
                begin.in_hand = False
                released[partition] = begin.offset
        return released

    def committed(self, partition: TopicPartition, offset: int) -> None:
        """An offset was committed: beyond the one that counts, the count ends, unless records are taken one by one."""
        begin = self._begins.get(partition)
        if begin is None or offset <= begin.offset:
            return
        if self._limits.caution(begin.deaths) is not Caution.ONE_AT_A_TIME:
            self.passed(partition)

    def passed(self, partition: TopicPartition) -> None:
        """There is progress: the count ends."""
        self._begins.pop(partition, None)
