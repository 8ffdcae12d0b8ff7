"""What the attempts to answer a request say of the endpoints that were asked."""

from contextlib import contextmanager
from datetime import timedelta

import pytest

from shared.inference import attempts
from shared.inference.attempts import Attempts, Job, RetryRules
from shared.inference.base import DeadlineExceeded, GenerationParameters, StreamTimeouts
from shared.inference.triton.client import Chunk
from shared.runtime.clock import Clock


class ClientStandIn:
    """Says a word or none, and is then silent until the deadline."""

    name = "e"

    def __init__(self, *words: str) -> None:
        self.words = words

    async def stream(self, *_, **__):
        for word in self.words:
            yield Chunk(word)
        raise DeadlineExceeded("e: the time is over")


class PoolStandIn:
    """One endpoint; keeps what is said of it."""

    name = "p"

    def __init__(self, client: ClientStandIn) -> None:
        self.client = client
        self.said: list[str] = []

    def choose(self, *, avoid):
        return "e"

    @contextmanager
    def lease(self, _):
        yield self.client

    def failed(self, _, error):
        self.said.append(error)


@pytest.mark.parametrize(
    ("words", "silence_s", "speaks_against_it"), [((), 0.0, True), ((), 60.0, False), (("a",), 0.0, False)]
)
async def test_long_silence_until_the_deadline_speaks_against_an_endpoint(
    monkeypatch, words, silence_s, speaks_against_it
):
    monkeypatch.setattr(attempts, "LONG_SILENCE_S", silence_s)
    clock = Clock()
    pool = PoolStandIn(ClientStandIn(*words))
    made = Attempts(
        clock=clock,
        rules=RetryRules(),
        on_retry=lambda _: None,
        stream_timeouts=StreamTimeouts(60.0, 20.0),
        stream_always=True,
    )
    job = Job(
        request_id="r",
        prompt="why?",
        parameters=GenerationParameters(max_tokens=1),
        deadline=clock.now() + timedelta(seconds=30),
    )
    outcome = await made.run(pool, job)
    assert outcome.error.code == "deadline_exceeded"
    assert bool(pool.said) is speaks_against_it
