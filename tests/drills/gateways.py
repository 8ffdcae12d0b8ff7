"""Faults of gateways, and of routers behind them, while HTTP clients read answers: none may wait for ever."""

import asyncio
import json
import signal
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import httpx

from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from shared.kafka.records import RecordId
from shared.topics import REQUESTS
from tests.drills.run import ScenarioRun, prompt
from tests.drills.schedule import Fault, faults
from tests.support.fleets import MODEL

RATE: Final = 20.0
"""HTTP requests per second; each is open for 2.4 s, so that about 48 are open at a fault."""
REQUESTS_SENT: Final = 1_000
FAULTS: Final = 3
GATEWAYS: Final = 2
WITHIN_S: Final = 30.0
"""Every client has its answer or an error within this time, wall."""
HUNG_S: Final = 120.0
"""A client that has nothing after this time counts as hanging."""
DOWN_S: Final = (0.0, 2.0)

_NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""The gateways have none; a client would load the authorities of the system each time."""


async def gateway_killed(run: ScenarioRun) -> None:
    """One of two gateways is killed in the middle of its streams and restarted, three times; its clients ask again."""

    async def kill(fault: Fault, gateways: list[str]) -> None:
        victim = gateways[fault.victim]
        await run.inject("SIGKILL", victim, signal.SIGKILL)
        await asyncio.sleep(fault.hold_s)
        await run.restart(victim)

    await _with_clients(run, kill, may_end=True)


async def gateway_router_killed(run: ScenarioRun) -> None:
    """One of two routers behind the gateways is killed in the middle of its streams and restarted, three times."""

    async def kill(fault: Fault, _: list[str]) -> None:
        victim = await run.busy_router(fault.victim)
        await run.inject("SIGKILL", victim, signal.SIGKILL)
        await asyncio.sleep(fault.hold_s)
        await run.restart(victim)

    await _with_clients(run, kill, may_end=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one HTTP request ended.

    Attributes:
        kind: `answer`; `error event` of a stream; `status 503` and others; `connection ended`; `hung`.
        seconds: from its start, wall.
        error: why the connection ended.
    """

    kind: str
    seconds: float
    error: str = ""


async def _with_clients(
    run: ScenarioRun, inject: Callable[[Fault, list[str]], Awaitable[None]], *, may_end: bool
) -> None:
    """Clients of two gateways at a steady rate, with faults; then every request must have ended in time.

    Args:
        may_end: whether connections may end without an answer and without an error event.
    """
    urls, names = await _start(run)
    plan = faults(run.rng, number=run.number(FAULTS), victims=GATEWAYS, hold_s=DOWN_S, within=(0.1, 0.7))
    number = run.number(REQUESTS_SENT)
    began = time.monotonic()
    sending = asyncio.create_task(_send(urls, number, began))
    for fault in plan:
        await asyncio.sleep(max(0.0, began + fault.after * number / RATE - time.monotonic()))
        await inject(fault, names)
    outcomes = await sending
    counts = Counter(one.kind for one in outcomes)
    slowest_s = max(one.seconds for one in outcomes)
    run.figures.update({**counts, "HTTP requests": len(outcomes), "longest, s": round(slowest_s, 1)})
    run.check(slowest_s <= WITHIN_S, f"a client waited {slowest_s:.1f} s")
    run.check(not counts["hung"], f"{counts['hung']} clients hung")
    ended = counts["connection ended"]
    errors = Counter(one.error or "no [DONE]" for one in outcomes if one.kind == "connection ended")
    run.check(may_end or not ended, f"{ended} connections ended without an answer and without an error: {dict(errors)}")
    neither = number - counts["answer"] - counts["error event"]
    run.check(not neither, f"{neither} requests had neither an answer nor an error event: {dict(counts)}")
    await _count_published(run)


async def _start(run: ScenarioRun) -> tuple[list[str], list[str]]:
    """Start PostgreSQL, routers and gateways; returns the gateways' URLs and the names of their processes."""
    folder = run.environment.folder / run.scenario
    folder.mkdir(parents=True, exist_ok=True)
    name = f"postgres-{run.scenario.replace('_', '-')}"
    spec, url = await asyncio.to_thread(postgres_spec, folder / "postgres", name=name)
    await run.start(spec)
    await create_database(url)
    await run.serve(routers=2)
    environment = ServiceEnvironment(
        bootstrap_servers=run.kafka.bootstrap_servers,
        topic_prefix=run.kafka.topic_prefix,
        database_url=url,
        fleet_file=run.environment.folder / f"{run.kafka.topic_prefix}toml",
        clock={},
    )
    settings = {"SPROUT_KAFKA_GROUP_PREFIX": run.kafka.group_prefix, "SPROUT_GATEWAY_REQUIRE_KEY": "false"}
    specs = [
        service_spec(
            "gateway", port=port, environment=environment, settings=settings,
            name=f"{run.kafka.topic_prefix}gateway{number}",
        )
        for number, port in enumerate(free_ports(GATEWAYS))
    ]  # fmt: skip
    await run.start(*specs)
    return [spec.url or "" for spec in specs], [spec.name for spec in specs]


async def _send(urls: list[str], number: int, began: float) -> list[Outcome]:
    """Send evenly spaced requests, half of them streams; returns how each attempt ended."""
    asking = []
    for index in range(number):
        await asyncio.sleep(max(0.0, began + index / RATE - time.monotonic()))
        asking.append(asyncio.create_task(_ask_until_answered(urls, index)))
    return [one for outcomes in await asyncio.gather(*asking) for one in outcomes]


async def _ask_until_answered(urls: list[str], index: int) -> list[Outcome]:
    """Ask; after an error without an event ask the next gateway, as OpenAI's clients do. Returns all attempts."""
    outcomes: list[Outcome] = []
    began = time.monotonic()
    while time.monotonic() < began + HUNG_S:
        if outcomes:
            await asyncio.sleep(0.5)
        url = urls[(index // 2 + len(outcomes)) % len(urls)]
        outcomes.append(await _ask(url, index, stream=index % 2 == 0))
        if outcomes[-1].kind in {"answer", "error event", "hung"}:
            break
    return outcomes


async def _ask(url: str, index: int, *, stream: bool) -> Outcome:
    """Ask once, on a connection of its own.

    The pool of httpcore 1.0 looks at all its connections for every request, and may close one that it has just given to
    a request: with hundreds of them the drill would measure its client.
    """
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt(index)}], "stream": stream}
    headers = {"x-sprout-directive": "L0"}  # the longest answers
    began = time.monotonic()
    error = ""
    try:
        async with (
            asyncio.timeout(HUNG_S),
            httpx.AsyncClient(timeout=HUNG_S, verify=_NO_TLS) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as answer,
        ):
            lines = [line async for line in answer.aiter_lines() if line]
        kind = (
            _kind(answer, lines)
            if stream
            else "answer"
            if answer.status_code == 200
            else f"status {answer.status_code}"
        )
    except (TimeoutError, httpx.TimeoutException):
        kind = "hung"
    except httpx.TransportError as transport:
        kind, error = "connection ended", f"{type(transport).__name__}: {transport}"
    return Outcome(kind, time.monotonic() - began, error)


def _kind(answer: httpx.Response, lines: list[str]) -> str:
    """How a stream ended."""
    if answer.status_code != 200:
        return f"status {answer.status_code}"
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return "connection ended"
    last = json.loads(events[-2])
    return "error event" if "error" in last else "answer"


async def _count_published(run: ScenarioRun) -> None:
    """Count what the gateways have published as sent: each must get one answer, also if its client has left."""
    messages = run.traffic.messages
    for record in await run.traffic.records(REQUESTS):
        request_id = json.loads(record.value)["id"]
        messages.sent.add(request_id)
        messages.records[request_id] = str(RecordId.of(record, run.kafka.topic_prefix))
