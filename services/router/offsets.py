"""Which offsets may be committed: of every partition the finished prefix, and nothing beyond it.

Requests finish in any order. A commit says "everything before this is done", so it may only move past an offset when
all before it are finished; what is redelivered after a crash is then at most what was not finished.
"""

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

P = TypeVar("P", bound=Hashable)
"""What names a partition."""

_FINISHED: Final = True
_RUNNING: Final = False


class _Window:
    """One partition: the offsets from the first unfinished one on, in order."""

    __slots__ = ("committed", "delivered", "next", "offsets")

    def __init__(self, first: int) -> None:
        self.next = first  # all before it are finished
        self.committed = first
        self.delivered = first - 1  # the last one that came in this epoch
        self.offsets: OrderedDict[int, bool] = OrderedDict()

    def settle(self) -> None:
        """Move past what is finished."""
        while self.offsets:
            offset, state = next(iter(self.offsets.items()))
            if state is _RUNNING:
                return
            del self.offsets[offset]
            self.next = offset + 1

    def reassign(self, floor: int) -> None:
        """All before `floor` has been committed, by whomever; deliveries begin again there."""
        for offset in [one for one in self.offsets if one < floor]:
            del self.offsets[offset]
        self.next = max(self.next, floor)
        self.committed = max(self.committed, floor)
        self.delivered = floor - 1
        self.settle()


@dataclass(frozen=True, slots=True, eq=False)
class Claim(Generic[P]):
    """A record that is being worked on here; handed back to `finish`.

    Attributes:
        log_restarted: the partition's log has begun again at a lower offset than before, as that of a topic that was
            deleted and created anew.
    """

    partition: P
    offset: int
    window: _Window
    log_restarted: bool = False


class OffsetTracker(Generic[P]):
    """Follows records from their arrival to their end, over all partitions; does no I/O.

    Within an epoch the offsets of a partition arrive in growing order; there may be gaps between them, which no record
    ever fills. A rebalance is told in two steps, as Kafka tells it: `suspend` when partitions are taken away, `resume`
    when it is known which of them came back. Each step begins a new epoch, and a record that was fetched in an earlier
    epoch is refused: it will come again. After a rebalance a partition that came back is delivered from its committed
    offset on, so what is running or finished here comes again, and is recognised.
    """

    def __init__(self) -> None:
        self._windows: dict[P, _Window] = {}
        self._suspended: set[P] = set()
        self.epoch = 0

    def begin(self, partition: P, offset: int, *, epoch: int) -> Claim[P] | None:
        """A record has arrived; returns a claim when it is to be worked on.

        It is not when it was fetched before the last rebalance, when its partition is being taken away, or when it is
        known already: redelivered although it is still running here, or finished.

        Args:
            epoch: the tracker's epoch when the record was fetched.
        """
        if epoch != self.epoch or partition in self._suspended:
            return None
        window = self._windows.get(partition)
        # Kafka delivers nothing twice between two rebalances, so these are other records that bear the offsets of old.
        log_restarted = window is not None and offset <= window.delivered
        if window is None or log_restarted:
            window = self._windows[partition] = _Window(offset)
        window.delivered = offset
        if offset < window.next or offset in window.offsets:
            return None
        window.offsets[offset] = _RUNNING
        return Claim(partition, offset, window, log_restarted)

    def finish(self, claim: Claim[P]) -> None:
        """A record is done with; said twice, or of a partition that was lost meanwhile, it means nothing."""
        if claim.offset in claim.window.offsets:
            claim.window.offsets[claim.offset] = _FINISHED
            claim.window.settle()

    def committable(self, partitions: Collection[P] | None = None) -> dict[P, int]:
        """The next offset to read, by partition, where it has moved since the last commit.

        Args:
            partitions: only of these, suspended or not; null: of all that are not suspended.
        """
        return {
            partition: window.next
            for partition, window in self._windows.items()
            if window.next > window.committed
            and (partition not in self._suspended if partitions is None else partition in partitions)
        }

    def note_committed(self, offsets: Mapping[P, int]) -> None:
        """These have been committed."""
        for partition, offset in offsets.items():
            window = self._windows.get(partition)
            if window is not None:
                window.committed = max(window.committed, offset)

    def finished(self, partition: P) -> int | None:
        """The offset before which all is finished here; null where nothing was begun."""
        window = self._windows.get(partition)
        return None if window is None else window.next

    def knows(self, partition: P) -> bool:
        """Whether anything of a partition was ever begun here and not forgotten."""
        return partition in self._windows

    def suspend(self, partitions: Iterable[P]) -> None:
        """Partitions are being taken away: begin nothing of them; what runs may finish and be committed."""
        self._suspended.update(partitions)
        self.epoch += 1

    def resume(self, floors: Mapping[P, int | None]) -> set[P]:
        """Partitions are assigned; all others are lost, and forgotten.

        Args:
            floors: by assigned partition the offset that the group has committed; null: not known. A partition whose
                floor is not known, or lies below what was committed here (its log began again, or someone reset the
                group), starts afresh from what is delivered.

        Returns:
            The partitions that were lost or start afresh: work on their records is in vain.
        """
        dropped: set[P] = set()
        for partition, window in self._windows.items():
            floor = floors.get(partition)
            if floor is None or floor < window.committed:
                dropped.add(partition)
            else:
                window.reassign(floor)
        for partition in dropped:
            del self._windows[partition]
        self._suspended.clear()
        self.epoch += 1
        return dropped
