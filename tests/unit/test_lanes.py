"""Lanes: topics of requests with their weights, and the topics and access that follow."""

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from services.router.settings import RouterSettings
from shared.access import ACCESS, acl_arguments
from shared.kafka.topic_settings import LaneSettings, all_topics
from shared.runtime.settings import KafkaSettings
from shared.topics import REQUESTS, TOPICS
from tools.cli.main import app

LANES = "requests:4, requests-batch:1"


def test_lanes_are_topics_like_requests(monkeypatch):
    assert LaneSettings().lanes == {"requests": 1}
    assert all_topics() == TOPICS
    monkeypatch.setenv("SPROUT_ROUTER_LANES", LANES)
    assert RouterSettings().lanes == {"requests": 4, "requests-batch": 1}
    first, batch = RouterSettings().lane_topics
    assert first is REQUESTS
    assert (batch.name, batch.message, batch.partitions) == ("requests-batch", REQUESTS.message, REQUESTS.partitions)
    assert all_topics() == (*TOPICS, batch)


@pytest.mark.parametrize(
    ("lanes", "problem"),
    [
        ("batch:1", "the lane requests is missing"),
        ("", "the lane requests is missing"),
        ("requests", "give TOPIC:WEIGHT"),
        ("requests:1,requests:2", "each topic once"),
        ("requests:1,Batch:1", "is no name of a topic"),
        ("requests:1,responses:1", "responses is a topic of other messages"),
        ("requests:0", "greater than or equal to 1"),
        ("requests:many", "valid integer"),
    ],
)
def test_what_is_wrong_with_lanes_is_said(monkeypatch, lanes, problem):
    monkeypatch.setenv("SPROUT_ROUTER_LANES", lanes)
    with pytest.raises(ValidationError, match=problem):
        RouterSettings()
    result = CliRunner().invoke(app, ["topics", "acls"])
    assert result.exit_code == 1
    assert problem in result.output


def test_who_may_use_requests_may_use_every_lane(monkeypatch):
    monkeypatch.setenv("SPROUT_ROUTER_LANES", LANES)
    kafka = KafkaSettings(topic_prefix="s.")
    (batch,) = LaneSettings().further_topics
    commands = list(acl_arguments(kafka, {name: name for name in ACCESS}, lanes=(batch,)))
    granted = {(command[1], command[3]) for command in commands if "s.requests-batch" in command}
    assert granted == {(command[1], command[3]) for command in commands if "s.requests" in command}
    assert ("client", "Write") in granted
    result = CliRunner().invoke(app, ["topics", "acls", "router"])
    assert "--operation Read --topic sprout.requests-batch" in result.output
