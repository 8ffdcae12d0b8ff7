"""Intervals are settled once: in however many steps, no joule is lost, moved or counted twice."""

import math
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from services.ledger.attribution import Call
from services.ledger.curve import CurveState
from services.ledger.earlier import EarlierVersions
from services.ledger.endpoint import EndpointState, OpenCall, SettledInterval, settle_endpoint
from services.ledger.loop import AttributionLoop
from services.ledger.meters import Reading
from services.ledger.metrics import LedgerMetrics
from services.ledger.outbox import CurvePublisher, FootprintOutbox
from services.ledger.reports import AwakeEndpoints
from services.ledger.settings import LedgerSettings
from services.ledger.settlement import IntervalSettlement
from services.ledger.sql import Storage
from shared.fleet import Directive, Fleet, Model
from shared.pools import Endpoint, Pool
from shared.runtime.clock import Clock

SETTINGS = LedgerSettings()


def call(name: str, started_s: float, finished_s: float, tokens: int = 10) -> Call:
    return Call(name, started_s, None, finished_s, 0, tokens)


class EndpointTables:
    """One endpoint's tables, in memory."""

    def __init__(self, readings: list[Reading], idle_w: float = 0.0, *, still_after_s: float = math.inf) -> None:
        self.readings, self.idle_w, self.still_after_s = readings, idle_w, still_after_s
        self.until_s = readings[0].at_s
        self.intervals: dict[float, SettledInterval] = {}
        self.idle_j = self.metered_j = 0.0
        self.curve = CurveState()
        self.server_s: dict[str, float] = {}
        self.open: dict[str, OpenCall] = {}
        self.footprints: dict[str, float] = {}
        self.partial: set[str] = set()

    def add(self, *calls: Call) -> None:
        for one in calls:
            if one.id not in self.footprints:
                self.open.setdefault(one.id, OpenCall(one))

    def settle(self, watermark_s: float) -> None:
        state = EndpointState(
            readings=[one for one in self.readings if self.until_s <= one.at_s <= watermark_s],
            calls=list(self.open.values()),
            settled=list(self.intervals.values()),
            metered_from_s=self.readings[0].at_s,
            idle_power_w=self.idle_w,
            curve=self.curve,
            still_after_s=self.still_after_s,
        )
        state = replace(state, calls=[c for c in state.calls if c.call.started_s <= state.readings[-1].at_s])
        result = settle_endpoint(state, SETTINGS)
        self.until_s, self.curve = result.settled_until_s, result.curve
        for one in result.intervals:
            self.intervals[one.interval.started_s] = SettledInterval(
                one.interval.started_s,
                one.interval.finished_s,
                one.attributed_j,
                one.unattributed_j,
                one.idle_s,
                one.interval.restarted or one.interval.started_s in result.stalled,
            )
            self.idle_j += one.idle_j
            self.metered_j += one.interval.metered_j
        for start_s, joules in result.reallocated_j:
            old = self.intervals[start_s]
            assert joules == pytest.approx(old.unattributed_j)
            self.intervals[start_s] = replace(old, attributed_j=old.attributed_j + joules, unattributed_j=0.0)
        for start_s, seconds in result.reallocated_s:
            self.intervals[start_s] = replace(self.intervals[start_s], idle_s=self.intervals[start_s].idle_s - seconds)
        for one in result.calls:
            opened = self.open[one.id]
            self.open[one.id] = OpenCall(opened.call, one.used, accounted=True, partial=one.partial)
            self.server_s[one.id] = one.server_s
            if one.finished:
                del self.open[one.id]
                if one.metered:
                    self.footprints[one.id] = one.energy_j
                if one.partial:
                    self.partial.add(one.id)

    @property
    def accounted_j(self) -> float:
        in_calls = (*self.footprints.values(), *(one.used.energy_j for one in self.open.values()))
        return math.fsum((*in_calls, self.idle_j, *(one.unattributed_j for one in self.intervals.values())))

    @property
    def accounted_s(self) -> float:
        return math.fsum((*self.server_s.values(), *(one.idle_s for one in self.intervals.values())))


READINGS = [Reading(s, {"g": 100.0 * s + 7 * (s // 3)}) for s in range(0, 101, 5)]
calls_drawn = st.lists(
    st.tuples(st.floats(-10, 110), st.floats(0, 40), st.integers(0, 50)).map(
        # Times are stored with microseconds.
        lambda drawn: (round(drawn[0], 6), round(drawn[0] + drawn[1], 6), drawn[2])
    ),
    max_size=8,
)


@settings(deadline=None)
@given(calls_drawn, st.lists(st.floats(0, 100), max_size=5), st.data())
def test_whenever_calls_arrive_and_intervals_are_settled_every_joule_is_accounted_once(drawn, watermarks, data):
    tables = EndpointTables(READINGS, idle_w=30)
    waiting = [call(f"c{n}", *one) for n, one in enumerate(drawn)]
    for watermark_s in sorted(watermarks):
        known = data.draw(st.integers(0, len(waiting)))
        tables.add(*waiting[:known], *waiting[:known])
        waiting = waiting[known:]
        tables.settle(watermark_s)
        assert tables.accounted_j == pytest.approx(tables.metered_j, rel=1e-9, abs=1e-6)
        assert tables.accounted_s == pytest.approx(tables.until_s - READINGS[0].at_s, rel=1e-9, abs=1e-9)
    tables.add(*waiting)
    tables.settle(100)
    tables.settle(100)
    assert tables.metered_j == pytest.approx(READINGS[-1].energy_j["g"])
    assert tables.accounted_j == pytest.approx(tables.metered_j, rel=1e-9)
    assert tables.accounted_s == pytest.approx(100, rel=1e-9)
    assert min(one.idle_s for one in tables.intervals.values()) >= -1e-9
    assert set(tables.open) == {f"c{n}" for n, (_, finished_s, _) in enumerate(drawn) if finished_s > 100}


@settings(deadline=None)
@given(calls_drawn, st.lists(st.floats(0, 100), max_size=5))
def test_calls_known_in_time_get_the_same_energy_in_one_settlement_or_many(drawn, watermarks):
    calls = [call(f"c{n}", *one) for n, one in enumerate(drawn)]
    once, often = EndpointTables(READINGS), EndpointTables(READINGS)
    for tables in (once, often):
        tables.add(*calls)
    for watermark_s in sorted(watermarks):
        often.settle(watermark_s)
    once.settle(100)
    often.settle(100)
    assert often.footprints == pytest.approx(once.footprints, rel=1e-9, abs=1e-9)


def test_a_late_call_gets_the_unattributed_energy_of_its_intervals():
    tables = EndpointTables(READINGS)
    tables.settle(50)
    tables.add(call("late", 12, 14))
    tables.settle(50)
    assert tables.footprints == pytest.approx({"late": READINGS[3].energy_j["g"] - READINGS[2].energy_j["g"]})
    assert tables.partial == set()


def test_a_late_call_takes_nothing_from_other_calls_and_is_partial():
    tables = EndpointTables(READINGS)
    tables.add(call("early", 11, 14))
    tables.settle(50)
    before = dict(tables.footprints)
    tables.add(call("late", 12, 14))
    tables.settle(50)
    assert tables.footprints == {**before, "late": 0.0}
    assert tables.partial == {"late"}


def test_a_call_from_before_the_first_reading_is_partial_or_has_no_footprint():
    tables = EndpointTables(READINGS)
    tables.add(call("before", -9, -1), call("across", -5, 5))
    tables.settle(20)
    assert set(tables.footprints) == {"across"}
    assert "across" in tables.partial


def test_a_late_call_gets_the_time_in_which_no_other_call_ran():
    tables = EndpointTables(READINGS)
    tables.add(call("early", 21, 24))
    tables.settle(50)
    tables.add(call("late", 8, 23))
    tables.settle(50)
    # 5-20 without another call; 20-25 was idle for two of five seconds, and the late call ran for three.
    assert tables.server_s["early"] == pytest.approx(3)
    assert tables.server_s["late"] == pytest.approx(2 + 10 + 2)
    assert tables.accounted_s == pytest.approx(50)


def with_counter(*energies_j: float) -> EndpointTables:
    """An endpoint that is read every ten seconds."""
    readings = [Reading(10.0 * number, {"g": float(joules)}) for number, joules in enumerate(energies_j)]
    return EndpointTables(readings, still_after_s=30.0)


def test_calls_that_ran_while_the_counter_was_reset_are_partial():
    tables = with_counter(0, 500, 1_000, 100, 600)
    tables.add(call("before", 1, 9), call("across", 15, 35), call("within", 22, 28), call("after", 31, 39))
    tables.settle(40)
    assert tables.partial == {"across", "within"}


@pytest.mark.parametrize("step", [10, 40, 100])
def test_calls_that_ran_while_the_meter_stood_still_are_partial_and_never_have_0_joules(step):
    tables = with_counter(0, 500, 500, 500, 500, 500, 500, 1_000, 1_500)
    tables.add(call("before", 1, 9), call("across", 15, 75), call("short", 12, 18), call("after", 71, 79))
    for watermark_s in range(step, 81, step):
        tables.settle(watermark_s)
    tables.settle(80)
    assert tables.partial == {"across", "short"}


def test_a_meter_that_is_refreshed_less_often_than_it_is_read_works():
    tables = with_counter(0, 500, 500, 1_500, 1_500, 2_500, 2_500, 3_500)
    tables.add(call("long", 1, 69), call("short", 21, 29))
    tables.settle(70)
    assert tables.partial == set()
    assert tables.curve.still_s == 0


def test_a_meter_may_stand_still_while_nothing_runs():
    tables = with_counter(0, 500, 500, 500, 500, 500, 1_000)
    tables.add(call("before", 1, 9), call("after", 51, 59))
    tables.settle(60)
    assert tables.partial == set()


class SlowPool:
    """A connection pool: single statements succeed; transactions fail with `error` if it is set."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def execute(self, *arguments: object) -> None:
        """Like `asyncpg.Pool.execute`."""

    @asynccontextmanager
    async def acquire(self):
        if self.error is not None:
            raise self.error
        yield self

    @asynccontextmanager
    async def transaction(self):
        yield

    async def fetchval(self, *arguments: object) -> bool:
        return False  # another ledger holds the lock

    async def fetch(self, *arguments: object) -> list[object]:
        return []

    async def fetchrow(self, *arguments: object) -> None:
        return None


@pytest.fixture
def loop_and_pool() -> tuple[AttributionLoop, Storage, SlowPool]:
    fleet = Fleet(
        directives=(Directive(level="L0"),),
        models=(Model(name="m", chat_template="chatml"),),
        pools=(Pool(name="p", model="m", zone="Z", endpoints=(Endpoint(name="e", grpc="localhost:1"),)),),
    )
    storage, pool, metrics = Storage(), SlowPool(), LedgerMetrics(CollectorRegistry())
    storage.attach(pool)
    loop = AttributionLoop(
        SimpleNamespace(watermark=datetime(2024, 2, 1, tzinfo=UTC)),
        IntervalSettlement(
            fleet, settings=SETTINGS, storage=storage, metrics=metrics, awake=AwakeEndpoints(), clock=Clock()
        ),
        FootprintOutbox(None, storage=storage, metrics=metrics),
        CurvePublisher(None),
        earlier=EarlierVersions(storage),
        running=SimpleNamespace(limits=lambda watermark: {"e": watermark}),
        storage=storage,
        settings=SETTINGS,
        metrics=metrics,
        clock=Clock(),
    )
    return loop, storage, pool


async def test_a_failed_settlement_is_reported_until_one_succeeds_whatever_other_operations_do(loop_and_pool):
    loop, storage, pool = loop_and_pool
    await storage.add("rejections", [{"id": "a"}])
    pool.error = TimeoutError()
    with capture_logs() as logs:
        for _ in range(3):
            await loop.run_once()
            await storage.add("rejections", [{"id": "a"}])
            assert storage.status.problem() is None
            assert "settlement: PostgreSQL is unavailable (TimeoutError)" in loop.settlement_problem()
        pool.error = None
        await loop.run_once()
    assert loop.settlement_problem() is None
    assert [(one["event"], one["work"]) for one in logs] == [
        (event, work)
        for event in ("the database did not answer; the next round tries again", "works again")
        for work in ("settlement", "publication", "roll-up")
    ]


async def test_a_settlement_clears_the_problem_of_other_operations(loop_and_pool):
    loop, storage, _ = loop_and_pool
    assert storage.status.problem() is not None
    await loop.run_once()
    assert storage.status.problem() is None
