"""Serves one request, from its record to its published answer."""

import asyncio
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from services.router import answers
from services.router.admission import Arrival, Limits, arrive, refusal
from services.router.delivery import Delivery, fitting
from services.router.gate import Passage
from services.router.knowledge import Knowledge
from services.router.metrics import RouterMetrics
from services.router.sampling import becomes_sample
from services.router.selection import UnknownLevelError, select
from services.router.streaming import ChunkStream
from services.router.tracing import Tracing
from shared.fleet import Fleet
from shared.inference.attempts import AttemptResult, Attempts, GenerationJob
from shared.inference.base import GenerationParameters
from shared.inference.chat import ControlSequencePolicy, ConversationError
from shared.inference.pool import Pools, ServingPool
from shared.kafka.dead_letters import PoisonMessageError
from shared.messages import Decision, ErrorDetail, GenerationResponse, Timing
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger, where

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Everything that serving needs; the decisions are made by the modules that it calls."""

    fleet: Fleet
    clock: Clock
    limits: Limits
    knowledge: Knowledge
    pools: Pools
    attempts: Attempts
    delivery: Delivery
    metrics: RouterMetrics
    control_sequences: ControlSequencePolicy
    chunk_interval_s: float
    sample_share: float
    tracing: Tracing | None = None

    async def serve(self, record: Any, passage: Passage) -> None:  # noqa: ANN401 - FastStream's record
        """Answer a record; returns once Kafka has the answer, or the dead letter.

        Only cancellation ends it early; the record is then to be delivered again.
        """
        if self.tracing is None:
            await self._serve(record, passage)
        else:
            await self.tracing.processing(record, self._serve(record, passage))

    async def _serve(self, record: Any, passage: Passage) -> None:  # noqa: ANN401
        began = perf_counter()
        arrival = None
        try:
            arrival = arrive(
                record, received_at=self.clock.now(), clock=self.clock, fleet=self.fleet, limits=self.limits
            )
            await self._answer(arrival, passage, began)
        except PoisonMessageError as error:
            await self.delivery.dead_letter(record, error, passage)
        except Exception as error:  # noqa: BLE001 - one request must not end the others
            # The text of an unforeseen error may quote the request.
            _log.error(
                "serving failed unexpectedly",
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                error=type(error).__name__,
                where=where(error),
            )
            poison = PoisonMessageError("handler_error", type(error).__name__)
            await self.delivery.dead_letter(record, poison, passage)
            if arrival is not None:
                detail = ErrorDetail(
                    code="upstream_error", message="the router failed; the request was kept for people"
                )
                await self.delivery.respond(fitting(answers.failure(arrival, detail)), passage)

    async def _answer(self, arrival: Arrival, passage: Passage, began: float) -> None:
        chunks = None
        if arrival.request.stream:
            chunks = ChunkStream(arrival.request_id, self.delivery, interval_s=self.chunk_interval_s)
        try:
            response, model_s = await self._response(arrival, chunks)
            response = await self._publish(arrival, fitting(response), chunks, passage)
        except BaseException:
            if chunks is not None:
                await chunks.abandon()
            raise
        self.metrics.answered(response, overhead_s=max(0.0, perf_counter() - began - model_s))

    async def _response(self, arrival: Arrival, chunks: ChunkStream | None) -> tuple[GenerationResponse, float]:
        """The answer, and the wall seconds that model servers took."""
        refused = refusal(arrival, fleet=self.fleet, limits=self.limits)
        if refused is not None:
            return answers.failure(arrival, refused), 0.0
        try:
            decision = self._decide(arrival)
        except UnknownLevelError as error:
            return answers.failure(arrival, ErrorDetail(code="unknown_level", message=str(error))), 0.0
        pool = self.pools[decision.pool]
        try:
            prompt = self._prompt(arrival, pool, decision)
        except ConversationError as error:
            detail = ErrorDetail(code="invalid_request", message=str(error))
            return answers.failure(arrival, detail, decision=decision), 0.0
        parameters = GenerationParameters.of(arrival.request.sampling, stop=pool.template.stop)
        job = GenerationJob(
            request_id=arrival.request_id, prompt=prompt, parameters=parameters, deadline=arrival.deadline, sink=chunks
        )
        run = self.attempts.run(pool, job)
        outcome = await (run if self.tracing is None else self.tracing.generating(arrival, decision, run))
        return _concluded(arrival, decision, outcome), outcome.model_s

    def _decide(self, arrival: Arrival) -> Decision:
        standing = self.knowledge.standing(arrival.model, arrival.received_at)
        assignment = self.knowledge.groups.assign(arrival.request, model=arrival.model, policy=standing.policy)
        if assignment.missing:
            self.metrics.ungrouped.labels(arrival.model).inc()
        decision = select(
            request_id=arrival.request_id,
            model=arrival.model,
            assignment=assignment,
            policy=standing.policy,
            fleet=self.fleet,
            wish=arrival.request.directive,
        )
        if standing.fallback is not None and decision.source == "fallback":
            self.metrics.fallbacks.labels(arrival.model, standing.fallback).inc()
        return decision

    def _prompt(self, arrival: Arrival, pool: ServingPool, decision: Decision) -> str:
        conversation = arrival.request.conversation()
        if pool.template.control_sequences(conversation):
            self.metrics.control_sequences.inc()
        return pool.template.render(
            conversation,
            self.fleet.directive_text(decision.level),
            control_sequences=self.control_sequences,
        )

    async def _publish(
        self, arrival: Arrival, response: GenerationResponse, chunks: ChunkStream | None, passage: Passage
    ) -> GenerationResponse:
        """Publish an answer; returns what was published."""
        if chunks is not None:
            # A reader of the stream does not wait for the whole answer.
            await chunks.end(passage, finish_reason=response.finish_reason, error=response.error)
        decision = response.decision
        if (
            response.status == "ok"
            and decision is not None
            and becomes_sample(arrival.request_id, arrival.request, decision, share=self.sample_share)
        ):
            published, _ = await asyncio.gather(
                self.delivery.respond(response, passage),
                self.delivery.sample(answers.sample(arrival, clock=self.clock)),
            )
            return published
        return await self.delivery.respond(response, passage)


def _concluded(arrival: Arrival, decision: Decision, outcome: AttemptResult) -> GenerationResponse:
    if outcome.generation is not None and outcome.endpoint is not None:
        return answers.answer(
            arrival, decision, outcome.generation, endpoint=outcome.endpoint, attempts=outcome.attempts
        )
    timing = None
    if outcome.span is not None:
        started_at, finished_at = outcome.span
        timing = Timing(received_at=arrival.received_at, started_at=started_at, finished_at=finished_at)
    error = outcome.error or ErrorDetail(code="upstream_error", message="there was neither an answer nor an error")
    return answers.failure(
        arrival,
        error,
        decision=decision,
        endpoint=outcome.endpoint,
        timing=timing,
        attempts=outcome.attempts,
    )
