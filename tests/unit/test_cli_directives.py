"""`sprout directives try`: messages where it cannot run."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.local.processes import free_ports
from tests.support.evaluator import judged_fleet
from tests.support.fleets import fleet_toml
from tools.cli.main import app


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPROUT_LOCAL_STATE", str(tmp_path))
    monkeypatch.setenv("SPROUT_EVALUATOR_ENDPOINT_CHECK_TIMEOUT_S", "0.5")
    monkeypatch.delenv("SPROUT_KAFKA_BOOTSTRAP_SERVERS", raising=False)
    (tmp_path / "c.json").write_text(json.dumps({"directives": [{"level": "L3", "text": "In one sentence."}]}))
    (tmp_path / "fleet.toml").write_text(judged_fleet(f"127.0.0.1:{free_ports(1)[0]}"))
    return tmp_path


def run(folder: Path, *arguments: str):
    options = ["--candidates", str(folder / "c.json"), "--fleet", str(folder / "fleet.toml"), *arguments]
    return CliRunner().invoke(app, ["directives", "try", *options])


def test_a_fleet_without_a_model_server_is_an_error(folder):
    result = run(folder, "--number", "3")
    assert result.exit_code == 3
    assert "no model server responds: all endpoints of pool" in result.output


def test_a_fleet_without_a_judge_is_an_error(folder):
    (folder / "fleet.toml").write_text(fleet_toml(["127.0.0.1:1"]))
    result = run(folder)
    assert result.exit_code == 1
    assert "the fleet file has no [judge]" in result.output


def test_an_unknown_model_is_wrong_usage(folder):
    result = run(folder, "--model", "nobody's")
    assert result.exit_code == 2
    assert "the fleet has no model" in result.output


def test_unusable_files_are_errors(folder):
    (folder / "p.jsonl").write_text('{"task": "qa"}\n')
    assert "line 1: " in run(folder, "--prompts", str(folder / "p.jsonl")).output
    (folder / "c.json").write_text('{"directives": [{"level": "L1", "text": "Short."}]}')
    assert "level L1 is in the fleet file" in run(folder).output
    (folder / "fleet.toml").unlink()
    assert "does not exist" in run(folder).output
