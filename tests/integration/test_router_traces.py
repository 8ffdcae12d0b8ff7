"""A router process exports traces to a collector: real Kafka, real Triton, OTLP over gRPC."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from deploy.local.processes import Supervisor
from shared.runtime.settings import KafkaSettings
from shared.topics import REQUESTS, RESPONSE_CHUNKS, SAMPLES
from tests.support.deadlines import DEADLINE_S
from tests.support.router import (
    MODEL,
    RouterProcess,
    fleet_toml,
    producing,
    question,
    reading,
    request,
    start_triton,
    until_committed,
)

pytestmark = pytest.mark.integration

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the exports."""

    def __init__(self) -> None:
        self.exports: list[ExportTraceServiceRequest] = []

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:  # noqa: N802
        self.exports.append(request)
        return ExportTraceServiceResponse()

    def spans(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for export in self.exports:
            for resource in export.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        found.setdefault(span.name, []).append(span)
        return found


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    made = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield made, f"http://127.0.0.1:{port}"
    server.stop(None)


async def test_a_request_is_one_trace_from_the_producer_to_the_answer(
    supervisor: Supervisor, kafka: KafkaSettings, collector, tmp_path: Path
):
    received, endpoint = collector
    triton = start_triton(supervisor, tmp_path, name="tracing-triton")
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(fleet_toml([triton.address]))
    routers = RouterProcess(supervisor, kafka, fleet)
    async with producing(kafka) as producer:
        await producer.prepare({"L1": 1.0})
    name = routers.start(
        OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
        OTEL_BSP_SCHEDULE_DELAY="600000",  # spans are exported because the router is stopped
        SPROUT_ROUTER_SAMPLE_SHARE="1",
    )
    asked = request(3, directive="L1", stream=True, sampling={"max_tokens": 64}, task="qa")
    try:
        async with (
            producing(kafka) as producer,
            reading(kafka) as answers,
            reading(kafka, RESPONSE_CHUNKS) as chunks,
            reading(kafka, SAMPLES) as samples,
        ):
            await producer.raw(
                asked.model_copy(update={"directive": None}).model_dump_json().encode(),
                headers=[("traceparent", f"00-{TRACE}-{PARENT}-01".encode())],
            )
            await producer.raw(b"{broken")
            await answers.read(until=1)
            await samples.read(until=1)
            await chunks.read(until=2)
            await until_committed(kafka)
        assert received.exports == []
        routers.stop_gently(name, within_s=DEADLINE_S)
    finally:
        for one in (name, triton.name):
            supervisor.stop(one)
    spans = received.spans()
    resource = {one.key: one.value.string_value for one in received.exports[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "sprout.router"
    broken, processed = sorted(spans[f"process {kafka.topic(REQUESTS)}"], key=lambda span: span.trace_id.hex() == TRACE)
    assert _attributes(broken)["error.type"] == "invalid_json"
    (chat,) = spans[f"chat {MODEL}"]
    sends = {_attributes(span)["messaging.destination.name"]: span for span in [
        one for title, found in spans.items() if title.startswith("send ") for one in found
    ]}  # fmt: skip
    assert {one.trace_id.hex() for one in (processed, chat, *sends.values())} == {TRACE}
    assert processed.parent_span_id.hex() == PARENT
    assert {one.parent_span_id for one in (chat, *sends.values())} == {processed.span_id}
    attributes = _attributes(chat)
    assert (attributes["gen_ai.request.max_tokens"], attributes["gen_ai.usage.output_tokens"]) == (64, 30)
    assert (attributes["sprout.level"], attributes["sprout.endpoint"], attributes["sprout.attempts"]) == ("L1", "e0", 1)
    assert (attributes["sprout.group"], attributes["sprout.propensity"], attributes["sprout.policy_version"]) == (
        "qa",
        1.0,
        1,
    )
    for read in (answers, samples):
        (record,) = read.records
        assert _parent(record) == [TRACE, sends[record.topic].span_id.hex()]
    assert {_parent(record)[0] for record in chunks.records} == {TRACE}
    assert {_parent(record)[1] for record in chunks.records} <= {chat.span_id.hex(), processed.span_id.hex()}
    everything = b"".join(export.SerializeToString() for export in received.exports)
    for text in (question(3), "L1 says", "{broken", "Always answer briefly"):
        assert text.encode() not in everything


def _attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def _parent(record: Any) -> list[str]:
    return dict(record.headers)["traceparent"].decode().split("-")[1:3]
