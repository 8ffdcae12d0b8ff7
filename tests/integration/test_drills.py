"""Drills at a small scale on real Kafka, PostgreSQL and Triton: they find what there is to find, and say so."""

import asyncio
import json
import os
import signal

import pytest
from typer import Typer
from typer.testing import CliRunner

from deploy.local.java import NoJavaError
from deploy.local.kafka import KafkaInstallationError
from tests.drills.__main__ import drill
from tests.drills.ground import KAFKA, Ground
from tests.drills.play import play

pytestmark = pytest.mark.integration


@pytest.fixture
def played(tmp_path):
    """Plays scenarios at a small scale; returns their results by name, and what was said."""

    async def playing(*names):
        said = []
        try:
            results = await play(names, seed=3, scale=0.1, folder=tmp_path, say=said.append)
        except (NoJavaError, KafkaInstallationError) as error:
            pytest.skip(f"no real Kafka: {error}")
        return {result.scenario: result for result in results}, said

    return playing


async def test_malformed_messages_and_a_killed_router_are_counted(played):
    results, said = await played("malformed", "sigkill")
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


async def test_who_dies_by_itself_is_noted_with_its_last_words_and_started_again(tmp_path):
    said = []
    async with Ground(tmp_path, say=said.append) as ground:
        name = ground.endpoints[0].name
        (process,) = await ground.running({name})
        os.kill(process.pid, signal.SIGSEGV)
        async with asyncio.timeout(30):
            while not (ground.deaths and await ground.running({name})):  # noqa: ASYNC110 - nobody else tells
                await asyncio.sleep(0.1)
        (death,) = ground.deaths
        assert death.name == name
        assert death.said.startswith(f"{name} was ended by SIGSEGV. The end of {ground.logs}")
        (again,) = await ground.running({name})
        assert again.pid != process.pid
        await ground.kill(KAFKA)
        assert not await ground.running({KAFKA})
    assert [line for line in said if line.startswith("!!")] == [f"!! {death.said.splitlines()[0]} Started again."]


def test_an_unknown_scenario_is_refused_with_those_there_are(tmp_path):
    app = Typer()
    app.command()(drill)
    answer = CliRunner().invoke(app, ["--scenario", "sigkil", "--out", str(tmp_path / "drill.json")])
    assert answer.exit_code == 2
    assert "no scenario sigkil" in answer.output
    assert not (tmp_path / "drill.json").exists()


@pytest.mark.parametrize(("problems", "status"), [((), 0), (("1 requests lost",), 1)])
def test_the_exit_code_tells_whether_anything_was_lost_and_the_figures_are_written(
    tmp_path, monkeypatch, problems, status
):
    class Shown:
        scenario = "sigterm"
        passed = not problems

        @staticmethod
        def to_json():
            return {"scenario": "sigterm", "problems": problems}

    async def playing(names, **options):
        assert (names, options["seed"], options["scale"]) == (["sigterm"], 5, 0.5)
        return [Shown()]

    monkeypatch.setattr("tests.drills.__main__.play", playing)
    monkeypatch.setattr("tests.drills.__main__.table", lambda results: f"{len(results)} scenario")
    monkeypatch.setattr("tests.drills.__main__.remarks", lambda results: list(problems))
    app = Typer()
    app.command()(drill)
    out = tmp_path / "build" / "drill.json"
    answer = CliRunner().invoke(app, ["--scenario", "sigterm", "--seed", "5", "--scale", "0.5", "--out", str(out)])
    assert answer.exit_code == status, answer.output
    assert json.loads(out.read_text()) == [{"scenario": "sigterm", "problems": list(problems)}]
