"""docker-compose.yml as `docker compose config` shows it. Needs that command, but no engine."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from services import SERVICES
from shared.batch_curve import MEASURED
from shared.fleet import load_fleet
from tests.support.compose import ONE_SHOTS, OURS, REPOSITORY, STAND_INS, WITH_SCHEMA, require_compose, run

pytestmark = pytest.mark.integration


def config(*options: str) -> dict[str, Any]:
    # An empty file instead of the developer's .env.
    files = options if "--env-file" in options else ("--env-file", os.devnull, *options)
    document: dict[str, Any] = json.loads(run("docker", "compose", *files, "config", "--format", "json"))
    return document


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Every service of the file with the default settings, including those of profiles."""
    require_compose()
    found: dict[str, Any] = config("--profile", "*")["services"]
    return found


def test_the_file_is_valid_with_the_defaults_and_the_shipped_env_files() -> None:
    require_compose()
    for file in (os.devnull, ".env.example", "deploy/docker/gpu.env"):
        run("docker", "compose", "--env-file", file, "config", "--quiet")


def test_the_example_env_file_states_the_defaults() -> None:
    require_compose()
    assert config("--env-file", ".env.example", "--profile", "*") == config("--profile", "*")


def test_ports_are_published_on_loopback_only(services: dict[str, Any]) -> None:
    published = {name: port for name, service in services.items() for port in service.get("ports", [])}
    assert set(published) == {"gateway", "kafka"}
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
    shipped = run("git", "ls-files", "deploy/docker").split()
    assert not [file for file in shipped if "password" in file or "token" in file]
    for name, service in services.items():
        for variable, value in (service.get("environment") or {}).items():
            if re.search("PASSWORD|TOKEN|API_KEY|DRAW_KEY", variable):
                assert variable.endswith("_FILE") or not value, (name, variable)


def test_tokens_of_other_parties_are_mounted_as_files(tmp_path: Path) -> None:
    require_compose()
    token = tmp_path / "token"
    token.write_text("a-token")
    env = tmp_path / "env"
    env.write_text(f"ELECTRICITY_MAPS_TOKEN_FILE={token}\nJUDGE_API_KEY_FILE={token}\n")
    document = config("--env-file", str(env))
    feed, evaluator = (document["services"][name] for name in ("carbon_feed", "evaluator"))
    variable = feed["environment"]["SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN_FILE"]
    assert variable == "/run/secrets/electricity-maps-token"
    assert [one["source"] for one in feed["secrets"]] == ["electricity-maps-token"]
    variable = evaluator["environment"]["SPROUT_EVALUATOR_JUDGE_API_KEY_FILE"]
    assert variable == "/run/secrets/judge-api-key"
    assert {one["file"] for one in document["secrets"].values()} == {str(token)}


def test_the_gpu_profile_swaps_the_model_server() -> None:
    require_compose()
    document = config("--env-file", "deploy/docker/gpu.env")
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
