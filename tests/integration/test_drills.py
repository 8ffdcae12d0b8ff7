"""Fault drills at a small scale on real Kafka and Triton, and the drill command."""

import json
import os
import signal

import pytest
from typer import Typer
from typer.testing import CliRunner

from deploy.local.java import KafkaInstallationError
from tests.drills.__main__ import drill, run_scenarios
from tests.drills.run import drill_environment
from tests.support.deadlines import until
from tests.support.environment import KAFKA

pytestmark = pytest.mark.integration


@pytest.fixture
def run_small(tmp_path):
    """Runs scenarios at a small scale; returns their results by name, and the printed lines."""

    async def running(*names):
        said = []
        try:
            results = await run_scenarios(names, seed=3, scale=0.1, folder=tmp_path, say=said.append)
        except KafkaInstallationError as error:
            pytest.skip(f"no real Kafka: {error}")
        return {result.scenario: result for result in results}, said

    return running


@pytest.mark.extended
async def test_malformed_messages_and_a_killed_router_are_counted(run_small):
    results, said = await run_small("malformed", "sigkill")
    mixed = results["malformed"].counts
    assert results["malformed"].passed, results["malformed"].problems
    assert (mixed.sent, mixed.answered, mixed.malformed_sent, mixed.dead_lettered) == (200, 200, 200, 200)
    assert mixed.errors == {"unknown_model": 10}
    killed = results["sigkill"]
    assert killed.passed, killed.problems
    assert (killed.counts.sent, killed.counts.answered, killed.counts.lost) == (500, 500, 0)
    assert any("SIGKILL router" in fault for fault in killed.faults)
    for result in results.values():
        assert 30 < result.peak_rss_mb < 2_000
        assert (result.uncommitted, result.router_died) == (0, ())
    assert any(line.startswith("== sigkill (2 of 2)") for line in said)


@pytest.mark.extended
async def test_a_fault_of_the_ledger_under_all_services_leaves_correct_books(run_small):
    results, _ = await run_small("ledger_faults")
    result = results["ledger_faults"]
    assert result.passed, result.problems
    assert (result.counts.sent, result.counts.answered) == (100, 100)
    assert any("ledger0" in fault for fault in result.faults)
    assert result.figures["footprints"] + result.figures["partial"] == result.figures["calls"] >= 100
    assert result.figures["policies"] >= 1


@pytest.mark.extended
async def test_clients_of_killed_gateways_and_routers_have_an_answer_or_an_error_in_time(run_small):
    results, _ = await run_small("gateway_killed", "gateway_router_killed")
    for result in results.values():
        assert result.passed, result.problems
        assert result.figures["HTTP requests"] >= 100
        assert result.counts.sent == result.counts.answered >= 100
        assert len(result.faults) == 2


async def test_an_unexpected_exit_is_recorded_with_its_log_and_the_process_restarted(tmp_path):
    said = []
    async with drill_environment(tmp_path, say=said.append) as environment:
        name = environment.model_servers[0].name
        (process,) = await environment.running({name})
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: environment.running({name}), lambda running: environment.exits and running)
        (exited,) = environment.exits
        assert exited.name == name
        assert exited.description.startswith(f"{name} was ended by SIGKILL. The end of {environment.logs}")
        (again,) = await environment.running({name})
        assert again.pid != process.pid
        await environment.kill(KAFKA)
        assert not await environment.running({KAFKA})
    assert [line for line in said if line.startswith("!!")] == [f"!! {exited.description.splitlines()[0]} Restarted."]


def test_an_unknown_scenario_is_rejected_with_the_known_ones(tmp_path):
    app = Typer()
    app.command()(drill)
    answer = CliRunner().invoke(app, ["--scenario", "sigkil", "--out", str(tmp_path / "drill.json")])
    assert answer.exit_code == 2
    assert "no scenario sigkil" in answer.output
    assert not (tmp_path / "drill.json").exists()


@pytest.mark.parametrize(("problems", "status"), [((), 0), (("1 requests lost",), 1)])
def test_the_exit_code_says_whether_a_scenario_failed_and_the_figures_are_written(
    tmp_path, monkeypatch, problems, status
):
    class Shown:
        scenario = "sigterm"
        passed = not problems

        @staticmethod
        def to_json():
            return {"scenario": "sigterm", "problems": problems}

    async def running(names, **options):
        assert (names, options["seed"], options["scale"]) == (["sigterm"], 5, 0.5)
        return [Shown()]

    monkeypatch.setattr("tests.drills.__main__.run_scenarios", running)
    monkeypatch.setattr("tests.drills.__main__.table", lambda results: f"{len(results)} scenario")
    monkeypatch.setattr("tests.drills.__main__.remarks", lambda results: list(problems))
    app = Typer()
    app.command()(drill)
    out = tmp_path / "build" / "drill.json"
    answer = CliRunner().invoke(app, ["--scenario", "sigterm", "--seed", "5", "--scale", "0.5", "--out", str(out)])
    assert answer.exit_code == status, answer.output
    assert json.loads(out.read_text()) == [{"scenario": "sigterm", "problems": list(problems)}]
