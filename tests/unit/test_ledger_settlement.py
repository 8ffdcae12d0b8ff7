"""Books are closed interval by interval: in however many steps, no joule is lost, moved or counted twice."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.ledger.attribution import Call
from services.ledger.metering import Reading
from services.ledger.settlement import EndpointBooks, OpenCall, Rules, SettledInterval, settle

RULES = Rules()


def call(name: str, started_s: float, finished_s: float, tokens: int = 10) -> Call:
    return Call(name, started_s, None, finished_s, 0, tokens)


class Book:
    """One endpoint's tables, kept in memory."""

    def __init__(self, readings: list[Reading], idle_w: float = 0.0) -> None:
        self.readings, self.idle_w = readings, idle_w
        self.until_s = readings[0].at_s
        self.intervals: dict[float, SettledInterval] = {}
        self.idle_j = self.metered_j = 0.0
        self.open: dict[str, OpenCall] = {}
        self.footprints: dict[str, float] = {}
        self.partial: set[str] = set()

    def learn(self, *calls: Call) -> None:
        for one in calls:
            if one.id not in self.footprints:
                self.open.setdefault(one.id, OpenCall(one))

    def settle(self, horizon_s: float) -> None:
        books = EndpointBooks(
            readings=[one for one in self.readings if self.until_s <= one.at_s <= horizon_s],
            calls=list(self.open.values()),
            settled=list(self.intervals.values()),
            metered_from_s=self.readings[0].at_s,
            idle_power_w=self.idle_w,
        )
        books = replace(books, calls=[c for c in books.calls if c.call.started_s <= books.readings[-1].at_s])
        result = settle(books, RULES)
        self.until_s = result.settled_until_s
        for one in result.intervals:
            self.intervals[one.interval.started_s] = SettledInterval(
                one.interval.started_s, one.interval.finished_s, one.attributed_j, one.unattributed_j
            )
            self.idle_j += one.idle_j
            self.metered_j += one.interval.metered_j
        for start_s, joules in result.taken_j:
            old = self.intervals[start_s]
            assert joules == pytest.approx(old.unattributed_j)
            self.intervals[start_s] = replace(old, attributed_j=old.attributed_j + joules, unattributed_j=0.0)
        for one in result.calls:
            opened = self.open[one.id]
            self.open[one.id] = OpenCall(opened.call, one.energy_j, accounted=True, partial=one.partial)
            if one.finished:
                del self.open[one.id]
                if one.metered:
                    self.footprints[one.id] = one.energy_j
                if one.partial:
                    self.partial.add(one.id)

    @property
    def booked_j(self) -> float:
        in_calls = (*self.footprints.values(), *(one.energy_j for one in self.open.values()))
        return math.fsum((*in_calls, self.idle_j, *(one.unattributed_j for one in self.intervals.values())))


READINGS = [Reading(s, {"g": 100.0 * s + 7 * (s // 3)}) for s in range(0, 101, 5)]
calls_drawn = st.lists(
    st.tuples(st.floats(-10, 110), st.floats(0, 40), st.integers(0, 50)).map(
        lambda drawn: (drawn[0], drawn[0] + drawn[1], drawn[2])
    ),
    max_size=8,
)


@settings(deadline=None)
@given(calls_drawn, st.lists(st.floats(0, 100), max_size=5), st.data())
def test_whenever_calls_come_and_books_are_closed_all_joules_are_in_them_once(drawn, horizons, data):
    book = Book(READINGS, idle_w=30)
    waiting = [call(f"c{n}", *one) for n, one in enumerate(drawn)]
    for horizon_s in sorted(horizons):
        known = data.draw(st.integers(0, len(waiting)))
        book.learn(*waiting[:known], *waiting[:known])
        waiting = waiting[known:]
        book.settle(horizon_s)
        assert book.booked_j == pytest.approx(book.metered_j, rel=1e-9, abs=1e-6)
    book.learn(*waiting)
    book.settle(100)
    book.settle(100)
    assert book.metered_j == pytest.approx(READINGS[-1].energy_j["g"])
    assert book.booked_j == pytest.approx(book.metered_j, rel=1e-9)
    assert set(book.open) == {f"c{n}" for n, (_, finished_s, _) in enumerate(drawn) if finished_s > 100}


@settings(deadline=None)
@given(calls_drawn, st.lists(st.floats(0, 100), max_size=5))
def test_calls_known_in_time_get_the_same_in_one_step_or_many(drawn, horizons):
    calls = [call(f"c{n}", *one) for n, one in enumerate(drawn)]
    once, often = Book(READINGS), Book(READINGS)
    for book in (once, often):
        book.learn(*calls)
    for horizon_s in sorted(horizons):
        often.settle(horizon_s)
    once.settle(100)
    often.settle(100)
    assert often.footprints == pytest.approx(once.footprints, rel=1e-9, abs=1e-9)


def test_a_late_call_takes_what_its_intervals_left():
    book = Book(READINGS)
    book.settle(50)
    book.learn(call("late", 12, 14))
    book.settle(50)
    assert book.footprints == pytest.approx({"late": READINGS[3].energy_j["g"] - READINGS[2].energy_j["g"]})
    assert book.partial == set()


def test_a_late_call_takes_nothing_from_others_and_is_known_to_be_short():
    book = Book(READINGS)
    book.learn(call("early", 11, 14))
    book.settle(50)
    before = dict(book.footprints)
    book.learn(call("late", 12, 14))
    book.settle(50)
    assert book.footprints == {**before, "late": 0.0}
    assert book.partial == {"late"}


def test_a_call_from_before_the_first_reading_is_short_or_has_no_footprint():
    book = Book(READINGS)
    book.learn(call("before", -9, -1), call("across", -5, 5))
    book.settle(20)
    assert set(book.footprints) == {"across"}
    assert "across" in book.partial
