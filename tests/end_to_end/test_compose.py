"""docker-compose.yml: checks of the file, and the whole stack on a Docker engine.

The first part needs the `docker compose` command, the second a Docker engine that has, or can pull, the base images.
Each is skipped, with the reason, if it is missing.
"""

import asyncio
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from deploy.local.processes import free_ports
from services import SERVICES
from shared.batch_curve import MEASURED
from shared.fleet import load_fleet
from shared.messages import GenerationRequest, GenerationResponse
from shared.runtime.settings import KafkaSettings
from shared.topics import REQUESTS, RESPONSES
from tests.support.deadlines import DEADLINE_S

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_INS = ("triton-0", "triton-1")
ONE_SHOTS = ("secrets", "database", "topics")
"""They do their work and exit before others start."""
OURS = (*SERVICES, *ONE_SHOTS, *STAND_INS, "cli")
WITH_SCHEMA = tuple(name for name, service in SERVICES.items() if service.needs_database)
BASE_IMAGES = ("python:3.11-slim-bookworm", "apache/kafka:4.1.1", "postgres:17")

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1_800)]


def _run(*command: str, timeout_s: float = 120.0, check: bool = True, **environment: str) -> str:
    """Run a command in the checkout; a failure shows its output."""
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if check and done.returncode != 0:
        pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


# ------------------------------------------------------------------------------------------------------- the file


def _require_compose() -> None:
    try:
        _run("docker", "compose", "version", timeout_s=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no docker compose here: {error}")
    except pytest.fail.Exception as error:
        pytest.skip(f"no docker compose here: {error}")


def _config(*options: str) -> dict[str, Any]:
    # An empty file instead of the developer's .env.
    files = options if "--env-file" in options else ("--env-file", os.devnull, *options)
    document: dict[str, Any] = json.loads(_run("docker", "compose", *files, "config", "--format", "json"))
    return document


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Every service of the file with the default settings, including those of profiles."""
    _require_compose()
    found: dict[str, Any] = _config("--profile", "*")["services"]
    return found


def test_the_file_is_valid_with_the_defaults_and_the_shipped_env_files() -> None:
    _require_compose()
    for file in (os.devnull, ".env.example", "deploy/docker/gpu.env"):
        _run("docker", "compose", "--env-file", file, "config", "--quiet")


def test_the_example_env_file_states_the_defaults() -> None:
    _require_compose()
    assert _config("--env-file", ".env.example", "--profile", "*") == _config("--profile", "*")


def test_ports_are_published_on_loopback_only(services: dict[str, Any]) -> None:
    published = {name: port for name, service in services.items() for port in service.get("ports", [])}
    assert set(published) == {"kafka"}
    assert {port["host_ip"] for port in published.values()} == {"127.0.0.1"}


def test_every_image_is_pinned(services: dict[str, Any]) -> None:
    for name, service in services.items():
        tag = service["image"].partition(":")[2]
        assert re.search(r"[0-9]", tag), f"{name}: {service['image']}"


def test_every_container_has_limits_rotated_logs_and_a_restart_policy(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["logging"]["options"]["max-size"], name
        assert service["restart"] == ("no" if name in {*ONE_SHOTS, "cli"} else "unless-stopped"), name
        if name != "triton-gpu":  # the engines' size decides
            assert int(service["mem_limit"]) <= 1 << 30, name


def test_containers_of_sprout_are_read_only_and_have_no_privileges(services: dict[str, Any]) -> None:
    for name in OURS:
        assert services[name]["read_only"] is True, name
        assert services[name]["cap_drop"] == ["ALL"], name
        assert services[name]["security_opt"] == ["no-new-privileges:true"], name


def test_routers_can_be_scaled(services: dict[str, Any]) -> None:
    router = services["router"]
    assert "container_name" not in router
    assert not router.get("ports")


def test_services_start_after_what_they_need(services: dict[str, Any]) -> None:
    for name in SERVICES:
        needs = {other: rule["condition"] for other, rule in services[name]["depends_on"].items()}
        assert needs["kafka"] == "service_healthy", name
        assert needs["topics"] == "service_completed_successfully", name
        if name in WITH_SCHEMA:
            assert needs["database"] == "service_completed_successfully", name
        if any(mount["source"].endswith("-secrets") for mount in services[name].get("volumes", ())):
            assert needs.keys() & {"secrets", "database"}, name
        if name in {"router", "evaluator"}:
            assert {needs[server] for server in STAND_INS} == {"service_healthy"}, name


def test_every_service_has_a_role_and_the_secrets_of_no_other(services: dict[str, Any]) -> None:
    roles = {"cli": "operator"} | {name: name for name in WITH_SCHEMA}
    for name, role in roles.items():
        environment = services[name]["environment"]
        assert environment["SPROUT_DATABASE_URL"] == f"postgresql://sprout_{role}@postgres:5432/sprout", name
        assert environment["SPROUT_DATABASE_PASSWORD_FILE"] == "/run/sprout/database-password", name
    given = {
        option.split("=")[1] for option in services["database"]["command"] if option.startswith("--password-file=")
    }
    assert given == set(roles.values())
    for name, service in services.items():
        volumes = {mount["source"]: mount for mount in service.get("volumes", ()) if "secrets" in mount["source"]}
        if name in {"secrets", "database"}:
            continue
        assert set(volumes) <= {f"{roles.get(name, name)}-secrets"}, name
        assert all(mount["read_only"] for mount in volumes.values()), name


def test_no_secret_is_shipped_or_in_an_environment(services: dict[str, Any]) -> None:
    shipped = _run("git", "ls-files", "deploy/docker").split()
    assert not [file for file in shipped if "password" in file or "token" in file]
    for name, service in services.items():
        for variable, value in (service.get("environment") or {}).items():
            if re.search("PASSWORD|TOKEN|API_KEY|DRAW_KEY", variable):
                assert variable.endswith("_FILE") or not value, (name, variable)


def test_tokens_of_other_parties_are_mounted_as_files(tmp_path: Path) -> None:
    _require_compose()
    token = tmp_path / "token"
    token.write_text("a-token")
    env = tmp_path / "env"
    env.write_text(f"ELECTRICITY_MAPS_TOKEN_FILE={token}\nJUDGE_API_KEY_FILE={token}\n")
    document = _config("--env-file", str(env))
    feed, evaluator = (document["services"][name] for name in ("carbon_feed", "evaluator"))
    variable = feed["environment"]["SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN_FILE"]
    assert variable == "/run/secrets/electricity-maps-token"
    assert [one["source"] for one in feed["secrets"]] == ["electricity-maps-token"]
    variable = evaluator["environment"]["SPROUT_EVALUATOR_JUDGE_API_KEY_FILE"]
    assert variable == "/run/secrets/judge-api-key"
    assert {one["file"] for one in document["secrets"].values()} == {str(token)}


def test_the_gpu_profile_swaps_the_model_server() -> None:
    _require_compose()
    document = _config("--env-file", "deploy/docker/gpu.env")
    real = document["services"]["triton-gpu"]
    assert {document["services"][name]["deploy"]["replicas"] for name in STAND_INS} == {0}
    assert real["image"].startswith("nvcr.io/nvidia/tritonserver:")
    assert real["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert document["configs"]["fleet"]["file"].endswith("fleet.gpu.toml")


@pytest.mark.parametrize("file", ["fleet.toml", "fleet.gpu.toml"])
def test_endpoints_of_the_shipped_fleets_are_services_of_the_file(file: str, services: dict[str, Any]) -> None:
    fleet = load_fleet(REPOSITORY / "deploy" / "docker" / file)
    hosts = {endpoint.grpc.partition(":")[0] for pool in fleet.pools for endpoint in pool.endpoints}
    assert hosts <= set(services)
    assert fleet.levels == ("L0", "L1", "L2")


def test_every_stand_in_is_an_endpoint_with_a_meter_of_its_own(services: dict[str, Any]) -> None:
    pool, judge = load_fleet(REPOSITORY / "deploy" / "docker" / "fleet.toml").pools
    labels = [services[name]["environment"]["SPROUT_TRITON_GPU_UUID"] for name in STAND_INS]
    assert len(set(labels)) == len(labels)
    assert [(endpoint.grpc, endpoint.gpus) for endpoint in pool.endpoints] == [
        (f"{name}:8001", (label,)) for name, label in zip(STAND_INS, labels, strict=True)
    ]
    curve = services[STAND_INS[0]]["environment"]["SPROUT_TRITON_CURVE"]
    assert pool.idle_power_w == MEASURED[curve].idle_w
    assert [endpoint.grpc for endpoint in judge.endpoints] == ["triton-0:8001"]
    assert [services[name]["environment"].get("SPROUT_TRITON_JUDGE") for name in STAND_INS] == [None, "none"]


# --------------------------------------------------------------------------------------------------- on an engine

Compose = Callable[..., str]


@pytest.fixture(scope="module")
def engine() -> None:
    """A Docker engine with the base images."""
    _require_compose()
    try:
        _run("docker", "info", timeout_s=30)
        for image in BASE_IMAGES:
            if not _run("docker", "image", "ls", "--quiet", image).strip():
                _run("docker", "pull", "--quiet", image, timeout_s=600)
    except subprocess.TimeoutExpired as error:
        pytest.skip(f"no usable Docker engine: {error}")
    except pytest.fail.Exception as error:
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
        return _run(
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
        "asyncpg": {"optimizer", "evaluator", "ledger"},
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
    deadline = time.monotonic() + DEADLINE_S
    while True:
        page = compose("exec", "-T", "ledger", "python", "-c", program)
        metered = r'^sprout_ledger_energy_joules_total\{endpoint="(.+?)",part="metered"\} (\S+)$'
        joules = {endpoint: float(value) for endpoint, value in re.findall(metered, page, re.MULTILINE)}
        if all(joules.get(endpoint, 0.0) > 0.0 for endpoint in wanted):
            return
        assert time.monotonic() < deadline, joules
        time.sleep(1.0)


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
                await asyncio.to_thread(_run, "docker", "kill", "--signal", "KILL", routers[0])
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
