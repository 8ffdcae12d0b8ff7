"""The table of ACLs is what the services' AsyncAPI documents say; the commands grant nothing else."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services import SERVICES
from shared.access import ACCESS, acl_arguments, leader_group
from shared.runtime.settings import KafkaSettings
from shared.topics import CANCELLATIONS, POLICIES, REQUESTS, REQUESTS_BATCH, TOPICS
from tests.support.contract import documents, groups_of, kafka_operations
from tools.cli.main import app

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"


def test_every_service_may_do_what_its_document_says_and_no_more() -> None:
    for name, document in documents().items():
        found = kafka_operations(document)
        access, groups = ACCESS[name], {group for one in found for group in groups_of(one)}
        for action, allowed in (("receive", access.reads), ("send", access.writes)):
            used = {one["channel"]["$ref"].rpartition("/")[2] for one in found if one["action"] == action}
            assert {spec.name for spec in allowed} == used, f"shared/access.py: what {name} may {action}"
        assert set(map(KafkaSettings().group, access.groups)) - {KafkaSettings().group(leader_group(name))} == groups


def test_only_the_optimizer_and_the_operator_can_steer_routers() -> None:
    writers = {name for name, access in ACCESS.items() if POLICIES in access.writes}
    assert writers == {"optimizer"}
    assert ACCESS["client"].writes == (REQUESTS, REQUESTS_BATCH, CANCELLATIONS)


def test_every_command_names_one_principal_and_one_resource() -> None:
    kafka = KafkaSettings(topic_prefix="s.", group_prefix="g.")
    commands = list(acl_arguments(kafka, {name: f"User:{name}" for name in ACCESS}))
    assert len(commands) == len(set(commands))
    assert ("--allow-principal", "User:router", "--operation", "Write", "--topic", "s.responses") in commands
    assert ("--allow-principal", "User:router", "--operation", "Read", "--group", "g.router") in commands
    assert not any("User:client" in command and "Read" in command and "s.requests" in command for command in commands)


def test_the_command_prints_what_a_shell_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPROUT_KAFKA_BOOTSTRAP_SERVERS", "k:9092")
    result = CliRunner().invoke(app, ["topics", "acls", "carbon-feed"])
    start = "kafka-acls.sh --bootstrap-server k:9092 --add --allow-principal User:sprout-carbon-feed --operation"
    assert result.output.splitlines() == [
        f"{start} Read --topic sprout.carbon-intensity",
        f"{start} Write --topic sprout.carbon-intensity",
        f"{start} Write --topic sprout.dead-letters",
        f"{start} Read --group sprout.carbon_feed.leader",
    ]
    assert CliRunner().invoke(app, ["topics", "acls", "nobody"]).exit_code == 1


def test_the_document_has_the_same_table() -> None:
    rows = [line.split("|")[1:-1] for line in SECURITY.read_text().splitlines() if line.startswith("| `")]
    found = {name.strip(" `"): [set(re.findall(r"`([^`]+)`", cell)) for cell in cells] for name, *cells in rows}
    for name in (*SERVICES, "sleeper", "client", "operator"):
        access = ACCESS[name]
        reads = {spec.name for spec in access.reads}
        reads = {"all"} if reads == {spec.name for spec in TOPICS} else reads
        assert found[name] == [reads, {spec.name for spec in access.writes}, set(access.groups)], name
