"""The stand-in engine: what is due is sent, and its energy is metered first."""

import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from deploy.triton.energy import EnergyAccount
from deploy.triton.stand_in.answers import PlannedAnswer
from deploy.triton.stand_in.batching import BatchRules, InFlightBatch
from deploy.triton.stand_in.engine import StandInEngine
from shared.runtime.clock import Clock, ManualClock

START = datetime(2023, 2, 10, tzinfo=UTC)
ANSWER = PlannedAnswer("abcdefghij" * 2, 20, 5, 100.0, 2.0)


class Journal:
    """Notes in one list what was metered and what was sent."""

    def __init__(self):
        self.lines = []

    def update(self, now_s, used_j, *, at_once):
        self.lines.append(("metered", used_j, at_once))


class Outlet:
    def __init__(self, journal, *, streams=True, breaks=False):
        self.journal = journal
        self.streams = streams
        self.breaks = breaks
        self.cancelled = False
        self.done = threading.Event()
        self.parts = []

    def send(self, text, *, tokens, final):
        if self.breaks:
            raising()
        self.parts.append((text, tokens, final))
        self.journal.lines.append(("sent", text, final))
        if final:
            self.done.set()

    def fail(self, message):
        self.parts.append(message)
        self.done.set()

    def end_cancelled(self):
        self.parts.append("cancelled")
        self.done.set()

    def is_cancelled(self):
        return self.cancelled

    @property
    def text(self):
        return "".join(part[0] for part in self.parts)


def raising(*_args, **_kwargs):
    raise RuntimeError("the connection is gone")


@pytest.fixture
def journal():
    return Journal()


@pytest.fixture
def clock():
    return ManualClock(START)


@pytest.fixture
def reports():
    return []


@pytest.fixture
def engine(clock, journal, reports):
    batch = InFlightBatch(BatchRules(slowdown=0.0), now_s=clock.now_s())
    return StandInEngine(batch, clock=clock, meter=journal, tick_s=0.0, report=reports.append)


def step(engine, clock, seconds):
    clock.advance(timedelta(seconds=seconds))
    return engine.step()


def test_a_streamed_answer_comes_token_by_token_and_its_last_token_ends_it(engine, clock, journal):
    outlet = Outlet(journal)
    engine.submit(ANSWER, outlet)
    engine.step()
    clock.advance(timedelta(seconds=0.01))
    for _ in range(21):
        step(engine, clock, 0.1)
    assert outlet.text == ANSWER.text
    assert [tokens for _, tokens, _ in outlet.parts] == [1] * 20
    assert [final for *_, final in outlet.parts] == [False] * 19 + [True]


def test_tokens_that_are_due_together_come_together(engine, clock, journal):
    outlet = Outlet(journal)
    engine.submit(ANSWER, outlet)
    engine.step()
    step(engine, clock, 0.75)
    step(engine, clock, 100.0)
    assert outlet.parts == [("abcdefg", 7, False), ("hijabcdefghij", 13, True)]


def test_an_answer_that_is_not_streamed_comes_whole(engine, clock, journal):
    outlet = Outlet(journal, streams=False)
    engine.submit(ANSWER, outlet)
    for _ in range(5):
        step(engine, clock, 0.5)
    assert outlet.parts == [(ANSWER.text, 20, True)]


def test_all_energy_of_an_answer_is_metered_before_its_end_is_sent(engine, clock, journal):
    engine.submit(ANSWER, Outlet(journal))
    engine.step()
    step(engine, clock, 3.0)
    *_, metered, sent = journal.lines
    assert metered == ("metered", pytest.approx(100.0), True)
    assert sent == ("sent", ANSWER.text, True)


def test_it_says_how_long_it_may_sleep(engine, clock, journal):
    engine.submit(ANSWER, Outlet(journal))
    assert engine.step() == pytest.approx(0.1)
    assert step(engine, clock, 0.05) == pytest.approx(0.05, abs=1e-6)
    assert step(engine, clock, 10.0) == pytest.approx(0.05)  # nothing runs: the idle energy still wants metering


def test_a_client_that_leaves_stops_its_answer_and_its_energy(engine, clock, journal, monkeypatch):
    monkeypatch.setattr("deploy.triton.stand_in.engine.CANCELLATION_CHECK_S", 0.0)
    outlet = Outlet(journal)
    engine.submit(ANSWER, outlet)
    engine.step()
    step(engine, clock, 1.0)
    outlet.cancelled = True
    step(engine, clock, 0.5)
    step(engine, clock, 100.0)
    assert outlet.parts[-1] == "cancelled"
    assert journal.lines[-1] == ("metered", pytest.approx(75.0), False)


def test_an_answer_that_cannot_be_sent_does_not_hold_up_the_others(engine, clock, journal, reports):
    broken, whole = Outlet(journal, breaks=True), Outlet(journal)
    engine.submit(ANSWER, broken)
    engine.submit(ANSWER, whole)
    engine.step()
    for _ in range(4):
        step(engine, clock, 1.0)
    assert whole.text == ANSWER.text
    assert reports == ["an answer could not be sent: RuntimeError: the connection is gone"]


def test_a_client_that_cannot_be_asked_whether_it_waits_does_not_hold_up_the_others(
    engine, clock, journal, reports, monkeypatch
):
    monkeypatch.setattr("deploy.triton.stand_in.engine.CANCELLATION_CHECK_S", 0.0)
    broken, whole = Outlet(journal), Outlet(journal)
    broken.is_cancelled = raising
    engine.submit(ANSWER, broken)
    engine.submit(ANSWER, whole)
    engine.step()
    for _ in range(4):
        step(engine, clock, 1.0)
    assert whole.text == ANSWER.text
    assert reports == ["an answer could not be sent: RuntimeError: the connection is gone"]


def test_its_thread_keeps_an_accelerated_clock(journal, reports):
    clock = Clock.starting(START, rate=100.0)
    engine = StandInEngine(
        InFlightBatch(BatchRules(), now_s=clock.now_s()),
        clock=clock,
        meter=journal,
        tick_s=0.005,
        report=reports.append,
    )
    engine.start()
    outlet = Outlet(journal)
    began = time.monotonic()
    engine.submit(ANSWER, outlet)
    assert outlet.done.wait(5)
    elapsed = time.monotonic() - began
    engine.stop()
    assert outlet.text == ANSWER.text
    assert 0.02 <= elapsed < 1.0  # 2 s of event time are 20 ms
    assert reports == []


def test_answers_that_are_under_way_when_it_stops_end_with_an_error(journal, reports):
    engine = StandInEngine(
        InFlightBatch(BatchRules(), now_s=Clock().now_s()),
        clock=Clock(),
        meter=journal,
        tick_s=0.005,
        report=reports.append,
    )
    engine.start()
    outlet = Outlet(journal)
    engine.submit(ANSWER, outlet)
    time.sleep(0.05)
    engine.stop()
    assert outlet.parts[-1] == "the model is being unloaded"


def test_the_account_is_idle_power_times_event_time_and_what_requests_took():
    account = EnergyAccount(idle_power_w=50.0, now_s=1_000.0)
    assert account.read(1_010.0, 0.0) == pytest.approx(500.0)
    assert account.read(1_010.0, 30.0) == pytest.approx(30.0)
    assert account.read(1_005.0, 30.0) == 0.0  # a counter never falls
    assert account.read(1_020.0, 100.0) == pytest.approx(570.0)
    assert account.total_j == pytest.approx(20 * 50 + 100)


def test_a_negative_idle_power_is_refused():
    with pytest.raises(ValueError, match="'idle_power_w' must not be negative"):
        EnergyAccount(idle_power_w=-1.0, now_s=0.0)
