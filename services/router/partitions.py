"""The life of a partition in one router, as a state machine; does no I/O.

| state        | new records | running requests                | publish fence | commits                         |
|--------------|-------------|---------------------------------|---------------|---------------------------------|
| `UNASSIGNED` | none        | cancelled                       | closed        | none; offsets are forgotten     |
| `RECOVERING` | paused      | continue, wait at the fence     | closed        | none                            |
| `OPEN`       | started     | continue                        | open          | at every commit interval        |
| `CLOSING`    | refused     | may finish in the grace period  | open          | at every interval on shutdown   |
| `CLOSED`     | refused     | continue, wait at the fence     | closed        | once, if it was open before     |

| event             | from                            | to           | cause                                         |
|-------------------|---------------------------------|--------------|-----------------------------------------------|
| `ASSIGNED`        | any                             | `RECOVERING` | a rebalance ended: the partition is here      |
| `LOST`            | any                             | `UNASSIGNED` | a rebalance ended: another router has it      |
| `RECOVERED`       | `RECOVERING`                    | `OPEN`       | all published responses are known             |
| `UNKNOWN_OUTCOME` | `OPEN`, `RECOVERING`            | `RECOVERING` | Kafka may have a response or not: read back   |
| `REVOKED`         | `OPEN`                          | `CLOSING`    | a rebalance starts, or the router shuts down  |
| `REVOKED`         | `RECOVERING`                    | `CLOSED`     | the same, before recovery was complete        |
| `FENCED`          | `RECOVERING`, `OPEN`, `CLOSING` | `CLOSED`     | the grace period ended; or an unknown outcome |
|                   |                                 |              | while the partition is being given back       |

An event changes nothing in a state that the table does not name. `services.router.consumer` reports the events and does
what the states require; `OffsetTracker` keeps the offsets, `PublishFence` holds back the responses. After processes
have died, `services.router.careful` delivers the first records of an `OPEN` partition one at a time; that is no state.
"""

from collections.abc import Collection, Mapping
from enum import Enum, auto
from types import MappingProxyType
from typing import Any, Final

from aiokafka import TopicPartition

from services.router.fencing import PublishFence
from services.router.offsets import Claim, OffsetTracker


class PartitionState(Enum):
    """See the first table of the module."""

    UNASSIGNED = auto()
    RECOVERING = auto()
    OPEN = auto()
    CLOSING = auto()
    CLOSED = auto()


class PartitionEvent(Enum):
    """See the second table of the module."""

    ASSIGNED = auto()
    LOST = auto()
    RECOVERED = auto()
    UNKNOWN_OUTCOME = auto()
    REVOKED = auto()
    FENCED = auto()


_S, _E = PartitionState, PartitionEvent

TRANSITIONS: Final[Mapping[PartitionEvent, Mapping[PartitionState, PartitionState]]] = MappingProxyType(
    {
        _E.ASSIGNED: dict.fromkeys(_S, _S.RECOVERING),
        _E.LOST: dict.fromkeys(_S, _S.UNASSIGNED),
        _E.RECOVERED: {_S.RECOVERING: _S.OPEN},
        _E.UNKNOWN_OUTCOME: {_S.OPEN: _S.RECOVERING, _S.RECOVERING: _S.RECOVERING},
        _E.REVOKED: {_S.OPEN: _S.CLOSING, _S.RECOVERING: _S.CLOSED},
        _E.FENCED: {_S.RECOVERING: _S.CLOSED, _S.OPEN: _S.CLOSED, _S.CLOSING: _S.CLOSED},
    }
)

PUBLISHING: Final = frozenset({PartitionState.OPEN, PartitionState.CLOSING})
"""States in which the publish fence is open."""


class Partitions:
    """The states of all partitions, and the offset tracker and publish fence that follow them.

    Attributes:
        tracker: offsets; the caller registers and finishes records, and commits.
        rebalancing: between the revocation and the assignment of partitions; also before the first assignment.
        stopping: the router shuts down.
    """

    def __init__(self, fence: PublishFence) -> None:
        self.tracker: OffsetTracker[TopicPartition] = OffsetTracker()
        self.rebalancing = True
        self.stopping = False
        self._fence = fence
        self._states: dict[TopicPartition, PartitionState] = {}

    def state(self, partition: TopicPartition) -> PartitionState:
        """The current state of a partition."""
        return self._states.get(partition, PartitionState.UNASSIGNED)

    @property
    def recovering(self) -> bool:
        """Whether a partition is being recovered."""
        return PartitionState.RECOVERING in self._states.values()

    @property
    def assigned(self) -> frozenset[TopicPartition]:
        """All partitions that are not `UNASSIGNED`."""
        return frozenset(self._states)

    def begin(self, record: Any, *, epoch: int, now_ms: int) -> Claim[TopicPartition] | None:  # noqa: ANN401
        """Register a delivered record; None if it is not to be processed. See `OffsetTracker.begin`."""
        partition = TopicPartition(record.topic, record.partition)
        if self.stopping or self.state(partition) is not PartitionState.OPEN:
            return None
        return self.tracker.begin(partition, record.offset, epoch=epoch, timestamp_ms=record.timestamp, now_ms=now_ms)

    def start_rebalance(self) -> None:
        """A rebalance starts; `revoke` follows when recovery has stopped."""
        self.rebalancing = True

    def assign(self, partitions: Collection[TopicPartition]) -> None:
        """A rebalance has ended with these partitions; all others are lost."""
        self.tracker.keep(partitions)
        self._apply(PartitionEvent.LOST, self.assigned.difference(partitions))
        self._apply(PartitionEvent.ASSIGNED, partitions)
        self.rebalancing = False

    def open(self, partitions: Collection[TopicPartition]) -> None:
        """Recovery is complete, and `tracker.resume` was called for these partitions."""
        self._apply(PartitionEvent.RECOVERED, partitions)

    def revoke(self, partitions: Collection[TopicPartition]) -> list[TopicPartition]:
        """Partitions are about to be given back.

        Returns:
            The partitions that have been open: only their progress may be committed. That of the others may be older
            than the commits of their last owner.
        """
        self.tracker.suspend(partitions)
        self._apply(PartitionEvent.REVOKED, partitions)
        return [partition for partition in partitions if self.state(partition) is PartitionState.CLOSING]

    def shut_down(self) -> None:
        """The router shuts down: start no record any more."""
        self.stopping = True
        self._apply(PartitionEvent.REVOKED, self.assigned)

    def fence_off(self, partitions: Collection[TopicPartition] | None = None) -> None:
        """Let no further response out; of all partitions if None."""
        self._apply(PartitionEvent.FENCED, self.assigned if partitions is None else partitions)

    def unknown_outcome(self) -> frozenset[TopicPartition]:
        """It is unknown whether Kafka has a response.

        Returns:
            The partitions to recover. None while partitions are being given back: recovery follows the next assignment.
        """
        if self.rebalancing or self.stopping:
            self.fence_off()
            return frozenset()
        self.tracker.suspend(self.assigned)
        self._apply(PartitionEvent.UNKNOWN_OUTCOME, self.assigned)
        return self.assigned

    def _apply(self, event: PartitionEvent, partitions: Collection[TopicPartition]) -> None:
        """The only place where states change; the fence follows."""
        moves = TRANSITIONS[event]
        for partition in partitions:
            state = moves.get(self.state(partition))
            if state is PartitionState.UNASSIGNED:
                self._states.pop(partition, None)
            elif state is not None:
                self._states[partition] = state
        publishing = [one for one in partitions if self.state(one) in PUBLISHING]
        self._fence.close([one for one in partitions if one not in publishing])
        self._fence.open(publishing)
