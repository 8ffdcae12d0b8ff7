"""How topics of a deployment differ from their declarations, and what a plan does with existing ones."""

import json
from pathlib import Path

import pytest

from shared.kafka.admin import TopicState, durability_problems, plan_topic
from shared.kafka.topic_settings import TopicSettings, TopicSettingsError, TopicTarget, load_topic_settings
from shared.topics import REQUESTS, SAMPLES

MINUTE_MS = 60_000


def test_by_default_topics_are_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_topic_settings().target(REQUESTS)
    assert (target.partitions, target.replication_factor) == (REQUESTS.partitions, 1)
    assert target.configuration == {**REQUESTS.configuration(), "min.insync.replicas": "1"}


def test_variables_and_a_file_say_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "topics.toml"
    file.write_text(
        "replication_factor = 3\nmin_insync_replicas = 2\n"
        "[topics.requests]\npartitions = 48\nretention_h = 0.5\n[topics.samples]\nmin_insync_replicas = 1\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("SPROUT_TOPICS_FILE", str(file))
        from_file = load_topic_settings()
    monkeypatch.setenv("SPROUT_TOPICS_REPLICATION_FACTOR", "3")
    monkeypatch.setenv("SPROUT_TOPICS_MIN_INSYNC_REPLICAS", "2")
    overrides = {"requests": {"partitions": 48, "retention_h": 0.5}, "samples": {"min_insync_replicas": 1}}
    monkeypatch.setenv("SPROUT_TOPICS_OVERRIDES", json.dumps(overrides))
    for settings in (from_file, load_topic_settings()):
        target = settings.target(REQUESTS)
        assert (target.partitions, target.replication_factor) == (48, 3)
        assert target.configuration["retention.ms"] == str(30 * MINUTE_MS)
        assert target.configuration["segment.ms"] == str(10 * MINUTE_MS)
        assert target.configuration["min.insync.replicas"] == "2"
        assert settings.target(SAMPLES).configuration["min.insync.replicas"] == "1"
    assert load_topic_settings(replication_factor=2).target(REQUESTS).replication_factor == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("replication_factor = 0", "replication_factor"),
        ("min_insync_replicas = 2", "larger than replication_factor"),
        ("copies = 3", "unknown settings: copies"),
        ("replication_factor = ", "cannot be read"),
        ("[topics.request]\npartitions = 2", "no topic 'request' is declared"),
        ("[topics.requests]\npartition = 2", "partition"),
        ("[topics.policies]\npartitions = 2", "policies must have one partition"),
        ("[topics.policies]\nretention_h = 2", "policies has no retention"),
    ],
)
def test_settings_that_cannot_be_used_are_named(
    content: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "topics.toml"
    file.write_text(content)
    monkeypatch.setenv("SPROUT_TOPICS_FILE", str(file))
    with pytest.raises(TopicSettingsError, match=message):
        load_topic_settings()


def found(**configuration: str) -> TopicState:
    return TopicState(12, 3, {"retention.ms": "100", "cleanup.policy": "delete", **configuration}, {})


@pytest.mark.parametrize(
    ("partitions", "copies", "wanted", "how"),
    [
        (12, 3, {}, {}),
        (13, 3, {}, {"partitions": "apply"}),
        (11, 3, {}, {"partitions": "manual"}),
        (12, 2, {}, {"replication.factor": "manual"}),
        (12, 3, {"retention.ms": "200", "x": "1"}, {"retention.ms": "apply", "x": "apply"}),
        (12, 3, {"retention.ms": "99"}, {"retention.ms": "loses"}),
        (12, 3, {"cleanup.policy": "compact"}, {"cleanup.policy": "apply"}),
    ],
)
def test_a_plan_says_what_loses_nothing(
    partitions: int, copies: int, wanted: dict[str, str], how: dict[str, str]
) -> None:
    plan = plan_topic("t", TopicTarget(partitions, copies, wanted), found())
    assert {one.setting: one.how for one in plan} == how


def test_what_loses_records_or_weakens_acknowledgements_is_marked() -> None:
    compacted = found(**{"cleanup.policy": "compact", "retention.ms": "-1", "min.insync.replicas": "2"})
    wanted = {"cleanup.policy": "compact,delete", "retention.ms": "100", "min.insync.replicas": "1"}
    plan = plan_topic("t", TopicTarget(12, 3, wanted), compacted)
    assert {one.setting: one.how for one in plan} == dict.fromkeys(wanted, "loses")
    (creation,) = plan_topic("t", TopicTarget(12, 3, wanted), None)
    assert str(creation) == "t: create with 12 partitions, replication factor 3"


def test_topics_that_do_not_hold_what_is_promised_are_named() -> None:
    assert durability_problems(REQUESTS, found(**{"min.insync.replicas": "2"})) == []
    assert durability_problems(REQUESTS, TopicState(12, 1, {"min.insync.replicas": "1"}, {})) == []
    (weak,) = durability_problems(REQUESTS, found(**{"min.insync.replicas": "1"}))
    assert "lost with one broker" in weak
    (few,) = durability_problems(REQUESTS, TopicState(3, 1, {}, {}))
    assert few == "the topic has 3 partitions, and is declared with 12"
    assert TopicSettings().target(REQUESTS).partitions == 12
