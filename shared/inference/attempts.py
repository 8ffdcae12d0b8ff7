"""Runs one generation: on one endpoint, then on others, until it succeeds or another attempt is pointless."""

import asyncio
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from time import perf_counter
from typing import Final, Literal, Protocol, Self

from pydantic import BaseModel, Field, model_validator

from shared.inference.base import (
    DeadlineExceeded,
    EndpointUnavailable,
    Generation,
    GenerationCancelled,
    GenerationError,
    GenerationParameters,
    InferenceClient,
    InvalidRequest,
    StreamTimeouts,
)
from shared.inference.pool import ServingPool
from shared.messages import ErrorDetail
from shared.runtime.clock import Clock

GiveUpCode = Literal["upstream_error", "no_endpoint", "deadline_exceeded"]
"""The error code of a request for which no further attempt is made."""

_EXPLANATIONS: Final[dict[GiveUpCode, str]] = {
    "deadline_exceeded": "there was no answer before the deadline: give it more time",
    "no_endpoint": "no model server could be reached before the deadline: try again later",
    "upstream_error": "the model server failed: try again later",
}

CANCELLED: Final = ErrorDetail(code="cancelled", message="the request was cancelled before the answer began")

SUSPICIOUS_SILENCE_S: Final = 5.0
"""Wall seconds without a response until the deadline that count as a failure of the endpoint; after a shorter time the
deadline may have been too short."""


class RetrySettings(BaseModel):
    """How often, and how soon, a failed attempt is repeated. A service's settings class may inherit these fields."""

    max_attempts: int = Field(default=6, ge=1, description="Most attempts for one request")
    backoff_s: float = Field(default=0.05, gt=0, description="Before the second attempt; doubles, with jitter; wall")
    backoff_max_s: float = Field(default=2.0, gt=0, description="Longest pause between attempts, wall")

    @model_validator(mode="after")
    def _check_backoff(self) -> Self:
        if self.backoff_max_s < self.backoff_s:
            raise ValueError("BACKOFF_MAX_S must not be below BACKOFF_S")
        return self

    def pause_s(self, attempts: int, jitter: float) -> float:
        """Pause after `attempts` failed attempts, between half of the backoff and all of it.

        Args:
            jitter: in [0, 1); keeps requests that failed together from returning together.
        """
        full_s = min(self.backoff_max_s, self.backoff_s * 2.0 ** min(attempts - 1, 30))
        return full_s * (0.5 + 0.5 * jitter)

    def give_up_code(self, *, attempts: int, published: bool, pause_s: float, remaining_s: float) -> GiveUpCode | None:
        """The error code if no further attempt is made, otherwise None.

        Args:
            attempts: attempts so far, all failed.
            published: a part of the answer has been published; another attempt would contradict it.
            remaining_s: until the deadline.
        """
        if published or attempts >= self.max_attempts:
            return "upstream_error"
        return "deadline_exceeded" if pause_s >= remaining_s else None


class TextSink(Protocol):
    """Receives an answer's text as it arrives."""

    @property
    def started(self) -> bool:
        """Whether a part of the answer may have been published: another attempt would contradict it."""

    def offer(self, text: str) -> None:
        """Take new text, without waiting."""


class CancelSignal:
    """Tells a job that it is cancelled, from another task."""

    __slots__ = ("_on_cancel", "cancelled")

    def __init__(self) -> None:
        self.cancelled = False
        self._on_cancel: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Cancel the job: its generation is stopped, and no further attempt is made."""
        self.cancelled = True
        if self._on_cancel is not None:
            self._on_cancel()

    def on_cancel(self, action: Callable[[], None] | None) -> None:
        """Set what `cancel` calls; None for nothing."""
        self._on_cancel = action


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationJob:
    """One generation that a pool is asked for.

    Attributes:
        prompt: with the chat template and the directive applied.
        deadline: event time.
        sink: receives the answer's text as it arrives; None: the text is returned only at the end.
        signal: cancels the job from another task.
    """

    request_id: str
    prompt: str
    parameters: GenerationParameters
    deadline: datetime
    sink: TextSink | None = None
    signal: CancelSignal | None = None


@dataclass(slots=True)
class AttemptResult:
    """The result of all attempts at one job.

    Attributes:
        generation: None when there is an error.
        endpoint: of the last attempt.
        attempts: number of attempts.
        model_s: wall seconds spent on model servers.
        span: start and end of the last attempt, event time.
        responded: the endpoint of the last attempt has sent something.
    """

    generation: Generation | None = None
    error: ErrorDetail | None = None
    endpoint: str | None = None
    attempts: int = 0
    model_s: float = 0.0
    span: tuple[datetime, datetime] | None = None
    responded: bool = False

    def fail(self, code: GiveUpCode, error: GenerationError | None = None) -> None:
        """Record that no further attempt is made.

        Args:
            error: of the last attempt.
        """
        details = f" ({error.for_requester})" if error is not None else ""
        self.error = ErrorDetail(code=code, message=_EXPLANATIONS[code] + details)


@dataclass(frozen=True, slots=True)
class Attempts:
    """Makes attempts, with the same limits for all jobs.

    Attributes:
        on_retry: called with the pool's name before every attempt after the first.
        stream_timeouts: for responses that are streamed.
        stream_always: stream from the model server even where the job has no sink.
    """

    clock: Clock
    retry: RetrySettings
    on_retry: Callable[[str], None]
    stream_timeouts: StreamTimeouts
    stream_always: bool

    async def run(self, pool: ServingPool, job: GenerationJob) -> AttemptResult:
        """Run the job on endpoints of the pool until it succeeds, its deadline passes, or another attempt is pointless.

        Errors of model servers end up in the result; only cancellation is raised.
        """
        result = AttemptResult()
        pool.arrived()
        tried: set[str] = set()
        while (remaining_s := self._remaining_s(job)) > 0:
            if job.signal is not None and job.signal.cancelled:
                result.error = CANCELLED
                return result
            endpoint = pool.choose(avoid=tried)
            if endpoint is None:
                await pool.wait_for_endpoint(remaining_s)
                continue
            result.endpoint = endpoint
            result.attempts += 1
            if result.attempts > 1:
                self.on_retry(pool.name)
            tried.add(endpoint)
            pause_s = await self._attempt(pool, endpoint, job, result)
            if pause_s is None:
                return result
            await asyncio.sleep(pause_s)
        result.fail("deadline_exceeded" if result.attempts else "no_endpoint")
        return result

    async def _attempt(
        self, pool: ServingPool, endpoint: str, job: GenerationJob, result: AttemptResult
    ) -> float | None:
        """One attempt; returns the pause before the next one, None when the result is final."""
        began, started_at = perf_counter(), self.clock.now()
        try:
            with pool.lease(endpoint, started_at) as client:
                result.generation = await self._generate(client, job, result)
        except EndpointUnavailable as error:
            pool.failed(endpoint, str(error))
            pause_s = self.retry.pause_s(result.attempts, random.random())
            code = self.retry.give_up_code(
                attempts=result.attempts,
                published=job.sink is not None and job.sink.started,
                pause_s=pause_s,
                remaining_s=self._remaining_s(job),
            )
            if code is None:
                return pause_s
            result.fail(code, error)
        except DeadlineExceeded as error:
            if not result.responded and perf_counter() - began >= SUSPICIOUS_SILENCE_S:
                pool.failed(endpoint, str(error))
            result.fail("deadline_exceeded")
        except GenerationCancelled:
            result.error = CANCELLED
        except InvalidRequest as error:
            pool.succeeded(endpoint)
            result.error = ErrorDetail(
                code="invalid_request", message=f"the model server rejected the request: {error.for_requester}"
            )
        else:
            pool.succeeded(endpoint)
        finally:
            result.model_s += perf_counter() - began
            result.span = (started_at, self.clock.now())
        return None

    async def _generate(self, client: InferenceClient, job: GenerationJob, result: AttemptResult) -> Generation:
        result.responded = False
        streamed = job.sink is not None or self.stream_always
        request = await client.prepare(
            job.prompt,
            job.parameters,
            request_id=job.request_id,
            timeout_s=self._remaining_s(job),
            streamed=streamed,
        )
        chunks = client.stream(
            request, timeout_s=self._remaining_s(job), stream_timeouts=self.stream_timeouts if streamed else None
        )
        if job.signal is not None:
            job.signal.on_cancel(partial(client.cancel, request))
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    result.responded = True
                    if job.sink is not None and chunk.text:
                        job.sink.offer(chunk.text)
                    if chunk.generation is not None:
                        return chunk.generation
        finally:
            if job.signal is not None:
                job.signal.on_cancel(None)
        raise EndpointUnavailable(f"{client.name}: the stream ended without an answer")

    def _remaining_s(self, job: GenerationJob) -> float:
        return self.clock.wall_seconds_until(job.deadline)
