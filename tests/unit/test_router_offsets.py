"""Offsets: only what is finished without a gap may be committed, whatever order things happen in."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.router.offsets import SINCE_REFRESH_MS, Claim, Commit, OffsetTracker, Standing


@pytest.fixture
def tracker() -> OffsetTracker[str]:
    return OffsetTracker()


def begin(tracker: OffsetTracker[str], *offsets: int, partition: str = "p") -> dict[int, Claim[str]]:
    """Deliver offsets; the claims on those that are to be worked on."""
    found = {offset: tracker.begin(partition, offset, epoch=tracker.epoch) for offset in offsets}
    return {offset: claim for offset, claim in found.items() if claim is not None}


def rebalance(tracker: OffsetTracker[str], **floors: int) -> None:
    tracker.suspend(floors)
    tracker.keep(floors)
    tracker.resume({partition: Standing(Commit(floor, 0)) for partition, floor in floors.items()})


def committable(tracker: OffsetTracker[str], partitions: set[str] | None = None) -> dict[str, int]:
    return {partition: commit.offset for partition, commit in tracker.committable(partitions).items()}


def test_a_finished_record_waits_for_all_before_it(tracker):
    claims = begin(tracker, 5, 6, 7)
    tracker.finish(claims[6])
    tracker.finish(claims[7])
    assert committable(tracker) == {}
    tracker.finish(claims[5])
    assert committable(tracker) == {"p": 8}
    tracker.note_committed(tracker.committable())
    assert committable(tracker) == {}


def test_gaps_between_offsets_are_no_obstacle(tracker):
    claims = begin(tracker, 5, 9, 20)
    tracker.finish(claims[5])
    assert committable(tracker) == {"p": 6}
    tracker.finish(claims[9])
    assert committable(tracker) == {"p": 10}


def test_partitions_do_not_wait_for_each_other(tracker):
    begin(tracker, 1, partition="p")
    tracker.finish(begin(tracker, 1, partition="q")[1])
    assert committable(tracker) == {"q": 2}


def test_a_record_that_is_delivered_again_is_begun_once(tracker):
    claims = begin(tracker, 1, 2, 3)
    tracker.finish(claims[1])
    tracker.finish(claims[3])
    rebalance(tracker, p=1)
    assert list(begin(tracker, 1, 2, 3, 4)) == [4]
    assert committable(tracker) == {"p": 2}


def test_finishing_twice_means_nothing(tracker):
    claims = begin(tracker, 1, 2)
    tracker.finish(claims[1])
    tracker.finish(claims[1])
    assert committable(tracker) == {"p": 2}


def test_while_a_partition_is_taken_away_nothing_new_begins_and_what_finishes_can_be_committed(tracker):
    claims = begin(tracker, 1, 2)
    tracker.suspend({"p"})
    assert begin(tracker, 3) == {}
    tracker.finish(claims[1])
    assert committable(tracker) == {}
    assert committable(tracker, {"p"}) == {"p": 2}


def test_a_partition_that_comes_back_goes_on_where_it_was(tracker):
    claims = begin(tracker, 1, 2, 3)
    tracker.finish(claims[3])
    rebalance(tracker, p=1, q=0)
    assert all(tracker.wanted(claims[offset]) for offset in (1, 2))
    assert list(begin(tracker, 1, 2, 3, 4)) == [4]
    tracker.finish(claims[1])
    tracker.finish(claims[2])
    assert committable(tracker) == {"p": 4}


def test_what_was_refused_during_a_rebalance_is_begun_after_it(tracker):
    begin(tracker, 1)
    tracker.suspend({"p"})
    assert begin(tracker, 2, 3) == {}
    tracker.keep({"p"})
    assert begin(tracker, 2, 3) == {}
    tracker.resume({"p": Standing(Commit(1, 0))})
    assert list(begin(tracker, 1, 2, 3)) == [2, 3]


def test_a_partition_that_went_elsewhere_is_forgotten(tracker):
    claims = begin(tracker, 1, 2)
    tracker.suspend({"p"})
    tracker.keep({"q"})
    assert not tracker.wanted(claims[1])
    tracker.finish(claims[1])
    assert committable(tracker) == {}
    assert list(begin(tracker, 1)) == [1]


def test_what_another_router_committed_meanwhile_is_never_committed_back(tracker):
    claims = begin(tracker, 1, 2, 3, 4)
    tracker.finish(claims[1])
    rebalance(tracker, p=4)
    assert [offset for offset, claim in claims.items() if tracker.wanted(claim)] == [4]
    tracker.finish(claims[2])
    assert committable(tracker) == {}
    tracker.finish(claims[4])
    assert committable(tracker) == {"p": 5}


def test_a_record_fetched_before_a_rebalance_is_refused_after_it(tracker):
    before = tracker.epoch
    begin(tracker, 0)
    tracker.suspend({"p"})
    during = tracker.epoch
    tracker.keep({"p"})
    tracker.resume({"p": Standing(Commit(0, 0))})
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
    assert committable(tracker) == {}
    tracker.finish(new[0])
    assert committable(tracker) == {"p": 1}


def test_nor_where_a_rebalance_tells_that_the_group_begins_anew(tracker):
    claims = begin(tracker, 7, 8)
    tracker.finish(claims[7])
    tracker.note_committed(tracker.committable())
    rebalance(tracker, p=0)
    assert not tracker.wanted(claims[8])
    assert list(begin(tracker, 0, 1)) == [0, 1]


def test_what_the_earlier_owner_answered_is_not_begun(tracker):
    tracker.keep({"p"})
    tracker.resume({"p": Standing(Commit(5, 100), {6: 60, 7: 70})})
    begun = {offset: tracker.begin("p", offset, epoch=tracker.epoch, timestamp_ms=10 * offset) for offset in (5, 6, 7)}
    assert [offset for offset, claim in begun.items() if claim is not None] == [5]
    tracker.finish(begun[5])
    assert committable(tracker) == {"p": 8}


def test_another_record_at_the_offset_of_an_answered_one_is_begun(tracker):
    tracker.keep({"p"})
    tracker.resume({"p": Standing(Commit(5, 100), {6: 60})})
    assert tracker.begin("p", 6, epoch=tracker.epoch, timestamp_ms=61) is not None


def test_what_another_router_answered_meanwhile_is_not_wanted_any_more(tracker):
    claims = begin(tracker, 1, 2)
    tracker.suspend({"p"})
    tracker.keep({"p"})
    tracker.resume({"p": Standing(Commit(1, 0), {2: -1})})
    assert [offset for offset, claim in claims.items() if tracker.wanted(claim)] == [1]
    tracker.finish(claims[1])
    assert committable(tracker) == {"p": 3}


def test_a_commit_says_since_when_there_may_be_answers_beyond_it(tracker):
    first = tracker.begin("p", 1, epoch=0, now_ms=1_000)
    second = tracker.begin("p", 2, epoch=0, now_ms=2_000)
    assert first is not None
    assert second is not None
    assert tracker.committable(now_ms=9_000, everything=True) == {"p": Commit(1, 1_000)}
    tracker.finish(first)
    assert tracker.committable(now_ms=9_000) == {"p": Commit(2, 2_000)}
    tracker.finish(second)
    assert tracker.committable(now_ms=9_000) == {"p": Commit(3, 9_000)}


def test_it_keeps_the_time_of_the_owner_before_while_there_are_answers_of_that_one_ahead(tracker):
    tracker.keep({"p"})
    tracker.resume({"p": Standing(Commit(5, 100), {7: 70})})
    claims = {offset: tracker.begin("p", offset, epoch=tracker.epoch, timestamp_ms=10 * offset, now_ms=5_000)
              for offset in (5, 6, 7, 8)}  # fmt: skip
    tracker.finish(claims[5])
    assert tracker.committable(now_ms=9_000) == {"p": Commit(6, 100)}
    tracker.finish(claims[6])
    assert tracker.committable(now_ms=9_000) == {"p": Commit(8, 5_000)}


def test_a_partition_where_nothing_happens_is_committed_now_and_then(tracker):
    tracker.keep({"p"})
    tracker.resume({"p": Standing(Commit(5, 100))})
    assert tracker.committable(now_ms=100 + SINCE_REFRESH_MS) == {}
    assert tracker.committable(now_ms=101 + SINCE_REFRESH_MS) == {"p": Commit(5, 101 + SINCE_REFRESH_MS)}


class Consumer(RuleBasedStateMachine):
    """One partition of a real group: fetched, worked on, rebalanced, committed, crashed, in any order.

    The log is what a broker has: records, and offsets between them that no record ever bears. Whoever owns the
    partition is delivered its records in order, after an assignment from the committed offset on. Every answer has a
    time; the next owner finds those that are not older than the commit says, and only those.
    """

    @initialize(log=st.sets(st.integers(0, 60), min_size=20))
    def start(self, log):
        self.tracker: OffsetTracker[str] = OffsetTracker()
        self.log = sorted(log)
        self.position = 0
        self.now = 1
        self.committed = Commit(0, 0)
        self.running: dict[int, Claim[str]] = {}
        self.answers: dict[int, int] = {}
        self.assigned = False
        self.tracker.keep({"p"})
        self._resume()

    @rule(count=st.integers(1, 5))
    def fetch(self, count):
        if not self.assigned:
            return
        for offset in [one for one in self.log if one >= self.position][:count]:
            self.now += 1
            claim = self.tracker.begin("p", offset, epoch=self.tracker.epoch, timestamp_ms=offset, now_ms=self.now)
            if claim is not None:
                assert offset not in self.running
                assert offset not in self.answers, "answered twice"
                self.running[offset] = claim
            else:
                assert offset in self.running or offset in self.answers
            self.position = offset + 1

    @rule(data=st.data(), dies=st.booleans())
    def answer(self, data, dies):
        if not self.running:
            return
        offset = data.draw(st.sampled_from(sorted(self.running)))
        self.now += 1
        self.answers[offset] = self.now
        if dies:  # between the answer and its being noted
            self.crash()
        else:
            self.tracker.finish(self.running.pop(offset))

    @rule(fails=st.booleans(), everything=st.booleans())
    def commit(self, fails, everything):
        self.now += 1
        self._commit(self.tracker.committable(now_ms=self.now, everything=everything), fails=fails)

    @rule(fails=st.booleans())
    def revoke(self, fails):
        if self.assigned:
            self.assigned = False
            self.tracker.suspend({"p"})
            self._commit(self.tracker.committable({"p"}, now_ms=self.now), fails=fails)

    @rule(other_did=st.sets(st.integers(0, 4)), other_committed=st.booleans(), back=st.booleans())
    def assign(self, other_did, other_committed, back):
        if self.assigned:
            return
        ahead = [one for one in self.log if one >= self.committed.offset and one not in self.answers]
        for place in sorted(other_did & set(range(len(ahead)))):
            self.now += 1
            self.answers[ahead[place]] = self.now
        if other_committed and (left := [one for one in self.log if one not in self.answers]):
            since = min(self.committed.since_ms, self.now) if left[0] < max(self.answers, default=-1) else self.now
            self.committed = Commit(max(self.committed.offset, left[0]), since)
        self.tracker.keep({"p"} if back else set())
        if back:
            self._resume()
        self._drop_unwanted()

    @rule()
    def crash(self):
        self.running.clear()
        self.tracker = OffsetTracker()
        self.tracker.keep({"p"})
        self._resume()

    @invariant()
    def everything_committed_is_done(self):
        assert self.answers.keys() >= {one for one in self.log if one < self.committed.offset}

    @invariant()
    def what_may_be_committed_is_done_and_no_answer_beyond_it_is_older_than_it_says(self):
        for commit in self.tracker.committable(now_ms=self.now, everything=True).values():
            assert self.answers.keys() >= {one for one in self.log if one < commit.offset}
            assert all(at >= commit.since_ms for offset, at in self.answers.items() if offset >= commit.offset)

    def _resume(self):
        found = {
            offset: offset
            for offset, at in self.answers.items()
            if offset >= self.committed.offset and at >= self.committed.since_ms
        }
        self.tracker.resume({"p": Standing(self.committed, found)})
        self.assigned = True
        self.position = self.committed.offset

    def _drop_unwanted(self):
        self.running = {offset: claim for offset, claim in self.running.items() if self.tracker.wanted(claim)}

    def _commit(self, commits, *, fails):
        if commits and not fails:
            self.committed = commits["p"]
            self.tracker.note_committed(commits)


TestConsumer = Consumer.TestCase
TestConsumer.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
