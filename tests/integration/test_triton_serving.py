"""Triton as it is installed, started and ended."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from deploy.local.config import REPOSITORY, default_state_dir
from deploy.local.triton import TritonInstallation, free_triton_ports, install, wait_ready
from deploy.triton.models import stand_in_judge, stand_in_llm
from deploy.triton.repository import write_repository
from tests.support.triton import model_processes, write_entries

pytestmark = pytest.mark.integration


@pytest.fixture(scope="session")
def triton() -> TritonInstallation:
    return install(default_state_dir(), say=print)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workload") / "w.jsonl"
    return write_entries(path)


def test_an_installation_is_found_again_at_once(triton):
    said: list[str] = []
    began = time.monotonic()
    assert install(default_state_dir(), say=said.append) == triton
    assert time.monotonic() - began < 0.5
    assert said == []


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
        wait_ready(ports, 60, alive=lambda: process.poll() is None)
        assert (tmp_path / "models" / "judge" / "config.pbtxt").is_file()
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "serving ensemble; its energy is counted under gpu_uuid 'stand-in-m'" in said


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # whoever inherits it may never look after it
    except psutil.NoSuchProcess:
        return False


def test_the_models_processes_end_with_a_server_that_is_killed(triton, workload, tmp_path):
    write_repository(tmp_path / "models", [stand_in_llm(workload, model="m"), stand_in_judge(workload)])
    ports = free_triton_ports()
    server = subprocess.Popen(
        triton.command(tmp_path / "models", ports),
        env={**os.environ, **triton.environment()},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_ready(ports, 60, alive=lambda: server.poll() is None)
        models = model_processes(server.pid)
        assert len(models) == 2
    finally:
        server.kill()
        server.wait()
    deadline = time.monotonic() + 20
    while (alive := [process for process in models if lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in alive:
        process.kill()
    assert not alive


def test_serve_refuses_a_workload_that_does_not_do(triton, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    process = serve(triton, WORKLOAD=str(tmp_path / "empty.jsonl"))
    _, said = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "cannot serve: workload" in said
    assert "has no usable line" in said
