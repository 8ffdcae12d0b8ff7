"""Attempts at a generation, and what they report about the endpoint."""

from contextlib import contextmanager
from datetime import timedelta

import pytest

from shared.inference import attempts
from shared.inference.attempts import Attempts, GenerationJob, RetrySettings
from shared.inference.base import Chunk, DeadlineExceeded, GenerationParameters, PreparedRequest, StreamTimeouts
from shared.runtime.clock import Clock


class FakeClient:
    """Streams some words, then nothing until the deadline."""

    name = "e"

    def __init__(self, *words: str) -> None:
        self.words = words

    async def prepare(self, prompt, parameters, *, request_id, **_):
        return PreparedRequest(request_id=request_id, prompt=prompt, parameters=parameters, payload=None)

    async def stream(self, *_, **__):
        for word in self.words:
            yield Chunk(word)
        raise DeadlineExceeded("e: the time is over")


class FakePool:
    """One endpoint; records its failures."""

    name = "p"

    def __init__(self, client: FakeClient) -> None:
        self.client = client
        self.failures: list[str] = []

    def choose(self, *, avoid):
        return "e"

    @contextmanager
    def lease(self, _):
        yield self.client

    def failed(self, _, error):
        self.failures.append(error)


@pytest.mark.parametrize(
    ("words", "silence_s", "is_failure"), [((), 0.0, True), ((), 60.0, False), (("a",), 0.0, False)]
)
async def test_long_silence_until_the_deadline_is_a_failure_of_the_endpoint(monkeypatch, words, silence_s, is_failure):
    monkeypatch.setattr(attempts, "SUSPICIOUS_SILENCE_S", silence_s)
    clock = Clock()
    pool = FakePool(FakeClient(*words))
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
    )
    result = await made.run(pool, job)
    assert result.error.code == "deadline_exceeded"
    assert bool(pool.failures) is is_failure
