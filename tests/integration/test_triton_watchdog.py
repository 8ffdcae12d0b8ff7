"""Process supervision: the parent watchdog of a model, with servers that are Python processes, and the init process."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deploy.triton.watchdog import CHECKS_BEFORE_KILL
from tests.support.deadlines import DEADLINE_S
from tests.support.triton import wait_until_ended

MODEL = """
import sys, time
from deploy.triton.watchdog import start_parent_watchdog
start_parent_watchdog(check_interval_s=0.05)
print("watched", flush=True)
time.sleep(60)
"""

SERVER = """
import os, signal, subprocess, sys, time
if sys.argv[2:]:
    signal.pthread_sigmask(signal.SIG_BLOCK, {int(number) for number in sys.argv[2:]})
model = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]],
    preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, set()),
)
print(model.pid, flush=True)
time.sleep(60)
"""

INIT = """
import os, sys
from deploy.triton.watchdog import run_as_init
print(os.getpid(), flush=True)
sys.exit(run_as_init(sys.argv[1:], os.environ))
"""
UNSHARE = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]

linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="without /proc no crash can be detected")


def start_server(*blocked: signal.Signals) -> tuple["subprocess.Popen[str]", psutil.Process]:
    """A server that blocks some signals; returns it and its model, whose watchdog is running."""
    numbers = [str(int(number)) for number in blocked]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, MODEL, *numbers], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    lines = {server.stdout.readline().strip(), server.stdout.readline().strip()} - {"watched"}
    return server, psutil.Process(int(lines.pop()))


def wait_for_checks(model: psutil.Process, count: int) -> None:
    """Return once the model's watchdog has made so many checks: it sleeps after each one."""
    (watchdog,) = model.children()
    sleeps: set[int] = set()
    while len(sleeps) < count:
        for sleep in watchdog.children():
            sleeps.add(sleep.pid)
            psutil.wait_procs([sleep], timeout=DEADLINE_S)


@linux
def test_a_model_ends_with_a_server_that_was_killed():
    server, model = start_server()
    server.kill()
    server.wait()  # until then it is a zombie, which counts as running
    wait_until_ended(model)


@linux
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_server_that_stays_in_the_handler_of_its_crash_is_killed(number):
    server, model = start_server(number)
    assert server.wait(DEADLINE_S) == -signal.SIGKILL
    wait_until_ended(model)
    assert server.stderr is not None
    assert server.stderr.read() == f"the server (pid {server.pid}) crashed without ending; killing it\n"


@linux
@pytest.mark.parametrize("blocked", [(), (signal.SIGTERM,), (signal.SIGSEGV, signal.SIGABRT, signal.SIGUSR1)])
def test_a_healthy_server_is_not_killed(blocked):
    server, model = start_server(*blocked)
    wait_for_checks(model, 2 * CHECKS_BEFORE_KILL)
    assert server.poll() is None
    server.kill()
    server.wait()
    wait_until_ended(model)


def start_init(*command: str, first: bool = False) -> "subprocess.Popen[str]":
    before = UNSHARE if first else []
    return subprocess.Popen(
        [*before, sys.executable, "-c", INIT, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 128 + 9)])
def test_the_init_process_ends_with_its_commands_status(script, status):
    assert start_init("sh", "-c", script).wait(DEADLINE_S) == status


def test_the_init_process_forwards_signals():
    script = "trap 'echo stopped; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    process = start_init("sh", "-c", script)
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 7
    assert process.stdout.read() == "stopped\n"


def test_as_process_1_it_reaps_orphans_and_its_command_can_be_killed():
    if subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this system does not let users create a PID namespace")
    orphan = "orphan=$(sh -c 'sleep 0.1 >/dev/null & echo $!'); while kill -0 $orphan 2>/dev/null; do sleep 0.05; done"
    process = start_init("sh", "-c", f"{orphan}; kill -9 $$", first=True)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert output == "1\n"
    assert process.returncode == 128 + 9


def test_a_signal_that_arrives_when_the_command_has_ended_has_no_effect():
    for _ in range(10):
        process = start_init("sh", "-c", "echo ready; exit 5")
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert process.wait(DEADLINE_S) in (5, 128 + signal.SIGHUP)
