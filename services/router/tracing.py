"""OpenTelemetry: the spans of a request, and the provider that exports them.

Spans are of processing the record, generation by a model, and sending messages. The trace continues that of the
client's record (W3C `traceparent` header), and continues in every message that results from it. Attributes follow
OpenTelemetry's semantic conventions for messaging and generative AI, and `sprout.*`. No span contains text of a
request, a response or an error. Without a collector OpenTelemetry's no-op tracer creates no spans, and the client's
trace context is passed on unchanged.

`OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) enables the export. OpenTelemetry's other variables apply too:
sampling (`OTEL_TRACES_SAMPLER`), batches (`OTEL_BSP_*`), TLS and headers (`OTEL_EXPORTER_OTLP_*`), the resource
(`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from services.router.admission import IncomingRequest
from shared.inference.attempts import AttemptResult
from shared.messages import Decision, GenerationResponse

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

TRACER_NAME = "sprout.router"

GEN_AI_PROVIDER = "nvidia.triton"
"""`gen_ai.provider.name`; the conventions have no value for self-hosted servers."""

_Attributes = dict[str, AttributeValue | None]

_W3C = TraceContextTextMapPropagator()
_W3C_FIELDS = frozenset(_W3C.fields)


class Tracing:
    """Creates the spans. The current span belongs to the asyncio task, so every request has its own."""

    def __init__(self, tracer: Tracer, *, group: str) -> None:
        """Set up.

        Args:
            group: consumer group of the router.
        """
        self._tracer = tracer
        self._group = group

    def processing(self, record: Any) -> AbstractContextManager[Span]:  # noqa: ANN401 - aiokafka has no types
        """The span of processing a record."""
        return self._span(
            f"process {record.topic}",
            SpanKind.CONSUMER,
            lambda: {
                "messaging.system": "kafka",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": record.topic,
                "messaging.destination.partition.id": str(record.partition),
                "messaging.kafka.offset": record.offset,
                "messaging.consumer.group.name": self._group,
            },
            parent=_parent_context(record),
        )

    def generating(self, incoming: IncomingRequest, decision: Decision) -> AbstractContextManager[Span]:
        """The span of generation by a model, all attempts included; `generated` records the result."""
        return self._span(f"chat {incoming.model}", SpanKind.CLIENT, lambda: _generation_attributes(incoming, decision))

    def sending(self, topic: str) -> AbstractContextManager[Span]:
        """The span of publishing a message."""
        return self._span(
            f"send {topic}",
            SpanKind.PRODUCER,
            lambda: {
                "messaging.system": "kafka",
                "messaging.operation.name": "send",
                "messaging.operation.type": "send",
                "messaging.destination.name": topic,
            },
        )

    @staticmethod
    def headers() -> dict[str, str]:
        """Message headers that continue the current trace."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier)
        return carrier

    @staticmethod
    def generated(span: Span, result: AttemptResult) -> None:
        """Record the result of all attempts on the span of generation."""
        if not span.is_recording():
            return
        attributes: _Attributes = {"sprout.attempts": result.attempts, "sprout.endpoint": result.endpoint}
        if (generation := result.generation) is not None:
            attributes["gen_ai.usage.input_tokens"] = generation.prompt_tokens
            attributes["gen_ai.usage.output_tokens"] = generation.completion_tokens
            attributes["gen_ai.response.finish_reasons"] = (generation.finish_reason,)
        _set_attributes(span, attributes)
        if result.error is not None:
            _set_error(span, result.error.code)

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
        self, name: str, kind: SpanKind, attributes: Callable[[], _Attributes], *, parent: Context | None = None
    ) -> Iterator[Span]:
        span = self._tracer.start_span(name, context=parent, kind=kind)
        if not span.get_span_context().is_valid and not parent:
            # Without a collector and without a client's trace there is no context to make current.
            yield span
            return
        # The text of an error may quote the request.
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            if span.is_recording():
                _set_attributes(span, attributes())
            try:
                yield span
            except BaseException as error:
                _set_error(span, type(error).__name__)
                raise


def _generation_attributes(incoming: IncomingRequest, decision: Decision) -> _Attributes:
    sampling = incoming.request.sampling
    return {
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


def _parent_context(record: Any) -> Context:  # noqa: ANN401
    """The trace context in a record's headers; empty if there is none or it is unreadable."""
    carrier = {
        name: value.decode("ascii", errors="replace")
        for name, value in record.headers
        if name in _W3C_FIELDS and value is not None
    }
    return _W3C.extract(carrier, context=Context())


def _set_attributes(span: Span, attributes: _Attributes) -> None:
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})


def _set_error(span: Span, reason: str) -> None:
    span.set_attribute("error.type", reason)
    span.set_status(StatusCode.ERROR)


class TelemetryError(ValueError):
    """The environment asks for an exporter or protocol that is not supported; the message says what is."""


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for traces.

    Raises:
        TelemetryError: with a protocol or an exporter that is not supported.
    """
    exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower()
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if disabled or exporter == "none" or not any(environment.get(name) for name in ENDPOINTS):
        return False
    if exporter != "otlp":
        raise TelemetryError(f"OTEL_TRACES_EXPORTER is {exporter!r}: only 'otlp' and 'none' are supported")
    protocol = next((value for name in PROTOCOLS if (value := environment.get(name))), "grpc")
    if protocol != "grpc":
        raise TelemetryError(
            f"{' or '.join(PROTOCOLS)} is {protocol!r}: only 'grpc' is supported; collectors listen for it on port 4317"
        )
    return True


def tracer_provider(service: str, *, version: str) -> "TracerProvider | None":
    """The provider of a service's spans, which exports them in the background; `None` if traces are off.

    The caller must call `shutdown`, which exports the remaining spans and blocks until that is done.

    Raises:
        TelemetryError: see `wanted`.
    """
    if not wanted():
        return None
    # Imported here: that takes 0.1 s, and only some images contain the exporter.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    # The environment takes precedence.
    default = Resource({SERVICE_NAME: f"sprout.{service}", SERVICE_VERSION: version})
    environment = Resource.create()
    has_name = not str(environment.attributes[SERVICE_NAME]).startswith("unknown_service")
    resource = default.merge(environment) if has_name else environment.merge(default)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
