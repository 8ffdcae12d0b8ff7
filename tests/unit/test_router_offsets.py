"""Offsets: only what is finished without a gap may be committed, whatever order things happen in."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.router.offsets import Claim, OffsetTracker


@pytest.fixture
def tracker() -> OffsetTracker[str]:
    return OffsetTracker()


def begin(tracker: OffsetTracker[str], *offsets: int, partition: str = "p") -> dict[int, Claim[str]]:
    """Deliver offsets; the claims on those that are to be worked on."""
    found = {offset: tracker.begin(partition, offset, epoch=tracker.epoch) for offset in offsets}
    return {offset: claim for offset, claim in found.items() if claim is not None}


def rebalance(tracker: OffsetTracker[str], **floors: int | None) -> set[str]:
    tracker.suspend(floors)
    return tracker.resume(floors)


def test_a_finished_record_waits_for_all_before_it(tracker):
    claims = begin(tracker, 5, 6, 7)
    tracker.finish(claims[6])
    tracker.finish(claims[7])
    assert tracker.committable() == {}
    tracker.finish(claims[5])
    assert tracker.committable() == {"p": 8}
    tracker.note_committed({"p": 8})
    assert tracker.committable() == {}


def test_gaps_between_offsets_are_no_obstacle(tracker):
    claims = begin(tracker, 5, 9, 20)
    tracker.finish(claims[5])
    assert tracker.committable() == {"p": 6}
    tracker.finish(claims[9])
    assert tracker.committable() == {"p": 10}


def test_partitions_do_not_wait_for_each_other(tracker):
    begin(tracker, 1, partition="p")
    tracker.finish(begin(tracker, 1, partition="q")[1])
    assert tracker.committable() == {"q": 2}


def test_a_record_that_is_delivered_again_is_begun_once(tracker):
    claims = begin(tracker, 1, 2, 3)
    tracker.finish(claims[1])
    tracker.finish(claims[3])
    assert rebalance(tracker, p=1) == set()
    assert list(begin(tracker, 1, 2, 3, 4)) == [4]
    assert tracker.committable() == {"p": 2}


def test_finishing_twice_means_nothing(tracker):
    claims = begin(tracker, 1, 2)
    tracker.finish(claims[1])
    tracker.finish(claims[1])
    assert tracker.committable() == {"p": 2}


def test_while_a_partition_is_taken_away_nothing_new_begins_and_what_finishes_can_be_committed(tracker):
    claims = begin(tracker, 1, 2)
    tracker.suspend({"p"})
    assert begin(tracker, 3) == {}
    tracker.finish(claims[1])
    assert tracker.committable() == {}
    assert tracker.committable({"p"}) == {"p": 2}


def test_a_partition_that_comes_back_goes_on_where_it_was(tracker):
    claims = begin(tracker, 1, 2, 3)
    tracker.finish(claims[3])
    assert rebalance(tracker, p=1, q=None) == set()
    assert list(begin(tracker, 1, 2, 3, 4)) == [4]
    tracker.finish(claims[1])
    tracker.finish(claims[2])
    assert tracker.committable() == {"p": 4}


def test_what_was_refused_during_a_rebalance_is_begun_after_it(tracker):
    begin(tracker, 1)
    tracker.suspend({"p"})
    assert begin(tracker, 2, 3) == {}
    tracker.resume({"p": 1})
    assert list(begin(tracker, 1, 2, 3)) == [2, 3]


def test_a_partition_that_went_elsewhere_is_forgotten(tracker):
    claims = begin(tracker, 1, 2)
    tracker.suspend({"p"})
    assert tracker.resume({"q": None}) == {"p"}
    tracker.finish(claims[1])
    assert tracker.committable() == {}
    assert list(begin(tracker, 1)) == [1]


def test_a_partition_whose_committed_offset_is_not_known_starts_afresh(tracker):
    claims = begin(tracker, 1, 2)
    assert rebalance(tracker, p=None) == {"p"}
    again = begin(tracker, 1, 2)
    assert list(again) == [1, 2]
    tracker.finish(claims[1])
    assert tracker.committable() == {}


def test_what_another_router_committed_meanwhile_is_never_committed_back(tracker):
    claims = begin(tracker, 1, 2, 3, 4)
    tracker.finish(claims[1])
    assert rebalance(tracker, p=4) == set()
    tracker.finish(claims[2])
    assert tracker.committable() == {}
    tracker.finish(claims[4])
    assert tracker.committable() == {"p": 5}


def test_a_record_fetched_before_a_rebalance_is_refused_after_it(tracker):
    before = tracker.epoch
    begin(tracker, 0)
    tracker.suspend({"p"})
    during = tracker.epoch
    tracker.resume({"p": 0})
    assert tracker.begin("p", 2, epoch=before) is None
    assert tracker.begin("p", 2, epoch=during) is None
    assert tracker.begin("p", 2, epoch=tracker.epoch) is not None


def test_the_records_of_a_topic_that_was_created_anew_are_not_taken_for_known_ones(tracker):
    old = begin(tracker, 7, 8)
    tracker.finish(old[7])
    tracker.note_committed(tracker.committable())
    new = begin(tracker, 0, 1, 8)
    assert [claim.log_restarted for claim in new.values()] == [True, False, False]
    tracker.finish(old[8])
    assert tracker.committable() == {}
    tracker.finish(new[0])
    assert tracker.committable() == {"p": 1}


def test_nor_where_a_rebalance_tells_that_the_group_begins_anew(tracker):
    claims = begin(tracker, 7, 8)
    tracker.finish(claims[7])
    tracker.note_committed(tracker.committable())
    assert rebalance(tracker, p=0) == {"p"}
    assert list(begin(tracker, 0, 1)) == [0, 1]


class Consumer(RuleBasedStateMachine):
    """One partition of a real group: fetched, worked on, rebalanced, committed, crashed, in any order.

    The log is what a broker has: records, and offsets between them that no record ever bears. Whoever owns the
    partition is delivered its records in order, after an assignment from the committed offset on.
    """

    @initialize(log=st.sets(st.integers(0, 60), min_size=20))
    def start(self, log):
        self.tracker: OffsetTracker[str] = OffsetTracker()
        self.log = sorted(log)
        self.position = self.committed = 0
        self.running: dict[int, Claim[str]] = {}
        self.done: set[int] = set()
        self.assigned = True

    @rule(count=st.integers(1, 5))
    def fetch(self, count):
        if not self.assigned:
            return
        for offset in [one for one in self.log if one >= self.position][:count]:
            claim = self.tracker.begin("p", offset, epoch=self.tracker.epoch)
            if claim is not None:
                assert offset not in self.running
                self.running[offset] = claim
            else:
                assert offset in self.running or offset in self.done
            self.position = offset + 1

    @rule(data=st.data())
    def finish(self, data):
        if self.running:
            offset = data.draw(st.sampled_from(sorted(self.running)))
            self.tracker.finish(self.running.pop(offset))
            self.done.add(offset)

    @rule(fails=st.booleans())
    def commit(self, fails):
        self._commit(self.tracker.committable(), fails=fails)

    @rule(fails=st.booleans())
    def revoke(self, fails):
        if self.assigned:
            self.assigned = False
            self.tracker.suspend({"p"})
            self._commit(self.tracker.committable({"p"}), fails=fails)

    @rule(other_did=st.integers(0, 4), back=st.booleans(), known=st.booleans())
    def assign(self, other_did, back, known):
        if self.assigned:
            return
        for offset in [one for one in self.log if one >= self.committed][:other_did]:
            self.done.add(offset)
            self.committed = offset + 1
        lost = self.tracker.resume({"p": self.committed if known else None} if back else {})
        self.assigned = back
        self.position = self.committed
        if lost:
            self.running.clear()

    @rule()
    def crash(self):
        self.tracker = OffsetTracker()
        self.running.clear()
        self.position = self.committed
        self.assigned = True

    @invariant()
    def everything_committed_is_done(self):
        assert self.done.issuperset(one for one in self.log if one < self.committed)

    @invariant()
    def what_may_be_committed_is_done_and_ahead_of_what_was(self):
        for offset in self.tracker.committable().values():
            assert offset > self.committed
            assert self.done.issuperset(one for one in self.log if one < offset)

    def _commit(self, offsets, *, fails):
        if offsets and not fails:
            self.committed = offsets["p"]
            self.tracker.note_committed(offsets)


TestConsumer = Consumer.TestCase
TestConsumer.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
