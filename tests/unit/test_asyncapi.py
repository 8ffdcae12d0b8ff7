"""`sprout asyncapi`: the document of every service, valid, and true to the messages."""

import copy
import functools
import json
import re
import socket
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from services import SERVICES
from shared import topics
from shared.topics import TOPICS, TopicSpec
from tests.support.contract import EXAMPLES, check_record, documents, groups_of, official_validator
from tools.cli.main import app

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
def test_a_document_has_health_and_readiness(described, service):
    assert {"http-health", "http-ready"} <= set(described[service]["operations"])


def test_requests_are_answered_on_three_topics(described):
    operations = described["router"]["operations"]
    for name, answers, message in (
        ("receive-requests", "responses", "GenerationResponse"),
        ("receive-requests-response-chunks", "response-chunks", "ResponseChunk"),
        ("receive-requests-replies", "replies", "Reply"),
    ):
        assert operations[name]["reply"] == {
            "channel": {"$ref": f"#/channels/{answers}"},
            "messages": [{"$ref": f"#/channels/{answers}/messages/{message}"}],
        }
    replying = operations["receive-requests-replies"]
    assert "reply_partition" in replying["description"]
    assert described["gateway"]["operations"]["send-requests"]["reply"] == replying["reply"]
    messages = described["router"]["components"]["messages"]
    assert messages["GenerationRequest"]["correlationId"] == {"location": "$message.payload#/id"}
    assert messages["GenerationResponse"]["correlationId"] == {"location": "$message.payload#/request_id"}
    assert {topics.SOURCE_HEADER, "traceparent", "content-type"} <= set(
        messages["GenerationResponse"]["headers"]["properties"]
    )


@pytest.mark.parametrize(
    ("service", "topic", "when"),
    [
        ("carbon_feed", "carbon-intensity", "before a leader publishes"),
        ("router", "responses", "Whenever partitions of requests have been assigned"),
        ("router", "dead-letters", "Whenever partitions of requests have been assigned"),
        ("router", "policies", "before requests are started"),
        ("optimizer", "policies", "before the copy makes policies as the leader"),
        ("gateway", "policies", "before the gateway is ready"),
        ("gateway", "replies", "One partition"),
        ("ledger", "load-reports", "Only what is published after the start"),
        ("ledger", "responses", "by one copy of the service"),
    ],
)
def test_a_document_says_when_a_topic_is_read(described, service, topic, when):
    operation = described[service]["operations"][f"receive-{topic}"]
    assert when in operation["description"]
    assert groups_of(operation) == (["sprout.ledger.responses"] if (service, topic) == ("ledger", "responses") else [])


def test_the_topics_of_lanes_are_described_like_requests(monkeypatch):
    monkeypatch.setenv("SPROUT_GATEWAY_BATCH_LANE", "later")
    assert CliRunner().invoke(app, ["asyncapi", "gateway"]).exit_code == 1
    monkeypatch.setenv("SPROUT_ROUTER_LANES", "requests:4,later:1")
    found = documents()
    for service, name in (("router", "receive-later-replies"), ("gateway", "send-later")):
        assert found[service]["operations"][name]["reply"]["channel"] == {"$ref": "#/channels/replies"}
        assert found[service]["channels"]["later"]["address"] == "here.later"
        official_validator().validate(found[service])


def test_a_topic_is_read_and_written_only_where_that_is_noted():
    """Every other way around `shared/kafka` would be missing in the documents."""
    clients = re.compile(r"\bAIOKafka(Consumer|Producer)\(|\bbroker\.(subscriber|publisher|publish|request)\(")
    root = Path(topics.__file__).parents[1]
    files = [path for folder in ("services", "shared") for path in sorted((root / folder).rglob("*.py"))]
    found = {str(path.relative_to(root)) for path in files if clients.search(path.read_text(encoding="utf-8"))}
    # Of what is noted: `reading` inspects it, and `unreadable` reads it with care.
    noted = {"subscribe", "since", "publish", "producer"}
    assert found == {f"shared/kafka/{name}.py" for name in (*noted, "reading", "unreadable")}


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
