"""One scenario while it is played: its routers, its traffic, the faults that strike, and what is measured."""

import asyncio
import re
import signal
import time
import urllib.request
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from deploy.local.java import Say
from deploy.local.processes import ManagedProcess, ProcessSpec
from deploy.triton.stand_in.faults import FaultRules
from shared.kafka.admin import create_topics
from shared.messages import GenerationRequest
from shared.runtime.settings import KafkaSettings
from tests.drills.accounting import count
from tests.drills.ground import Endpoint, Ground, prompt
from tests.drills.malformed import Malformed
from tests.drills.result import Result
from tests.drills.schedule import randomness
from tests.drills.traffic import Traffic
from tests.support.fleet import MODEL, fleet_toml
from tests.support.traffic import committed, producing

MAX_IN_FLIGHT: Final = 200
"""Of every router, so that about as many are in flight when it dies."""
SESSION_TIMEOUT_S: Final = 6.0
"""The shortest that Kafka allows: a killed router's requests wait for so long."""
STALL_S: Final = 60.0
"""A request that nobody has answered after so much silence is lost."""
SETTLE_S: Final = 20.0
"""For the routers to commit, at the end, what they have answered."""
BUSY_WAIT_S: Final = 3.0
SAMPLE_S: Final = 0.25
SAY_EVERY_S: Final = 3.0
POLICY: Final = {"L0": 0.2, "L1": 0.5, "L2": 0.3}

_IN_FLIGHT = re.compile(r"^sprout_router_in_flight ([0-9.e+]+)$", re.MULTILINE)
_HIGH_WATER = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


@dataclass
class Run:
    """A scenario's surroundings; its function drives them.

    Attributes:
        rng: the scenario's own draws.
        scale: share of the full number of requests and faults.
        routers: names of its routers that have become ready and not left.
    """

    ground: Ground
    scenario: str
    seed: int
    scale: float
    say: Say
    kafka: KafkaSettings = field(init=False)
    rng: Random = field(init=False)
    traffic: Traffic = field(init=False)
    routers: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        prefix = f"{self.scenario.replace('_', '-')}."
        self.kafka = KafkaSettings(
            bootstrap_servers=self.ground.bootstrap_servers, topic_prefix=prefix, group_prefix=prefix
        )
        self.rng = randomness(self.seed, self.scenario)
        self.traffic = Traffic(self.kafka)
        self._began = time.monotonic()
        self._stack = AsyncExitStack()
        self._specs: dict[str, ProcessSpec] = {}
        self._extra: list[str] = []
        self._faults: list[str] = []
        self._problems: list[str] = []
        self._peak_kb = 0
        self._made = 0
        self._watching: asyncio.Task[None] | None = None

    def number(self, full: int) -> int:
        """A number at this scale, one at least."""
        return max(1, round(full * self.scale))

    async def serve(
        self, *, routers: int = 2, endpoints: tuple[Endpoint, ...] = (), settings: dict[str, str] | None = None
    ) -> None:
        """Create topics, start routers, put a policy in force, listen to the answers.

        Args:
            endpoints: default: the ground's two.
            settings: further ones of the routers.
        """
        await create_topics(self.kafka)
        fleet = self.ground.folder / f"{self.scenario}.toml"
        fleet.write_text(fleet_toml([one.address for one in endpoints or self.ground.endpoints]), encoding="utf-8")
        made = producing(self.kafka, acks="all", enable_idempotence=True)
        producer = await self._stack.enter_async_context(made)
        await producer.prepare(POLICY)
        self._stack.push_async_callback(self.traffic.close)
        await self.traffic.open(producer)
        own = {
            "SPROUT_ROUTER_MAX_IN_FLIGHT": str(MAX_IN_FLIGHT),
            "SPROUT_ROUTER_SESSION_TIMEOUT_S": str(SESSION_TIMEOUT_S),
            **(settings or {}),
        }
        self._process = self.ground.routers(self.kafka, fleet, own)
        self._watching = asyncio.create_task(self._watch())
        await self.join(routers)

    async def join(self, number: int = 1) -> None:
        """Start routers and wait until they are ready."""
        specs = [self._process.spec({}) for _ in range(number)]
        self._specs |= {spec.name: spec for spec in specs}
        await self.ground.start(*specs)
        self.routers += [spec.name for spec in specs]

    def requests(self, full: int) -> list[GenerationRequest]:
        """Valid requests with new ids, as many as the scale makes of `full`."""
        first, self._made = self._made, self._made + self.number(full)
        return [
            GenerationRequest(id=f"{self.scenario}-{number}", model=MODEL, prompt=prompt(number))
            for number in range(first, self._made)
        ]

    def flow(self, messages: Sequence[GenerationRequest | Malformed], *, rate: float | None = None) -> None:
        """Let traffic begin; see `Traffic.send`."""
        self.say(f"sending {len(messages)} messages, {'all at once' if rate is None else f'{rate:g} a second'}")
        self.traffic.send(messages, rate=rate)

    async def busy(self, place: int) -> str:
        """Wait until a router has nearly all its places taken; returns its name.

        Args:
            place: of the one that was drawn. Where it has run out of requests, it is the busiest one instead.
        """
        drawn = self.routers[place]
        stream_timeouts = time.monotonic() + BUSY_WAIT_S
        while time.monotonic() < stream_timeouts:
            if await self._in_flight(drawn) >= 0.9 * MAX_IN_FLIGHT:
                return drawn
            await asyncio.sleep(0.05)
        in_flight = {name: await self._in_flight(name) for name in (drawn, *self.routers)}
        return max(in_flight, key=lambda name: in_flight[name])

    async def strike(self, what: str, name: str, number: signal.Signals) -> None:
        """Send a signal, as a fault; a router's requests in flight are told."""
        in_flight = f" with {await self._in_flight(name):.0f} in flight" if name in self._specs else ""
        await self._sample()
        self.note(f"{what} {self._short(name)}{in_flight}")
        if number is signal.SIGKILL:
            await self.ground.kill(name)
        elif number is signal.SIGTERM:
            await self.ground.stop(name)
        else:
            await self.ground.signal(name, number)

    async def again(self, name: str) -> None:
        """Start a process again."""
        await self.ground.again(name)
        self.note(f"{self._short(name)} is back")

    async def leave(self, place: int) -> None:
        """SIGTERM one of the routers, for good; `place` is counted round those that are ready."""
        if not self.routers:
            self.note("no router is ready, so none leaves")
            return
        name = self.routers.pop(place % len(self.routers))
        await self.strike("SIGTERM", name, signal.SIGTERM)

    async def failing_server(self, faults: FaultRules) -> Endpoint:
        """Start a model server of the scenario's own, which fails on purpose."""
        endpoint = await self.ground.model_server(f"triton-{self.scenario}-{len(self._extra)}", faults)
        self._extra.append(endpoint.name)
        return endpoint

    def note(self, what: str) -> None:
        """A fault, or its end, for the result."""
        line = f"{time.monotonic() - self._began:.1f} s: {what}"
        self._faults.append(line)
        self.say(f"  {line}")

    def failed(self, error: Exception) -> None:
        """The scenario could not be played to its end."""
        self._problems.append(f"{type(error).__name__}: {error}")
        self.say(f"!! {type(error).__name__}: {error}")

    async def conclude(self) -> Result:
        """Wait for the last answers, let the routers drain, and count."""
        uncommitted = 0
        try:
            await self.traffic.answered(stall_s=STALL_S)
            await self._settle()
            await self._sample()
            # Routers that have ended say nothing more: what comes late has come.
            await self.ground.stop(*(one.spec.name for one in await self.ground.running(self._specs.keys())))
            await self.traffic.close_books()
            uncommitted = await self._uncommitted()
        except Exception as error:  # noqa: BLE001 - what could be counted is told all the same
            self.failed(error)
        counts = count(self.traffic.books)
        mine = [death for death in self.ground.deaths if death.at >= self._began]
        return Result(
            scenario=self.scenario,
            seed=self.seed,
            scale=self.scale,
            counts=counts,
            peak_rss_mb=round(self._peak_kb / 1024, 1),
            seconds=round(time.monotonic() - self._began, 1),
            faults=tuple(self._faults),
            uncommitted=uncommitted,
            longest_answer_s=round(self.traffic.longest_s, 2),
            triton_died=tuple(death.said for death in mine if death.name.startswith("triton")),
            router_died=tuple(death.said for death in mine if death.name in self._specs),
            problems=(*self._problems, *counts.problems()),
        )

    async def close(self) -> None:
        """Stop whatever of the scenario still runs."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._stack.aclose()
        left = await self.ground.running({*self._specs, *self._extra})
        for process in left:
            process.signal(signal.SIGCONT)
        await self.ground.stop(*(process.spec.name for process in left))

    async def _settle(self) -> None:
        """Let the routers commit what they have answered, and a zombie find out that it is one."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            if not await self._uncommitted():
                return
            await asyncio.sleep(0.5)

    async def _uncommitted(self) -> int:
        """Records of the topic `requests` that the routers' group has not committed."""
        return sum(end - offset for offset, end in (await committed(self.kafka)).values())

    async def _watch(self) -> None:
        said = time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_S)
            await self._sample()
            if self.traffic.total and time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                books = self.traffic.books
                repeated = sum(times > 1 for times in books.answers.values())
                self.say(
                    f"  {said - self._began:.1f} s: sent {len(books.sent) + len(books.malformed)}, "
                    f"answered {books.answered}" + (f", {repeated} of them twice" if repeated else "")
                )

    async def _sample(self) -> None:
        """Note the high-water marks of the routers' memory."""
        for process in await self.ground.running(self._specs.keys()):
            self._peak_kb = max(self._peak_kb, _high_water_kb(process))

    async def _in_flight(self, router: str) -> float:
        """What a router says it works on; 0 where it says nothing."""
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
    """The largest resident set that a process has had, kB; 0 where it has just ended."""
    try:
        found = _HIGH_WATER.search(Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return 0
    return int(found.group(1)) if found else 0
