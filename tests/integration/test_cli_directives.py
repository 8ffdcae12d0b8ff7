"""`sprout directives try` on a real Triton server with the stand-in model and judge."""

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from deploy.local.triton import metrics_url
from deploy.triton.models import stand_in_judge, stand_in_llm
from deploy.triton.stand_in.judge import JudgeRules
from shared.messages import UsageRecord
from shared.runtime.clock import Clock
from shared.topics import USAGE
from tests.support.deadlines import REPLY_S
from tests.support.evaluator import judged_fleet, write_judged_workload
from tests.support.fleets import DIRECTIVES
from tests.support.router import LEVELS, MODEL, reading
from tests.support.triton import ServingTriton, serving_triton
from tools.cli.main import app

pytestmark = pytest.mark.integration

PROMPTS = 40
J_PER_TOKEN = 6.0
NOT_OBEYED = "Answer as you like."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("directives")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServingTriton]:
    workload = write_judged_workload(folder / "w.jsonl", prompts=PROMPTS)
    models = [
        stand_in_llm(workload, model=MODEL, idle_power_w=0.0),
        stand_in_judge(workload, rules=JudgeRules(position_bias=0.0)),
    ]
    clock = Clock.starting(datetime(2023, 2, 10, tzinfo=UTC), rate=60.0)
    with serving_triton(folder, models, clock=clock) as running:
        yield running


@pytest.fixture
def command(server: ServingTriton, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, with the catalogue's L2 and a text that the model does not know as candidates."""
    settings = {"SPROUT_LOCAL_STATE": str(folder), "SPROUT_EVALUATOR_ENDPOINT_CHECK_TIMEOUT_S": str(REPLY_S)}
    for name, value in (server.clock.environment() | settings).items():
        monkeypatch.setenv(name, value)
    metered = f'grpc = "{server.address}"\nmetrics = "{metrics_url(server.ports)}"\ngpus = ["stand-in-{MODEL}"]'
    fleet = judged_fleet(server.address, levels=("L0", "L1")).replace(f'grpc = "{server.address}"', metered)
    (folder / "fleet.toml").write_text(fleet)
    candidates = {"L2": DIRECTIVES["L2"], "L3": NOT_OBEYED}
    (folder / "candidates.json").write_text(
        json.dumps({"directives": [{"level": level, "text": text} for level, text in candidates.items()]})
    )
    files = {
        "--candidates": "candidates.json",
        "--fleet": "fleet.toml",
        "--prompts": "w.jsonl",
        "--json": "result.json",
    }
    options = [part for option, name in files.items() for part in (option, str(folder / name))]
    return lambda *more: CliRunner().invoke(app, ["directives", "try", *options, *more])


def test_candidates_are_measured_judged_and_rated(command, folder):
    result = command("--number", str(PROMPTS))
    assert result.exit_code == 0, result.output
    assert "worth adding: L2" in result.output
    document = json.loads((folder / "result.json").read_text())
    assert (document["model"], document["prompts"], document["energy"]) == (MODEL, PROMPTS, "meter")
    assert document["judge_fault"] is None
    tokens = {level: count for level, (count, _) in LEVELS.items()}
    assert document["reference"]["joules"] == pytest.approx(tokens["L0"] * J_PER_TOKEN)
    found = {one["level"]: one for one in document["directives"]}
    assert {level: one["in_catalogue"] for level, one in found.items()} == {"L1": True, "L2": False, "L3": False}
    for level in ("L1", "L2"):
        assert found[level]["tokens_ratio"] == pytest.approx(tokens[level] / tokens["L0"])
        assert found[level]["joules"] == pytest.approx(tokens[level] * J_PER_TOKEN)
        assert found[level]["verdicts"] == found[level]["rated"] == PROMPTS
        assert 0.0 < found[level]["not_worse"] < 1.0
    assert found["L1"]["right"] == 1.0
    assert found["L2"]["right_change"] < 0.0  # its answers to odd prompts are wrong
    # The stand-in does not know the text, so it answers as without a directive: the same answer is a tie.
    assert (found["L3"]["tokens_ratio"], found["L3"]["not_worse"], found["L3"]["advice"]) == (1.0, 1.0, "not shorter")


async def test_with_kafka_every_call_is_reported_to_the_ledger(command, kafka, monkeypatch):
    monkeypatch.setenv("SPROUT_KAFKA_TOPIC_PREFIX", kafka.topic_prefix)
    async with reading(kafka, USAGE) as usage:
        result = await asyncio.to_thread(command, "--number", "3", "--bootstrap", kafka.bootstrap_servers)
        assert result.exit_code == 0, result.output
        assert "too few verdicts" in result.output
        # Three prompts without a directive and with three; the judge sees the answers at L1 and L2 in two orders.
        read = await usage.read(until=3 * 4 + 3 * 2 * 2)
    records = [UsageRecord.model_validate_json(one.value) for one in read]
    answers = [one for one in records if one.purpose == "evaluation"]
    assert sorted(one.level for one in answers) == sorted(["L0", "L1", "L2", "L3"] * 3)
    assert {one.model for one in answers} == {MODEL}
    assert len({one.evaluation_id for one in records}) == 1
