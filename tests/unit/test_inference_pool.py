"""Pools of inference servers: load balancing, circuit breakers, and attempts at a generation."""

from collections import Counter
from contextlib import contextmanager
from datetime import timedelta

import pytest

from shared.inference import attempts
from shared.inference.attempts import Attempts, GenerationJob, RetrySettings
from shared.inference.balancer import Balancer, CircuitBreakerSettings
from shared.inference.base import (
    Chunk,
    DeadlineExceeded,
    Generation,
    GenerationParameters,
    PreparedRequest,
    StreamTimeouts,
)
from shared.runtime.clock import Clock

SETTINGS = CircuitBreakerSettings(circuit_failures=3, circuit_open_s=1.0, circuit_open_max_s=4.0)


@pytest.fixture
def balancer() -> Balancer:
    return Balancer(dict.fromkeys("abc"), SETTINGS)


def fail(balancer: Balancer, name: str, now_s: float, times: int = 3) -> None:
    for _ in range(times):
        balancer.failed(name, now_s)


def test_the_least_busy_endpoint_is_chosen(balancer):
    balancer.began("a")
    balancer.began("a")
    balancer.began("b")
    assert balancer.choose(0.0) == "c"
    balancer.began("c")
    balancer.ended("b", probe=False)
    assert balancer.choose(0.0) == "b"


def test_equally_busy_endpoints_take_turns(balancer):
    chosen = Counter(balancer.choose(0.0) for _ in range(300))
    assert chosen == {"a": 100, "b": 100, "c": 100}


def test_a_retry_avoids_the_endpoint_that_failed_while_there_is_another(balancer):
    balancer.began("b")
    balancer.began("c")
    assert balancer.choose(0.0, avoid={"a"}) in {"b", "c"}
    assert Balancer({"a": None}, SETTINGS).choose(0.0, avoid={"a"}) == "a"


def test_several_failures_in_a_row_open_the_circuit(balancer):
    fail(balancer, "a", 0.0, times=2)
    balancer.succeeded("a")
    fail(balancer, "a", 0.0, times=2)
    assert "a" in balancer.available()
    assert balancer.failed("a", 0.0)
    assert balancer.available() == ["b", "c"]
    assert {balancer.choose(0.5) for _ in range(10)} == {"b", "c"}


def test_a_half_open_circuit_admits_one_probe(balancer):
    fail(balancer, "a", 0.0)
    assert balancer.choose(1.0) == "a"
    assert balancer.began("a")
    assert balancer.choose(1.0) in {"b", "c"}
    assert balancer.due_for_probe(1.0) == []
    balancer.ended("a", probe=True)
    assert balancer.succeeded("a")
    assert sorted(balancer.available()) == ["a", "b", "c"]


def test_each_re_ejection_doubles_the_pause_up_to_its_limit(balancer):
    now_s = 0.0
    fail(balancer, "a", now_s)
    for pause_s in (1.0, 2.0, 4.0, 4.0):
        assert "a" not in balancer.due_for_probe(now_s + pause_s - 0.01)
        now_s += pause_s
        assert balancer.due_for_probe(now_s) == ["a"]
        assert balancer.failed("a", now_s)


def test_requests_sent_before_the_circuit_opened_do_not_prolong_the_pause(balancer):
    fail(balancer, "a", 0.0)
    assert not balancer.failed("a", 0.9)
    assert balancer.due_for_probe(1.0) == ["a"]


def test_when_all_endpoints_are_ejected_the_time_to_the_next_admission_is_known():
    balancer = Balancer(dict.fromkeys("ab"), SETTINGS)
    fail(balancer, "a", 0.0)
    fail(balancer, "b", 0.5)
    assert balancer.choose(0.6) is None
    assert balancer.next_admission_s(0.6) == pytest.approx(0.4)
    assert balancer.choose(1.0) == "a"
    balancer.began("a")
    assert balancer.next_admission_s(1.0) == pytest.approx(0.5)
    assert balancer.outstanding() == {"a": 1, "b": 0}


def test_an_endpoint_is_given_no_more_requests_than_its_limit():
    balancer = Balancer({"a": 1, "b": 2}, SETTINGS)
    given = []
    while (name := balancer.choose(0.0)) is not None:
        balancer.began(name)
        given.append(name)
    assert Counter(given) == {"a": 1, "b": 2}
    assert balancer.at_capacity
    assert balancer.next_admission_s(0.0) == float("inf")
    balancer.ended("b", probe=False)
    assert balancer.choose(0.0) == "b"
    assert balancer.next_admission_s(0.0) == 0.0


def test_a_retry_is_not_sent_to_an_endpoint_at_capacity():
    balancer = Balancer({"a": 1, "b": None}, SETTINGS)
    balancer.began("a")
    assert balancer.choose(0.0, avoid={"b"}) == "b"


def test_a_health_check_closes_the_circuit_but_one_more_failure_opens_it_again(balancer):
    fail(balancer, "a", 0.0)
    assert balancer.healthy("a")
    assert "a" in balancer.available()
    assert balancer.failed("a", 1.0)
    assert balancer.next_admission_s(1.0) == 0.0
    assert balancer.due_for_probe(2.9) == []  # twice as long as before
    assert balancer.due_for_probe(3.0) == ["a"]


def test_a_health_check_does_not_reset_the_failures_in_a_row(balancer):
    fail(balancer, "a", 0.0, times=2)
    assert not balancer.healthy("a")
    assert balancer.failed("a", 0.0)


def test_an_answered_request_resets_the_failures_in_a_row(balancer):
    fail(balancer, "a", 0.0)
    balancer.healthy("a")
    balancer.succeeded("a")
    fail(balancer, "a", 5.0, times=2)
    assert "a" in balancer.available()


class FakeClient:
    """Streams some words, then either the whole answer or nothing until the deadline."""

    name = "e"

    def __init__(self, *words: str, generation: Generation | None = None) -> None:
        self.words = words
        self.generation = generation

    async def prepare(self, prompt, parameters, *, request_id, **_):
        return PreparedRequest(request_id=request_id, prompt=prompt, parameters=parameters, payload=None)

    async def stream(self, *_, **__):
        for word in self.words:
            yield Chunk(word)
        if self.generation is None:
            raise DeadlineExceeded("e: the time is over")
        yield Chunk("", self.generation)


class FakePool:
    """One endpoint; records its failures."""

    name = "p"

    def __init__(self, client: FakeClient) -> None:
        self.client = client
        self.failures: list[str] = []
        self.successes: list[str] = []

    def arrived(self):
        pass

    def choose(self, *, avoid):
        return "e"

    @contextmanager
    def lease(self, *_):
        yield self.client

    def failed(self, _, error):
        self.failures.append(error)

    def succeeded(self, endpoint):
        self.successes.append(endpoint)


class Sink:
    started = False

    def __init__(self) -> None:
        self.texts: list[str] = []

    def offer(self, text):
        self.texts.append(text)


GENERATION = Generation(
    text="a b", finish_reason="stop", completion_tokens=2, prompt_tokens=1, token_count_source="server",
    started_at_s=1.0, first_token_at_s=1.1, finished_at_s=2.0,
)  # fmt: skip


async def run(pool: FakePool, *, sink: Sink | None = None):
    clock = Clock()
    made = Attempts(
        clock=clock,
        retry=RetrySettings(),
        on_retry=lambda _: None,
        stream_timeouts=StreamTimeouts(60.0, 20.0),
        stream_always=True,
    )
    job = GenerationJob(
        request_id="r",
        prompt="why?",
        parameters=GenerationParameters(max_tokens=1),
        deadline=clock.now() + timedelta(seconds=30),
        sink=sink,
    )
    return await made.run(pool, job)


async def test_a_successful_attempt_passes_text_on_and_returns_the_whole_answer():
    pool, sink = FakePool(FakeClient("a", " b", generation=GENERATION)), Sink()
    result = await run(pool, sink=sink)
    assert (result.generation, result.error, result.attempts, result.endpoint) == (GENERATION, None, 1, "e")
    assert sink.texts == ["a", " b"]
    assert pool.successes == ["e"]


@pytest.mark.parametrize(
    ("words", "silence_s", "is_failure"), [((), 0.0, True), ((), 60.0, False), (("a",), 0.0, False)]
)
async def test_long_silence_until_the_deadline_is_a_failure_of_the_endpoint(monkeypatch, words, silence_s, is_failure):
    monkeypatch.setattr(attempts, "SUSPICIOUS_SILENCE_S", silence_s)
    pool = FakePool(FakeClient(*words))
    result = await run(pool)
    assert result.error.code == "deadline_exceeded"
    assert bool(pool.failures) is is_failure
