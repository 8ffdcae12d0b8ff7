"""The content of a request appears in no log or metric, and its headers do not change where the response goes."""

import asyncio
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from deploy.local.processes import Supervisor
from deploy.triton.contract import INPUTS, OUTPUTS
from shared.kafka.admin import create_topics
from shared.messages import DeadLetter
from shared.runtime.settings import KafkaSettings
from shared.topics import DEAD_LETTERS, RESPONSES, SAMPLES, Cleanup, TopicSpec
from tests.support.deadlines import DEADLINE_S, REPLY_S
from tests.support.router import RouterProcess, fleet_toml, producing, reading, request, until_committed

pytestmark = pytest.mark.integration

MARKER = "MARKER-7f3a-never-to-be-logged"


class Echo(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A stand-in for a model server that is ready, fails every request, and quotes the prompt in its errors."""

    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        config = model_config_pb2.ModelConfig(name=request.name)
        for tensor in INPUTS:
            config.input.add(name=tensor.name, data_type=f"TYPE_{tensor.data_type}", optional=tensor.optional)
        for tensor in OUTPUTS:
            config.output.add(name=tensor.name, data_type=f"TYPE_{tensor.data_type}")
        config.model_transaction_policy.decoupled = True
        return service_pb2.ModelConfigResponse(config=config)

    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        asked = b"".join(next(request_iterator).raw_input_contents).decode(errors="replace")
        if "in the stream" in asked:
            yield service_pb2.ModelStreamInferResponse(error_message=f"cannot do {asked}")
        code = grpc.StatusCode.INVALID_ARGUMENT if "is refused" in asked else grpc.StatusCode.INTERNAL
        context.abort(code, f"cannot do {asked}")


@pytest.fixture
def echo() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def routers(supervisor: Supervisor, kafka: KafkaSettings, echo: str, tmp_path: Path) -> Iterator[RouterProcess]:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'{fleet_toml([echo])}\n[[tenants]]\nname = "desk"\nsystem = "{MARKER} system"\n')
    running = RouterProcess(supervisor, kafka, fleet)
    yield running
    for name in [name for name in supervisor.names if name.startswith(kafka.topic_prefix)]:
        supervisor.stop(name)


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=REPLY_S) as answer:
        return answer.read().decode()


async def test_no_failure_writes_a_prompt_to_log_or_metrics(kafka, routers):
    name = routers.start(
        SPROUT_LOG_LEVEL="DEBUG",
        SPROUT_ROUTER_MAX_ATTEMPTS="2",
        SPROUT_ROUTER_CONTROL_SEQUENCES="refuse",
        SPROUT_ROUTER_MAX_PROMPT_CHARS="1000",
    )
    poison = [
        f"{{{MARKER}".encode(),
        f'{{"prompt": ["{MARKER}"]}}'.encode(),
        f'{{"prompt": "a", "messages": "{MARKER}"}}'.encode(),
        f'{{"prompt": "a", "directive": "{MARKER}", "deadline": "{MARKER}"}}'.encode(),
        f'{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "system", "content": "{MARKER}"}}]}}'.encode(),
        MARKER.encode("utf-16"),
        f'{{"prompt": "a", "metadata": {{"{MARKER}": 3}}, "tenant": "desk"}}'.encode(),
        f'{{"id": "m", "prompt": "a", "metadata": {{"note": {{"{MARKER}": "{MARKER}"}}}}}}'.encode(),
    ]
    failing = [
        request(0, prompt=f"{MARKER} fails"),
        request(1, prompt=f"{MARKER} is refused"),
        request(2, prompt=f"{MARKER} fails in the stream", stream=True),
        request(3, prompt=f"[INST] {MARKER} <<SYS>>"),
        request(4, prompt=MARKER * 100),
        request(5, prompt="a", model=MARKER),
        request(6, prompt="a", directive="L7", metadata={"note": MARKER}),
        request(8, prompt=f"{MARKER} fails", sampling={"stop": [MARKER]}, tenant=MARKER),
        request(9, prompt="fails", tenant="desk", metadata={MARKER: MARKER}),
    ]
    async with (
        producing(kafka) as producer,
        reading(kafka) as answers,
        reading(kafka, DEAD_LETTERS) as letters,
    ):
        for value in poison:
            await producer.raw(value, headers=[("note", MARKER.encode())])
        await producer.ask(*failing)
        await letters.read(until=len(poison))
        await answers.read(until=len(failing) + 1)
        reasons = [DeadLetter.model_validate_json(record.value).detail for record in letters.records]
        assert not any(MARKER in reason for reason in reasons)
        codes = {name: response.error.code for name, response in answers.responses().items()}
    assert codes == {
        "r0": "upstream_error",
        "r1": "invalid_request",
        "r2": "upstream_error",
        "r3": "invalid_request",
        "r4": "prompt_too_large",
        "r5": "unknown_model",
        "r6": "unknown_level",
        "r8": "upstream_error",
        "r9": "upstream_error",
        "m": "invalid_request",
    }
    assert MARKER not in answers.responses()["m"].error.message
    url = routers.supervisor.process(name).spec.url
    for path in ("/metrics", "/ready"):
        try:
            text = await asyncio.to_thread(page, url + path)
        except urllib.error.HTTPError as error:  # not ready: its endpoint fails
            text = error.read().decode()
        assert MARKER not in text
    routers.stop_gently(name, within_s=DEADLINE_S)
    log = routers.log(name)
    assert "dead letter" in log
    assert "circuit breaker opened, endpoint ejected" in log
    assert MARKER not in log


async def test_responses_go_to_the_configured_topics_whatever_headers_a_request_has(kafka, routers):
    elsewhere = TopicSpec(
        name="elsewhere",
        description="Another topic",
        message=RESPONSES.message,
        key="any",
        partitions=1,
        cleanup=Cleanup.DELETE,
        retention_ms=60_000,
    )
    await create_topics(kafka, specs=(elsewhere,))
    topic = kafka.topic(elsewhere).encode()
    routers.start(SPROUT_ROUTER_SAMPLE_SHARE="1")
    headers = [(name, topic) for name in ("reply_to", "reply-to", "replyTo", "kafka_replyTopic", "correlation_id")]
    async with (
        producing(kafka) as producer,
        reading(kafka) as answers,
        reading(kafka, elsewhere) as diverted,
        reading(kafka, SAMPLES) as samples,
    ):
        for number in range(4):
            asked = request(number, prompt=f"{number} is refused", reply_to=topic.decode(), stream=number % 2 == 0)
            value = asked.model_dump_json(exclude_none=True).encode()
            await producer.raw(value, headers=headers, key=b"k")
        await producer.raw(b"{broken", headers=headers)
        await answers.read(until=4)
        await until_committed(kafka)
        assert len(await answers.read_to_end()) == 4
        assert await diverted.read_to_end() == []
        assert await samples.read_to_end() == []
    assert {record.topic for record in answers.records} == {kafka.topic(RESPONSES)}
