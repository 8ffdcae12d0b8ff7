"""The local stack on real Kafka and PostgreSQL: start, failures, restarts, and no processes left behind."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest
from aiokafka.admin import AIOKafkaAdminClient

from deploy.local.config import StackConfig, default_state_dir
from deploy.local.fleet import LocalFleet, LocalServer
from deploy.local.kafka import install_kafka
from deploy.local.model_servers import MODEL_TIER, PreparedModels
from deploy.local.processes import ProcessFailedError, ProcessSpec
from deploy.local.stack import LocalStack
from deploy.local.state import StateError, read_state, stop_stack
from shared.topics import TOPICS
from tests.support.deadlines import DEADLINE_S, wait_until

pytestmark = pytest.mark.integration

START = datetime(2023, 2, 10, tzinfo=UTC)


class IdleModels:
    """Stand-in for the model servers: a process that idles, or exits at once."""

    def __init__(self, *, fails: bool = False) -> None:
        self.code = "print('out of memory'); raise SystemExit(3)" if fails else "import time; time.sleep(600)"
        self.clock: Mapping[str, str] = {}

    def install(self, config: StackConfig, say) -> None:
        say("nothing to install")

    def prepare(self, config: StackConfig, clock: Mapping[str, str]) -> PreparedModels:
        self.clock = clock
        process = ProcessSpec(
            name="triton",
            command=(sys.executable, "-S", "-u", "-c", self.code),
            ready=lambda: None if "sleep" in self.code else "its models",
            tier=MODEL_TIER,
        )
        server = LocalServer(grpc="127.0.0.1:1", metrics="http://127.0.0.1:2/metrics", gpu="g")
        fleet = LocalFleet(config=config, servers=(server,), judge=server, idle_power_w=55.0, judge_idle_power_w=0.0)
        return PreparedModels(processes=(process,), fleet=fleet, description="nothing")


def config(folder: Path, **changes: object) -> StackConfig:
    return StackConfig.model_validate(
        {"state_dir": folder, "install_dir": default_state_dir(), "services": (), **changes}
    )


def living(state) -> list[str]:
    return [process.name for process in state.processes if process.alive]


async def test_every_process_runs_during_the_block_and_none_after_it(tmp_path):
    said: list[str] = []
    models = IdleModels()
    async with LocalStack(config(tmp_path, event_start=START, rate=720, lead_s=5), models, say=said.append) as stack:
        state = stack.state
        assert living(state) == ["kafka", "postgres", "triton"]
        admin = AIOKafkaAdminClient(bootstrap_servers=stack.kafka.bootstrap_servers)
        await admin.start()
        assert {stack.kafka.topic(spec) for spec in TOPICS} <= set(await admin.list_topics())
        await admin.close()
        connection = await asyncpg.connect(stack.database.url.get_secret_value())
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
        assert read_state(tmp_path) == state
        assert state.ready
        assert stack.clock.rate == 720
        assert models.clock == stack.clock.environment()
        assert (tmp_path / "fleet.toml").exists()
        stack.check()
    assert living(state) == []
    assert read_state(tmp_path) is None
    assert any("Kafka and PostgreSQL" in line for line in said)


def test_an_installation_in_the_state_folder_is_kept(tmp_path):
    libs = install_kafka(default_state_dir(), say=print).libs
    shutil.copytree(libs, tmp_path / "kafka" / libs.name, copy_function=os.link)
    said: list[str] = []
    with LocalStack(config(tmp_path, install_dir=tmp_path), IdleModels(), say=said.append):
        pass
    assert not [line for line in said if "fetching" in line]
    kept = tmp_path / "kafka" / libs.name
    assert sorted(path.name for path in kept.iterdir()) == sorted(path.name for path in libs.iterdir())


async def test_with_sleep_a_process_puts_endpoints_to_sleep_and_starts_and_ends_with_the_stack(tmp_path):
    async with LocalStack(config(tmp_path, sleep=True), IdleModels()) as stack:
        state = stack.state
        assert living(state) == ["kafka", "postgres", "triton", "sleeper"]
        log = stack.process("sleeper").log
        wait_until(lambda: '"pools": ["local-13b"]' in log.read_text())
        stack.check()
    assert living(state) == []
    assert '"event": "stopped"' in log.read_text()


async def test_nothing_listens_beyond_loopback(tmp_path):
    async with LocalStack(config(tmp_path), IdleModels()) as stack:
        pids = {process.pid for process in stack.state.processes}
        listening = {
            (one.laddr.ip, one.laddr.port)
            for pid in pids
            for one in psutil.Process(pid).net_connections(kind="inet")
            if one.status == psutil.CONN_LISTEN
        }
    assert len(listening) >= 3
    assert {ip.removeprefix("::ffff:") for ip, _ in listening} == {"127.0.0.1"}


async def test_services_log_in_with_roles_of_their_own_and_no_password_is_on_a_command_line(tmp_path):
    async with LocalStack(config(tmp_path, services=("optimizer",)), IdleModels()) as stack:
        connection = await asyncpg.connect(stack.database.url.get_secret_value())
        users = await connection.fetch("SELECT usename FROM pg_stat_activity WHERE application_name LIKE 'sprout.%'")
        assert {row["usename"] for row in users} == {"sprout_optimizer"}
        assert not await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        await connection.close()
        secrets = [
            stack.database.url.get_secret_value(),
            urlsplit(stack.database.url.get_secret_value()).password,
            (tmp_path / "evaluations-token").read_text().strip(),
        ]
        commands = " ".join(" ".join(psutil.Process(one.pid).cmdline()) for one in stack.state.processes)
        assert not [secret for secret in secrets if secret in commands]
        for name in ("stack.json", "evaluations-token"):
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        logs = "".join(path.read_text() for path in (tmp_path / "logs").glob("*.log"))
        assert not [secret for secret in secrets if secret in logs]
    assert not list((tmp_path / "data").glob("*.password*"))


def test_a_failed_start_shows_the_log_and_stops_every_process(tmp_path):
    stack = LocalStack(config(tmp_path), IdleModels(fails=True))
    with pytest.raises(ProcessFailedError, match=r"(?s)triton exited with status 3.*out of memory"):
        stack.start()
    assert read_state(tmp_path) is None
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(tmp_path) in command]


def test_a_detached_stack_is_found_and_stopped_by_its_state_file(tmp_path):
    stack = LocalStack(config(tmp_path), IdleModels(), detached=True)
    stack.start()
    state = read_state(tmp_path)
    assert state is not None
    try:
        with pytest.raises(StateError, match="stop it with 'sprout down'"):
            LocalStack(config(tmp_path), IdleModels()).start()
        assert living(state) == ["kafka", "postgres", "triton"]
    finally:
        stopped = stop_stack(state)
    assert stopped == 3
    assert living(state) == []
    assert read_state(tmp_path) is None


def test_an_exited_process_is_noticed_and_can_be_restarted(tmp_path):
    with LocalStack(config(tmp_path), IdleModels()) as stack:
        stack.kill("triton")
        stack.check()  # no error: the kill was requested
        stack.restart("triton")
        os.kill(stack.process("triton").pid, signal.SIGKILL)
        wait_until(lambda: not stack.process("triton").alive)
        with pytest.raises(ProcessFailedError, match="triton was ended by SIGKILL"):
            stack.check()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_the_stack_ends_with_its_owner(tmp_path, how):
    if how is signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux has a parent death signal")
    program = textwrap.dedent(
        f"""
        import signal, time
        from pathlib import Path
        from deploy.local.stack import LocalStack
        from tests.integration.test_local_stack import IdleModels, config
        # Processes that a shell started in the background ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with LocalStack(config(Path({str(tmp_path)!r})), IdleModels()):
            time.sleep(600)
        """
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: (state := read_state(tmp_path)) is not None and state.ready)
        state = read_state(tmp_path)
        assert state is not None
        assert living(state) == ["kafka", "postgres", "triton"]
        with pytest.raises(StateError, match=f"process {owner.pid} runs this stack in the foreground"):
            stop_stack(state)
        owner.send_signal(how)
        owner.wait(DEADLINE_S)
        wait_until(lambda: not living(state))
    finally:
        owner.kill()
        owner.wait()
