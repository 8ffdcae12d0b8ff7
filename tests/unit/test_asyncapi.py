"""`sprout asyncapi`: the document of every service, valid, and true to the messages."""

import copy
import functools
import json
import socket

import jsonschema
import pytest
from typer.testing import CliRunner

from services import SERVICES
from shared import topics
from shared.topics import TOPICS, TopicSpec
from tests.support.contract import EXAMPLES, check_record, documents, official_validator
from tools.cli.main import app

RECEIVED = {
    "carbon_feed": set(),
    "gateway": {"replies", "policies", "footprints", "carbon-intensity", "capacity", "metered-savings"},
    "router": {
        "requests",
        "requests-batch",
        "cancellations",
        "policies",
        "prompt-groups",
        "carbon-intensity",
        "power-curves",
        "capacity",
    },
    "optimizer": {"carbon-intensity", "footprints", "quality", "prompt-groups", "power-curves", "load-reports"},
    "evaluator": {"samples", "carbon-intensity", "footprints", "policies", "power-curves", "capacity"},
    "ledger": {
        "responses",
        "usage",
        "carbon-intensity",
        "policies",
        "quality",
        "prompt-groups",
        "load-reports",
        "capacity",
    },
}
SENT = {
    "carbon_feed": {"carbon-intensity", "dead-letters"},
    "gateway": {"requests", "requests-batch", "cancellations", "dead-letters"},
    "router": {"responses", "response-chunks", "replies", "samples", "load-reports", "dead-letters"},
    "optimizer": {"policies", "capacity", "dead-letters"},
    "evaluator": {"quality", "usage", "prompt-groups", "load-reports", "dead-letters"},
    "ledger": {"footprints", "power-curves", "metered-savings", "dead-letters"},
}
HEADERS = [("content-type", b"application/json"), ("correlation_id", b"1")]


all_documents = functools.cache(documents)


@pytest.fixture
def described():
    return all_documents()


@pytest.fixture(autouse=True)
def _nothing_is_configured_or_reachable(tmp_path, monkeypatch):
    def connect(*_):
        raise AssertionError("it connects")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("SPROUT_FLEET_FILE", "/absent")
    monkeypatch.setenv("SPROUT_ROUTER_MAX_IN_FLIGHT", "not a number")
    monkeypatch.setenv("SPROUT_KAFKA_TOPIC_PREFIX", "here.")


def references(part):
    """Every `$ref` in a part of a document."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref":
                yield value
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


@pytest.mark.parametrize("service", SERVICES)
def test_a_document_is_valid_and_its_references_resolve(described, service):
    document = described[service]
    official_validator().validate(document)
    for reference in references(document):
        found = document
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
    assert document["info"]["title"] == f"Sprout {service}"
    assert document["info"]["description"] == SERVICES[service].description


def test_the_validator_rejects_an_invalid_document(described):
    document = copy.deepcopy(described["router"])
    document["operations"]["receive-requests"]["action"] = "consume"
    with pytest.raises(jsonschema.ValidationError):
        official_validator().validate(document)


@pytest.mark.parametrize("service", SERVICES)
def test_a_document_names_the_topics_that_are_read_and_written(described, service):
    operations = described[service]["operations"]
    found = {"receive": set(), "send": set()}
    for name, operation in operations.items():
        if not name.startswith("http-"):
            found[operation["action"]].add(operation["channel"]["$ref"].rpartition("/")[2])
    assert found == {"receive": RECEIVED[service], "send": SENT[service]}
    assert {"http-health", "http-ready"} <= set(operations)


def test_requests_are_answered_on_responses(described):
    operation = described["router"]["operations"]["receive-requests"]
    assert operation["reply"] == {
        "channel": {"$ref": "#/channels/responses"},
        "messages": [{"$ref": "#/channels/responses/messages/GenerationResponse"}],
    }
    messages = described["router"]["components"]["messages"]
    assert messages["GenerationRequest"]["correlationId"] == {"location": "$message.payload#/id"}
    assert messages["GenerationResponse"]["correlationId"] == {"location": "$message.payload#/request_id"}
    assert {topics.SOURCE_HEADER, "traceparent", "content-type"} <= set(
        messages["GenerationResponse"]["headers"]["properties"]
    )


@pytest.mark.parametrize("spec", TOPICS, ids=lambda spec: spec.name)
def test_a_document_describes_single_messages_with_key_and_headers(described, spec: TopicSpec):
    describing = [document for document in described.values() if spec.name in document["channels"]]
    assert describing
    for document in describing:
        check_record(document, spec, key=b"k", value=EXAMPLES[spec.name].model_dump_json().encode(), headers=HEADERS)
        with pytest.raises(jsonschema.ValidationError):
            check_record(document, spec, key=b"k", value=b"[]", headers=HEADERS)
        with pytest.raises(jsonschema.ValidationError):
            check_record(document, spec, key=None, value=EXAMPLES[spec.name].model_dump_json().encode(), headers=[])


def test_every_message_has_a_channel_with_its_address_and_retention(described):
    channel = described["ledger"]["channels"]["footprints"]
    assert channel["address"] == "here.footprints"
    assert channel["bindings"]["kafka"]["topicConfiguration"]["retention.ms"] == topics.FOOTPRINTS.retention_ms


def test_an_unknown_service_is_answered_with_the_known_ones():
    result = CliRunner().invoke(app, ["asyncapi", "unknown"])
    assert result.exit_code == 1
    assert "router" in result.stderr


def test_documents_are_printed_or_written(tmp_path):
    printed = CliRunner().invoke(app, ["asyncapi", "carbon-feed", "--json"])
    assert json.loads(printed.stdout)["channels"]["carbon-intensity"]["address"] == "here.carbon-intensity"
    result = CliRunner().invoke(app, ["asyncapi", "router", "--out", str(tmp_path / "docs" / "router.yaml")])
    assert result.exit_code == 0, result.output
    assert "here.requests" in (tmp_path / "docs" / "router.yaml").read_text()
