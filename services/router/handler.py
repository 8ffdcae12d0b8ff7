"""Handles one request: admit it, decide the option, build the prompt, generate, publish the response."""

import asyncio
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from services.router.admission import IncomingRequest, error_of_unparsed, parse_request, rejection, should_sample
from services.router.cancellation import Cancellations
from services.router.fencing import RecordFence
from services.router.metrics import RouterMetrics
from services.router.policy import PolicyCache, UnknownLevelError, select_option
from services.router.publisher import RouterPublisher, limit_size
from services.router.settings import RouterSettings
from services.router.streaming import ChunkStream
from services.router.tracing import Tracing
from shared.fleet import Fleet
from shared.grouping import DEFAULT_GROUP
from shared.inference.attempts import AttemptResult, Attempts, CancelSignal, GenerationJob
from shared.inference.base import GenerationParameters
from shared.inference.chat import ConversationError
from shared.inference.pools import Pools
from shared.kafka.records import PoisonMessageError
from shared.messages import (
    MAX_SERVED_CHARS,
    Decision,
    ErrorDetail,
    GenerationResponse,
    Reply,
    Sample,
    ServedAnswer,
    Timing,
    Usage,
    option_key,
)
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger, where

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHandler:
    """Everything that handling a request needs."""

    fleet: Fleet
    clock: Clock
    settings: RouterSettings
    policies: PolicyCache
    pools: Pools
    attempts: Attempts
    cancellations: Cancellations
    publisher: RouterPublisher
    metrics: RouterMetrics
    tracing: Tracing

    async def handle(self, record: Any, fence: RecordFence) -> None:  # noqa: ANN401 - aiokafka has no types
        """Answer a record; returns once Kafka has the response or the dead letter.

        Only cancellation ends it early; the record is then redelivered.
        """
        with self.tracing.processing(record):
            await self._handle(record, fence)

    async def _handle(self, record: Any, fence: RecordFence) -> None:  # noqa: ANN401
        started_s = perf_counter()
        incoming = None
        try:
            incoming = parse_request(
                record,
                record_id=str(fence.source),
                received_at=self.clock.now(),
                clock=self.clock,
                fleet=self.fleet,
                settings=self.settings,
            )
            await self._answer(incoming, fence, started_s)
        except PoisonMessageError as error:
            await self._reject(record, error, fence, started_s)
        except Exception as error:  # noqa: BLE001 - one request must not end the others
            # The text of an unexpected error may quote the request.
            _log.error(
                "unexpected error while handling a request",
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                error=type(error).__name__,
                where=where(error),
            )
            poison = PoisonMessageError("handler_error", type(error).__name__)
            await self.publisher.publish_dead_letter(record, poison, fence)
            if incoming is not None:
                detail = ErrorDetail(
                    code="upstream_error",
                    message="internal error in the router; the request was saved to the dead-letter topic",
                )
                await self._publish_response(incoming, limit_size(error_response(incoming, detail)), fence)

    async def _reject(self, record: Any, error: PoisonMessageError, fence: RecordFence, started_s: float) -> None:  # noqa: ANN401
        """Publish the dead letter of a record that is no request, and an error response if its id can be read.

        A request that is too large and has an id only gets the response.
        """
        response = error_of_unparsed(
            record,
            error,
            record_id=str(fence.source),
            received_at=self.clock.now(),
            clock=self.clock,
            fleet=self.fleet,
            settings=self.settings,
        )
        if response is None or error.reason != "too_large":
            await self.publisher.publish_dead_letter(record, error, fence)
        if response is not None:
            await self.publisher.publish_response(response, fence)
            self.metrics.answered(response, overhead_s=perf_counter() - started_s)

    async def _answer(self, incoming: IncomingRequest, fence: RecordFence, started_s: float) -> None:
        chunks = None
        if incoming.request.stream:
            interval_s = self.settings.chunk_interval_ms / 1_000
            chunks = ChunkStream(
                incoming.request_id,
                self.publisher,
                interval_s=interval_s,
                reply_partition=incoming.request.reply_partition,
            )
        try:
            with self.cancellations.watch(incoming.request_id, incoming.record) as signal:
                response, model_s = await self._respond(incoming, chunks, signal)
            response = await self._publish(incoming, limit_size(response), chunks, fence)
        except BaseException:
            if chunks is not None:
                await chunks.cancel()
            raise
        self.metrics.answered(response, overhead_s=max(0.0, perf_counter() - started_s - model_s))

    async def _respond(
        self, incoming: IncomingRequest, chunks: ChunkStream | None, signal: CancelSignal
    ) -> tuple[GenerationResponse, float]:
        """The response, and the wall seconds spent on model servers."""
        rejected = rejection(incoming, fleet=self.fleet, settings=self.settings)
        if rejected is not None:
            return error_response(incoming, rejected), 0.0
        try:
            decision = self._decide(incoming)
        except UnknownLevelError as error:
            return error_response(incoming, ErrorDetail(code="unknown_level", message=str(error))), 0.0
        if chunks is not None:
            chunks.decision = decision
        try:
            job = self._job(incoming, decision, chunks, signal)
        except ConversationError as error:
            detail = ErrorDetail(code="invalid_request", message=str(error))
            return error_response(incoming, detail, decision=decision), 0.0
        with self.tracing.generating(incoming, decision) as span:
            result = await self.attempts.run(self.pools[decision.pool], job)
            self.tracing.generated(span, result)
        return response_of(incoming, decision, result), result.model_s

    def _decide(self, incoming: IncomingRequest) -> Decision:
        reference_block = self.pools.reference_block()
        if reference_block:
            self.metrics.switchback_requests.labels(incoming.model).inc()
        active = self.policies.active(incoming.model, incoming.received_at)
        assignment = self.policies.groups.assign(incoming.request, model=incoming.model, policy=active.policy)
        if assignment.unknown_version:
            self.metrics.unknown_group_versions.labels(incoming.model).inc()
        decision = select_option(
            record=incoming.record,
            draw_key=self.settings.draw_key_bytes,
            model=incoming.model,
            assignment=assignment,
            policy=active.policy,
            fleet=self.fleet,
            requested_directive=incoming.request.directive,
            zone=incoming.request.zone,
            reference_block=reference_block,
        )
        if active.fallback is not None and decision.source == "fallback":
            self.metrics.fallbacks.labels(incoming.model, active.fallback).inc()
        return decision

    def _job(
        self, incoming: IncomingRequest, decision: Decision, chunks: ChunkStream | None, signal: CancelSignal
    ) -> GenerationJob:
        template = self.pools[decision.pool].template
        conversation = incoming.request.conversation()
        if template.control_sequences(conversation):
            self.metrics.control_sequences.inc()
        prompt = template.render(
            conversation,
            self.fleet.directive_text(decision.level),
            control_sequences=self.settings.control_sequences,
        )
        return GenerationJob(
            request_id=incoming.record,  # unlike the client's id, unique on the model server
            prompt=prompt,
            parameters=GenerationParameters.of(incoming.request.sampling, stop=template.stop),
            deadline=incoming.deadline,
            sink=chunks,
            signal=signal,
        )

    async def _publish(
        self,
        incoming: IncomingRequest,
        response: GenerationResponse,
        chunks: ChunkStream | None,
        fence: RecordFence,
    ) -> GenerationResponse:
        """Publish a response and what belongs to it; returns the published response."""
        if chunks is not None:
            # Before the response: a client that reads the stream does not wait for the whole response.
            await chunks.end(fence, finish_reason=response.finish_reason, error=response.error)
        decision = response.decision
        if response.status == "ok" and decision is not None and should_sample(incoming, decision, self.settings):
            published, _ = await asyncio.gather(
                self._publish_response(incoming, response, fence),
                self.publisher.publish_sample(self._sample(incoming, response)),
            )
            return published
        return await self._publish_response(incoming, response, fence)

    def _sample(self, incoming: IncomingRequest, response: GenerationResponse) -> Sample:
        served = served_answer(response, self.fleet) if self.settings.sample_answers else None
        return sample_of(incoming, served, clock=self.clock)

    async def _publish_response(
        self, incoming: IncomingRequest, response: GenerationResponse, fence: RecordFence
    ) -> GenerationResponse:
        """Publish a response, and before it the reply: without the response, another router would answer again."""
        if incoming.request.reply_partition is not None:
            reply = Reply(request_id=response.request_id, response=response)
            await self.publisher.publish_reply(reply, incoming.request.reply_partition)
        return await self.publisher.publish_response(response, fence)


def response_of(incoming: IncomingRequest, decision: Decision, result: AttemptResult) -> GenerationResponse:
    """The response to a request that was sent to a model server."""
    generation = result.generation
    if generation is None or result.endpoint is None:
        timing = None
        if result.span is not None:
            started_at, finished_at = result.span
            timing = Timing(received_at=incoming.received_at, started_at=started_at, finished_at=finished_at)
        return error_response(
            incoming,
            result.error or ErrorDetail(code="upstream_error", message="the model server returned no result"),
            decision=decision,
            endpoint=result.endpoint,
            timing=timing,
            attempts=result.attempts,
        )
    return GenerationResponse(
        request_id=incoming.request_id,
        record=incoming.record,
        model=incoming.model,
        status="ok",
        text=generation.text,
        finish_reason=generation.finish_reason,
        decision=decision,
        endpoint=result.endpoint,
        usage=Usage(
            prompt_tokens=generation.prompt_tokens,
            completion_tokens=generation.completion_tokens,
            source=generation.token_count_source,
        ),
        timing=Timing(
            received_at=incoming.received_at,
            started_at=generation.started_at,
            first_token_at=generation.first_token_at,
            finished_at=generation.finished_at,
        ),
        requested_at=incoming.requested_at,
        attempts=result.attempts,
        task=incoming.request.task,
        tenant=incoming.request.tenant,
        metadata=incoming.request.metadata,
    )


def error_response(
    incoming: IncomingRequest,
    error: ErrorDetail,
    *,
    decision: Decision | None = None,
    endpoint: str | None = None,
    timing: Timing | None = None,
    attempts: int = 0,
) -> GenerationResponse:
    """The response to a request that failed or was rejected.

    Args:
        endpoint: of the last attempt.
        timing: of the last attempt, which may have used energy nevertheless.
    """
    return GenerationResponse(
        request_id=incoming.request_id,
        record=incoming.record,
        model=incoming.model,
        status="error",
        error=error,
        decision=decision,
        endpoint=endpoint,
        timing=timing,
        requested_at=incoming.requested_at,
        attempts=attempts,
        task=incoming.request.task,
        tenant=incoming.request.tenant,
        metadata=incoming.request.metadata,
    )


def served_answer(response: GenerationResponse, fleet: Fleet) -> ServedAnswer | None:
    """The answer of a response for its sample; None if it was cut off by its requester, or is too long to be kept."""
    decision, usage, timing = response.decision, response.usage, response.timing
    if response.finish_reason not in ("stop", "length") or decision is None or usage is None or timing is None:
        return None
    if len(response.text or "") > MAX_SERVED_CHARS:
        return None
    return ServedAnswer(
        option=option_key(decision.pool, decision.level),
        directive=fleet.directive_text(decision.level),
        text=response.text or "",
        completion_tokens=usage.completion_tokens,
        processing_s=max(0.0, (timing.finished_at - timing.started_at).total_seconds()),
    )


def sample_of(incoming: IncomingRequest, served: ServedAnswer | None, *, clock: Clock) -> Sample:
    """The sample of a request for the evaluator.

    Args:
        served: the answer that it got; None: not to be used.
    """
    return Sample(
        request_id=incoming.request_id,
        record=incoming.record,
        model=incoming.model,
        group=incoming.request.task or DEFAULT_GROUP,
        task=incoming.request.task,
        tenant=incoming.request.tenant,
        messages=incoming.request.conversation(),
        sampling=incoming.request.sampling,
        reference=incoming.request.reference,
        served=served,
        sampled_at=clock.now(),
    )
