"""Faults of the services and of what they depend on, under steady traffic; then topics and tables are checked."""

import asyncio
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

import asyncpg

from deploy.local.postgres import create_database, postgres_spec
from deploy.local.processes import ProcessSpec, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from deploy.triton.stand_in.batching import CurveRules
from shared.batch_curve import MEASURED
from shared.messages import CarbonIntensity, Footprint, Message, Policy, Quality
from shared.topics import CARBON_INTENSITY, FOOTPRINTS, POLICIES, QUALITY, TopicSpec
from tests.drills.consistency import (
    Tables,
    evaluation_problems,
    footprint_problems,
    intensity_problems,
    policy_problems,
    read_tables,
    sum_problems,
)
from tests.drills.run import PROMPTS, STALL_S, ScenarioRun, prompt
from tests.drills.schedule import Fault, faults
from tests.support.environment import KAFKA
from tests.support.fleets import MODEL, ZONE, fleet_toml
from tests.support.processes import TritonServer

RATE: Final = 20.0
"""Requests per second."""
REQUESTS: Final = 1_000
"""Of a scenario at full scale: 50 s of traffic."""
FAULTS: Final = 3
DOWN_S: Final = (0.0, 3.0)
"""From the end of a killed process to its new start, wall seconds."""
FROZEN_S: Final = (3.0, 12.0)
SETTLED_S: Final = 120.0
"""Longest wait for settled calls, and for services that are ready, wall seconds."""
EVALUATION_S: Final = 3.0
"""Between two requests for an evaluation, wall seconds."""
LEVELS: Final = {"L0": (60, 1.0), "L1": (30, 0.5), "L2": (15, 0.25)}
"""Tokens of the answers; the curve of the model servers says how long they take."""
WINDOW: Final = timedelta(minutes=10)
"""Trailing window of the carbon intensities."""
INTENSITY_S: Final = 2.0
"""Between two carbon intensities."""
TOKEN: Final = "drill-" + "0" * 16
COPIES: Final = {"ledger": 1, "carbon_feed": 2, "optimizer": 2, "evaluator": 2}
LED: Final = ("carbon_feed", "optimizer", "evaluator")
"""Services of whose copies one is the leader."""

M = TypeVar("M", bound=Message)


async def ledger_faults(run: ScenarioRun) -> None:
    """The ledger is killed or frozen three times: no footprint is lost or doubled, and the joules add up."""
    await _with_faults(run, ["ledger"])


async def leader_faults(run: ScenarioRun) -> None:
    """The leaders of carbon_feed, optimizer and evaluator are killed or frozen, in any order."""
    await _with_faults(run, run.rng.sample(LED, len(LED)))


async def postgres_faults(run: ScenarioRun) -> None:
    """PostgreSQL is killed or frozen three times under all services."""
    await _with_faults(run, ["postgres"])


async def kafka_faults(run: ScenarioRun) -> None:
    """Kafka is killed or frozen three times under all services."""
    await _with_faults(run, [KAFKA])


async def model_server_faults(run: ScenarioRun) -> None:
    """Model servers with meters are killed or frozen three times: calls that a restart touched are partial."""
    await _with_faults(run, ["triton"])


@dataclass
class Stack:
    """PostgreSQL, two model servers with meters, and all services.

    Attributes:
        url: of the database.
        postgres: name of its process.
        specs: the processes of every service.
    """

    run: ScenarioRun
    url: str = ""
    postgres: str = ""
    model_servers: tuple[TritonServer, ...] = ()
    specs: dict[str, list[ProcessSpec]] = field(default_factory=dict)

    async def start(self) -> None:
        """Start everything, and wait until it is ready."""
        run, folder = self.run, self.run.environment.folder / self.run.scenario
        folder.mkdir(parents=True, exist_ok=True)
        self.postgres = f"postgres-{run.scenario.replace('_', '-')}"
        spec, self.url = await asyncio.to_thread(postgres_spec, folder / "postgres", name=self.postgres)
        await run.start(spec)
        await create_database(self.url)
        answers = {prompt(number): LEVELS for number in range(PROMPTS)}
        batch = CurveRules(curve=MEASURED["qwen3-14b-h100"])
        starts = [run.model_server(answers=answers, batch=batch, judge=judge) for judge in (True, False)]
        self.model_servers = tuple(await asyncio.gather(*starts))
        fleet, trace = folder / "fleet.toml", folder / "trace.csv"
        fleet.write_text(_fleet(self.model_servers), encoding="utf-8")
        trace.write_text(_trace(datetime.now(UTC)), encoding="utf-8")
        await run.environment.topics(run.kafka.topic_prefix)
        environment = ServiceEnvironment(
            bootstrap_servers=run.kafka.bootstrap_servers,
            topic_prefix=run.kafka.topic_prefix,
            database_url=self.url,
            fleet_file=fleet,
            clock={},
        )
        settings = _settings(trace)
        self.specs = {
            service: [
                service_spec(
                    service,
                    port=port,
                    environment=environment,
                    settings={"SPROUT_KAFKA_GROUP_PREFIX": run.kafka.group_prefix, **settings[service]},
                    name=f"{run.kafka.topic_prefix}{service}{number}",
                )
                for number, port in enumerate(free_ports(copies))
            ]
            for service, copies in COPIES.items()
        }
        await asyncio.gather(
            run.start(*(spec for specs in self.specs.values() for spec in specs)),
            run.serve(routers=1, settings={"SPROUT_ROUTER_SAMPLE_SHARE": "0.5"}, fleet=fleet),
        )

    async def victim(self, target: str, fault: Fault) -> str:
        """Name of the process of a fault: a service's leader, or the only or the drawn one."""
        if target in LED:
            return await self.run.environment.leader([spec.name for spec in self.specs[target]])
        if target in self.specs:
            return self.specs[target][0].name
        return {"postgres": self.postgres, "triton": self.model_servers[fault.victim].name}.get(target, target)

    async def request_evaluations(self) -> None:
        """Ask the leader of the evaluator for evaluations until cancelled."""
        while True:
            for spec in self.specs["evaluator"]:
                await asyncio.to_thread(_post, f"{spec.url}/evaluations?model={MODEL}")
            await asyncio.sleep(EVALUATION_S)

    async def settled(self, answered: set[str]) -> Tables:
        """Wait until the services have nothing left to do; returns what they have stored.

        Args:
            answered: records of the requests with an answer of a model server.
        """
        deadline = time.monotonic() + SETTLED_S
        tables: Tables | None = None
        while time.monotonic() < deadline:
            try:
                tables = await read_tables(self.url)
            except (OSError, asyncpg.PostgresError, TimeoutError):
                pass  # while PostgreSQL restarts
            else:
                left = tables.unsettled + tables.unpublished + tables.running
                if not left and answered <= {one.id for one in tables.calls}:
                    return tables
            await asyncio.sleep(0.5)
        if tables is None:
            raise TimeoutError("PostgreSQL does not answer")
        self.run.check(
            False,
            f"not settled after {SETTLED_S:.0f} s: {tables.unsettled} calls unsettled, {tables.unpublished} sets not "
            f"published, {tables.running} evaluations running",
        )
        return tables

    async def check_ready(self) -> None:
        """Record the services that do not become ready."""
        deadline = time.monotonic() + SETTLED_S
        for spec in (spec for specs in self.specs.values() for spec in specs):
            while (problem := await asyncio.to_thread(_unready, f"{spec.url}/ready")) is not None:
                if time.monotonic() > deadline:
                    self.run.check(False, f"{spec.name} is not ready: {problem}")
                    break
                await asyncio.sleep(0.5)


async def _with_faults(run: ScenarioRun, targets: list[str]) -> None:
    """Traffic with faults of targets in turn, then the checks."""
    stack = Stack(run)
    await stack.start()
    evaluating = asyncio.create_task(stack.request_evaluations())
    run.send(run.requests(REQUESTS), rate=RATE)
    number = max(run.number(FAULTS), len(targets))
    plan = faults(run.rng, number=number, victims=len(stack.model_servers), hold_s=FROZEN_S, within=(0.15, 0.85))
    for index, fault in enumerate(plan):
        await run.traffic.until(fault.after)
        await _inject(run, await stack.victim(targets[index % len(targets)], fault), fault)
    await run.traffic.answered(stall_s=STALL_S)
    evaluating.cancel()
    await asyncio.gather(evaluating, return_exceptions=True)
    await _check(run, stack)


async def _inject(run: ScenarioRun, name: str, fault: Fault) -> None:
    """Kill and restart a process, or freeze it, as drawn."""
    if run.rng.random() < 0.5:
        await run.inject("SIGKILL", name, signal.SIGKILL)
        await asyncio.sleep(run.rng.uniform(*DOWN_S))
        await run.restart(name)
    else:
        await run.frozen(name, fault.hold_s)


async def _check(run: ScenarioRun, stack: Stack) -> None:
    """Wait until all is settled, and compare what was published and stored."""
    messages = run.traffic.messages
    served = messages.sent & messages.answers.keys() - messages.errors.keys()
    answered = {messages.records[name] for name in served}
    await stack.check_ready()
    tables = await stack.settled(answered)
    footprints = await _read(run, FOOTPRINTS, wanted=Footprint)
    policies = await _read(run, POLICIES, wanted=Policy)
    qualities = await _read(run, QUALITY, wanted=Quality)
    intensities = await _read(run, CARBON_INTENSITY, wanted=CarbonIntensity)
    for problem in (
        *footprint_problems(footprints, tables.calls, answered=answered),
        *sum_problems(tables.calls, tables.intervals),
        *policy_problems(policies, now=datetime.now(UTC)),
        *evaluation_problems(qualities, tables.evaluations),
        *intensity_problems(intensities, window=WINDOW),
    ):
        run.check(False, problem)
    partial = [one for one in tables.calls if one.partial]
    run.figures.update(
        {
            "calls": len(tables.calls),
            "footprints": len({one.record or one.request_id for one in footprints}),
            "footprint messages": len(footprints),
            "partial": len(partial),
            "partial with 0 J": sum(one.energy_j <= 0.0 for one in partial),
            "meter restarts": sum(one.restarted for one in tables.intervals),
            "metered J": round(sum(one.metered_j for one in tables.intervals)),
            "attributed J": round(sum(one.attributed_j for one in tables.intervals)),
            "policies": len(policies),
            "evaluations": len(qualities),
            "intensities": len(intensities),
        }
    )


async def _read(run: ScenarioRun, spec: TopicSpec, *, wanted: type[M]) -> list[M]:
    """All messages of a topic."""
    records = await run.traffic.records(spec)
    return [wanted.model_validate_json(record.value) for record in records if record.value is not None]


def _fleet(servers: tuple[TritonServer, ...]) -> str:
    """A fleet file: the pool `p` of all servers, and the judge of the first one, all with meters."""

    def endpoint(name: str, server: TritonServer, gpu: str) -> list[str]:
        return [
            "[[pools.endpoints]]", f'name = "{name}"', f'grpc = "{server.address}"', f'metrics = "{server.metrics}"',
            f'gpus = ["{gpu}"]',
        ]  # fmt: skip

    lines = [fleet_toml([])]
    for number, server in enumerate(servers):
        lines += endpoint(f"e{number}", server, server.name)
    lines += ["[[pools]]", 'name = "judge"', 'triton_model = "judge"', f'zone = "{ZONE}"', "idle_power_w = 0"]
    lines += endpoint("judge-0", servers[0], f"{servers[0].name}-judge")
    return "\n".join([*lines, "[judge]", 'pool = "judge"', ""])


def _trace(now: datetime) -> str:
    """Carbon intensities from ten minutes ago for half an hour."""
    begin = now.replace(microsecond=0) - WINDOW
    times = [begin + timedelta(seconds=number * INTENSITY_S) for number in range(round(2_400 / INTENSITY_S))]
    rows = [f"{at:%Y-%m-%d %H:%M:%S},{ZONE},{100 + number % 7 * 50}" for number, at in enumerate(times)]
    return "\n".join(["Datetime (UTC),Zone Id,Carbon intensity gCO₂eq/kWh (direct)", *rows, ""])


def _settings(trace: Path) -> Mapping[str, dict[str, str]]:
    """Environment variables by service."""
    return {
        "ledger": {
            "SPROUT_LEDGER_SCRAPE_INTERVAL_S": "1",
            "SPROUT_LEDGER_SETTLE_INTERVAL_S": "1",
        },
        "carbon_feed": {
            "SPROUT_CARBON_FEED_PROVIDERS": json.dumps({ZONE: [{"kind": "csv", "path": str(trace)}]}),
            "SPROUT_CARBON_FEED_HISTORY_DAYS": str(WINDOW / timedelta(days=1)),
        },
        "optimizer": {"SPROUT_OPTIMIZER_MIN_WINDOW_HOURS": "2"},
        "evaluator": {
            "SPROUT_EVALUATOR_HTTP_TOKEN": TOKEN,
            "SPROUT_EVALUATOR_MIN_SAMPLES": "10",
            "SPROUT_EVALUATOR_PROMPTS_PER_EVALUATION": "6",
            "SPROUT_EVALUATOR_PROMPT_GROUPS": "task",
            "SPROUT_EVALUATOR_RETRY_PAUSE_S": "1",
        },
    }


def _post(url: str) -> None:
    """Ask for an evaluation; a standby refuses, and a service that is down does not answer."""
    request = urllib.request.Request(url, method="POST", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        urllib.request.urlopen(request, timeout=2.0).close()
    except OSError:
        return


def _unready(url: str) -> str | None:
    """Why a service is not ready; None if it is."""
    try:
        urllib.request.urlopen(url, timeout=2.0).close()
    except urllib.error.HTTPError as error:
        return error.read().decode(errors="replace")
    except OSError as error:
        return str(error)
    return None
