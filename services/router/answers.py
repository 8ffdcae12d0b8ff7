"""The messages that a request is answered with."""

from services.router.admission import Arrival
from services.router.grouping import DEFAULT_GROUP
from shared.inference.base import Generation
from shared.messages import Decision, ErrorDetail, GenerationResponse, Sample, Timing, Usage
from shared.runtime.clock import Clock


def answer(
    arrival: Arrival, decision: Decision, generation: Generation, *, endpoint: str, attempts: int
) -> GenerationResponse:
    """The response to a request that was served."""
    return GenerationResponse(
        request_id=arrival.request_id,
        model=arrival.model,
        status="ok",
        text=generation.text,
        finish_reason=generation.finish_reason,
        decision=decision,
        endpoint=endpoint,
        usage=Usage(
            prompt_tokens=generation.prompt_tokens,
            completion_tokens=generation.completion_tokens,
            source=generation.token_count_source,
        ),
        timing=Timing(
            received_at=arrival.received_at,
            started_at=generation.started_at,
            first_token_at=generation.first_token_at,
            finished_at=generation.finished_at,
        ),
        requested_at=arrival.requested_at,
        attempts=attempts,
        task=arrival.request.task,
        tenant=arrival.request.tenant,
        metadata=arrival.request.metadata,
    )


def failure(
    arrival: Arrival,
    error: ErrorDetail,
    *,
    decision: Decision | None = None,
    endpoint: str | None = None,
    timing: Timing | None = None,
    attempts: int = 0,
) -> GenerationResponse:
    """The response to a request that was not served.

    Args:
        endpoint: the last one that was asked.
        timing: of the last attempt, which may have cost energy all the same.
    """
    return GenerationResponse(
        request_id=arrival.request_id,
        model=arrival.model,
        status="error",
        error=error,
        decision=decision,
        endpoint=endpoint,
        timing=timing,
        requested_at=arrival.requested_at,
        attempts=attempts,
        task=arrival.request.task,
        tenant=arrival.request.tenant,
        metadata=arrival.request.metadata,
    )


def sample(arrival: Arrival, *, clock: Clock) -> Sample:
    """A prompt for the evaluator."""
    return Sample(
        request_id=arrival.request_id,
        model=arrival.model,
        group=arrival.request.task or DEFAULT_GROUP,
        task=arrival.request.task,
        messages=arrival.request.conversation(),
        sampling=arrival.request.sampling,
        sampled_at=clock.now(),
    )
