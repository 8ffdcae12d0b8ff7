"""Has a model answer one request: on one endpoint, then on another, until it works or there is no use in going on."""

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter

from services.router.admission import Arrival
from services.router.metrics import RouterMetrics
from services.router.pools import ServingPool
from services.router.retrying import GiveUp, RetryRules
from services.router.streaming import ChunkStream
from shared.clock import Clock
from shared.messages import ErrorDetail, Timing
from shared.triton import (
    DeadlineExceeded,
    EndpointUnavailable,
    Generation,
    GenerationError,
    GenerationParameters,
    InvalidRequest,
    TritonClient,
)

_EXPLANATIONS: dict[GiveUp, str] = {
    "deadline_exceeded": "there was no answer before the deadline: give it more time",
    "no_endpoint": "no model server could be reached before the deadline: try again later",
    "upstream_error": "the model server failed: try again later",
}


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of a model.

    Attributes:
        prompt: with the chat template and the directive.
        chunks: where the answer's text goes as it comes; null: nowhere.
    """

    arrival: Arrival
    prompt: str
    parameters: GenerationParameters
    chunks: ChunkStream | None


@dataclass(slots=True)
class Outcome:
    """What came of a request.

    Attributes:
        generation: null when there is an error.
        endpoint: the last one that was asked.
        attempts: endpoints asked.
        model_s: wall seconds spent on model servers.
        timing: of the last attempt.
    """

    generation: Generation | None = None
    error: ErrorDetail | None = None
    endpoint: str | None = None
    attempts: int = 0
    model_s: float = 0.0
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class Attempts:
    """Makes attempts by the same rules for all requests.

    Attributes:
        first_chunk_timeout_s: wall seconds until a streaming server must have said something.
        stream_always: stream from the model server whether or not the producer wants chunks.
    """

    clock: Clock
    rules: RetryRules
    metrics: RouterMetrics
    first_chunk_timeout_s: float
    stream_always: bool

    async def run(self, pool: ServingPool, job: Job) -> Outcome:
        """Have the request answered by the pool, before its deadline."""
        outcome = Outcome()
        tried: set[str] = set()
        while (remaining_s := self._remaining_s(job.arrival)) > 0:
            endpoint = pool.choose(avoid=tried)
            if endpoint is None:
                await pool.wait_for_endpoint(remaining_s)
                continue
            outcome.endpoint = endpoint
            outcome.attempts += 1
            if outcome.attempts > 1:
                self.metrics.retries.labels(pool.name).inc()
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
                outcome.generation = await self._ask(client, job)
        except EndpointUnavailable as error:
            pool.failed(endpoint, str(error))
            pause_s = self.rules.pause_s(outcome.attempts, random.random())
            verdict = self.rules.verdict(
                attempts=outcome.attempts,
                published=job.chunks is not None and job.chunks.started,
                pause_s=pause_s,
                remaining_s=self._remaining_s(job.arrival),
            )
            if verdict is None:
                return pause_s
            self._give_up(outcome, verdict, error)
        except DeadlineExceeded:
            self._give_up(outcome, "deadline_exceeded")
        except InvalidRequest as error:
            pool.succeeded(endpoint)
            outcome.error = ErrorDetail(code="invalid_request", message=f"the model server refused it: {error}")
        else:
            pool.succeeded(endpoint)
        finally:
            outcome.model_s += perf_counter() - began
            outcome.timing = Timing(
                received_at=job.arrival.received_at, started_at=started_at, finished_at=self.clock.now()
            )
        return None

    async def _ask(self, client: TritonClient, job: Job) -> Generation:
        streamed = job.chunks is not None or self.stream_always
        pieces = client.stream(
            job.prompt,
            job.parameters,
            request_id=job.arrival.request_id,
            timeout_s=self._remaining_s(job.arrival),
            first_chunk_timeout_s=self.first_chunk_timeout_s if streamed else None,
            streamed=streamed,
        )
        async with aclosing(pieces):
            async for piece in pieces:
                if job.chunks is not None and piece.text:
                    job.chunks.offer(piece.text)
                if piece.generation is not None:
                    return piece.generation
        raise EndpointUnavailable(f"{client.name}: the stream ended without an answer")

    def _remaining_s(self, arrival: Arrival) -> float:
        return self.clock.wall_seconds_until(arrival.deadline)

    @staticmethod
    def _give_up(outcome: Outcome, code: GiveUp, error: GenerationError | None = None) -> Outcome:
        said = f" ({error})" if error is not None else ""
        outcome.error = ErrorDetail(code=code, message=_EXPLANATIONS[code] + said)
        return outcome
