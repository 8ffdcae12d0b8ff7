"""Which offsets may be committed: of every partition the finished prefix, and nothing beyond it.

Requests finish in any order. A commit says "everything before this is done", so it may only move past an offset when
all before it are finished; what is redelivered after a crash is then at most what was not finished. With every commit
goes the time from which on the answers to what follows it may have been published: whoever takes the partition over
looks for them there (`services.router.recovery`) and does nothing twice.
"""

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Generic, TypeVar

P = TypeVar("P", bound=Hashable)
"""What names a partition."""

SINCE_REFRESH_MS: Final = 30_000
"""A partition in which nothing is finished is committed all the same when the time it was committed with is so old:
the next owner has less to look through."""

_FINISHED: Final = -1


@dataclass(frozen=True, slots=True)
class Commit:
    """What is committed of a partition.

    Attributes:
        offset: the next one to read: all before it are finished.
        since_ms: no answer to a record at or beyond `offset` was published before it; wall, milliseconds since the
            Unix epoch.
    """

    offset: int
    since_ms: int


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the group stands in a partition that is taken over.

    Attributes:
        commit: what the group committed last.
        answered: timestamps of the records at or beyond the committed offset whose answers were found, by offset.
    """

    commit: Commit
    answered: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))


class _Window:
    """One partition: the offsets from the first unfinished one on, in order."""

    __slots__ = ("answered", "committed", "delivered", "inherited_ms", "last_answered", "next", "offsets")

    def __init__(self, first: int, since_ms: int) -> None:
        self.next = first  # all before it are finished
        self.committed = Commit(first, since_ms)
        self.delivered = first - 1  # the last one that came in this epoch
        # By offset when it was begun here, or _FINISHED. Those that are running were begun in the order of offsets.
        self.offsets: OrderedDict[int, int] = OrderedDict()
        self.answered: Mapping[int, int] = {}
        self.last_answered = -1
        self.inherited_ms = since_ms

    def settle(self) -> None:
        """Move past what is finished."""
        while self.offsets:
            offset, state = next(iter(self.offsets.items()))
            if state != _FINISHED:
                break
            del self.offsets[offset]
            self.next = offset + 1
        if self.answered and self.next > self.last_answered:
            self.answered = {}

    def take_over(self, standing: Standing) -> None:
        """Go on where the group stands; deliveries begin again there."""
        floor = standing.commit.offset
        for offset in list(self.offsets):
            if offset < floor:
                del self.offsets[offset]
            elif offset in standing.answered:
                self.offsets[offset] = _FINISHED
        self.next = max(self.next, floor)
        self.committed = standing.commit
        self.delivered = floor - 1
        self.answered = standing.answered
        self.last_answered = max(standing.answered, default=-1)
        self.inherited_ms = standing.commit.since_ms
        self.settle()

    def since_ms(self, now_ms: int) -> int:
        """From when on the answers to what is not committed may have been published."""
        if self.next <= self.last_answered:
            return self.inherited_ms
        return min(next(iter(self.offsets.values())), now_ms) if self.offsets else now_ms


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
    ever fills. A rebalance is told in three steps: `suspend` when partitions are taken away, `keep` when it is known
    which of them came back, `resume` when it is known where the group stands in them. The first and the last begin a
    new epoch, and a record that was fetched in an earlier epoch is refused: it will come again. A partition that came
    back is delivered from its committed offset on, so what is running or finished here comes again, and is recognised;
    so is what another router answered.
    """

    def __init__(self) -> None:
        self._windows: dict[P, _Window] = {}
        self._suspended: set[P] = set()
        self.epoch = 0

    def begin(self, partition: P, offset: int, *, epoch: int, timestamp_ms: int, now_ms: int) -> Claim[P] | None:
        """A record has arrived; returns a claim when it is to be worked on.

        It is not when it was fetched before the last rebalance, when its partition is being taken away, or when it is
        known already: answered by the partition's earlier owner, or redelivered although it is still running here, or
        finished.

        Args:
            epoch: the tracker's epoch when the record was fetched.
            timestamp_ms: the record's; tells it from another one that bore the same offset in an earlier log.
            now_ms: wall, milliseconds since the Unix epoch.
        """
        if epoch != self.epoch or partition in self._suspended:
            return None
        window = self._windows.get(partition)
        # Kafka delivers nothing twice between two rebalances, so these are other records that bear the offsets of old.
        log_restarted = window is not None and offset <= window.delivered
        if window is None or log_restarted:
            window = self._windows[partition] = _Window(offset, now_ms)
        window.delivered = offset
        if offset < window.next or offset in window.offsets:
            return None
        if window.answered.get(offset) == timestamp_ms:
            window.offsets[offset] = _FINISHED
            window.settle()
            return None
        window.offsets[offset] = now_ms
        return Claim(partition, offset, window, log_restarted)

    def finish(self, claim: Claim[P]) -> None:
        """A record is done with; said twice, or of a partition that was lost meanwhile, it means nothing."""
        if claim.offset in claim.window.offsets:
            claim.window.offsets[claim.offset] = _FINISHED
            claim.window.settle()

    def wanted(self, claim: Claim[P]) -> bool:
        """Whether a record is still to be answered here."""
        return (
            self._windows.get(claim.partition) is claim.window
            and claim.window.offsets.get(claim.offset, _FINISHED) != _FINISHED
        )

    def committable(
        self, partitions: Collection[P] | None = None, *, now_ms: int, everything: bool = False
    ) -> dict[P, Commit]:
        """What there is to commit, by partition, where it has moved since the last commit.

        Args:
            partitions: only of these, suspended or not; null: of all that are not suspended.
            now_ms: wall, milliseconds since the Unix epoch.
            everything: also where nothing has moved.
        """
        found = {
            partition: (window, Commit(window.next, window.since_ms(now_ms)))
            for partition, window in self._windows.items()
            if (partition not in self._suspended if partitions is None else partition in partitions)
        }
        return {
            partition: commit
            for partition, (window, commit) in found.items()
            if everything
            or commit.offset > window.committed.offset
            or commit.since_ms - window.committed.since_ms > SINCE_REFRESH_MS
        }

    def note_committed(self, commits: Mapping[P, Commit]) -> None:
        """These have been committed."""
        for partition, commit in commits.items():
            window = self._windows.get(partition)
            if window is not None and commit.offset >= window.committed.offset:
                window.committed = commit

    def finished(self, partition: P) -> int | None:
        """The offset before which all is finished; null where nothing is known of the partition."""
        window = self._windows.get(partition)
        return None if window is None else window.next

    def suspend(self, partitions: Iterable[P]) -> None:
        """Partitions are being taken away: begin nothing of them; what runs may finish and be committed."""
        self._suspended.update(partitions)
        self.epoch += 1

    def keep(self, assigned: Collection[P]) -> None:
        """Partitions are assigned, and wait for `resume`; all others are lost, and forgotten."""
        self._windows = {partition: window for partition, window in self._windows.items() if partition in assigned}
        self._suspended = set(assigned)
        self.epoch += 1

    def resume(self, standings: Mapping[P, Standing]) -> None:
        """Go on with partitions that were kept.

        Where the group stands below what was committed here (the log began again, or someone reset the group), the
        partition starts afresh, and work on its records is in vain; see `wanted`.
        """
        for partition, standing in standings.items():
            window = self._windows.get(partition)
            if window is None or standing.commit.offset < window.committed.offset:
                window = self._windows[partition] = _Window(standing.commit.offset, standing.commit.since_ms)
            window.take_over(standing)
            self._suspended.discard(partition)
        self.epoch += 1
