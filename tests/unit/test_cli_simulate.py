"""`sprout simulate`: with the shipped inputs, and with invalid ones."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.local.grid import shipped_trace
from tests.support.fleets import write_workload
from tools.cli.main import app
from tools.cli.simulate import SCHEME_NAMES
from tools.simulator.schemes import SCHEMES

FLEET = str(Path(__file__).parents[2] / "docs/experiments/fleets/14b.toml")

KEYS = (
    "zone", "window_start_hour", "scheme", "xi", "carbon_saving_pct", "preference_pct", "correctness_pct",
    "hours_bound_kept_pct", "evaluations", "evaluation_hours", "evaluator_share_pct", "mean_gco2_per_request",
)  # fmt: skip


def run(*arguments: str):
    return CliRunner().invoke(app, ["simulate", *arguments])


@pytest.mark.simulation
def test_without_options_it_uses_the_shipped_inputs(tmp_path):
    result = run("--hours", "24", "--xi", "0,0.1", "--jobs", "1", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert all(tuple(row)[: len(KEYS)] == KEYS for row in rows)
    assert {row["correctness_source"] for row in rows} == {"string"}
    assert {row["scheme"] for row in rows} == {"base", "co2_opt", "sprout_sta", "sprout", "sprout_context", "oracle"}
    assert [row["xi"] for row in rows if row["scheme"] == "sprout"] == [0.0, 0.1]
    page = (tmp_path / "report.html").read_text()
    for title in ("Saving by zone", "Pareto front over xi", "Directive mix", "Evaluator", "Throughput", "Every window"):
        assert f"<h2>{title}</h2>" in page
    assert "sprout_context" in result.stdout


@pytest.mark.simulation
def test_a_promise_by_period_is_simulated(tmp_path):
    options = ("--schemes", "base,sprout_sta,sprout", "--hours", "48", "--jobs", "1", "--out", str(tmp_path))
    result = run("--promise", "period", "--period-days", "1", *options)
    assert result.exit_code == 0, result.output
    base, _, sprout = json.loads((tmp_path / "summary.json").read_text())
    assert (sprout["promise"], sprout["period_kept_pct"]) == ("period", 100.0)
    assert base["period_kept_pct"] is None
    assert "does not change base, sprout_sta" in " ".join(result.stderr.split())


@pytest.mark.simulation
def test_a_fleet_adds_what_its_meters_would_show(tmp_path):
    options = ("--schemes", "base,sprout,oracle", "--hours", "48", "--jobs", "1")
    result = run(*options, "--fleet", FLEET, "--latency-objective", "25", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    base, sprout, oracle = json.loads((tmp_path / "summary.json").read_text())
    assert [(one["dispatch"], one["sleep"]) for one in base["fleets"]] == [
        ("spread", False), ("pack", False), ("pack", True),
    ]  # fmt: skip
    asleep = sprout["fleets"][2]
    assert asleep["fleet"] == "14b"
    assert asleep["endpoints"] == 16
    assert asleep["tpot_p99_ms"] <= 25.0
    assert asleep["saving_on_meter_pct"] > base["fleets"][2]["saving_on_meter_pct"] > 20.0
    assert oracle["fleets"] == []
    assert "no fleet figures of oracle" in " ".join(result.stderr.split())
    title = "What the meters of the fleet would show, means over all windows"
    assert title in result.stdout
    assert f"<h2>{title}</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--xi", "2"), "--xi must lie between 0 and 1, got 2"),
        (("--xi", "little"), "--xi must be numbers separated by commas"),
        (("--xi", ","), "--xi names no number"),
        (("--windows", "9000"), "begins after the end of the shortest trace"),
        (("--windows", "100", "--hours", "720"), "does not lie within the trace's 240 hours"),
        (("--zones", "ATLANTIS"), "no trace of zone ATLANTIS; there are SAMPLE-SOLAR"),
        (("--schemes", "sprout,wish"), "there is no scheme 'wish'"),
        (("--schemes", "model_opt"), "needs --model-preference"),
        (("--variant", "dream"), "--variant must be production or published, got 'dream'"),
        (("--variant", "published"), "needs a model measured at 3 levels; 'llama-2-13b-chat' was at L0, L1, L2, L3"),
        (("--quality-draws", "q.csv"), "--quality-draws needs --variant published"),
        (("--requests", "none.jsonl"), "none.jsonl cannot be read"),
        (("--model", "gpt"), "has no model 'gpt'; it has llama-2-13b-chat"),
        (("--promise", "monthly"), "--promise must be hourly or period, got 'monthly'"),
        (("--target-batch", "8"), "--target-batch needs --fleet"),
        (("--fleet", "none.toml"), "--fleet none.toml cannot be read"),
        (("--fleet", FLEET, "--dispatch", "hurl"), "--dispatch must be of spread, pack, got 'hurl'"),
        (("--fleet", FLEET, "--latency-objective", "-1"), "--latency-objective must be greater than 0, got -1"),
        (("--fleet", FLEET, "--latency-objective", "5"), "no batch keeps --latency-objective 5 ms"),
        (("--fleet", FLEET, "--schemes", "base", "--hours", "24", "--requests-per-hour", "1e8"), "is overloaded"),
    ],
)
def test_an_invalid_option_is_named_with_the_remedy(tmp_path, arguments, message):
    result = run("--out", str(tmp_path / "out"), "--jobs", "1", *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--schemes", "sprout_context"), "was not published"),
        (("--promise", "period"), "--promise period needs --variant production"),
    ],
)
def test_what_the_published_variant_lacks_is_named(tmp_path, arguments, message):
    answers = {"L0": (90, 2.0), "L1": (20, 0.5), "L2": (5, 0.1)}
    workload = write_workload(tmp_path / "w.jsonl", {f"Why {number}?": answers for number in range(60)})
    result = run("--jobs", "1", "--variant", "published", "--requests", str(workload), *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("hour,factual\n0,1.0\n", "has 1 hours, 48 are simulated"),
        (
            "hour,factual\n" + "".join(f"{hour},0.5\n" for hour in range(48)),
            "line 2: the shares must sum to 1, they sum to 0.5",
        ),
        (
            "hour,factual\n" + "".join(f"{hour},much\n" for hour in range(48)),
            "line 2: 'factual' must be a share from 0 to 1, got 'much'",
        ),
        ("hour,factual\n" + "".join(f"{hour},1.0\n" for hour in range(48)), "have no place among the tasks factual"),
        ("a,b\n1,2\n", "has no column 'hour'"),
        ("", "has no column 'hour'; its columns: none"),
    ],
)
def test_an_invalid_mix_is_named_with_its_line(tmp_path, rows, message):
    (tmp_path / "mix.csv").write_text(rows)
    result = run("--hours", "48", "--mix", str(tmp_path / "mix.csv"), "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_a_gap_in_a_window_is_named_and_never_filled(tmp_path):
    lines = shipped_trace().read_text(encoding="utf-8").splitlines()
    del lines[101]
    (tmp_path / "trace.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = run("--carbon", str(tmp_path / "trace.csv"), "--windows", "80", "--hours", "48", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "1 hours without a value in the window from hour 80 (the first: 2024-02-05 04:00)" in result.stderr


def test_a_column_that_the_trace_lacks_is_named(tmp_path):
    (tmp_path / "trace.csv").write_text(
        "Datetime (UTC),Zone Id,Carbon Intensity gCO₂eq/kWh (direct)\n2024-02-01 00:00:00,Z,100\n", encoding="utf-8"
    )
    result = run("--carbon", str(tmp_path / "trace.csv"), "--life-cycle", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "has no life-cycle intensity" in result.stderr


def test_prompts_without_a_level_or_a_judgment_are_named(tmp_path):
    answer = {"energy_j": 100.0, "time_s": 1.0, "tokens": 10}
    whole = {"task": "t", "prompt": "a", "preferred": "L1", "responses": {"m/L0": answer, "m/L1": answer}}
    lacking = {"task": "t", "prompt": "b", "preferred": None, "responses": {"m/L0": answer}}
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps(whole) + "\n" + json.dumps(lacking) + "\n")
    assert "1 prompts lack 'm/L1' (the first is prompt 2)" in run("--requests", str(file)).stderr
    file.write_text(json.dumps({**whole, "preferred": None}) + "\n")
    assert "no prompt was judged" in run("--requests", str(file)).stderr


def test_an_output_folder_that_cannot_be_written_is_rejected_before_anything_is_read(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    (tmp_path / "taken" / "summary.json").mkdir(parents=True)
    for out, message in (
        (file, "is a file; name a folder"),
        (file / "below", "cannot be written"),
        (tmp_path / ("n" * 300), "cannot be written"),
        (tmp_path / "taken", "cannot be written"),
    ):
        result = run("--requests", "none.jsonl", "--out", str(out))
        assert result.exit_code == 1
        assert f"--out {out} {message}" in result.stderr
        assert "reading" not in result.stderr
    assert file.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_a_negative_seed_is_wrong_usage():
    result = run("--seed", "-1")
    assert result.exit_code == 2
    assert "--seed" in result.stderr


def test_a_setting_that_is_not_json_is_named_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("SPROUT_OPTIMIZER_CONFIDENCE_Z_BY_METRIC", "{")
    result = run("--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "SPROUT_OPTIMIZER_CONFIDENCE_Z_BY_METRIC is not JSON" in result.stderr


def test_the_help_names_every_scheme():
    assert ", ".join(SCHEMES) == SCHEME_NAMES
