"""`sprout status`: the local stack's processes, their health, role and consumer lag, and the fleet's endpoints."""

import asyncio
import json
import time
import urllib.request
from typing import Annotated, Any

import typer
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from rich.markup import escape
from rich.table import Table

from deploy.local.processes import http_probe
from deploy.local.services import SERVICE_TIER
from deploy.local.state import GATEWAY, ProcessRecord, StackState
from shared.access import ACCESS, leader_group
from shared.runtime.logs import printable
from shared.runtime.settings import KafkaSettings
from tools.cli.console import Exit, Target, out, quiet_clients, running_stack

LAG_TIMEOUT_S = 5.0
NOTICE_WIDTH = 60
MODEL_SERVERS = "triton"
"""How the names of the model servers' processes begin."""


def status(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """Show every process of the local stack: pid, port, health, role, uptime, and the lag of its consumer groups.

    The lag is the number of records that the service has not processed yet, over all topics that it reads in a group.

    Also shows the endpoints of the fleet, and whether each is awake: whether its model is loaded.

    Exit codes: 0 every process is ready, 1 a process is not ready, 3 no stack is running.
    """
    state = running_stack()
    quiet_clients()
    lags = asyncio.run(_lags(state))
    rows = [_row(process, lags) for process in state.processes]
    endpoints = _endpoints(state)
    if as_json:
        document = {
            "broker": "kafka",
            "bootstrap_servers": state.bootstrap_servers,
            "api": _api(state),
            "model": state.model,
            "zone": state.zone,
            "event_time": state.event_clock.now().isoformat(),
            "rate": state.event_clock.rate,
            "processes": rows,
            "endpoints": endpoints,
        }
        print(json.dumps(document, indent=2))
    else:
        _print(state, rows)
        _print_endpoints(endpoints)
    if not state.ready or any(row["health"] != "ready" for row in rows):
        raise typer.Exit(Exit.FAILED)


def _api(state: StackState) -> str | None:
    """Base URL of the OpenAI-compatible API; `sprout endpoint` prints it with a key."""
    return next((f"{process.url}/v1" for process in state.processes if process.name == GATEWAY), None)


def _row(process: ProcessRecord, lags: dict[str, int]) -> dict[str, Any]:
    alive = process.alive
    return {
        "name": process.name,
        "pid": process.pid if alive else None,
        "port": process.port,
        "health": _health(process) if alive else "ended",
        "role": _role(process) if alive else None,
        "uptime_s": round(time.time() - process.started_at_s, 1) if alive else None,
        "lag": lags.get(process.name),
    }


def _health(process: ProcessRecord) -> str:
    if process.url is None:
        return "ready"
    path = "/v2/health/ready" if process.name.startswith(MODEL_SERVERS) else "/ready"
    return http_probe(process.url + path)() or "ready"


def _role(process: ProcessRecord) -> str | None:
    """Leader or standby; None for a process whose copies all do the same, or that is not ready."""
    if process.url is None or process.tier != SERVICE_TIER:
        return None
    try:
        with urllib.request.urlopen(f"{process.url}/ready", timeout=2.0) as response:
            role = json.load(response).get("role")
    except (OSError, ValueError):
        return None
    return None if role is None else str(role)


def _endpoints(state: StackState) -> list[dict[str, str]]:
    """The endpoints of the fleet, in packing order: pool, name, address, process, and whether it is awake."""
    fleet = Target(state.kafka, state).fleet()
    servers = {process.port: process for process in state.processes if process.name.startswith(MODEL_SERVERS)}
    return [
        {
            "name": endpoint.name,
            "pool": pool.name,
            "grpc": endpoint.grpc,
            "process": process.name,
            "state": _endpoint_state(process, pool.triton_model),
        }
        for pool in (() if fleet is None else fleet.pools)
        for endpoint in pool.endpoints
        if (process := servers.get(int(endpoint.grpc.rpartition(":")[2]))) is not None
    ]


def _endpoint_state(process: ProcessRecord, model: str) -> str:
    if not process.alive or http_probe(f"{process.url}/v2/health/live")() is not None:
        return "unreachable"
    return "asleep" if http_probe(f"{process.url}/v2/models/{model}/ready")() else "awake"


async def _lags(state: StackState) -> dict[str, int]:
    """The lag of each service's consumer groups, in records; services without a group are left out."""
    services = [process.name for process in state.running if process.tier == SERVICE_TIER and "-" not in process.name]
    try:
        async with asyncio.timeout(LAG_TIMEOUT_S):
            committed = await _committed(state.kafka, services)
            partitions = {partition for offsets in committed.values() for partition in offsets}
            if not partitions:
                return {}
            ends = await _ends(state.kafka, list(partitions))
    except (KafkaError, OSError, TimeoutError):
        return {}  # the health column shows that Kafka does not answer
    return {
        service: sum(max(0, ends[partition] - offset) for partition, offset in offsets.items())
        for service, offsets in committed.items()
        if offsets
    }


async def _committed(kafka: KafkaSettings, services: list[str]) -> dict[str, dict[TopicPartition, int]]:
    """The committed offsets of each service's consumer groups; no two of its groups read the same topic."""
    admin = AIOKafkaAdminClient(**kafka.client_options(), request_timeout_ms=3_000)
    try:
        await admin.start()
        return {
            service: {
                partition: entry.offset
                for group in groups_of(service)
                for partition, entry in (await admin.list_consumer_group_offsets(kafka.group(group))).items()
                if entry.offset >= 0
            }
            for service in services
        }
    finally:
        await admin.close()


def groups_of(service: str) -> list[str]:
    """The consumer groups in which a service processes records, without the prefix."""
    access = ACCESS.get(service)
    return [] if access is None else [group for group in access.groups if group != leader_group(service)]


async def _ends(kafka: KafkaSettings, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
    """The end offset of each partition."""
    consumer: Any = AIOKafkaConsumer(**kafka.client_options(), enable_auto_commit=False)
    try:
        await consumer.start()
        ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
    finally:
        await consumer.stop()
    return ends


def _print(state: StackState, rows: list[dict[str, Any]]) -> None:
    out.print(printable(f"Kafka      {state.bootstrap_servers}"), markup=False)
    if (api := _api(state)) is not None:
        out.print(printable(f"API        {api}, page {api.removesuffix('v1')}; key: sprout endpoint"), markup=False)
    out.print(printable(f"model      {state.model}, zone {state.zone}"), markup=False)
    clock = state.event_clock
    speed = "real time" if not state.clock else f"{clock.rate:g} times real time"
    out.print(f"event time {clock.now():%Y-%m-%d %H:%M} UTC, {speed}", markup=False)
    table = Table("process", "pid", "port", "health", "role", "uptime", "lag")
    for row in rows:
        health = str(row["health"])
        style = "green" if health == "ready" else "red"
        table.add_row(
            row["name"],
            "" if row["pid"] is None else str(row["pid"]),
            "" if row["port"] is None else str(row["port"]),
            f"[{style}]{_short(health)}[/]",
            "" if row["role"] is None else _short(str(row["role"])),
            "" if row["uptime_s"] is None else _duration(row["uptime_s"]),
            "" if row["lag"] is None else str(row["lag"]),
        )
    out.print(table)
    if not state.ready:
        out.print(
            "the stack is still starting, or its start was interrupted; in that case: sprout down, then sprout up"
        )


def _print_endpoints(endpoints: list[dict[str, str]]) -> None:
    table = Table("endpoint", "pool", "gRPC", "process", "state")
    for endpoint in endpoints:
        style = {"awake": "green", "asleep": "blue"}.get(endpoint["state"], "red")
        table.add_row(
            *(escape(printable(endpoint[column])) for column in ("name", "pool", "grpc", "process")),
            f"[{style}]{endpoint['state']}[/]",
        )
    if endpoints:
        out.print(table)


def _short(text: str) -> str:
    text = printable(text)
    return escape(text if len(text) <= NOTICE_WIDTH else text[: NOTICE_WIDTH - 1] + "…")


def _duration(seconds: float) -> str:
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {whole % 60:02} s"
