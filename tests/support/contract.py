"""Contract tests: what carries the messages (memory or real Kafka), AsyncAPI documents, an example of every message."""

import gzip
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
from faststream.kafka import KafkaBroker, TestKafkaBroker

from services import SERVICES
from shared.messages import (
    Cancellation,
    CapacityForecast,
    CarbonIntensity,
    ChatMessage,
    DeadLetter,
    Decision,
    EndpointCurve,
    EndpointLoad,
    EvaluationCost,
    Footprint,
    GenerationRequest,
    GenerationResponse,
    GroupEvidence,
    GroupTaken,
    IntensityPoint,
    LimitOutcome,
    LoadReport,
    Message,
    OptionEstimate,
    PackedArray,
    Paired,
    Policy,
    PolicyInputs,
    PoolCapacity,
    PoolLoad,
    PromptGrouping,
    Quality,
    QualityCount,
    Reply,
    ResponseChunk,
    Sample,
    SavingOnMeter,
    ServedAnswer,
    Timing,
    Usage,
    UsageRecord,
)
from shared.runtime.settings import KafkaSettings
from shared.topics import TopicSpec
from tests.support.deadlines import until
from tools.cli.asyncapi import describe_service

DATA = Path(__file__).parent.parent / "data"
NOW = datetime(2024, 2, 3, 12, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Medium:
    """What carries the messages of a test."""

    kafka: KafkaSettings
    in_memory: bool

    @asynccontextmanager
    async def running(self, broker: KafkaBroker) -> AsyncIterator[None]:
        """The broker, with its subscribers running."""
        if self.in_memory:
            async with TestKafkaBroker(broker):
                yield
            return
        await broker.start()
        try:
            yield
        finally:
            await broker.stop()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; in memory it holds at once."""
        await until(condition)


def official_validator() -> jsonschema.Draft7Validator:
    """The official JSON schema of AsyncAPI 3.0.0 documents."""
    with gzip.open(DATA / "asyncapi-3.0.0.json.gz") as file:
        return jsonschema.Draft7Validator(json.load(file))


def documents() -> dict[str, dict[str, Any]]:
    """The AsyncAPI document of every service."""
    return {name: describe_service(service) for name, service in SERVICES.items()}


def kafka_operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The operations of a document on topics."""
    return [one for name, one in document["operations"].items() if not name.startswith("http-")]


def groups_of(operation: dict[str, Any]) -> list[str]:
    """The consumer groups of an operation."""
    return operation.get("bindings", {}).get("kafka", {}).get("groupId", {}).get("enum", [])


def check_record(
    document: dict[str, Any], spec: TopicSpec, *, key: bytes | None, value: bytes, headers: Iterable[tuple[str, bytes]]
) -> None:
    """Check a Kafka record against the message that a document describes for its topic.

    Raises:
        jsonschema.ValidationError: value, key or headers differ from the description.
    """
    (reference,) = document["channels"][spec.name]["messages"].values()
    message = document["components"]["messages"][reference["$ref"].rpartition("/")[2]]
    assert message["contentType"] == "application/json"
    parts = (
        (message["payload"], json.loads(value)),
        (message["headers"], {name: content.decode() for name, content in headers}),
        (message["bindings"]["kafka"]["key"], None if key is None else key.decode()),
    )
    for schema, instance in parts:
        jsonschema.Draft7Validator({"allOf": [schema], "components": document["components"]}).validate(instance)


_COUNT = QualityCount(
    group="g1", option="p/L1", metric="preference", successes=3.5, trials=5,
    paired=Paired(reference="p/L0", successes=4, both=3),
)  # fmt: skip

EXAMPLES: dict[str, Message] = {
    "requests": GenerationRequest(id="r1", prompt="Why?", directive="!L2", stream=True, metadata={"a": "b"}),
    "requests-batch": GenerationRequest(id="r1", prompt="Why?"),
    "responses": GenerationResponse(
        request_id="r1", model="m", status="ok", text="Because.", finish_reason="stop", endpoint="e0",
        decision=Decision(source="policy", group="g1", pool="p", level="L1", zone="GB", policy_version=1,
                          propensity=0.5, propensities={"p/L0": 0.5, "p/L1": 0.5}),
        usage=Usage(prompt_tokens=3, completion_tokens=2, source="server"),
        timing=Timing(received_at=NOW, started_at=NOW, first_token_at=NOW, finished_at=NOW), requested_at=NOW,
    ),
    "response-chunks": ResponseChunk(request_id="r1", stream="s", sequence=0, text="Be"),
    "replies": Reply(request_id="r1", chunk=ResponseChunk(request_id="r1", stream="s", sequence=0, text="Be")),
    "cancellations": Cancellation(request_id="r1", record="requests/0/1/2", cancelled_at=NOW),
    "samples": Sample(
        request_id="r1", model="m", group="g1", messages=(ChatMessage(role="user", content="Why?"),), sampled_at=NOW,
        served=ServedAnswer(option="p/L1", directive="Be brief.", text="Because.", completion_tokens=2, processing_s=1),
    ),
    "usage": UsageRecord(
        id="u1", purpose="judge", evaluation_id="ev", model="j", pool="p", level="L0", zone="GB", endpoint="e0",
        group="g1", started_at=NOW, finished_at=NOW, completion_tokens=1,
    ),
    "carbon-intensity": CarbonIntensity(
        zone="GB", latest=IntensityPoint(at=NOW, intensity_g_per_kwh=200),
        history=(IntensityPoint(at=NOW - timedelta(hours=1), intensity_g_per_kwh=210),), source="trace x.csv",
        published_at=NOW,
    ),
    "footprints": Footprint(
        request_id="r1", purpose="request", model="m", group="g1", pool="p", level="L1", zone="GB", endpoint="e0",
        started_at=NOW, finished_at=NOW, processing_s=1, completion_tokens=2, finish_reason="stop", energy_j=60,
        intensity_g_per_kwh=200, operational_g=0.003, embodied_g=0.001, total_g=0.004,
    ),
    "quality": Quality(
        evaluation_id="ev", model="m", evaluated_at=NOW, trigger="overdue", counts=(_COUNT,), prompts=5, abstentions=0,
        cost=EvaluationCost(generations=10, judgements=10, completion_tokens=100, processing_s=5),
    ),
    "prompt-groups": PromptGrouping(
        model="m", version="v1", learned_at=NOW, prompts=600, names=("g1",), families={"g1": "f1"},
        arrays={"means": PackedArray(dtype="<f4", shape=(1, 2), data="eJw=")}, traffic={"g1": 1.0},
        evidence=(GroupEvidence(evaluated_at=NOW, counts=(_COUNT,)),),
        taken=(GroupTaken(group="g1", option="p/L1", requests=5, energy_kwh=0.1, processing_s=5),),
    ),
    "policies": Policy(
        model="m", version=1, created_at=NOW, valid_until=NOW, status="optimal", reason="first", reference="p/L0",
        groups={"g1": {"p/L0": 0.5, "p/L1": 0.5}}, overall={"p/L0": 1.0}, bounds={"preference": 0.9},
        limits={"preference": LimitOutcome(required=0.9, mean=0.95, margin=0.05, carbon_points_per_point=1.2)},
        extra_g={"g1": {"p/L0": 0.0, "p/L1": 0.0}},
        expected_quality={"preference": 0.95}, expected_g_per_request=0.02, reference_g_per_request=0.05,
        inputs=PolicyInputs(
            solved_for=NOW, intensity_g_per_kwh={"GB": 200}, k0_zone="GB", k0_g_per_kwh=200, k0_min_g_per_kwh=100,
            k0_max_g_per_kwh=300, xi={"preference": 0.1}, weights={"g1": 1}, holdout=0.02, cautions={"preference": 1.6},
            estimates={"g1": {"p/L1": OptionEstimate(energy_kwh=0.1, processing_s=1, quality={"preference": 0.9},
                                                     doubt={"preference": (0.1, 0.05, 0.02)})}},
        ),
    ),
    "load-reports": LoadReport(
        instance="router-1", service="router", at=NOW, interval_s=1, share=0.5,
        pools=(PoolLoad(pool="p", arrivals=3, waiting=0,
                        endpoints={"e0": EndpointLoad(in_flight=2, oldest_started_at=NOW)}),),
    ),
    "power-curves": EndpointCurve(
        endpoint="e0", pool="p", at=NOW, idle_w=100, step_j=3.7, token_j=0.08, step_s=0.012, token_s=0.00013,
        standard_errors={"step_j": 0.1}, identifiable=True, intervals=300, mean_batch=12.5, mean_prompt_tokens=200,
    ),
    "capacity": PoolCapacity(
        pool="p", at=NOW, valid_until=NOW + timedelta(minutes=10), requests_per_s=0.5, in_flight=20, target_batch=64,
        endpoints=2, endpoints_needed=1, forecast=(CapacityForecast(at=NOW + timedelta(hours=1), endpoints_needed=2),),
        awake=("e0",), reason="20 requests need 1 endpoint",
    ),
    "metered-savings": SavingOnMeter(window="day", since=NOW, at=NOW, saved_g=1.0, blocks=4),
    "dead-letters": DeadLetter(
        service="router", topic="requests", partition=0, offset=1, key_base64=None, value_base64="ew==",
        reason="invalid_json", detail="message: invalid", failed_at=NOW,
    ),
}  # fmt: skip
"""An example of every topic's message, most optional fields set."""
