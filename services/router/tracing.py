"""The spans of a request: taken from Kafka, answered by a model, its messages sent.

The trace goes on where the producer's record began it (W3C `traceparent` in the headers) and travels on with every
message that comes of it. Names of attributes are OpenTelemetry's semantic conventions for messaging and generative AI,
and `sprout.*`. No span carries text of a request, an answer or an error.
"""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from services.router.admission import Arrival
from shared.inference.attempts import AttemptResult
from shared.messages import Decision, GenerationResponse

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

PROVIDER = "nvidia.triton"
"""`gen_ai.provider.name`; the conventions name none for a server of one's own."""

_W3C = TraceContextTextMapPropagator()


class Tracing:
    """Makes the router's spans. The current span is that of the task, so every request has its own."""

    def __init__(self, provider: "TracerProvider", *, version: str, group: str) -> None:
        """Set up.

        Args:
            group: the router's consumer group.
        """
        self._provider = provider
        self._tracer = provider.get_tracer("sprout.router", version)
        self._group = group

    async def processing(self, record: Any, work: Awaitable[None]) -> None:  # noqa: ANN401 - FastStream's record
        """Deal with a record, in a span of its own."""
        attributes: dict[str, AttributeValue] = {
            "messaging.system": "kafka",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": record.topic,
            "messaging.destination.partition.id": str(record.partition),
            "messaging.kafka.offset": record.offset,
            "messaging.consumer.group.name": self._group,
        }
        with self._span(f"process {record.topic}", SpanKind.CONSUMER, attributes, parent=_sent_with(record)):
            await work

    def answered(self, response: GenerationResponse) -> None:
        """The record that is being processed was answered."""
        span = trace.get_current_span()
        if not span.is_recording():
            return
        span.set_attribute("sprout.request_id", response.request_id)
        if response.error is not None:
            _fail(span, response.error.code)

    def refused(self, reason: str) -> None:
        """The record that is being processed becomes a dead letter."""
        _fail(trace.get_current_span(), reason)

    async def generating(self, arrival: Arrival, decision: Decision, run: Awaitable[AttemptResult]) -> AttemptResult:
        """Have a model answer, in a span of its own."""
        sampling = arrival.request.sampling
        attributes = _given(
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": PROVIDER,
                "gen_ai.request.model": arrival.model,
                "gen_ai.request.stream": arrival.request.stream,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k,
                "gen_ai.request.presence_penalty": sampling.presence_penalty,
                "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
                "gen_ai.request.seed": sampling.seed,
                "sprout.group": decision.group,
                "sprout.pool": decision.pool,
                "sprout.level": decision.level,
                "sprout.zone": decision.zone,
                "sprout.decision.source": decision.source,
                "sprout.policy_version": decision.policy_version,
                "sprout.propensity": decision.propensity,
            }
        )
        with self._span(f"chat {arrival.model}", SpanKind.CLIENT, attributes) as span:
            outcome = await run
            if span.is_recording():
                _conclude(span, outcome)
            return outcome

    @contextmanager
    def sending(self, topic: str) -> Iterator[dict[str, str]]:
        """A message is published; yields the headers that it must have for its readers to go on with the trace."""
        attributes: dict[str, AttributeValue] = {
            "messaging.system": "kafka",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": topic,
        }
        with self._span(f"send {topic}", SpanKind.PRODUCER, attributes):
            yield self.headers()

    @staticmethod
    def headers() -> dict[str, str]:
        """The headers that carry the current span on."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier)
        return carrier

    async def close(self) -> None:
        """Export what is left; nothing is made any more."""
        await asyncio.to_thread(self._provider.shutdown)

    @contextmanager
    def _span(
        self, name: str, kind: SpanKind, attributes: dict[str, AttributeValue], *, parent: Context | None = None
    ) -> Iterator[Span]:
        with self._tracer.start_as_current_span(
            name,
            context=parent,
            kind=kind,
            attributes=attributes,
            # An error's text may quote the request.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                _fail(span, type(error).__name__)
                raise


def _conclude(span: Span, outcome: AttemptResult) -> None:
    found: dict[str, AttributeValue | None] = {
        "sprout.attempts": outcome.attempts,
        "sprout.endpoint": outcome.endpoint,
    }
    if (generation := outcome.generation) is not None:
        found["gen_ai.usage.input_tokens"] = generation.prompt_tokens
        found["gen_ai.usage.output_tokens"] = generation.completion_tokens
        found["gen_ai.response.finish_reasons"] = (generation.finish_reason,)
    span.set_attributes(_given(found))
    if outcome.error is not None:
        _fail(span, outcome.error.code)


def _sent_with(record: Any) -> Context:  # noqa: ANN401
    """The context in a record's headers; an empty one where there is none that can be read."""
    carrier = {
        name: value.decode("ascii", errors="replace")
        for name, value in record.headers
        if name in _W3C.fields and value is not None
    }
    return _W3C.extract(carrier, context=Context())


def _given(attributes: dict[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}


def _fail(span: Span, reason: str) -> None:
    span.set_attribute("error.type", reason)
    span.set_status(StatusCode.ERROR)
