"""The stand-in engine: responses are sent when they are due, after their energy is metered; and injected faults."""

import threading
from datetime import UTC, datetime, timedelta

import pytest

from deploy.triton.energy import EnergyAccount, EnergyMeter
from deploy.triton.gpu import LoadedMark, StandingEnergy, is_loaded
from deploy.triton.stand_in.answers import PlannedAnswer
from deploy.triton.stand_in.batching import CurveRules, InFlightBatch, RecordedRules
from deploy.triton.stand_in.engine import StandInEngine
from deploy.triton.stand_in.faults import MESSAGE, FailingOutlet, FaultDraws, FaultRules
from shared.batch_curve import BatchCurve
from shared.runtime.clock import Clock, ManualClock

START = datetime(2023, 2, 10, tzinfo=UTC)
ANSWER = PlannedAnswer("abcdefghij" * 2, 20, 5, 100.0, 2.0)
IDS = [f"r{number}" for number in range(4_000)]


class Journal:
    """Records in one list what was metered and what was sent."""

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
        self.started = threading.Event()
        self.done = threading.Event()
        self.parts = []

    def send(self, text, *, tokens, final):
        if self.breaks:
            raising()
        self.parts.append((text, tokens, final))
        self.journal.lines.append(("sent", text, final))
        self.started.set()
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
    batch = InFlightBatch(RecordedRules(slowdown=0.0), now_s=clock.now_s())
    return StandInEngine(batch, clock=clock, meter=journal, tick_s=0.0, report=reports.append)


def step(engine, clock, seconds):
    clock.advance(timedelta(seconds=seconds))
    return engine.step()


def test_a_streamed_answer_is_sent_token_by_token_and_its_last_token_ends_it(engine, clock, journal):
    outlet = Outlet(journal)
    engine.submit(ANSWER, outlet)
    engine.step()
    clock.advance(timedelta(seconds=0.01))
    for _ in range(21):
        step(engine, clock, 0.1)
    assert outlet.text == ANSWER.text
    assert [tokens for _, tokens, _ in outlet.parts] == [1] * 20
    assert [final for *_, final in outlet.parts] == [False] * 19 + [True]


def test_with_a_curve_the_first_token_is_sent_a_step_after_the_prompt_is_read(clock, journal, reports):
    curve = BatchCurve(idle_w=100, step_j=4, token_j=1, step_s=0.09, token_s=0.01, prompt_token_j=2, prompt_token_s=0.2)
    batch = InFlightBatch(CurveRules(curve=curve), now_s=clock.now_s())
    engine = StandInEngine(batch, clock=clock, meter=journal, tick_s=0.0, report=reports.append)
    outlet = Outlet(journal)
    engine.submit(ANSWER, outlet)
    assert engine.step() == pytest.approx(1.0)  # a prompt of five tokens
    step(engine, clock, 1.05)
    assert outlet.parts == []
    for _ in range(20):
        step(engine, clock, 0.1)
    assert [part for *part, final in outlet.parts if not final] == [[text, 1] for text in ANSWER.text[:-1]]
    assert outlet.text == ANSWER.text
    assert batch.energy_j == pytest.approx(5 * 2 + 20 * 5)


def test_tokens_that_are_due_together_are_sent_together(engine, clock, journal):
    outlet = Outlet(journal)
    engine.submit(ANSWER, outlet)
    engine.step()
    step(engine, clock, 0.75)
    step(engine, clock, 100.0)
    assert outlet.parts == [("abcdefg", 7, False), ("hijabcdefghij", 13, True)]


def test_first_tokens_and_ends_do_not_wait_for_the_next_round(clock, journal, reports):
    batch = InFlightBatch(RecordedRules(slowdown=0.0), now_s=clock.now_s())
    engine = StandInEngine(batch, clock=clock, meter=journal, tick_s=3_600.0, report=reports.append)
    outlets = [Outlet(journal) for _ in range(3)]
    engine.submit(ANSWER, outlets[0])
    assert engine.step() == pytest.approx(0.1)
    step(engine, clock, 0.11)
    step(engine, clock, 0.1)  # the second token starts a round
    for outlet in outlets[1:]:
        engine.submit(ANSWER, outlet)
        engine.step()
        step(engine, clock, 0.11)
    step(engine, clock, 10.0)
    assert [tokens for _, tokens, _ in outlets[0].parts] == [1, 1, 18]
    assert [tokens for _, tokens, _ in outlets[1].parts] == [1, 19]
    assert [tokens for _, tokens, _ in outlets[2].parts] == [1, 19]


def test_an_answer_that_is_not_streamed_is_sent_in_one_response(engine, clock, journal):
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


def test_a_step_returns_the_time_until_the_next_response_is_due(engine, clock, journal):
    engine.submit(ANSWER, Outlet(journal))
    assert engine.step() == pytest.approx(0.1)
    assert step(engine, clock, 0.05) == pytest.approx(0.05, abs=1e-6)
    assert step(engine, clock, 10.0) == pytest.approx(0.05)  # nothing runs, but the idle energy is metered


def test_a_cancelled_request_stops_its_answer_and_its_energy(engine, clock, journal, monkeypatch):
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


def test_a_failed_check_for_cancellation_does_not_hold_up_the_others(engine, clock, journal, reports, monkeypatch):
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


def test_its_thread_follows_an_accelerated_clock(journal, reports):
    clock = Clock.starting(START, rate=100.0)
    engine = StandInEngine(
        InFlightBatch(RecordedRules(), now_s=clock.now_s()),
        clock=clock,
        meter=journal,
        tick_s=0.005,
        report=reports.append,
    )
    engine.start()
    outlet = Outlet(journal)
    began_s = clock.now_s()
    engine.submit(ANSWER, outlet)
    assert outlet.done.wait(20)
    assert clock.now_s() - began_s >= ANSWER.time_s
    engine.stop()
    assert outlet.text == ANSWER.text
    assert reports == []


def test_unfinished_answers_end_with_an_error_when_the_engine_stops(journal, reports):
    engine = StandInEngine(
        InFlightBatch(RecordedRules(), now_s=Clock().now_s()),
        clock=Clock(),
        meter=journal,
        tick_s=0.005,
        report=reports.append,
    )
    engine.start()
    outlet = Outlet(journal)
    engine.submit(ANSWER, outlet)
    assert outlet.started.wait(20)
    engine.stop()
    assert outlet.parts[-1] == "the model is being unloaded"


def test_the_account_is_idle_power_times_event_time_and_what_requests_took():
    account = EnergyAccount(idle_power_w=50.0, now_s=1_000.0)
    assert account.read(1_010.0, 0.0) == pytest.approx(500.0)
    assert account.read(1_010.0, 30.0) == pytest.approx(30.0)
    assert account.read(1_005.0, 30.0) == 0.0  # a counter never falls
    assert account.read(1_020.0, 100.0) == pytest.approx(570.0)
    assert account.total_j == pytest.approx(20 * 50 + 100)


def test_a_negative_idle_power_is_rejected():
    with pytest.raises(ValueError, match="'idle_power_w' must not be negative"):
        EnergyAccount(idle_power_w=-1.0, now_s=0.0)


def test_standing_energy_is_idle_power_while_the_model_is_loaded_and_asleep_power_while_it_is_not():
    standing = StandingEnergy(idle_power_w=100.0, asleep_power_w=10.0, now_s=1_000.0)
    standing.advance(1_010.0, loaded=True)
    standing.advance(1_030.0, loaded=False)
    standing.advance(1_020.0, loaded=True)  # the past
    standing.advance(1_031.0, loaded=True)
    assert standing.total_j == pytest.approx(10 * 100 + 20 * 10 + 1 * 100)


def test_a_model_is_loaded_while_any_of_its_processes_has_marked_it(tmp_path):
    assert not is_loaded(tmp_path)
    old, new = LoadedMark(tmp_path), LoadedMark(tmp_path)
    assert is_loaded(tmp_path)
    old.close()
    assert is_loaded(tmp_path)
    new.close()
    assert not is_loaded(tmp_path)


class Metrics:
    """The part of the Python backend that exports metrics; like the server, it merges those of the same name."""

    COUNTER, GAUGE = "counter", "gauge"

    def __init__(self):
        self.values = {}

    def MetricFamily(self, *, name, description, kind):  # noqa: N802
        return Family(self.values, name)

    MetricFamily.COUNTER, MetricFamily.GAUGE = COUNTER, GAUGE


class Family:
    def __init__(self, values, name):
        self.values, self.name = values, name

    def Metric(self, *, labels):  # noqa: N802
        self.values.setdefault((self.name, labels["gpu_uuid"]), 0.0)
        return Metric(self.values, (self.name, labels["gpu_uuid"]))


class Metric:
    def __init__(self, values, key):
        self.values, self.key = values, key

    def increment(self, value):
        self.values[self.key] += value

    def set(self, value):
        self.values[self.key] = value

    def value(self):
        return self.values[self.key]


def test_a_model_and_its_companion_share_a_counter_and_the_companion_exports_the_power_of_both():
    backend = Metrics()
    companion = EnergyMeter(backend, EnergyAccount(idle_power_w=0.0, now_s=0.0), gpu_uuid="g", power_interval_s=0.0)
    model = EnergyMeter(backend, EnergyAccount(idle_power_w=0.0, now_s=0.0), gpu_uuid="g", power_interval_s=None)
    companion.update(0.0, 0.0, at_once=True)
    model.update(10.0, 3_000.0, at_once=True)
    companion.update(10.0, 1_000.0, at_once=True)
    assert backend.values == {("nv_energy_consumption", "g"): 4_000.0, ("nv_gpu_power_usage", "g"): 400.0}
    companion.update(20.0, 1_100.0, at_once=True)
    assert backend.values == {("nv_energy_consumption", "g"): 4_100.0, ("nv_gpu_power_usage", "g"): 10.0}


def failing(draws):
    return {name for name in IDS if draws.fails_after(name) is not None}


def test_without_a_share_nothing_fails():
    assert failing(FaultDraws(FaultRules())) == set()


def test_the_requested_share_fails_at_any_point_of_the_answer():
    draws = FaultDraws(FaultRules(error_share=0.3, seed=1))
    ends = [end for name in IDS if (end := draws.fails_after(name)) is not None]
    assert len(ends) / len(IDS) == pytest.approx(0.3, abs=0.03)
    assert 0 <= min(ends) < 0.05
    assert 0.95 < max(ends) < 1
    assert sum(ends) / len(ends) == pytest.approx(0.5, abs=0.05)


def test_faults_are_reproducible_and_differ_by_seed_and_attempt():
    rules = FaultRules(error_share=0.3, seed=1)
    draws = FaultDraws(rules)
    first, second = failing(draws), failing(draws)
    assert first == failing(FaultDraws(rules))
    for others in (second, failing(FaultDraws(FaultRules(error_share=0.3, seed=2)))):
        # The overlap of independent draws.
        assert len(first & others) / len(IDS) == pytest.approx(0.09, abs=0.03)


def test_a_share_that_is_not_a_probability_is_rejected():
    with pytest.raises(ValueError, match="'error_share' is a probability"):
        FaultRules(error_share=1.5)


def test_a_failing_answer_begins_normally_and_ends_with_the_error():
    inner = Outlet(Journal())
    inner.cancelled = True
    outlet = FailingOutlet(inner)
    assert outlet.streams
    assert outlet.is_cancelled()
    outlet.send("a", tokens=1, final=False)
    outlet.send("b", tokens=1, final=True)
    outlet.fail("unloaded")
    outlet.end_cancelled()
    assert inner.parts == [("a", 1, False), MESSAGE, "unloaded", "cancelled"]
