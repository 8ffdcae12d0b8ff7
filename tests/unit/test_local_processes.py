"""Child processes of the local stack: readiness, failure, order of the end, and no orphans."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from deploy.local.ports import free_ports
from deploy.local.processes import ProcessFailedError, ProcessSpec, StartAbortedError, Supervisor, http_probe
from deploy.local.records import stop_recorded

SLEEPER = "import time; time.sleep(60)"


def python(code: str, **fields: object) -> ProcessSpec:
    settings = {"name": "child", "stop_grace_s": 5.0, **fields}
    return ProcessSpec(command=(sys.executable, "-S", "-u", "-c", textwrap.dedent(code)), **settings)


@pytest.fixture
def supervisor(tmp_path: Path):
    running = Supervisor(tmp_path / "logs")
    yield running
    running.stop_all()


def wait_until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_process_is_started_once_its_probe_is_content(supervisor, tmp_path):
    ready = tmp_path / "ready"
    spec = python(
        f"import time; time.sleep(0.3); open({str(ready)!r}, 'w').close(); time.sleep(60)",
        ready=lambda: None if ready.exists() else "not yet",
    )
    supervisor.start(spec)
    assert ready.exists()


def test_what_dies_at_its_start_is_reported_with_its_status_and_the_end_of_its_log(supervisor):
    spec = python("print('no such database'); raise SystemExit(7)", ready=lambda: "never")
    with pytest.raises(ProcessFailedError, match=r"(?s)child exited with status 7.*no such database"):
        supervisor.start(spec)


def test_what_is_not_ready_in_time_is_reported_with_what_it_waited_for(supervisor):
    spec = python(SLEEPER, ready=lambda: "the moon", ready_timeout_s=0.3)
    with pytest.raises(ProcessFailedError, match=r"not ready within 0 s \(the moon\)"):
        supervisor.start(spec)


def test_a_process_that_dies_later_is_noticed(supervisor):
    process = supervisor.start(python(SLEEPER))
    supervisor.check()
    os.kill(process.pid, signal.SIGKILL)
    assert wait_until(lambda: not process.alive)
    with pytest.raises(ProcessFailedError, match="ended by SIGKILL"):
        supervisor.check()


def test_a_start_can_be_called_off_from_another_thread(supervisor):
    threading.Timer(0.2, supervisor.abort).start()
    with pytest.raises(StartAbortedError):
        supervisor.start(python(SLEEPER, ready=lambda: "never", ready_timeout_s=30))


def test_users_are_stopped_before_what_they_use_and_the_last_started_first(supervisor, tmp_path):
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


def test_what_ignores_the_request_to_stop_is_killed_with_its_children(supervisor, tmp_path):
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
    assert wait_until(lambda: gone(grandchild))


def test_a_killed_process_can_be_brought_back_and_goes_on_in_its_log(supervisor):
    first = supervisor.start(python("print('hello'); import time; time.sleep(60)"))
    assert wait_until(lambda: "hello" in first.log.read_text())
    supervisor.kill("child")
    second = supervisor.respawn("child")
    assert second.pid != first.pid
    assert wait_until(lambda: second.log.read_text().count("hello") == 2)
    supervisor.check()


def test_a_second_process_of_the_same_name_is_refused(supervisor):
    supervisor.start(python(SLEEPER))
    with pytest.raises(ValueError, match="runs already"):
        supervisor.spawn(python(SLEEPER))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child's life to its parent's")
def test_children_die_with_a_parent_that_is_killed_with_sigkill(tmp_path):
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
        assert wait_until(lambda: pids.exists() and pids.read_text(), 20)
        child = int(pids.read_text())
        assert wait_until(lambda: psutil.Process(child).cmdline()[-1] == SLEEPER)
        parent.kill()
        parent.wait()
        assert wait_until(lambda: gone(child))
    finally:
        parent.kill()
        parent.wait()


def test_detached_processes_are_found_and_stopped_by_their_records_alone(tmp_path):
    starter = Supervisor(tmp_path, tethered=False)
    starter.start(python(SLEEPER, name="one"))
    starter.start(python(SLEEPER, name="two", tier=1))
    records = starter.records()
    assert all(record.alive for record in records)
    stopped = stop_recorded(records)
    assert [record.name for record in stopped] == ["two", "one"]
    assert not any(record.alive for record in records)
    assert stop_recorded(records) == []


def test_a_pid_that_now_belongs_to_a_stranger_is_left_alone(tmp_path):
    starter = Supervisor(tmp_path, tethered=False)
    starter.start(python(SLEEPER))
    (record,) = starter.records()
    recycled = record.model_copy(update={"started_at_s": record.started_at_s - 3600})
    assert not recycled.alive
    assert stop_recorded([recycled]) == []
    assert record.alive
    starter.stop_all()


def test_an_http_probe_tells_why_a_service_is_not_ready(supervisor, tmp_path):
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
    supervisor.start(python(code, ready=http_probe(f"http://127.0.0.1:{port}/ready"), ready_timeout_s=20))
    assert "no policy yet" in (http_probe(f"http://127.0.0.1:{port}/else")() or "")
