"""The state machine of a partition: transitions, and the publish fence and offset tracker that follow them."""

from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.router.fencing import PublishFence
from services.router.offsets import Commit, RecoveredOffsets
from services.router.partitions import PUBLISHING, TRANSITIONS, PartitionEvent, Partitions, PartitionState
from tests.support.examples import examples

P, Q = TopicPartition("requests", 0), TopicPartition("requests", 1)
UNASSIGNED, RECOVERING, OPEN, CLOSING, CLOSED = PartitionState


def made() -> tuple[Partitions, PublishFence]:
    fence = PublishFence(session_timeout_s=10.0)
    return Partitions(fence), fence


def recover(partitions: Partitions, *which: TopicPartition) -> None:
    partitions.tracker.resume({one: RecoveredOffsets(Commit(0, 0)) for one in which})
    partitions.open(which)


def opened(*which: TopicPartition) -> tuple[Partitions, PublishFence]:
    partitions, fence = made()
    partitions.assign(which)
    recover(partitions, *which)
    return partitions, fence


def begin(partitions: Partitions, offset: int = 0, partition: TopicPartition = P) -> bool:
    record = SimpleNamespace(topic="requests", partition=partition.partition, offset=offset, timestamp=0)
    return partitions.begin(record, epoch=partitions.tracker.epoch, now_ms=0) is not None


def test_the_table_of_transitions():
    assert {event: moves for event, moves in TRANSITIONS.items() if event.name not in ("ASSIGNED", "LOST")} == {
        PartitionEvent.RECOVERED: {RECOVERING: OPEN},
        PartitionEvent.UNKNOWN_OUTCOME: {OPEN: RECOVERING, RECOVERING: RECOVERING},
        PartitionEvent.REVOKED: {OPEN: CLOSING, RECOVERING: CLOSED},
        PartitionEvent.FENCED: {RECOVERING: CLOSED, OPEN: CLOSED, CLOSING: CLOSED},
    }
    assert set(TRANSITIONS[PartitionEvent.ASSIGNED].values()) == {RECOVERING}
    assert set(TRANSITIONS[PartitionEvent.LOST].values()) == {UNASSIGNED}


def test_a_partition_from_assignment_to_revocation():
    partitions, fence = made()
    assert partitions.rebalancing
    partitions.assign([P])
    assert (partitions.state(P), partitions.recovering, partitions.rebalancing) == (RECOVERING, True, False)
    assert not begin(partitions)
    assert not fence.is_open(P)
    recover(partitions, P)
    assert partitions.state(P) is OPEN
    assert begin(partitions)
    assert fence.is_open(P)
    partitions.start_rebalance()
    assert partitions.revoke([P]) == [P]
    assert partitions.state(P) is CLOSING
    assert not begin(partitions, 1)
    assert fence.is_open(P)
    partitions.fence_off([P])
    assert partitions.state(P) is CLOSED
    assert not fence.is_open(P)
    partitions.assign([Q])
    assert (partitions.state(P), partitions.state(Q)) == (UNASSIGNED, RECOVERING)
    assert partitions.assigned == {Q}


def test_a_partition_revoked_before_recovery_is_closed_and_not_committed():
    partitions, fence = made()
    partitions.assign([P])
    assert partitions.revoke([P]) == []
    assert partitions.state(P) is CLOSED
    partitions.open([P])
    assert (partitions.state(P), fence.is_open(P)) == (CLOSED, False)


def test_an_unknown_outcome_recovers_every_partition():
    partitions, fence = opened(P, Q)
    epoch = partitions.tracker.epoch
    assert partitions.unknown_outcome() == {P, Q}
    assert {partitions.state(P), partitions.state(Q)} == {RECOVERING}
    assert not fence.is_open(P)
    assert partitions.tracker.epoch > epoch


@pytest.mark.parametrize("stopping", [False, True])
def test_an_unknown_outcome_while_partitions_are_given_back_closes_them(stopping):
    partitions, fence = opened(P)
    if stopping:
        partitions.shut_down()
    else:
        partitions.start_rebalance()
        partitions.revoke([P])
    assert partitions.state(P) is CLOSING
    assert partitions.unknown_outcome() == frozenset()
    assert (partitions.state(P), fence.is_open(P)) == (CLOSED, False)


def test_on_shutdown_requests_may_finish_and_be_committed_but_none_starts():
    partitions, fence = opened(P)
    claim = partitions.begin(
        SimpleNamespace(topic="requests", partition=0, offset=0, timestamp=0), epoch=partitions.tracker.epoch, now_ms=0
    )
    partitions.shut_down()
    assert fence.is_open(P)
    assert not begin(partitions, 1)
    assert claim is not None
    partitions.tracker.finish(claim)
    assert partitions.tracker.committable(now_ms=0)[P].offset == 1
    partitions.fence_off()
    assert partitions.state(P) is CLOSED


class AnyOrder(RuleBasedStateMachine):
    """All events in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.partitions, self.fence = made()
        self.offset = 0

    @rule(assigned=st.sets(st.sampled_from([P, Q])))
    def assign(self, assigned):
        self.partitions.assign(assigned)
        assert {one for one in (P, Q) if self.partitions.state(one) is RECOVERING} == assigned

    @precondition(lambda self: self.partitions.recovering)
    @rule()
    def recovered(self):
        recover(self.partitions, *(one for one in (P, Q) if self.partitions.state(one) is RECOVERING))

    @rule()
    def revoke(self):
        self.partitions.start_rebalance()
        before = {one for one in (P, Q) if self.partitions.state(one) in PUBLISHING}
        assert set(self.partitions.revoke(sorted(self.partitions.assigned))) == before

    @precondition(lambda self: self.partitions.rebalancing or self.partitions.stopping)
    @rule()
    def fence_off(self):
        self.partitions.fence_off()

    @rule()
    def unknown_outcome(self):
        for partition in self.partitions.unknown_outcome():
            assert self.partitions.state(partition) is RECOVERING

    @rule()
    def shut_down(self):
        self.partitions.shut_down()

    @invariant()
    def the_fence_is_open_in_publishing_states_only(self):
        for one in (P, Q):
            assert self.fence.is_open(one) is (self.partitions.state(one) in PUBLISHING)

    @invariant()
    def no_record_of_an_assigned_partition_starts_unless_it_is_open(self):
        for one in self.partitions.assigned:
            self.offset += 1
            if begin(self.partitions, self.offset, one):
                assert self.partitions.state(one) is OPEN
                assert not self.partitions.stopping


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=examples(100), stateful_step_count=30)
