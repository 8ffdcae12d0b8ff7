"""What ends a model with its server, and a server that crashed and stays; the server is a process of Python here."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MODEL = """
import sys, time
from deploy.triton.lifeline import end_with_server
end_with_server(look_s=0.05)
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

linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc here: no crash can be seen")


def start(*blocked: signal.Signals) -> tuple["subprocess.Popen[str]", int]:
    """A server that has such signals blocked; returns it and the pid of its model, which is watched."""
    numbers = [str(int(number)) for number in blocked]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, MODEL, *numbers], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    said = {server.stdout.readline().strip(), server.stdout.readline().strip()} - {"watched"}
    return server, int(said.pop())


def gone(pid: int, *, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@linux
def test_a_model_ends_with_a_server_that_was_killed():
    server, model = start()
    server.kill()
    server.wait()  # until then it is a zombie, which counts as there
    assert gone(model)


@linux
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_server_that_stays_in_the_handler_of_its_crash_is_killed(number):
    server, model = start(number)
    assert server.wait(10) == -signal.SIGKILL
    assert gone(model)
    assert server.stderr is not None
    assert server.stderr.read() == f"the server (pid {server.pid}) crashed and did not end; it is killed\n"


@linux
@pytest.mark.parametrize("blocked", [(), (signal.SIGTERM,), (signal.SIGSEGV, signal.SIGABRT, signal.SIGUSR1)])
def test_a_server_that_is_well_stays(blocked):
    server, model = start(*blocked)
    time.sleep(1.0)
    assert server.poll() is None
    server.kill()
    server.wait()  # until then it is a zombie, which counts as there
    assert gone(model)
