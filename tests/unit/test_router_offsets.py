"""Offsets: only what is finished without a gap may be committed, whatever order things happen in."""

import pytest

from services.router.offsets import SINCE_REFRESH_MS, Claim, Commit, OffsetTracker, Standing


@pytest.fixture
def tracker() -> OffsetTracker[str]:
    return OffsetTracker()


def begin(tracker: OffsetTracker[str], *offsets: int, partition: str = "p") -> dict[int, Claim[str]]:
    """Deliver offsets; the claims on those that are to be worked on."""
    found = {offset: _begin(tracker, partition, offset, epoch=tracker.epoch) for offset in offsets}
    return {offset: claim for offset, claim in found.items() if claim is not None}


def _begin(tracker: OffsetTracker[str], partition: str, offset: int, *, epoch: int) -> Claim[str] | None:
    return tracker.begin(partition, offset, epoch=epoch, timestamp_ms=-1, now_ms=0)


def rebalance(tracker: OffsetTracker[str], **floors: int) -> None:
    tracker.suspend(floors)
    tracker.keep(floors)
    tracker.resume({partition: Standing(Commit(floor, 0)) for partition, floor in floors.items()})


def committable(tracker: OffsetTracker[str], partitions: set[str] | None = None) -> dict[str, int]:
    return {partition: commit.offset for partition, commit in tracker.committable(partitions, now_ms=0).items()}


def test_a_finished_record_waits_for_all_before_it(tracker):
    claims = begin(tracker, 5, 6, 7)
    tracker.finish(claims[6])
    tracker.finish(claims[7])
    assert committable(tracker) == {}
    tracker.finish(claims[5])
    assert committable(tracker) == {"p": 8}
    tracker.note_committed(tracker.committable(now_ms=0))
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
    assert _begin(tracker, "p", 2, epoch=before) is None
    assert _begin(tracker, "p", 2, epoch=during) is None
    assert _begin(tracker, "p", 2, epoch=tracker.epoch) is not None


def test_the_records_of_a_topic_that_was_created_anew_are_not_taken_for_known_ones(tracker):
    old = begin(tracker, 7, 8)
    tracker.finish(old[7])
    tracker.note_committed(tracker.committable(now_ms=0))
    new = begin(tracker, 0, 1, 8)
    assert [claim.log_restarted for claim in new.values()] == [True, False, False]
    tracker.finish(old[8])
    assert committable(tracker) == {}
    tracker.finish(new[0])
    assert committable(tracker) == {"p": 1}


def test_nor_where_a_rebalance_tells_that_the_group_begins_anew(tracker):
    claims = begin(tracker, 7, 8)
    tracker.finish(claims[7])
    tracker.note_committed(tracker.committable(now_ms=0))
    rebalance(tracker, p=0)
    assert not tracker.wanted(claims[8])
    assert list(begin(tracker, 0, 1)) == [0, 1]


def test_what_the_earlier_owner_answered_is_not_begun(tracker):
    tracker.keep({"p"})
    tracker.resume({"p": Standing(Commit(5, 100), {6: 60, 7: 70})})
    begun = {
        offset: tracker.begin("p", offset, epoch=tracker.epoch, timestamp_ms=10 * offset, now_ms=0)
        for offset in (5, 6, 7)
    }
    assert [offset for offset, claim in begun.items() if claim is not None] == [5]
    tracker.finish(begun[5])
    assert committable(tracker) == {"p": 8}


def test_another_record_at_the_offset_of_an_answered_one_is_begun(tracker):
    tracker.keep({"p"})
    tracker.resume({"p": Standing(Commit(5, 100), {6: 60})})
    assert tracker.begin("p", 6, epoch=tracker.epoch, timestamp_ms=61, now_ms=0) is not None


def test_what_another_router_answered_meanwhile_is_not_wanted_any_more(tracker):
    claims = begin(tracker, 1, 2)
    tracker.suspend({"p"})
    tracker.keep({"p"})
    tracker.resume({"p": Standing(Commit(1, 0), {2: -1})})
    assert [offset for offset, claim in claims.items() if tracker.wanted(claim)] == [1]
    tracker.finish(claims[1])
    assert committable(tracker) == {"p": 3}


def test_a_commit_says_since_when_there_may_be_answers_beyond_it(tracker):
    first = tracker.begin("p", 1, epoch=0, timestamp_ms=-1, now_ms=1_000)
    second = tracker.begin("p", 2, epoch=0, timestamp_ms=-1, now_ms=2_000)
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
