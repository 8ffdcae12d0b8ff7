"""docker-compose.yml and the `docker compose` command, for the tests of the file and of a running stack."""

import os
import subprocess
from pathlib import Path

import pytest

from services import SERVICES

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_INS = ("triton-0", "triton-1")
ONE_SHOTS = ("secrets", "database", "topics")
"""They do their work and exit before others start."""
OURS = (*SERVICES, *ONE_SHOTS, *STAND_INS, "cli")
WITH_SCHEMA = tuple(name for name, service in SERVICES.items() if service.needs_database)


def run(*command: str, timeout_s: float = 120.0, check: bool = True, **environment: str) -> str:
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


def require_compose() -> None:
    """Skip where the `docker compose` command is missing."""
    try:
        run("docker", "compose", "version", timeout_s=30)
    except (OSError, subprocess.TimeoutExpired, pytest.fail.Exception) as error:
        pytest.skip(f"no docker compose here: {error}")
