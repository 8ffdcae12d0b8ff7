"""Has a model answer one request: on one endpoint, then on another, until it works or there is no use in going on.

Whether a failed attempt is repeated, and after how long.
"""

import asyncio
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from time import perf_counter
from typing import Final, Literal, Protocol

from shared.inference.base import (
    DeadlineExceeded,
    EndpointUnavailable,
    GenerationError,
    GenerationParameters,
    InvalidRequest,
    StreamTimeouts,
)
from shared.inference.pool import ServingPool
from shared.inference.triton.client import TritonClient
from shared.inference.triton.generation import Generation
from shared.messages import ErrorDetail
from shared.runtime.clock import Clock

GiveUp = Literal["upstream_error", "no_endpoint", "deadline_exceeded"]
"""The error code of a request that is not tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRules:
    """Limits of repetition; wall seconds.

    Attributes:
        max_attempts: endpoints asked for one request, >= 1.
        backoff_s: before the second attempt; doubles with every further one.
        backoff_max_s: longest pause.
    """

    max_attempts: int = 6
    backoff_s: float = 0.05
    backoff_max_s: float = 2.0

    def pause_s(self, attempts: int, jitter: float) -> float:
        """Pause after `attempts` failed ones, between half and all of the backoff.

        Args:
            jitter: in [0, 1); keeps requests that failed together from coming back together.
        """
        full_s = min(self.backoff_max_s, self.backoff_s * 2.0 ** min(attempts - 1, 30))
        return full_s * (0.5 + 0.5 * jitter)

    def verdict(self, *, attempts: int, published: bool, pause_s: float, remaining_s: float) -> GiveUp | None:
        """Why a request is not tried again; null when it is.

        Args:
            attempts: made so far, all failed.
            published: a part of the answer has been published; another attempt would contradict it.
            remaining_s: until the deadline.
        """
        if published or attempts >= self.max_attempts:
            return "upstream_error"
        return "deadline_exceeded" if pause_s >= remaining_s else None


LONG_SILENCE_S: Final = 5.0
"""Wall seconds without a word until the deadline that speak against the endpoint; fewer may be the deadline's fault."""

_EXPLANATIONS: dict[GiveUp, str] = {
    "deadline_exceeded": "there was no answer before the deadline: give it more time",
    "no_endpoint": "no model server could be reached before the deadline: try again later",
    "upstream_error": "the model server failed: try again later",
}


class TextSink(Protocol):
    """Where an answer's text goes as it comes."""

    @property
    def started(self) -> bool:
        """Whether somebody may have seen a part of the answer: another attempt would contradict it."""

    def offer(self, text: str) -> None:
        """Take new text, without waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked of a model.

    Attributes:
        prompt: with the chat template and the directive.
        deadline: event time.
        sink: where the answer's text goes as it comes; null: nowhere.
    """

    request_id: str
    prompt: str
    parameters: GenerationParameters
    deadline: datetime
    sink: TextSink | None = None


@dataclass(slots=True)
class Outcome:
    """What came of a request.

    Attributes:
        generation: null when there is an error.
        endpoint: the last one that was asked.
        attempts: endpoints asked.
        model_s: wall seconds spent on model servers.
        span: when the last attempt began and ended, event time.
        heard: the last endpoint said something.
    """

    generation: Generation | None = None
    error: ErrorDetail | None = None
    endpoint: str | None = None
    attempts: int = 0
    model_s: float = 0.0
    span: tuple[datetime, datetime] | None = None
    heard: bool = False


@dataclass(frozen=True, slots=True)
class Attempts:
    """Makes attempts by the same rules for all requests.

    Attributes:
        on_retry: told the pool's name at every attempt that follows a failed one.
        stream_timeouts: with a streaming server that is silent.
        stream_always: stream from the model server whether or not the text has a sink.
    """

    clock: Clock
    rules: RetryRules
    on_retry: Callable[[str], None]
    stream_timeouts: StreamTimeouts
    stream_always: bool

    async def run(self, pool: ServingPool, job: Job) -> Outcome:
        """Have the request answered by the pool, before its deadline."""
        outcome = Outcome()
        tried: set[str] = set()
        while (remaining_s := self._remaining_s(job)) > 0:
            endpoint = pool.choose(avoid=tried)
            if endpoint is None:
                await pool.wait_for_endpoint(remaining_s)
                continue
            outcome.endpoint = endpoint
            outcome.attempts += 1
            if outcome.attempts > 1:
                self.on_retry(pool.name)
            tried.add(endpoint)
            pause_s = await self._attempt(pool, endpoint, job, outcome)
            if pause_s is None:
                return outcome
            await asyncio.sleep(pause_s)
        return self._give_up(outcome, "deadline_exceeded" if outcome.attempts else "no_endpoint")

    async def _attempt(self, pool: ServingPool, endpoint: str, job: Job, outcome: Outcome) -> float | None:
        """One attempt; returns the pause before the next one, null when the outcome is final."""
        began, started_at = perf_counter(), self.clock.now()
        try:
            with pool.lease(endpoint) as client:
                outcome.generation = await self._ask(client, job, outcome)
        except EndpointUnavailable as error:
            pool.failed(endpoint, str(error))
            pause_s = self.rules.pause_s(outcome.attempts, random.random())
            verdict = self.rules.verdict(
                attempts=outcome.attempts,
                published=job.sink is not None and job.sink.started,
                pause_s=pause_s,
                remaining_s=self._remaining_s(job),
            )
            if verdict is None:
                return pause_s
            self._give_up(outcome, verdict, error)
        except DeadlineExceeded as error:
            if not outcome.heard and perf_counter() - began >= LONG_SILENCE_S:
                pool.failed(endpoint, str(error))
            self._give_up(outcome, "deadline_exceeded")
        except InvalidRequest as error:
            pool.succeeded(endpoint)
            outcome.error = ErrorDetail(
                code="invalid_request", message=f"the model server refused it: {error.for_requester}"
            )
        else:
            pool.succeeded(endpoint)
        finally:
            outcome.model_s += perf_counter() - began
            outcome.span = (started_at, self.clock.now())
        return None

    async def _ask(self, client: TritonClient, job: Job, outcome: Outcome) -> Generation:
        outcome.heard = False
        streamed = job.sink is not None or self.stream_always
        pieces = client.stream(
            job.prompt,
            job.parameters,
            request_id=job.request_id,
            timeout_s=self._remaining_s(job),
            stream_timeouts=self.stream_timeouts if streamed else None,
            streamed=streamed,
        )
        async with aclosing(pieces):
            async for piece in pieces:
                outcome.heard = True
                if job.sink is not None and piece.text:
                    job.sink.offer(piece.text)
                if piece.generation is not None:
                    return piece.generation
        raise EndpointUnavailable(f"{client.name}: the stream ended without an answer")

    def _remaining_s(self, job: Job) -> float:
        return self.clock.wall_seconds_until(job.deadline)

    @staticmethod
    def _give_up(outcome: Outcome, code: GiveUp, error: GenerationError | None = None) -> Outcome:
        said = f" ({error.for_requester})" if error is not None else ""
        outcome.error = ErrorDetail(code=code, message=_EXPLANATIONS[code] + said)
        return outcome
