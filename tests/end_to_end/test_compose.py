"""The stack of docker-compose.yml on a Docker engine that has, or can pull, the base images; skipped without one."""

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from deploy.local.processes import free_ports
from services import SERVICES
from shared.messages import GenerationRequest, GenerationResponse
from shared.runtime.settings import KafkaSettings
from shared.topics import REQUESTS, RESPONSES
from tests.support.compose import OURS, REPOSITORY, STAND_INS, WITH_SCHEMA, require_compose, run
from tests.support.deadlines import DEADLINE_S, wait_until

BASE_IMAGES = ("python:3.11-slim-bookworm", "apache/kafka:4.1.1", "postgres:17")

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1_800)]

Compose = Callable[..., str]


@pytest.fixture(scope="module")
def engine() -> None:
    """A Docker engine with the base images."""
    require_compose()
    try:
        run("docker", "info", timeout_s=30)
        for image in BASE_IMAGES:
            if not run("docker", "image", "ls", "--quiet", image).strip():
                run("docker", "pull", "--quiet", image, timeout_s=600)
    except (subprocess.TimeoutExpired, pytest.fail.Exception) as error:
        pytest.skip(f"no usable Docker engine: {str(error)[:500]}")


@pytest.fixture(scope="module")
def kafka_port() -> int:
    """The published port of Kafka."""
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def compose(engine: None, kafka_port: int) -> Iterator[Compose]:
    """`docker compose` for a separate project with healthy services; removed with its volumes afterwards."""
    project = f"sprout-test-{uuid4().hex[:8]}"

    def call(*arguments: str, timeout_s: float = 1_000.0, check: bool = True) -> str:
        return run(
            "docker", "compose", "--env-file", os.devnull, "--project-name", project, *arguments,
            timeout_s=timeout_s, check=check, KAFKA_EXTERNAL_PORT=str(kafka_port),
        )  # fmt: skip

    try:
        call("build", timeout_s=1_200)
        call("up", "--detach", "--wait", "--wait-timeout", "900", timeout_s=1_000)
        yield call
    finally:
        call("down", "--volumes", "--timeout", "20", check=False)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _locked(lock: Path) -> set[str]:
    return {_normal(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", lock.read_text(), re.MULTILINE)}


def _installed(compose: Compose, service: str) -> set[str]:
    listing = "import importlib.metadata as m; print(*(d.name for d in m.distributions()), sep='\\n')"
    return {
        _normal(name)
        for name in compose("run", "--rm", "--no-deps", "--entrypoint", "python", service, "-c", listing).split()
    }


def test_images_have_only_their_own_packages(compose: Compose) -> None:
    installed = {service: _installed(compose, service) for service in OURS}
    for service in SERVICES:
        lock = REPOSITORY / "requirements" / f"{service.replace('_', '-')}.lock"
        assert installed[service] <= _locked(lock), service
        assert {"faststream", "aiokafka"} <= installed[service], service
    assert installed["cli"] <= _locked(REPOSITORY / "requirements" / "cli.lock")
    for server in STAND_INS:
        assert installed[server] == {"nvidia-pytriton", "numpy"}, server
    having = {
        package: {service for service in SERVICES if package in installed[service]}
        for package in ("tritonclient", "highspy", "asyncpg", "pip", "pytest")
    }
    assert having == {
        "tritonclient": {"router", "evaluator"},
        "highspy": {"optimizer"},
        "asyncpg": set(WITH_SCHEMA),
        "pip": set(),
        "pytest": set(),
    }


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_has_only_its_own_code_and_cannot_change_it(compose: Compose, service: str) -> None:
    output = compose(
        "exec", "-T", service, "sh", "-c", "id -u; ls services; ls; touch /app/x 2>/dev/null && echo writable; true"
    ).split()
    assert output[0] == "10001"
    assert set(output[1:]) - {"__pycache__"} == {"__init__.py", "__main__.py", service, "services", "shared"}


def _python(compose: Compose, service: str, program: str, check: bool = True) -> str:
    return compose("exec", "-T", service, "python", "-c", program, check=check)


def test_a_service_cannot_read_the_tables_of_another(compose: Compose) -> None:
    query = """
import asyncio, asyncpg
from shared.runtime.settings import DatabaseSettings
async def main():
    connection = await asyncpg.connect(DatabaseSettings().url.get_secret_value())
    print(await connection.fetchval("SELECT current_user || ' ' || count(*) FROM ledger.calls"))
    for statement in ("TABLE evaluator.reservoir", "CREATE SCHEMA mine", "ALTER ROLE sprout_ledger SUPERUSER"):
        try:
            await connection.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            print("denied")
asyncio.run(main())
"""
    output = _python(compose, "ledger", query).split()
    assert output[0] == "sprout_ledger"
    assert output[2:] == ["denied"] * 3


def test_passwords_differ_and_are_readable_in_their_own_container_only(compose: Compose) -> None:
    program = "import pathlib; print(*(f'{p.name}={p.read_text()}' for p in pathlib.Path('/run/sprout').glob('*')))"
    found = {
        service: dict(one.split("=", 1) for one in _python(compose, service, program).split()) for service in SERVICES
    }
    assert {service: set(names) for service, names in found.items()} == {
        "carbon_feed": set(),
        "optimizer": {"database-password"},
        "evaluator": {"database-password", "evaluations-token", "draw-key"},
        "ledger": {"database-password"},
        "gateway": {"database-password"},
        "router": {"draw-key"},
    }
    passwords = {found[service]["database-password"] for service in WITH_SCHEMA}
    assert len(passwords) == len(WITH_SCHEMA)
    assert all(len(password) >= 40 for password in passwords)
    assert found["router"]["draw-key"] == found["evaluator"]["draw-key"]


def test_the_evaluator_takes_requests_with_its_token_only(compose: Compose) -> None:
    assert compose("run", "--rm", "cli", "evaluate").startswith("llama-2-13b-chat: requested")
    call = ("run", "--rm", "--env", "SPROUT_EVALUATOR_HTTP_TOKEN_FILE=/run/sprout/database-password", "cli", "evaluate")
    assert compose(*call, check=False) == ""


def test_starting_again_keeps_the_secrets_and_the_tables(compose: Compose) -> None:
    program = "print(open('/run/sprout/database-password').read())"
    before = _python(compose, "ledger", program)
    compose("up", "--detach", "--wait", "--wait-timeout", "900", "--force-recreate", "secrets", "postgres", "ledger")
    assert _python(compose, "ledger", program) == before
    assert compose("exec", "-T", "ledger", "python", "/usr/local/lib/sprout/healthcheck.py", "8080", "/ready") == ""


def test_a_producer_gets_an_answer(compose: Compose) -> None:
    answered = json.loads(compose("run", "--rm", "cli", "send", "--json", "Who wrote Emma?"))
    response = answered["response"]
    assert response["status"] == "ok"
    assert response["text"]
    assert response["decision"]["level"] in {"L0", "L1", "L2"}


def test_the_ledger_reads_the_meter_of_every_model_server(compose: Compose) -> None:
    program = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/metrics').read().decode())"
    wanted = {f"local-13b-{number}" for number in range(len(STAND_INS))}
    metered = r'^sprout_ledger_energy_joules_total\{endpoint="(.+?)",part="metered"\} (\S+)$'

    def every_meter_is_read() -> bool:
        page = compose("exec", "-T", "ledger", "python", "-c", program)
        joules = {endpoint: float(value) for endpoint, value in re.findall(metered, page, re.MULTILINE)}
        return all(joules.get(endpoint, 0.0) > 0.0 for endpoint in wanted)

    wait_until(every_meter_is_read)


async def test_no_request_is_lost_when_one_of_three_routers_is_killed(compose: Compose, kafka_port: int) -> None:
    compose("up", "--detach", "--wait", "--no-recreate", "--scale", "router=3", "router")
    routers = compose("ps", "--quiet", "router").split()
    assert len(routers) == 3

    kafka = KafkaSettings(bootstrap_servers=f"localhost:{kafka_port}")
    ids = [f"compose-{uuid4().hex}" for _ in range(300)]
    consumer = AIOKafkaConsumer(
        kafka.topic(RESPONSES), bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="latest"
    )
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all")
    await consumer.start()
    await producer.start()
    try:
        # Without a group the position is set at the first poll, which must be before the first answer.
        for partition in consumer.assignment():
            await consumer.position(partition)
        for number, request_id in enumerate(ids):
            request = GenerationRequest(id=request_id, prompt=f"What is {number} times {number}?")
            await producer.send_and_wait(
                kafka.topic(REQUESTS), request.model_dump_json(exclude_none=True).encode(), key=request_id.encode()
            )
            if number == len(ids) // 2:
                await asyncio.to_thread(run, "docker", "kill", "--signal", "KILL", routers[0])
        answered: dict[str, GenerationResponse] = {}
        async with asyncio.timeout(DEADLINE_S):
            while set(ids) - answered.keys():
                record = await consumer.getone()
                response = GenerationResponse.model_validate_json(record.value)
                answered[response.request_id] = response
    finally:
        await producer.stop()
        await consumer.stop()
    assert {answered[request_id].status for request_id in ids} == {"ok"}
