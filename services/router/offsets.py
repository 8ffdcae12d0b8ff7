"""Tracks which offsets may be committed: in every partition the finished prefix, and nothing beyond it.

Requests finish in any order. A committed offset means that all records before it are finished, so it may move past a
record only when all earlier ones are finished. After a crash only unfinished records are redelivered.

Every commit also stores a time: responses to records at or beyond the committed offset were published at that time or
later. The next owner of the partition reads the responses from that time on (`services.router.recovery`) and answers
no record twice. No library does this: Kafka clients commit a position, which is not a finished prefix.
"""

from collections import OrderedDict, deque
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Generic, TypeVar

P = TypeVar("P", bound=Hashable)
"""The key of a partition."""

SINCE_REFRESH_MS: Final = 30_000
"""Age of a committed time after which a partition is committed again although its offset has not moved: the next
owner then has fewer responses to read."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit of a partition.

    Attributes:
        offset: the next one to read; all records before it are finished.
        since_ms: lower bound of the publish time of responses to records at or beyond `offset`; wall time,
            milliseconds since the Unix epoch.
        deaths: processes that died with this commit, see `shared.kafka.deaths`; the tracker does not look at it.
    """

    offset: int
    since_ms: int
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class RecoveredOffsets:
    """The progress of the consumer group in a partition that this router has been assigned.

    Attributes:
        commit: the last commit of the group.
        answered: timestamps of the records at or beyond the committed offset that have a response, by offset.
    """

    commit: Commit
    answered: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))


class _Window:
    """One partition: its offsets from the first unfinished one on, in order."""

    __slots__ = ("answered", "committed", "delivered", "inherited_ms", "last_answered", "next", "offsets", "started")

    def __init__(self, first: int, since_ms: int) -> None:
        self.next = first  # all records before it are finished
        self.committed = Commit(first, since_ms)
        self.delivered = first - 1  # the last one delivered in this epoch
        self.offsets: OrderedDict[int, bool] = OrderedDict()  # whether it is finished, by offset
        self.started: deque[tuple[int, int]] = deque()  # time and offset of started records, in order of time
        self.answered: Mapping[int, int] = {}
        self.last_answered = -1
        self.inherited_ms = since_ms

    def advance(self) -> None:
        """Move past the finished prefix."""
        while self.offsets:
            offset, finished = next(iter(self.offsets.items()))
            if not finished:
                break
            del self.offsets[offset]
            self.next = offset + 1
        if self.answered and self.next > self.last_answered:
            self.answered = {}

    def take_over(self, recovered: RecoveredOffsets) -> None:
        """Continue at the committed offset of the group, from which records are delivered again."""
        floor = recovered.commit.offset
        for offset in list(self.offsets):
            if offset < floor:
                del self.offsets[offset]
            elif offset in recovered.answered:
                self.offsets[offset] = True
        self.next = max(self.next, floor)
        self.committed = recovered.commit
        self.delivered = floor - 1
        self.answered = recovered.answered
        self.last_answered = max(recovered.answered, default=-1)
        self.inherited_ms = recovered.commit.since_ms
        self.advance()

    def since_ms(self, now_ms: int) -> int:
        """Lower bound of the publish time of responses to records at or beyond `next`."""
        if self.next <= self.last_answered:
            return self.inherited_ms
        # Only started records have responses; the finished prefix does not count.
        while self.started and self.started[0][1] < self.next:
            self.started.popleft()
        return min(self.started[0][0], now_ms) if self.started else now_ms


@dataclass(frozen=True, slots=True, eq=False)
class Claim(Generic[P]):
    """A record that waits or is being processed here; passed to `start` and `finish`.

    Attributes:
        log_restarted: the partition's offsets went backwards, for example because the topic was deleted and created
            again.
    """

    partition: P
    offset: int
    window: _Window
    log_restarted: bool = False


class OffsetTracker(Generic[P]):
    """Follows records from delivery to completion, in all partitions; does no I/O.

    Within an epoch the offsets of a partition are delivered in ascending order, possibly with gaps. A rebalance has
    three steps: `suspend` when partitions are revoked, `keep` when partitions are assigned, `resume` when the progress
    of the group in them is known. Each step starts a new epoch. A record that was fetched in an earlier epoch is
    refused, because it will be redelivered. An assigned partition is delivered from its committed offset on: records
    that are running or finished here, or were answered by another router, are recognised and not started again.
    """

    def __init__(self) -> None:
        self._windows: dict[P, _Window] = {}
        self._suspended: set[P] = set()
        self.epoch = 0

    def begin(self, partition: P, offset: int, *, epoch: int, timestamp_ms: int, now_ms: int) -> Claim[P] | None:
        """Register a delivered record.

        Args:
            epoch: the epoch of the tracker when the record was fetched.
            timestamp_ms: the timestamp of the record; distinguishes it from a record with the same offset in an
                earlier log.
            now_ms: wall time, milliseconds since the Unix epoch.

        Returns:
            A claim if the record is to be processed. None if it was fetched before the last rebalance, if its
            partition is suspended, or if it is known: running or finished here, or answered by an earlier owner.
        """
        if epoch != self.epoch or partition in self._suspended:
            return None
        window = self._windows.get(partition)
        # Within an epoch Kafka delivers no offset twice, so this is another record with an old offset: a new log.
        log_restarted = window is not None and offset <= window.delivered
        if window is None or log_restarted:
            window = self._windows[partition] = _Window(offset, now_ms)
        window.delivered = offset
        if offset < window.next or offset in window.offsets:
            return None
        if window.answered.get(offset) == timestamp_ms:
            window.offsets[offset] = True
            window.advance()
            return None
        window.offsets[offset] = False
        return Claim(partition, offset, window, log_restarted)

    def start(self, claim: Claim[P], *, now_ms: int) -> None:
        """Note that a record is processed from now on: before this there is no response to it.

        Args:
            now_ms: wall time, milliseconds since the Unix epoch.
        """
        claim.window.started.append((now_ms, claim.offset))

    def finish(self, claim: Claim[P]) -> None:
        """Mark a record as finished; no effect if it is finished already or its partition was lost."""
        if claim.offset in claim.window.offsets:
            claim.window.offsets[claim.offset] = True
            claim.window.advance()

    def still_owned(self, claim: Claim[P]) -> bool:
        """Whether the record is still to be answered by this router."""
        return self._windows.get(claim.partition) is claim.window and not claim.window.offsets.get(claim.offset, True)

    def committable(
        self, partitions: Collection[P] | None = None, *, now_ms: int, everything: bool = False
    ) -> dict[P, Commit]:
        """Commits by partition, where they differ from the last ones.

        Args:
            partitions: only these, suspended or not; None: all that are not suspended.
            now_ms: wall time, milliseconds since the Unix epoch.
            everything: include partitions without progress.
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
        """Note that Kafka has accepted these commits."""
        for partition, commit in commits.items():
            window = self._windows.get(partition)
            if window is not None and commit.offset >= window.committed.offset:
                window.committed = commit

    def tracked(self, partitions: Iterable[P]) -> int:
        """Records of partitions that are kept in mind: unfinished ones, and those finished out of order."""
        return sum(len(window.offsets) for one in partitions if (window := self._windows.get(one)) is not None)

    def finished(self, partition: P) -> int | None:
        """The offset before which all records are finished; None for an unknown partition."""
        window = self._windows.get(partition)
        return None if window is None else window.next

    def suspend(self, partitions: Iterable[P]) -> None:
        """Start no more records of these partitions; running ones may finish and be committed."""
        self._suspended.update(partitions)
        self.epoch += 1

    def keep(self, assigned: Collection[P]) -> None:
        """Suspend the assigned partitions until `resume`; forget all others."""
        self._windows = {partition: window for partition, window in self._windows.items() if partition in assigned}
        self._suspended = set(assigned)
        self.epoch += 1

    def resume(self, recovered: Mapping[P, RecoveredOffsets]) -> None:
        """Continue with partitions after `keep`.

        If the committed offset of the group is below the one committed here (the log restarted, or the group was
        reset), the partition starts again from there, and its running records are not owned any more.
        """
        for partition, found in recovered.items():
            window = self._windows.get(partition)
            if window is None or found.commit.offset < window.committed.offset:
                window = self._windows[partition] = _Window(found.commit.offset, found.commit.since_ms)
            window.take_over(found)
            self._suspended.discard(partition)
        self.epoch += 1
