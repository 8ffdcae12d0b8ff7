"""`sprout asyncapi`: every service's contract, generated from its code without connecting to anything."""

import json
import socket

import pytest
from typer.testing import CliRunner

from tools.cli.main import app

TOPICS = {
    "carbon_feed": {"carbon-intensity"},
    "router": {"requests", "responses", "response-chunks", "samples", "policies", "carbon-intensity"},
    "optimizer": {"carbon-intensity", "footprints", "quality", "policies"},
    "evaluator": {"samples", "carbon-intensity", "quality", "usage"},
    "ledger": {"responses", "usage", "carbon-intensity", "footprints"},
}
"""What a reader must find in each document; the rest is the service's own affair."""


@pytest.fixture(autouse=True)
def _nothing_is_configured_or_reachable(tmp_path, monkeypatch):
    def connect(*_):
        raise AssertionError("it connects")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.delenv("SPROUT_FLEET_FILE", raising=False)
    monkeypatch.setenv("SPROUT_KAFKA_TOPIC_PREFIX", "here.")


@pytest.mark.parametrize("service", TOPICS)
def test_the_document_names_the_topics_and_describes_their_messages(service):
    result = CliRunner().invoke(app, ["asyncapi", service, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    addresses = {channel["address"] for channel in document["channels"].values()}
    assert {f"here.{topic}" for topic in TOPICS[service]} <= addresses
    assert document["components"]["schemas"]
    assert document["info"]["title"] == f"Sprout {service}"


def test_an_unknown_service_is_answered_with_those_there_are():
    result = CliRunner().invoke(app, ["asyncapi", "gateway"])
    assert result.exit_code == 1
    assert "router" in result.stderr


def test_files_are_written_for_all_where_a_folder_is_named(tmp_path):
    result = CliRunner().invoke(app, ["asyncapi", "router", "--out", str(tmp_path / "docs" / "router.yaml")])
    assert result.exit_code == 0, result.output
    assert "here.requests" in (tmp_path / "docs" / "router.yaml").read_text()
