"""Installing, starting and stopping Triton."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from deploy.local.config import REPOSITORY, default_state_dir
from deploy.local.triton import TritonInstallation, free_triton_ports, install, wait_ready
from deploy.triton.models import stand_in_judge, stand_in_llm
from deploy.triton.repository import write_repository
from tests.support.deadlines import DEADLINE_S
from tests.support.triton import model_processes, wait_until_ended, write_entries

pytestmark = pytest.mark.integration


@pytest.fixture(scope="session")
def triton() -> TritonInstallation:
    return install(default_state_dir(), say=print)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workload") / "w.jsonl"
    return write_entries(path)


def test_an_installation_is_found_again(triton):
    steps: list[str] = []
    assert install(default_state_dir(), say=steps.append) == triton
    assert steps == []


def serve(triton: TritonInstallation, *arguments: str, **changes: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(triton.server.python), "-m", "deploy.triton.serve", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **changes},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_serve_writes_the_repository_and_becomes_the_server(triton, workload, tmp_path):
    ports = free_triton_ports()
    process = serve(
        triton, "--models", "ensemble=m", "--folder", str(tmp_path),
        WORKLOAD=str(workload),
        SPROUT_TRITON_GRPC_PORT=str(ports.grpc),
        SPROUT_TRITON_HTTP_PORT=str(ports.http),
        SPROUT_TRITON_METRICS_PORT=str(ports.metrics),
    )  # fmt: skip
    try:
        wait_ready(ports, DEADLINE_S, alive=lambda: process.poll() is None)
        assert (tmp_path / "models" / "ensemble-gpu" / "config.pbtxt").is_file()  # a curve is the default
        with (
            grpcclient.InferenceServerClient(f"127.0.0.1:{ports.grpc}") as client,
            pytest.raises(InferenceServerException, match="explicit model load / unload is not allowed"),
        ):
            client.unload_model("ensemble")
        assert (tmp_path / "models" / "judge" / "config.pbtxt").is_file()
    finally:
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert "serving ensemble; its energy counters have gpu_uuid 'stand-in-m'" in output


def test_the_models_end_with_a_server_that_is_killed(triton, workload, tmp_path):
    write_repository(tmp_path / "models", [stand_in_llm(workload, model="m"), stand_in_judge(workload)])
    ports = free_triton_ports()
    server = subprocess.Popen(
        triton.command(tmp_path / "models", ports),
        env={**os.environ, **triton.environment()},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_ready(ports, DEADLINE_S, alive=lambda: server.poll() is None)
        models = model_processes(server.pid)
        assert len(models) == 2
    finally:
        server.kill()
        server.wait()
    for model in models:
        wait_until_ended(model)


def test_serve_rejects_an_unknown_mode_of_model_control(triton, workload):
    process = serve(triton, "--models", "ensemble=m", "--model-control", "poll", WORKLOAD=str(workload))
    _, output = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert "--model-control must be explicit or none; got 'poll'" in output


def test_serve_rejects_an_unusable_workload(triton, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    process = serve(triton, WORKLOAD=str(tmp_path / "empty.jsonl"))
    _, output = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert "cannot serve: workload" in output
    assert "has no usable line" in output
