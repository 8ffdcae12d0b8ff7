"""The offset tracker: only the finished prefix of a partition may be committed."""

import pytest

from services.router.offsets import SINCE_REFRESH_MS, Claim, Commit, OffsetTracker, RecoveredOffsets


@pytest.fixture
def tracker() -> OffsetTracker[str]:
    return OffsetTracker()


def begin(tracker: OffsetTracker[str], *offsets: int, partition: str = "p") -> dict[int, Claim[str]]:
    """Deliver offsets; returns the claims of those that are to be processed."""
    found = {offset: _begin(tracker, partition, offset, epoch=tracker.epoch) for offset in offsets}
    return {offset: claim for offset, claim in found.items() if claim is not None}


def _begin(tracker: OffsetTracker[str], partition: str, offset: int, *, epoch: int) -> Claim[str] | None:
    return tracker.begin(partition, offset, epoch=epoch, timestamp_ms=-1, now_ms=0)


def rebalance(tracker: OffsetTracker[str], **floors: int) -> None:
    tracker.suspend(floors)
    tracker.keep(floors)
    tracker.resume({partition: RecoveredOffsets(Commit(floor, 0)) for partition, floor in floors.items()})


def committable(tracker: OffsetTracker[str], partitions: set[str] | None = None) -> dict[str, int]:
    return {partition: commit.offset for partition, commit in tracker.committable(partitions, now_ms=0).items()}


def test_a_finished_record_waits_for_all_earlier_ones(tracker):
    claims = begin(tracker, 5, 6, 7)
    tracker.finish(claims[6])
    tracker.finish(claims[7])
    assert committable(tracker) == {}
    tracker.finish(claims[5])
    assert committable(tracker) == {"p": 8}
    tracker.note_committed(tracker.committable(now_ms=0))
    assert committable(tracker) == {}


def test_gaps_between_offsets_are_skipped(tracker):
    claims = begin(tracker, 5, 9, 20)
    tracker.finish(claims[5])
    assert committable(tracker) == {"p": 6}
    tracker.finish(claims[9])
    assert committable(tracker) == {"p": 10}


def test_partitions_are_independent(tracker):
    begin(tracker, 1, partition="p")
    tracker.finish(begin(tracker, 1, partition="q")[1])
    assert committable(tracker) == {"q": 2}


def test_a_redelivered_record_is_started_once(tracker):
    claims = begin(tracker, 1, 2, 3)
    tracker.finish(claims[1])
    tracker.finish(claims[3])
    rebalance(tracker, p=1)
    assert list(begin(tracker, 1, 2, 3, 4)) == [4]
    assert committable(tracker) == {"p": 2}


def test_finishing_twice_has_no_effect(tracker):
    claims = begin(tracker, 1, 2)
    tracker.finish(claims[1])
    tracker.finish(claims[1])
    assert committable(tracker) == {"p": 2}


def test_a_suspended_partition_starts_no_records_and_commits_finished_ones(tracker):
    claims = begin(tracker, 1, 2)
    tracker.suspend({"p"})
    assert begin(tracker, 3) == {}
    tracker.finish(claims[1])
    assert committable(tracker) == {}
    assert committable(tracker, {"p"}) == {"p": 2}


def test_a_partition_assigned_again_continues(tracker):
    claims = begin(tracker, 1, 2, 3)
    tracker.finish(claims[3])
    rebalance(tracker, p=1, q=0)
    assert all(tracker.still_owned(claims[offset]) for offset in (1, 2))
    assert list(begin(tracker, 1, 2, 3, 4)) == [4]
    tracker.finish(claims[1])
    tracker.finish(claims[2])
    assert committable(tracker) == {"p": 4}


def test_records_refused_during_a_rebalance_are_started_after_it(tracker):
    begin(tracker, 1)
    tracker.suspend({"p"})
    assert begin(tracker, 2, 3) == {}
    tracker.keep({"p"})
    assert begin(tracker, 2, 3) == {}
    tracker.resume({"p": RecoveredOffsets(Commit(1, 0))})
    assert list(begin(tracker, 1, 2, 3)) == [2, 3]


def test_a_lost_partition_is_forgotten(tracker):
    claims = begin(tracker, 1, 2)
    tracker.suspend({"p"})
    tracker.keep({"q"})
    assert not tracker.still_owned(claims[1])
    tracker.finish(claims[1])
    assert committable(tracker) == {}
    assert list(begin(tracker, 1)) == [1]


def test_a_commit_of_another_router_is_never_undone(tracker):
    claims = begin(tracker, 1, 2, 3, 4)
    tracker.finish(claims[1])
    rebalance(tracker, p=4)
    assert [offset for offset, claim in claims.items() if tracker.still_owned(claim)] == [4]
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
    tracker.resume({"p": RecoveredOffsets(Commit(0, 0))})
    assert _begin(tracker, "p", 2, epoch=before) is None
    assert _begin(tracker, "p", 2, epoch=during) is None
    assert _begin(tracker, "p", 2, epoch=tracker.epoch) is not None


def test_records_of_a_recreated_topic_are_new_records(tracker):
    old = begin(tracker, 7, 8)
    tracker.finish(old[7])
    tracker.note_committed(tracker.committable(now_ms=0))
    new = begin(tracker, 0, 1, 8)
    assert [claim.log_restarted for claim in new.values()] == [True, False, False]
    tracker.finish(old[8])
    assert committable(tracker) == {}
    tracker.finish(new[0])
    assert committable(tracker) == {"p": 1}


def test_records_are_new_if_the_group_was_reset(tracker):
    claims = begin(tracker, 7, 8)
    tracker.finish(claims[7])
    tracker.note_committed(tracker.committable(now_ms=0))
    rebalance(tracker, p=0)
    assert not tracker.still_owned(claims[8])
    assert list(begin(tracker, 0, 1)) == [0, 1]


def test_records_answered_by_an_earlier_owner_are_not_started(tracker):
    tracker.keep({"p"})
    tracker.resume({"p": RecoveredOffsets(Commit(5, 100), {6: 60, 7: 70})})
    begun = {
        offset: tracker.begin("p", offset, epoch=tracker.epoch, timestamp_ms=10 * offset, now_ms=0)
        for offset in (5, 6, 7)
    }
    assert [offset for offset, claim in begun.items() if claim is not None] == [5]
    tracker.finish(begun[5])
    assert committable(tracker) == {"p": 8}


def test_another_record_with_the_offset_of_an_answered_one_is_started(tracker):
    tracker.keep({"p"})
    tracker.resume({"p": RecoveredOffsets(Commit(5, 100), {6: 60})})
    assert tracker.begin("p", 6, epoch=tracker.epoch, timestamp_ms=61, now_ms=0) is not None


def test_a_running_record_answered_by_another_router_is_no_longer_owned(tracker):
    claims = begin(tracker, 1, 2)
    tracker.suspend({"p"})
    tracker.keep({"p"})
    tracker.resume({"p": RecoveredOffsets(Commit(1, 0), {2: -1})})
    assert [offset for offset, claim in claims.items() if tracker.still_owned(claim)] == [1]
    tracker.finish(claims[1])
    assert committable(tracker) == {"p": 3}


def test_a_commit_has_the_earliest_start_of_the_records_beyond_it(tracker):
    claims = begin(tracker, 1, 2, 3, 4)
    assert tracker.committable(now_ms=500, everything=True) == {"p": Commit(1, 500)}  # all wait: there are no responses
    for offset, now_ms in ((3, 1_000), (1, 2_000), (2, 3_000)):
        tracker.start(claims[offset], now_ms=now_ms)
    assert tracker.committable(now_ms=9_000, everything=True) == {"p": Commit(1, 1_000)}
    tracker.finish(claims[3])
    tracker.finish(claims[1])
    assert tracker.committable(now_ms=9_000) == {"p": Commit(2, 1_000)}
    tracker.finish(claims[2])
    assert tracker.committable(now_ms=9_000) == {"p": Commit(4, 9_000)}


def test_a_commit_keeps_the_time_of_the_earlier_owner_while_its_responses_are_beyond(tracker):
    tracker.keep({"p"})
    tracker.resume({"p": RecoveredOffsets(Commit(5, 100), {7: 70})})
    claims = {offset: tracker.begin("p", offset, epoch=tracker.epoch, timestamp_ms=10 * offset, now_ms=0)
              for offset in (5, 6, 7, 8)}  # fmt: skip
    for offset in (5, 6, 8):
        tracker.start(claims[offset], now_ms=5_000)
    tracker.finish(claims[5])
    assert tracker.committable(now_ms=9_000) == {"p": Commit(6, 100)}
    tracker.finish(claims[6])
    assert tracker.committable(now_ms=9_000) == {"p": Commit(8, 5_000)}


def test_records_that_are_unfinished_or_finished_out_of_order_are_counted(tracker):
    claims = begin(tracker, 1, 2, 3) | begin(tracker, 1, 2, partition="q")
    assert tracker.tracked(["p", "q", "unknown"]) == 5
    tracker.finish(claims[3])
    assert tracker.tracked(["p"]) == 3


def test_an_idle_partition_is_committed_from_time_to_time(tracker):
    tracker.keep({"p"})
    tracker.resume({"p": RecoveredOffsets(Commit(5, 100))})
    assert tracker.committable(now_ms=100 + SINCE_REFRESH_MS) == {}
    assert tracker.committable(now_ms=101 + SINCE_REFRESH_MS) == {"p": Commit(5, 101 + SINCE_REFRESH_MS)}
