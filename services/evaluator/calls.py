"""Asks model servers on an evaluation's account; every finished call is reported, so that its energy is attributed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

from services.evaluator.spending import Call, Errand, Purpose
from shared.fleet import Fleet
from shared.inference.attempts import Attempts, GenerationJob
from shared.inference.base import Generation, GenerationParameters
from shared.inference.chat import ConversationError
from shared.inference.pool import Pools
from shared.messages import ChatMessage, SamplingParameters, UsageRecord
from shared.runtime.clock import Clock

Report = Callable[[UsageRecord], Awaitable[None]]


class CallError(RuntimeError):
    """A call came to nothing; the message quotes neither prompt nor answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and what that took."""

    text: str
    call: Call


class ModelCalls:
    """Makes calls, a bounded number at once, whoever asks for them."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        pools: Pools,
        attempts: Attempts,
        clock: Clock,
        report: Report,
        concurrency: int,
        timeout_s: float,
    ) -> None:
        """Set up.

        Args:
            report: publishes the record of a finished call.
            timeout_s: for one call with its retries, wall.
        """
        self._fleet = fleet
        self._pools = pools
        self._attempts = attempts
        self._clock = clock
        self._report = report
        self._turns = asyncio.Semaphore(concurrency)
        self._timeout_s = timeout_s

    async def make(
        self,
        errand: Errand,
        *,
        purpose: Purpose,
        pool: str,
        level: str | None,
        messages: Sequence[ChatMessage],
        sampling: SamplingParameters,
    ) -> Answer:
        """Ask once; returns when the call has been reported.

        Args:
            level: whose directive is put in; null: none, as for `L0`.

        Raises:
            CallError: no answer within the time, or none is possible.
        """
        serving = self._pools[pool]
        reference = self._fleet.levels[0]
        directive = self._fleet.directive_text(level or reference)
        try:
            prompt = serving.template.render(messages, directive)
        except ConversationError as error:
            raise CallError(str(error)) from error
        record_id = f"{errand.evaluation_id}-{uuid4().hex[:12]}"
        async with self._turns:
            outcome = await self._attempts.run(
                serving,
                GenerationJob(
                    request_id=record_id,
                    prompt=prompt,
                    parameters=GenerationParameters.of(sampling, stop=serving.template.stop),
                    deadline=self._clock.now() + timedelta(seconds=self._timeout_s * self._clock.rate),
                ),
            )
        generation = outcome.generation
        if generation is None or outcome.endpoint is None:
            raise CallError(outcome.error.message if outcome.error else f"pool {pool}: no answer")
        await self._report(
            UsageRecord(
                id=record_id,
                purpose=purpose,
                evaluation_id=errand.evaluation_id,
                model=errand.model,
                pool=pool,
                level=level or reference,
                zone=self._fleet.pool(pool).zone,
                endpoint=outcome.endpoint,
                group=errand.group,
                started_at=generation.started_at,
                # Where the answer came in one piece, nobody knows when its first token did.
                first_token_at=generation.first_token_at if self._attempts.stream_always else None,
                finished_at=generation.finished_at,
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=generation.completion_tokens,
            )
        )
        return Answer(generation.text, _spent(purpose, pool, generation))


def _spent(purpose: Purpose, pool: str, generation: Generation) -> Call:
    seconds = max(0.0, generation.finished_at_s - generation.started_at_s)
    return Call(purpose, pool, generation.completion_tokens, seconds)
