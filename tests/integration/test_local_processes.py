"""Child processes of the local stack: readiness, failures, order of stopping, and no orphans."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest

from deploy.local.processes import (
    ProcessFailedError,
    ProcessSpec,
    StartAbortedError,
    Supervisor,
    free_ports,
    http_probe,
)
from deploy.local.state import stop_recorded
from tests.support.deadlines import REPLY_S, wait_until

SLEEPER = "import time; time.sleep(60)"


def python(code: str, **fields: object) -> ProcessSpec:
    settings = {"name": "child", "stop_grace_s": 60.0, **fields}
    return ProcessSpec(command=(sys.executable, "-S", "-u", "-c", textwrap.dedent(code)), **settings)


@pytest.fixture
def supervisor(tmp_path: Path):
    with Supervisor(tmp_path / "logs") as running:
        yield running


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_process_is_started_once_its_probe_is_ready(supervisor, tmp_path):
    ready = tmp_path / "ready"
    spec = python(
        f"import time; time.sleep(0.3); open({str(ready)!r}, 'w').close(); time.sleep(60)",
        ready=lambda: None if ready.exists() else "not yet",
    )
    supervisor.start(spec)
    assert ready.exists()


def test_a_failed_start_is_reported_with_exit_status_and_end_of_log(supervisor):
    spec = python("print('no such database'); raise SystemExit(7)", ready=lambda: "never")
    with pytest.raises(ProcessFailedError, match=r"(?s)child exited with status 7.*no such database"):
        supervisor.start(spec)


def test_a_timeout_is_reported_with_the_missing_condition(supervisor):
    spec = python(SLEEPER, ready=lambda: "the moon", ready_timeout_s=0.3)
    with pytest.raises(ProcessFailedError, match=r"not ready within 0 s \(the moon\)"):
        supervisor.start(spec)


def test_an_unexpected_exit_is_reported(supervisor):
    process = supervisor.start(python(SLEEPER))
    supervisor.check()
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not process.alive)
    with pytest.raises(ProcessFailedError, match="ended by SIGKILL"):
        supervisor.check()


def test_a_start_can_be_aborted_from_another_thread(supervisor):
    threading.Timer(0.2, supervisor.abort).start()
    with pytest.raises(StartAbortedError):
        supervisor.start(python(SLEEPER, ready=lambda: "never", ready_timeout_s=30))


def test_higher_tiers_are_stopped_first(supervisor, tmp_path):
    order = tmp_path / "order"
    code = """
        import signal, sys
        def leave(*_):
            with open({order!r}, "a") as file:
                file.write({name!r} + " ")
            sys.exit()
        signal.signal(signal.SIGTERM, leave)
        open({name!r} + ".up", "w").close()
        signal.pause()
    """
    for name, tier in [("broker", 0), ("database", 0), ("service", 2)]:
        up = tmp_path / f"{name}.up"
        supervisor.start(
            python(
                code.format(order=str(order), name=name),
                name=name,
                tier=tier,
                directory=tmp_path,
                ready=lambda up=up: None if up.exists() else "up",
            )
        )
    supervisor.stop_all()
    stopped = order.read_text().split()
    assert stopped[0] == "service"
    assert sorted(stopped[1:]) == ["broker", "database"]
    assert supervisor.names == ()


def test_a_process_that_ignores_the_stop_signal_is_killed_with_its_children(supervisor, tmp_path):
    pids = tmp_path / "pids"
    code = f"""
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-S", "-c", {SLEEPER!r}])
        open({str(pids)!r}, "w").write(str(child.pid))
        time.sleep(60)
    """
    spec = python(code, stop_grace_s=0.3, ready=lambda: None if pids.exists() and pids.read_text() else "its child")
    process = supervisor.start(spec)
    grandchild = int(pids.read_text())
    supervisor.stop_all()
    assert gone(process.pid)
    wait_until(lambda: gone(grandchild))


def test_a_killed_process_can_be_started_again_and_appends_to_its_log(supervisor):
    first = supervisor.start(python("print('hello'); import time; time.sleep(60)"))
    wait_until(lambda: "hello" in first.log.read_text())
    supervisor.kill("child")
    second = supervisor.respawn("child")
    assert second.pid != first.pid
    wait_until(lambda: second.log.read_text().count("hello") == 2)
    supervisor.check()


def test_a_second_process_of_the_same_name_is_rejected(supervisor):
    supervisor.start(python(SLEEPER))
    with pytest.raises(ValueError, match="running already"):
        supervisor.spawn(python(SLEEPER))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a parent death signal")
def test_children_end_when_their_parent_is_killed_with_sigkill(tmp_path):
    pids = tmp_path / "pid"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                f"""
                import sys, time
                from pathlib import Path
                from deploy.local.processes import ProcessSpec, Supervisor
                supervisor = Supervisor(Path({str(tmp_path)!r}))
                process = supervisor.start(ProcessSpec(name="c", command=(sys.executable, "-S", "-c", {SLEEPER!r})))
                Path({str(pids)!r}).write_text(str(process.pid))
                time.sleep(60)
                """
            ),
        ]
    )
    try:
        wait_until(lambda: pids.exists() and pids.read_text())
        child = int(pids.read_text())
        wait_until(lambda: psutil.Process(child).cmdline()[-1] == SLEEPER)
        parent.kill()
        parent.wait()
        wait_until(lambda: gone(child))
    finally:
        parent.kill()
        parent.wait()


def test_detached_processes_are_found_and_stopped_by_their_records(tmp_path):
    starter = Supervisor(tmp_path, detached=True)
    starter.start(python(SLEEPER, name="one"))
    starter.start(python(SLEEPER, name="two", tier=1))
    records = starter.records()
    assert all(record.alive for record in records)
    stopped = stop_recorded(records)
    assert [record.name for record in stopped] == ["two", "one"]
    assert not any(record.alive for record in records)
    assert stop_recorded(records) == []


def test_a_process_that_reuses_a_recorded_pid_is_not_stopped(tmp_path):
    starter = Supervisor(tmp_path, detached=True)
    starter.start(python(SLEEPER))
    (record,) = starter.records()
    recycled = record.model_copy(update={"started_at_s": record.started_at_s - 3600})
    assert not recycled.alive
    assert stop_recorded([recycled]) == []
    assert record.alive
    starter.stop_all()


def test_an_http_probe_says_why_a_service_is_not_ready(supervisor, tmp_path):
    (port,) = free_ports(1)
    code = f"""
        from http.server import BaseHTTPRequestHandler, HTTPServer
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                ready = self.path == "/ready"
                self.send_response(200 if ready else 503)
                self.end_headers()
                self.wfile.write(b"" if ready else b'no policy yet')
            def log_message(self, *_): pass
        HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
    """
    assert "does not answer" in (http_probe(f"http://127.0.0.1:{port}/ready")() or "")
    supervisor.start(python(code, ready=http_probe(f"http://127.0.0.1:{port}/ready")))
    assert "no policy yet" in (http_probe(f"http://127.0.0.1:{port}/else", timeout_s=REPLY_S)() or "")
