"""Builders and helpers of the router's tests: recorded answers, requests, readers of topics, waiting for progress."""

import asyncio
import threading
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer

from deploy.local.processes import Supervisor
from deploy.triton.contract import ContractName
from deploy.triton.models import stand_in_llm
from shared.messages import GenerationRequest, GenerationResponse
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from shared.topics import RESPONSES, TopicSpec
from tests.support import fleets, processes
from tests.support.deadlines import DEADLINE_S, REPLY_S, until
from tests.support.fleets import DIRECTIVES, MODEL, ZONE, fleet_toml
from tests.support.messages import intensity, policy
from tests.support.processes import RouterProcess, TritonServer
from tests.support.traffic import Producer, committed, producing

__all__ = [
    "DIRECTIVES",
    "ENDLESS_PROMPT",
    "LARGE_PROMPT",
    "LEVELS",
    "LONG_PROMPT",
    "MODEL",
    "ZONE",
    "Answers",
    "Producer",
    "RouterProcess",
    "TritonServer",
    "committed",
    "fleet_toml",
    "intensity",
    "policy",
    "producing",
    "question",
    "reading",
    "request",
    "restarted_triton",
    "start_triton",
    "until_committed",
    "until_page",
    "write_workload",
]

LEVELS = {"L0": (100, 1.0), "L1": (30, 0.3), "L2": (10, 0.1)}
"""Tokens and seconds of the recorded answers."""
LONG_PROMPT = "A question that takes long."
"""Its answers take four seconds at every level."""
ENDLESS_PROMPT = "A question whose answer nobody waits for."
"""Its answers take thirty seconds and have 300 tokens at every level: longer than any pause of a busy machine."""
LARGE_PROMPT = "A question with a large answer."
"""Its answers have 20,000 tokens at every level, in two seconds."""


def write_workload(path: Path, *, prompts: int = 40) -> Path:
    """Recorded answers of `MODEL` to "Question number N?", to the other prompts above."""
    answers = {question(number): LEVELS for number in range(prompts)}
    others = {LONG_PROMPT: (40, 4.0), ENDLESS_PROMPT: (300, 30.0), LARGE_PROMPT: (20_000, 2.0)}
    answers |= {prompt: dict.fromkeys(LEVELS, answer) for prompt, answer in others.items()}
    return fleets.write_workload(path, answers)


def question(number: int) -> str:
    return f"Question number {number}?"


def page(url: str) -> str:
    """The text of a page, for example `/metrics`."""
    with urllib.request.urlopen(url, timeout=REPLY_S) as answer:
        return answer.read().decode()


async def until_page(url: str, condition: Callable[[str], object]) -> str:
    """Wait until the text of a page meets a condition; returns it."""
    return await until(lambda: asyncio.to_thread(page, url), condition)


async def until_committed(kafka: KafkaSettings) -> None:
    """Wait until the routers have committed the end of every partition: every request is finished."""
    await until(lambda: committed(kafka), lambda found: all(offset == end for offset, end in found.values()))


def request(number: int, **changes: Any) -> GenerationRequest:
    return GenerationRequest.model_validate({"id": f"r{number}", "prompt": question(number % 40), **changes})


def start_triton(
    supervisor: Supervisor, folder: Path, *, name: str, clock: Clock | None = None, contract: ContractName = "ensemble"
) -> TritonServer:
    """Start one; needs its environment, which is made once."""
    models = [stand_in_llm(write_workload(folder / "w.jsonl"), model=MODEL, contract=contract)]
    return processes.start_triton(supervisor, folder, models, name=name, clock=clock)


@contextmanager
def restarted_triton(supervisor: Supervisor, folder: Path, *, name: str) -> Iterator[TritonServer]:
    """A model server that is started again after a crash."""
    leaving = threading.Event()
    # Processes end with the thread that started them, so one thread starts them all.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="triton") as thread:
        server = thread.submit(start_triton, supervisor, folder, name=name).result()

        def restart_until_leaving() -> None:
            while not leaving.wait(0.25):
                processes.restart_exited(supervisor, [server.name])

        restarting = thread.submit(restart_until_leaving)
        try:
            yield server
        finally:
            leaving.set()
            restarting.result()
            supervisor.stop(server.name)


@dataclass
class Answers:
    """The records of a topic, read from its start."""

    consumer: AIOKafkaConsumer
    records: list[Any] = field(default_factory=list)

    async def read(
        self, *, until: int | None = None, timeout_s: float = DEADLINE_S, settle_s: float = 0.0
    ) -> list[Any]:
        """Read until there are `until` records, then those that arrive within `settle_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while until is None or len(self.records) < until:
            if loop.time() > deadline:
                raise AssertionError(f"{len(self.records)} records after {timeout_s} s, expected {until}")
            if not await self._poll(200) and until is None:
                break
        if settle_s:
            await asyncio.sleep(settle_s)
            while await self._poll(300):
                pass
        return self.records

    async def read_to_end(self) -> list[Any]:
        """Read all records that the topic has now."""
        ends = await self.consumer.end_offsets(self.consumer.assignment())
        while any([await self.consumer.position(one) < end for one, end in ends.items()]):
            await self._poll(200)
        return self.records

    async def ids(self, wanted: Iterable[str], *, timeout_s: float = DEADLINE_S) -> Counter[str]:
        """Read until every wanted request id has a response; returns the number of responses by id."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        missing = set(wanted)
        seen: Counter[str] = Counter(record.key.decode() for record in self.records)
        while missing - set(seen):
            if loop.time() > deadline:
                raise AssertionError(f"{len(missing - set(seen))} requests without an answer after {timeout_s} s")
            for record in await self._poll(200):
                seen[record.key.decode()] += 1
        return seen

    def responses(self) -> dict[str, GenerationResponse]:
        found = (GenerationResponse.model_validate_json(record.value) for record in self.records)
        return {response.request_id: response for response in found}

    async def _poll(self, timeout_ms: int) -> list[Any]:
        batches = await self.consumer.getmany(timeout_ms=timeout_ms)
        fresh = [record for batch in batches.values() for record in batch]
        self.records += fresh
        return fresh


@asynccontextmanager
async def reading(kafka: KafkaSettings, spec: TopicSpec = RESPONSES) -> AsyncIterator[Answers]:
    consumer = AIOKafkaConsumer(
        kafka.topic(spec), **kafka.client_options(), group_id=None, auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        yield Answers(consumer)
    finally:
        await consumer.stop()
