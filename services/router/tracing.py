"""OpenTelemetry spans of a request: processing the record, generation by a model, sending messages.

The trace continues that of the client's record (W3C `traceparent` header), and continues in every message that results
from it. Attributes follow OpenTelemetry's semantic conventions for messaging and generative AI, and `sprout.*`. No span
contains text of a request, a response or an error. Without a collector the tracer is OpenTelemetry's no-op tracer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from services.router.admission import IncomingRequest
from shared.inference.attempts import AttemptResult
from shared.messages import Decision, GenerationResponse

TRACER_NAME = "sprout.router"

GEN_AI_PROVIDER = "nvidia.triton"
"""`gen_ai.provider.name`; the conventions have no value for self-hosted servers."""

_W3C = TraceContextTextMapPropagator()


class Tracing:
    """Creates the spans. The current span belongs to the asyncio task, so every request has its own."""

    def __init__(self, tracer: Tracer, *, group: str) -> None:
        """Set up.

        Args:
            group: consumer group of the router.
        """
        self._tracer = tracer
        self._group = group

    @contextmanager
    def processing(self, record: Any) -> Iterator[None]:  # noqa: ANN401 - aiokafka has no types
        """The span of processing a record."""
        attributes: dict[str, AttributeValue] = {
            "messaging.system": "kafka",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": record.topic,
            "messaging.destination.partition.id": str(record.partition),
            "messaging.kafka.offset": record.offset,
            "messaging.consumer.group.name": self._group,
        }
        with self._span(f"process {record.topic}", SpanKind.CONSUMER, attributes, parent=_parent_context(record)):
            yield

    @contextmanager
    def generating(self, incoming: IncomingRequest, decision: Decision) -> Iterator["GenerationSpan"]:
        """The span of generation by a model, all attempts included."""
        sampling = incoming.request.sampling
        attributes = _without_none(
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": GEN_AI_PROVIDER,
                "gen_ai.request.model": incoming.model,
                "gen_ai.request.stream": incoming.request.stream,
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
        with self._span(f"chat {incoming.model}", SpanKind.CLIENT, attributes) as span:
            yield GenerationSpan(span)

    @contextmanager
    def sending(self, topic: str) -> Iterator[dict[str, str]]:
        """The span of publishing a message; yields the headers that continue the trace."""
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
        """Message headers that continue the current trace."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier)
        return carrier

    @staticmethod
    def answered(response: GenerationResponse) -> None:
        """Record on the current span that the request was answered."""
        span = trace.get_current_span()
        if not span.is_recording():
            return
        span.set_attribute("sprout.request_id", response.request_id)
        if response.error is not None:
            _set_error(span, response.error.code)

    @staticmethod
    def dead_lettered(reason: str) -> None:
        """Record on the current span that the record becomes a dead letter."""
        _set_error(trace.get_current_span(), reason)

    @contextmanager
    def _span(
        self, name: str, kind: SpanKind, attributes: dict[str, AttributeValue], *, parent: Context | None = None
    ) -> Iterator[Span]:
        with self._tracer.start_as_current_span(
            name,
            context=parent,
            kind=kind,
            attributes=attributes,
            # The text of an error may quote the request.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                _set_error(span, type(error).__name__)
                raise


class GenerationSpan:
    """The span of generation, for its result."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def finish(self, result: AttemptResult) -> None:
        """Record the result of all attempts."""
        if not self._span.is_recording():
            return
        attributes: dict[str, AttributeValue | None] = {
            "sprout.attempts": result.attempts,
            "sprout.endpoint": result.endpoint,
        }
        if (generation := result.generation) is not None:
            attributes["gen_ai.usage.input_tokens"] = generation.prompt_tokens
            attributes["gen_ai.usage.output_tokens"] = generation.completion_tokens
            attributes["gen_ai.response.finish_reasons"] = (generation.finish_reason,)
        self._span.set_attributes(_without_none(attributes))
        if result.error is not None:
            _set_error(self._span, result.error.code)


def _parent_context(record: Any) -> Context:  # noqa: ANN401
    """The trace context in a record's headers; empty if there is none or it is unreadable."""
    carrier = {
        name: value.decode("ascii", errors="replace")
        for name, value in record.headers
        if name in _W3C.fields and value is not None
    }
    return _W3C.extract(carrier, context=Context())


def _without_none(attributes: dict[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    return {name: value for name, value in attributes.items() if value is not None}


def _set_error(span: Span, reason: str) -> None:
    span.set_attribute("error.type", reason)
    span.set_status(StatusCode.ERROR)
