"""A router with a model of TensorRT-LLM's LLM API: token counts, rejections, stop sequences and tenant defaults."""

from pathlib import Path

import pytest

from deploy.local.processes import Supervisor
from shared.messages import ResponseChunk
from shared.runtime.settings import KafkaSettings
from shared.topics import RESPONSE_CHUNKS
from tests.support.router import RouterProcess, fleet_toml, producing, reading, request, start_triton, until_committed
from tests.support.tokenizer import write_tokenizer

pytestmark = pytest.mark.integration

TENANT = """
[[tenants]]
name = "desk"
directive = "L2"
sampling = { max_tokens = 4 }
"""


async def test_the_llm_api_serves_requests_like_the_ensemble(
    kafka: KafkaSettings, supervisor: Supervisor, tmp_path: Path
) -> None:
    triton = start_triton(supervisor, tmp_path, name="llm-api-triton", contract="llm-api")
    write_tokenizer(tmp_path)
    template = 'chat_template = "llama-2"\n'
    fleet = tmp_path / "fleet.toml"
    models = fleet_toml([triton.address]).replace(template, template + 'tokenizer = "tokenizer.json"\n')
    fleet.write_text(models + TENANT)
    router = RouterProcess(supervisor, kafka, fleet)
    name = router.start()
    plain = {"sampling": {"max_tokens": 500}}
    async with producing(kafka) as producer, reading(kafka) as answers, reading(kafka, RESPONSE_CHUNKS) as chunks:
        await producer.prepare({"L0": 1.0})
        await producer.ask(
            request(1, **plain),
            request(2, stream=True, sampling={"max_tokens": 500, "stop": ["d word"]}),
            request(3, sampling={"max_tokens": 500, "repetition_penalty": 1.2}),
        )
        # Without the fields that the message class adds.
        await producer.raw(b'{"id": "r4", "prompt": "Question number 4?", "tenant": "desk"}', key=b"r4")
        await answers.ids(["r1", "r2", "r3", "r4"])
        responses = answers.responses()
        await until_committed(kafka)
        await chunks.read_to_end()
    pieces = [ResponseChunk.model_validate_json(record.value) for record in chunks.records]

    whole = responses["r1"]
    assert (whole.status, whole.text) == ("ok", "L0 says: " + "word " * 100)
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.usage.source) == (102, "tokenizer")
    assert whole.usage.prompt_tokens == 1 + len(["[INST]", "Question", "number", "1?", "[/INST]"])

    assert (responses["r2"].text, responses["r2"].finish_reason) == ("L0 says: wor", "stop")
    assert "".join(piece.text for piece in pieces) == "L0 says: wor"
    assert pieces[-1].finish_reason == "stop"

    refused = responses["r3"].error
    assert refused is not None
    assert refused.code == "invalid_request"
    assert "sampling.repetition_penalty cannot be served" in refused.message

    defaulted = responses["r4"]
    assert defaulted.decision is not None
    assert (defaulted.decision.level, defaulted.decision.source) == ("L2", "forced")
    assert defaulted.finish_reason == "length"
    assert defaulted.text is not None
    assert 0 < len(defaulted.text) < len("L2 says: " + "word " * 10) / 2

    log = router.log(name)
    assert "llm-api" in log
    assert "repetition_penalty" in log
    for process in (name, triton.name):
        supervisor.stop(process)
