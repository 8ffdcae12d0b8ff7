"""A container's first process, here mostly as any other one."""

import signal
import subprocess
import sys

import pytest

RUN = """
import os, sys
from deploy.triton.reaper import run
print(os.getpid(), flush=True)
sys.exit(run(sys.argv[1:], os.environ))
"""
UNSHARE = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]


def start(*command: str, first: bool = False) -> "subprocess.Popen[str]":
    before = UNSHARE if first else []
    return subprocess.Popen(
        [*before, sys.executable, "-c", RUN, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 128 + 9)])
def test_it_ends_as_its_command_did(script, status):
    assert start("sh", "-c", script).wait(20) == status


def test_it_hands_on_what_asks_to_stop():
    script = "trap 'echo told; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    process = start("sh", "-c", script)
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 7
    assert process.stdout.read() == "told\n"


def test_as_the_first_process_it_buries_orphans_and_its_command_can_be_killed():
    if subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this system lets no user make a PID namespace")
    orphan = "orphan=$(sh -c 'sleep 0.1 >/dev/null & echo $!'); sleep 0.6; kill -0 $orphan 2>/dev/null && echo unburied"
    process = start("sh", "-c", f"{orphan}; kill -9 $$", first=True)
    said, _ = process.communicate(timeout=20)
    assert said == "1\n"
    assert process.returncode == 128 + 9


def test_a_signal_that_comes_when_the_command_has_ended_changes_nothing():
    for _ in range(10):
        process = start("sh", "-c", "echo ready; exit 5")
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) in (5, 128 + signal.SIGHUP)
