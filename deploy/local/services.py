"""The services of a local stack as processes: command, environment and settings."""

import json
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.local.config import REPOSITORY, StackConfig
from deploy.local.grid import shipped_trace
from deploy.local.processes import LOOPBACK, ProcessSpec, http_probe
from deploy.local.state import TOKEN_FILE, write_private
from services import SERVICES

READY_TIMEOUT_S: Final = 180.0
SERVICE_TIER: Final = 2
"""The tier of services: stopped before the model servers, Kafka and PostgreSQL."""

BACKGROUND_NICENESS: Final = 5
"""Of the services that no request waits for: solving and learning must not delay answers on a machine of few cores."""

SETTLE_DELAY_WALL_S: Final = 10.0
"""The ledger's settlement delay, wall seconds. The ledger learns of a call only when it ends. A call longer than the
delay (about 800 tokens of the stand-in's default curve) gets energy for its last part only; the energy before that
counts as unattributed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEnvironment:
    """The settings that all services of a stack have.

    Attributes:
        database_url: with the role of the service that the environment is for; empty: none.
        clock: `SPROUT_CLOCK_*` variables; empty: real time.
        draw_key_file: key of random draws; None: none.
    """

    bootstrap_servers: str
    topic_prefix: str
    database_url: str
    fleet_file: Path
    clock: Mapping[str, str]
    draw_key_file: Path | None = None
    log_level: str = "INFO"

    def variables(self) -> dict[str, str]:
        """The environment variables, without those of the database."""
        drawing = () if self.draw_key_file is None else ("ROUTER", "EVALUATOR")
        return {
            **self.clock,
            **{f"SPROUT_{service}_DRAW_KEY_FILE": str(self.draw_key_file) for service in drawing},
            "SPROUT_KAFKA_BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "SPROUT_KAFKA_TOPIC_PREFIX": self.topic_prefix,
            "SPROUT_FLEET_FILE": str(self.fleet_file),
            "SPROUT_LOG_LEVEL": self.log_level,
            "SPROUT_LOG_FORMAT": "json",
            # Otherwise log lines reach the file late.
            "PYTHONUNBUFFERED": "1",
        }


def service_spec(
    service: str, *, port: int, environment: ServiceEnvironment, settings: Mapping[str, str], name: str | None = None
) -> ProcessSpec:
    """The process of a service.

    Args:
        service: its package in `services`.
        port: of its HTTP interface, on loopback.
        settings: environment variables of this process; they override the shared settings.
        name: of the process; default: the service's.
    """
    variables = {**environment.variables(), "SPROUT_HTTP_HOST": LOOPBACK, "SPROUT_HTTP_PORT": str(port)}
    if SERVICES[service].needs_database:
        variables["SPROUT_DATABASE_URL"] = environment.database_url
    url = f"http://{LOOPBACK}:{port}"
    return ProcessSpec(
        name=name or service,
        command=(sys.executable, "-m", "services", service),
        environment={**variables, **settings},
        directory=REPOSITORY,
        ready=http_probe(f"{url}/ready"),
        ready_timeout_s=READY_TIMEOUT_S,
        tier=SERVICE_TIER,
        port=port,
        url=url,
        niceness=0 if service == "router" else BACKGROUND_NICENESS,
    )


def sleeper_spec(environment: ServiceEnvironment) -> ProcessSpec:
    """The process that puts endpoints to sleep and wakes them."""
    return ProcessSpec(
        name="sleeper",
        command=(sys.executable, "-m", "deploy.local.sleeper"),
        environment=environment.variables(),
        directory=REPOSITORY,
        # It wakes the endpoints before it exits.
        stop_grace_s=15.0,
        tier=SERVICE_TIER,
    )


def secret_file(file: Path) -> Path:
    """A file with a random secret, which is made if there is none."""
    if not file.exists():
        write_private(file, f"{secrets.token_hex(32)}\n")
    return file


def service_settings(config: StackConfig) -> dict[str, dict[str, str]]:
    """Environment variables by service: defaults for few requests sent by hand, overridden by `config.settings`.

    Raises:
        TraceError: the zone has no trace, and none is shipped for it.
    """
    defaults = {
        # Every request is a sample, and an evaluation needs few of them.
        "router": {"SPROUT_ROUTER_SAMPLE_SHARE": "1"},
        "evaluator": {
            "SPROUT_EVALUATOR_MIN_SAMPLES": "20",
            "SPROUT_EVALUATOR_HTTP_TOKEN_FILE": str(config.state_dir / TOKEN_FILE),
        },
        "ledger": {
            "SPROUT_LEDGER_SCRAPE_INTERVAL_S": "1",
            "SPROUT_LEDGER_SETTLE_DELAY_S": f"{SETTLE_DELAY_WALL_S * config.rate:g}",
            "SPROUT_LEDGER_SETTLE_INTERVAL_S": "1",
        },
    }
    if "carbon_feed" in config.services:
        defaults["carbon_feed"] = {"SPROUT_CARBON_FEED_PROVIDERS": carbon_providers(config)}
    return {
        service: defaults.get(service, {}) | config.settings.get(service, {}) for service in defaults | config.settings
    }


def carbon_providers(config: StackConfig) -> str:
    """The providers of carbon_feed, as JSON: a trace for every zone.

    In real time the trace is repeated, because it has no values for today; a replay uses the recorded times.

    Raises:
        TraceError: the zone has no trace, and none is shipped for it.
    """
    traces: dict[str, Path] = dict(config.carbon)
    if config.zone not in traces:
        traces[config.zone] = shipped_trace(config.zone)
    repeat = config.event_start is None
    return json.dumps(
        {zone: [{"kind": "csv", "path": str(path), "repeat": repeat}] for zone, path in sorted(traces.items())}
    )
