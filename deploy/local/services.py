"""How each service runs as a local process: its command and its environment."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.local.paths import REPOSITORY
from deploy.local.ports import LOOPBACK
from deploy.local.processes import ProcessSpec, http_probe

WITH_DATABASE = frozenset({"optimizer", "evaluator", "ledger"})
READY_TIMEOUT_S = 90.0
SERVICE_TIER = 2
"""Services are stopped before the model server, that one before the broker and the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every service of a stack is told."""

    bootstrap_servers: str
    topic_prefix: str
    database_url: str
    fleet_file: Path
    clock: Mapping[str, str]
    log_level: str = "INFO"


def service_spec(
    service: str, *, port: int, around: Surroundings, settings: Mapping[str, str], name: str | None = None
) -> ProcessSpec:
    """How to run one process of a service.

    Args:
        service: its package below `services`.
        port: of its HTTP side, on loopback.
        settings: environment of this service alone; wins over what every service is told.
        name: of the process, where a service runs more than once.
    """
    environment = {
        **around.clock,
        "SPROUT_KAFKA_BOOTSTRAP_SERVERS": around.bootstrap_servers,
        "SPROUT_KAFKA_TOPIC_PREFIX": around.topic_prefix,
        "SPROUT_FLEET_FILE": str(around.fleet_file),
        "SPROUT_HTTP_HOST": LOOPBACK,
        "SPROUT_HTTP_PORT": str(port),
        "SPROUT_LOG_LEVEL": around.log_level,
        "SPROUT_LOG_FORMAT": "json",
        # A line must be in the log when a person looks for it.
        "PYTHONUNBUFFERED": "1",
    }
    if service in WITH_DATABASE:
        environment["SPROUT_DATABASE_URL"] = around.database_url
    url = f"http://{LOOPBACK}:{port}"
    return ProcessSpec(
        name=name or service,
        command=(sys.executable, "-m", "services", service),
        environment={**environment, **settings},
        directory=REPOSITORY,
        ready=http_probe(f"{url}/ready"),
        ready_timeout_s=READY_TIMEOUT_S,
        tier=SERVICE_TIER,
        port=port,
        url=url,
    )
