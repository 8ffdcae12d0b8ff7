"""The spans of a request, their attributes, and what no span contains."""

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode

from services.router.admission import IncomingRequest
from services.router.handler import response_of
from services.router.tracing import TRACER_NAME, TelemetryError, Tracing, tracer_provider, wanted
from shared.inference.attempts import AttemptResult
from shared.inference.base import Generation
from shared.messages import Decision, ErrorDetail, GenerationRequest

SECRET = "do not tell anybody"
NOON = datetime(2023, 2, 10, 12, tzinfo=UTC)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENT_TRACE = f"00-{TRACE}-{PARENT}-01"
DECISION = Decision(
    source="policy", group="qa", pool="p", level="L1", zone="GB", policy_version=7, propensity=0.25,
    propensities={"p/L0": 0.75, "p/L1": 0.25},
)  # fmt: skip
INCOMING = IncomingRequest(
    request_id="r1",
    record="requests/0/0/0",
    model="m",
    request=GenerationRequest.model_validate(
        {"prompt": SECRET, "sampling": {"max_tokens": 32, "temperature": 0.5, "stop": [SECRET]}}
    ),
    requested_at=NOON,
    received_at=NOON,
    deadline=NOON,
)
GENERATION = Generation(
    text=SECRET, finish_reason="length", completion_tokens=32, prompt_tokens=9, token_count_source="server",
    started_at_s=1.0, first_token_at_s=1.1, finished_at_s=2.0,
)  # fmt: skip
ANSWERED = AttemptResult(generation=GENERATION, endpoint="e0", attempts=2)


class Traces:
    def __init__(self, sampler: Sampler = ALWAYS_ON) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBased(sampler), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(provider.get_tracer(TRACER_NAME, "1"), group="sprout.router")

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        found = self.exporter.get_finished_spans()
        assert SECRET not in "".join(span.to_json() for span in found)
        return {span.name: span for span in found}


@pytest.fixture
def traces() -> Traces:
    return Traces()


def record(traceparent: bytes | None = CLIENT_TRACE.encode()):
    headers = () if traceparent is None else (("traceparent", traceparent), ("other", b"\xff"))
    return SimpleNamespace(topic="requests", partition=3, offset=17, headers=headers, value=SECRET.encode())


def serve(
    tracing: Tracing, header: SimpleNamespace, result: AttemptResult, sent: list[dict[str, str]] | None = None
) -> None:
    """All spans of a request; collects the headers of what it sends."""
    sent = [] if sent is None else sent
    with tracing.processing(header):
        with tracing.generating(INCOMING, DECISION) as span:
            tracing.generated(span, result)
        with tracing.sending("responses"):
            sent.append(tracing.headers())
        sent.append(tracing.headers())
        tracing.answered(response_of(INCOMING, DECISION, result))


def test_the_clients_trace_continues_through_model_and_messages(traces):
    sent: list[dict[str, str]] = []
    serve(traces.tracing, record(), ANSWERED, sent)
    spans = traces.spans
    process, chat, send = spans["process requests"], spans["chat m"], spans["send responses"]
    assert [span.kind for span in (process, chat, send)] == [SpanKind.CONSUMER, SpanKind.CLIENT, SpanKind.PRODUCER]
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert f"{process.parent.span_id:016x}" == PARENT
    assert (chat.parent.span_id, send.parent.span_id) == (process.context.span_id, process.context.span_id)
    assert sent[0]["traceparent"] == f"00-{TRACE}-{send.context.span_id:016x}-01"
    assert sent[1]["traceparent"] == f"00-{TRACE}-{process.context.span_id:016x}-01"
    assert dict(process.attributes) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "requests",
        "messaging.destination.partition.id": "3",
        "messaging.kafka.offset": 17,
        "messaging.consumer.group.name": "sprout.router",
        "sprout.request_id": "r1",
    }
    assert dict(chat.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nvidia.triton",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 32,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 32,
        "gen_ai.response.finish_reasons": ("length",),
        "sprout.group": "qa",
        "sprout.pool": "p",
        "sprout.level": "L1",
        "sprout.zone": "GB",
        "sprout.decision.source": "policy",
        "sprout.policy_version": 7,
        "sprout.propensity": 0.25,
        "sprout.attempts": 2,
        "sprout.endpoint": "e0",
    }


def test_an_error_is_marked_by_its_code_without_its_text(traces):
    failed = AttemptResult(error=ErrorDetail(code="upstream_error", message=SECRET), endpoint="e0", attempts=1)
    serve(traces.tracing, record(), failed)
    for name in ("process requests", "chat m"):
        span = traces.spans[name]
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
        assert span.attributes["error.type"] == "upstream_error"


@pytest.mark.parametrize("error", [RuntimeError(SECRET), asyncio.CancelledError()])
def test_an_exception_ends_the_span_and_is_not_quoted(traces, error):
    with pytest.raises(type(error)), traces.tracing.processing(record()):
        raise error
    span = traces.spans["process requests"]
    assert (span.attributes["error.type"], span.events) == (type(error).__name__, ())


@pytest.mark.parametrize("header", [None, b"", b"00-zz", b"\xff\xfe", f"00-{'0' * 32}-{PARENT}-01".encode()])
def test_without_a_readable_parent_a_trace_starts_here(traces, header):
    sent: list[dict[str, str]] = []
    serve(traces.tracing, record(header), ANSWERED, sent)
    assert traces.spans["process requests"].parent is None
    assert sent[0]["traceparent"].split("-")[1] == f"{traces.spans['chat m'].context.trace_id:032x}"


def test_an_unsampled_trace_is_not_sampled_here_but_continued(traces):
    sent: list[dict[str, str]] = []
    unsampled = f"00-{TRACE}-{PARENT}-00".encode()
    serve(traces.tracing, record(unsampled), ANSWERED, sent)
    assert traces.spans == {}
    assert [headers["traceparent"].split("-")[1::2] for headers in sent] == [[TRACE, "00"]] * 2


def test_a_request_that_the_sampler_drops_has_no_spans_but_one_trace():
    traces = Traces(sampler=ALWAYS_OFF)
    sent: list[dict[str, str]] = []
    serve(traces.tracing, record(None), ANSWERED, sent)
    assert traces.spans == {}
    assert len({headers["traceparent"].split("-")[1] for headers in sent}) == 1
    assert not any(int(headers["traceparent"].split("-")[3], 16) & 1 for headers in sent)  # the flag "sampled"


async def test_concurrent_requests_have_a_trace_each(traces):
    sent: list[dict[str, str]] = []

    async def request() -> None:
        with traces.tracing.processing(record(None)):
            await asyncio.sleep(0)
            with traces.tracing.generating(INCOMING, DECISION):
                await asyncio.sleep(0)
                sent.append(traces.tracing.headers())

    await asyncio.gather(*(asyncio.create_task(request()) for _ in range(20)))
    assert len({headers["traceparent"].split("-")[1] for headers in sent}) == 20


@pytest.mark.parametrize(
    ("header", "carried"),
    [(None, {}), (CLIENT_TRACE.encode(), {"traceparent": CLIENT_TRACE})],
    ids=["none", "client's"],
)
def test_without_a_collector_the_clients_trace_is_passed_on_unchanged(header, carried):
    sent: list[dict[str, str]] = []
    tracing = Tracing(NoOpTracerProvider().get_tracer(TRACER_NAME), group="sprout.router")
    serve(tracing, record(header), ANSWERED, sent)
    assert sent == [carried, carried]


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_traces_are_made_where_the_environment_names_a_collector(environment, on):
    assert wanted(environment) is on


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "only 'grpc' is supported"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "only 'otlp' and 'none'"),
    ],
)
def test_what_is_not_offered_is_said(extra, said):
    with pytest.raises(TelemetryError, match=said):
        wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", **extra})


def test_the_resource_names_the_service_unless_the_environment_does(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    ours = tracer_provider("router", version="1")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,deployment.environment.name=lab")
    theirs = tracer_provider("router", version="1")
    assert ours.resource.attributes["service.name"] == "sprout.router"
    assert (theirs.resource.attributes["service.name"], theirs.resource.attributes["service.version"]) == ("mine", "1")
    assert theirs.resource.attributes["deployment.environment.name"] == "lab"
    for provider in (ours, theirs):
        provider.shutdown()
