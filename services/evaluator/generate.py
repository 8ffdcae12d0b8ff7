"""Calls to model servers on behalf of an evaluation. Every finished call is reported, so that energy is attributed."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

from services.evaluator.cost import Call, CallContext, Purpose
from shared.fleet import Fleet
from shared.inference.attempts import Attempts, GenerationJob
from shared.inference.base import GenerationParameters
from shared.inference.chat import ConversationError
from shared.inference.pools import Pools
from shared.messages import ChatMessage, SamplingParameters, UsageRecord
from shared.runtime.clock import Clock

T = TypeVar("T")


class CallError(RuntimeError):
    """A call failed; the text quotes neither prompt nor answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Text of a model, and the call that generated it."""

    text: str
    call: Call


class ModelCalls:
    """Calls models with bounded concurrency over all evaluations."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        pools: Pools,
        attempts: Attempts,
        clock: Clock,
        publish_usage: Callable[[UsageRecord], Awaitable[None]],
        concurrency: int,
        timeout_s: float,
    ) -> None:
        """Create.

        Args:
            publish_usage: publishes the record of a finished call.
            timeout_s: of one call including retries, wall.
        """
        self._fleet = fleet
        self._pools = pools
        self._attempts = attempts
        self._clock = clock
        self._publish_usage = publish_usage
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout_s = timeout_s

    async def generate(
        self,
        context: CallContext,
        *,
        purpose: Purpose,
        pool: str,
        level: str | None,
        messages: Sequence[ChatMessage],
        sampling: SamplingParameters,
    ) -> Answer:
        """Generate one answer, publish its usage record, and add the call to the context's work.

        Args:
            level: whose directive is added; None: no directive, as for the reference level.

        Raises:
            CallError: no answer within the timeout, or none is possible.
        """
        serving = self._pools[pool]
        level = level or self._fleet.levels[0]
        try:
            prompt = serving.template.render(messages, self._fleet.directive_text(level))
        except ConversationError as error:
            raise CallError(str(error)) from error
        record_id = f"{context.evaluation_id}-{uuid4().hex[:12]}"
        async with self._slots:
            result = await self._attempts.run(
                serving,
                GenerationJob(
                    request_id=record_id,
                    prompt=prompt,
                    parameters=GenerationParameters.of(sampling, stop=serving.template.stop),
                    deadline=self._clock.now() + timedelta(seconds=self._timeout_s * self._clock.rate),
                ),
            )
        generation = result.generation
        if generation is None or result.endpoint is None:
            # The error's message is for a requester: it may quote the prompt.
            raise CallError(f"pool {pool}: {result.error.code if result.error else 'no answer'}")
        await self._publish_usage(
            UsageRecord(
                id=record_id,
                purpose=purpose,
                evaluation_id=context.evaluation_id,
                model=context.model,
                pool=pool,
                level=level,
                zone=self._fleet.pool(pool).zone,
                endpoint=result.endpoint,
                group=context.group,
                started_at=generation.started_at,
                # Without streaming the time of the first token is unknown.
                first_token_at=generation.first_token_at if self._attempts.stream_always else None,
                finished_at=generation.finished_at,
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=generation.completion_tokens,
            )
        )
        seconds = max(0.0, generation.finished_at_s - generation.started_at_s)
        call = Call(purpose, pool, generation.completion_tokens, seconds)
        # Dropped prompts have cost energy too, so the call is recorded here rather than with the prompt's result.
        context.work.calls.append(call)
        return Answer(generation.text, call)


def all_or_first_error(results: Sequence[T | BaseException]) -> list[T]:
    """The results of `asyncio.gather(..., return_exceptions=True)`.

    Raises:
        BaseException: the first error among them.
    """
    found: list[T] = []
    for one in results:
        if isinstance(one, BaseException):
            raise one
        found.append(one)
    return found
