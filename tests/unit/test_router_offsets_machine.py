"""The offset tracker under any order of events: no unfinished record is committed, no record is answered twice."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.router.offsets import Claim, Commit, OffsetTracker, RecoveredOffsets
from tests.support.examples import examples


class Consumer(RuleBasedStateMachine):
    """One partition of a real group: fetch, start, process, rebalance, commit, crash, in any order.

    The log has records and gaps between their offsets. The owner of the partition is delivered its records in order,
    from the committed offset on after an assignment, and starts them in any order. Every response has a time; the next
    owner finds exactly those that are not older than the time of the commit.
    """

    @initialize(log=st.sets(st.integers(0, 60), min_size=20))
    def start(self, log):
        self.tracker: OffsetTracker[str] = OffsetTracker()
        self.log = sorted(log)
        self.position = 0
        self.now = 1
        self.committed = Commit(0, 0)
        self.waiting: dict[int, Claim[str]] = {}
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
                assert offset not in self.waiting.keys() | self.running.keys()
                assert offset not in self.answers, "answered twice"
                self.waiting[offset] = claim
            else:
                assert offset in self.waiting.keys() | self.running.keys() | self.answers.keys()
            self.position = offset + 1

    @rule(data=st.data())
    def start_one(self, data):
        if self.waiting:
            offset = data.draw(st.sampled_from(sorted(self.waiting)))
            self.now += 1
            self.tracker.start(self.waiting[offset], now_ms=self.now)
            self.running[offset] = self.waiting.pop(offset)

    @rule(data=st.data(), dies=st.booleans())
    def answer(self, data, dies):
        if not self.running:
            return
        offset = data.draw(st.sampled_from(sorted(self.running)))
        self.now += 1
        self.answers[offset] = self.now
        if dies:  # between publishing the response and noting it
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

    @rule(other_answered=st.sets(st.integers(0, 4)), other_committed=st.booleans(), back=st.booleans())
    def assign(self, other_answered, other_committed, back):
        if self.assigned:
            return
        ahead = [one for one in self.log if one >= self.committed.offset and one not in self.answers]
        for place in sorted(other_answered & set(range(len(ahead)))):
            self.now += 1
            self.answers[ahead[place]] = self.now
        if other_committed and (left := [one for one in self.log if one not in self.answers]):
            since = min(self.committed.since_ms, self.now) if left[0] < max(self.answers, default=-1) else self.now
            self.committed = Commit(max(self.committed.offset, left[0]), since)
        self.tracker.keep({"p"} if back else set())
        if back:
            self._resume()
        self._drop_lost()

    @rule()
    def crash(self):
        self.waiting.clear()
        self.running.clear()
        self.tracker = OffsetTracker()
        self.tracker.keep({"p"})
        self._resume()

    @invariant()
    def every_committed_record_is_answered(self):
        assert self.answers.keys() >= {one for one in self.log if one < self.committed.offset}

    @invariant()
    def every_committable_record_is_answered_and_responses_beyond_are_not_older_than_its_time(self):
        for commit in self.tracker.committable(now_ms=self.now, everything=True).values():
            assert self.answers.keys() >= {one for one in self.log if one < commit.offset}
            assert all(at >= commit.since_ms for offset, at in self.answers.items() if offset >= commit.offset)

    def _resume(self):
        found = {
            offset: offset
            for offset, at in self.answers.items()
            if offset >= self.committed.offset and at >= self.committed.since_ms
        }
        self.tracker.resume({"p": RecoveredOffsets(self.committed, found)})
        self.assigned = True
        self.position = self.committed.offset

    def _drop_lost(self):
        for claims in (self.waiting, self.running):
            for offset in [offset for offset, claim in claims.items() if not self.tracker.still_owned(claim)]:
                del claims[offset]

    def _commit(self, commits, *, fails):
        if commits and not fails:
            self.committed = commits["p"]
            self.tracker.note_committed(commits)


TestConsumer = Consumer.TestCase
TestConsumer.settings = settings(max_examples=examples(120), stateful_step_count=50)
