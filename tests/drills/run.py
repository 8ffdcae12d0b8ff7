"""The run of one scenario: its routers, its traffic, the injected faults, and the measurements."""

import asyncio
import re
import signal
import time
import urllib.request
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Final

from deploy.local.java import Say
from deploy.local.processes import ManagedProcess, ProcessSpec
from deploy.triton.stand_in.batching import RecordedRules
from deploy.triton.stand_in.faults import FaultRules
from shared.messages import GenerationRequest
from shared.runtime.settings import KafkaSettings
from tests.drills.accounting import Result, count
from tests.drills.malformed import Malformed
from tests.drills.schedule import randomness
from tests.drills.traffic import Traffic
from tests.support.environment import Environment
from tests.support.fleets import MODEL
from tests.support.processes import TritonServer
from tests.support.traffic import committed, producing

MAX_IN_FLIGHT: Final = 200
"""Of every router: about the number of requests in flight at a fault."""
SESSION_TIMEOUT_S: Final = 6.0
"""The minimum of Kafka: the requests of a killed router wait for so long."""
STALL_S: Final = 60.0
"""Unanswered requests are lost if no answer has arrived for so long."""
COMMIT_WAIT_S: Final = 20.0
"""Longest wait for the routers' last commits."""
BUSY_WAIT_S: Final = 3.0
READY_S: Final = 240.0
"""Longest wait for a process that starts beside many others on few cores."""
SAMPLE_S: Final = 0.25
PROGRESS_S: Final = 3.0
POLICY: Final = {"L0": 0.2, "L1": 0.5, "L2": 0.3}
PROMPTS: Final = 40
LEVELS: Final = {"L0": (12, 2.4), "L1": (6, 1.5), "L2": (3, 0.8)}
"""Tokens and seconds of the answers: few tokens, and long enough that hundreds of requests are in flight and a backlog
lasts through several faults."""
BATCH: Final = RecordedRules(slots=1_000, slowdown=0.0)
"""Batching of the model servers, which must not limit the routers."""

_IN_FLIGHT = re.compile(r"^sprout_router_in_flight ([0-9.e+]+)$", re.MULTILINE)
_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def prompt(number: int) -> str:
    """A prompt with recorded answers."""
    return f"Question number {number % PROMPTS}?"


def drill_environment(folder: Path, *, say: Say, model_servers: int = 2) -> Environment:
    """The environment of all scenarios: Kafka and model servers; exited processes are restarted."""
    answers = {prompt(number): LEVELS for number in range(PROMPTS)}
    return Environment(folder, answers=answers, model_servers=model_servers, batch=BATCH, restart=True, say=say)


@dataclass
class ScenarioRun:
    """The run of a scenario, driven by the scenario's function.

    Attributes:
        rng: the random numbers of the scenario.
        scale: share of the full number of requests and faults.
        routers: names of the routers that are ready and have not left.
        figures: further figures for the result, by name.
    """

    environment: Environment
    scenario: str
    seed: int
    scale: float
    say: Say
    kafka: KafkaSettings = field(init=False)
    rng: Random = field(init=False)
    traffic: Traffic = field(init=False)
    routers: list[str] = field(init=False, default_factory=list)
    figures: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        prefix = f"{self.scenario.replace('_', '-')}."
        self.kafka = KafkaSettings(
            bootstrap_servers=self.environment.bootstrap_servers, topic_prefix=prefix, group_prefix=prefix
        )
        self.rng = randomness(self.seed, self.scenario)
        self.traffic = Traffic(self.kafka)
        self._began = time.monotonic()
        self._stack = AsyncExitStack()
        self._specs: dict[str, ProcessSpec] = {}
        self._others: list[str] = []
        self._faults: list[str] = []
        self._problems: list[str] = []
        self._peak_kb = 0
        self._made = 0
        self._watching: asyncio.Task[None] | None = None

    def number(self, full: int) -> int:
        """A number at this scale, at least 1."""
        return max(1, round(full * self.scale))

    async def serve(
        self,
        *,
        routers: int = 2,
        model_servers: tuple[TritonServer, ...] = (),
        settings: dict[str, str] | None = None,
        tenants: Collection[str] = (),
        fleet: Path | None = None,
    ) -> None:
        """Create topics, publish a policy, start to read answers, and start routers.

        Args:
            model_servers: default: those of the environment.
            settings: additional environment variables of the routers.
            tenants: of the fleet file.
            fleet: the fleet file; no policy is published, because the services of the scenario do that.
        """
        await self.environment.topics(self.kafka.topic_prefix)
        connecting = producing(self.kafka, acks="all", enable_idempotence=True)
        producer = await self._stack.enter_async_context(connecting)
        if fleet is None:
            await producer.prepare(POLICY)
        self._stack.push_async_callback(self.traffic.close)
        await self.traffic.open(producer)
        variables = {
            "SPROUT_ROUTER_MAX_IN_FLIGHT": str(MAX_IN_FLIGHT),
            "SPROUT_ROUTER_SESSION_TIMEOUT_S": str(SESSION_TIMEOUT_S),
            **(settings or {}),
        }
        self._process = self.environment.routers(
            self.kafka, variables, model_servers=model_servers, tenants=tenants, fleet=fleet
        )
        self._watching = asyncio.create_task(self._watch())
        await self.join(routers)

    async def join(self, number: int = 1) -> None:
        """Start routers and wait until they are ready."""
        specs = [self._process.spec({}) for _ in range(number)]
        self._specs |= {spec.name: spec for spec in specs}
        await self.environment.start(*specs)
        self.routers += [spec.name for spec in specs]

    def requests(self, full: int, *, tenant: str | None = None) -> list[GenerationRequest]:
        """Valid requests with new ids; their number is `full` times the scale."""
        first, self._made = self._made, self._made + self.number(full)
        return [
            GenerationRequest(id=f"{self.scenario}-{number}", model=MODEL, prompt=prompt(number), tenant=tenant)
            for number in range(first, self._made)
        ]

    def send(self, messages: Sequence[GenerationRequest | Malformed], *, rate: float | None = None) -> None:
        """Start to send messages; see `Traffic.send`."""
        self.say(f"sending {len(messages)} messages, {'all at once' if rate is None else f'{rate:g} per second'}")
        self.traffic.send(messages, rate=rate)

    async def busy_router(self, index: int) -> str:
        """Wait until a router is nearly at its in-flight limit; returns its name.

        Args:
            index: of the drawn router. If it does not reach the limit, the busiest router is returned.
        """
        drawn = self.routers[index]
        deadline = time.monotonic() + BUSY_WAIT_S
        while time.monotonic() < deadline:
            if await self._in_flight(drawn) >= 0.9 * MAX_IN_FLIGHT:
                return drawn
            await asyncio.sleep(0.05)
        in_flight = {name: await self._in_flight(name) for name in (drawn, *self.routers)}
        return max(in_flight, key=lambda name: in_flight[name])

    async def inject(self, what: str, name: str, number: signal.Signals) -> None:
        """Inject a fault by a signal to a process."""
        in_flight = f" with {await self._in_flight(name):.0f} in flight" if name in self._specs else ""
        await self._sample()
        self.note(f"{what} {self._short(name)}{in_flight}")
        if number is signal.SIGKILL:
            await self.environment.kill(name)
        elif number is signal.SIGTERM:
            await self.environment.stop(name)
        else:
            await self.environment.signal(name, number)

    async def start(self, *specs: ProcessSpec) -> None:
        """Start other processes in parallel, wait until all are ready, and stop them with the scenario."""
        self._others += [spec.name for spec in specs]
        await self.environment.start(*(replace(spec, ready_timeout_s=READY_S) for spec in specs))

    async def frozen(self, name: str, hold_s: float) -> None:
        """Freeze a process and its descendants for some time, wall seconds."""
        self.note(f"SIGSTOP {self._short(name)} for {hold_s:.1f} s")
        await self.environment.signal(name, signal.SIGSTOP, tree=True)
        try:
            await asyncio.sleep(hold_s)
        finally:
            await self.environment.signal(name, signal.SIGCONT, tree=True)

    async def restart(self, name: str) -> None:
        """Start a process again and wait until it is ready."""
        await self.environment.restart(name)
        self.note(f"{self._short(name)} is ready again")

    async def leave(self, index: int) -> None:
        """Stop one of the ready routers with SIGTERM; the index is taken modulo their number."""
        if not self.routers:
            self.note("no router is ready, so none leaves")
            return
        name = self.routers.pop(index % len(self.routers))
        await self.inject("SIGTERM", name, signal.SIGTERM)

    async def model_server(self, faults: FaultRules | None = None, **changes: Any) -> TritonServer:
        """Start an additional model server; see `Environment.model_server`."""
        self._others.append(f"triton-{self.scenario.replace('_', '-')}-{len(self._others)}")
        return await self.environment.model_server(self._others[-1], faults, **changes)

    def note(self, what: str) -> None:
        """Record a fault, or its end, for the result."""
        line = f"{time.monotonic() - self._began:.1f} s: {what}"
        self._faults.append(line)
        self.say(f"  {line}")

    def check(self, holds: bool, problem: str) -> None:
        """Record a problem of a scenario that goes on, unless the condition holds."""
        if not holds:
            self._problems.append(problem)

    def failed(self, error: Exception) -> None:
        """Record an error that ended the scenario early."""
        self._problems.append(f"{type(error).__name__}: {error}")
        self.say(f"!! {type(error).__name__}: {error}")

    async def result(self) -> Result:
        """Wait for the last answers and commits, stop the routers, and count."""
        uncommitted = 0
        try:
            await self.traffic.answered(stall_s=STALL_S)
            await self._commits()
            await self._sample()
            # After their exit the routers publish nothing more.
            await self.environment.stop(*(one.spec.name for one in await self.environment.running(self._specs.keys())))
            await self.traffic.read_to_end()
            uncommitted = await self._uncommitted()
        except Exception as error:  # noqa: BLE001 - the result has the counts so far
            self.failed(error)
        counts = count(self.traffic.messages)
        exits = [one for one in self.environment.exits if one.at >= self._began]
        ended = [one.name for one in exits if one.name in self._others and not one.name.startswith("triton")]
        return Result(
            scenario=self.scenario,
            seed=self.seed,
            scale=self.scale,
            counts=counts,
            peak_rss_mb=round(self._peak_kb / 1024, 1),
            seconds=round(time.monotonic() - self._began, 1),
            faults=tuple(self._faults),
            uncommitted=uncommitted,
            longest_answer_s=round(max(self.traffic.waited_s.values(), default=0.0), 2),
            triton_died=tuple(one.description for one in exits if one.name.startswith("triton")),
            router_died=tuple(one.description for one in exits if one.name in self._specs),
            service_died=tuple(one.description for one in exits if one.name in ended),
            figures=self.figures,
            problems=(*self._problems, *counts.problems(), *(f"{name} ended by itself" for name in ended)),
        )

    async def close(self) -> None:
        """Stop the running processes of the scenario."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._stack.aclose()
        running = await self.environment.running({*self._specs, *self._others})
        for process in running:
            await self.environment.signal(process.spec.name, signal.SIGCONT, tree=True)
        # The services before what they use, as in an orderly shutdown.
        for tier in sorted({process.spec.tier for process in running}, reverse=True):
            await self.environment.stop(*(one.spec.name for one in running if one.spec.tier == tier))

    async def _commits(self) -> None:
        """Wait until the routers have committed every record; a fenced router stops in this time."""
        deadline = time.monotonic() + COMMIT_WAIT_S
        while time.monotonic() < deadline:
            if not await self._uncommitted():
                return
            await asyncio.sleep(0.5)

    async def _uncommitted(self) -> int:
        """Number of records of the topic `requests` that the routers have not committed."""
        return sum(end - offset for offset, end in (await committed(self.kafka)).values())

    async def _watch(self) -> None:
        printed_at = time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_S)
            await self._sample()
            if self.traffic.total and time.monotonic() - printed_at >= PROGRESS_S:
                printed_at = time.monotonic()
                messages = self.traffic.messages
                repeated = sum(times > 1 for times in messages.answers.values())
                self.say(
                    f"  {printed_at - self._began:.1f} s: sent {len(messages.sent) + len(messages.malformed)}, "
                    f"answered {messages.answered}" + (f", {repeated} of them twice" if repeated else "")
                )

    async def _sample(self) -> None:
        """Update the peak of the routers' memory."""
        for process in await self.environment.running(self._specs.keys()):
            self._peak_kb = max(self._peak_kb, _high_water_kb(process))

    async def _in_flight(self, router: str) -> float:
        """Number of requests in flight of a router; 0 if it does not answer."""
        url = f"{self._specs[router].url}/metrics"
        try:
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=2.0).read().decode())
        except OSError:
            return 0.0
        found = _IN_FLIGHT.search(text)
        return float(found.group(1)) if found else 0.0

    def _short(self, name: str) -> str:
        return name.removeprefix(self.kafka.topic_prefix)


def _high_water_kb(process: ManagedProcess) -> int:
    """Peak resident memory of a process, kB; 0 if it has just ended."""
    try:
        found = _HIGH_WATER.search(Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return 0
    return int(found.group(1)) if found else 0
