"""Builders for the evaluator's tests: samples, intensities, judged prompts, a Triton server, and service processes."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from deploy.local.config import default_state_dir
from deploy.local.processes import ProcessSpec, Supervisor, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from deploy.local.triton import free_triton_ports, install, ready_probe
from deploy.triton.models import stand_in_judge, stand_in_llm
from deploy.triton.repository import write_repository
from deploy.triton.stand_in.judge import JudgeRules
from services.evaluator.quality import JudgedAnswer, JudgedPrompt
from shared.grouping import extract_features
from shared.messages import CarbonIntensity, ChatMessage, IntensityPoint, Sample, ServedAnswer
from shared.runtime.clock import Clock
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from tests.support.deadlines import REPLY_S, until
from tests.support.router import LEVELS, MODEL, ZONE, TritonServer, fleet_toml, question

PREFERRED = ("L0", "L0", "L0", "L1", "L1", "L2")
"""Preferred level by prompt number modulo 6: shares 1/2, 1/3, 1/6."""

TOKEN = "token-of-these-tests"
"""Of POST /evaluations."""

KINDS = 400
"""Number of prompts of two kinds, which learned groups separate."""


def of_a_kind(number: int) -> str:
    """Even numbers: questions, whose shortest answer is preferred. Odd numbers: sums, whose longest answer is."""
    if number % 2 == 0:
        return f"Which country is the city of number {number} the capital of?"
    return f"Ann has {number} apples and gives {number % 9} away. How many remain?"


def sample(
    number: int,
    *,
    group: str = "qa",
    model: str = MODEL,
    at: datetime | None = None,
    text: Callable[[int], str] = question,
    reference: str | None = None,
    served: ServedAnswer | None = None,
) -> Sample:
    return Sample(
        request_id=f"r{number}",
        model=model,
        group=group,
        messages=(ChatMessage(role="user", content=text(number)),),
        reference=reference,
        served=served,
        sampled_at=at or datetime.now(UTC),
    )


def intensities(at: datetime, *values: float, hours: float = 1.0) -> CarbonIntensity:
    """An intensity message: values `hours` apart, the last one at `at`."""
    points = [
        IntensityPoint(at=at - timedelta(hours=hours * age), intensity_g_per_kwh=value)
        for age, value in enumerate(reversed(values))
    ]
    latest, *history = points
    return CarbonIntensity(zone=ZONE, latest=latest, history=tuple(reversed(history)), source="test", published_at=at)


def judged_fleet(address: str, *, levels: Sequence[str] = tuple(LEVELS)) -> str:
    """Fleet file of the router's tests, with a judge."""
    return fleet_toml([address], levels=levels) + "\n".join(
        [
            "[[pools]]", 'name = "judge"', 'triton_model = "judge"', f'zone = "{ZONE}"', "[[pools.endpoints]]",
            'name = "judge-0"', f'grpc = "{address}"', "[judge]", 'pool = "judge"', "",
        ]
    )  # fmt: skip


REFERENCE = "word"
"""Right answer to every prompt of the workload; the brief answer at L2 to an odd prompt disagrees with it."""


def write_judged_workload(path: Path, *, prompts: int) -> Path:
    def entry(number: int, prompt: str, preferred: str) -> dict[str, Any]:
        return {
            "task": "test",
            "prompt": prompt,
            "preferred": preferred,
            "reference": REFERENCE,
            "responses": {
                f"{MODEL}/{level}": {
                    "text": f"{level} on {number}: " + "word " * tokens,
                    "tokens": tokens,
                    "energy_j": tokens * 6.0,
                    "time_s": time_s,
                    "correct": level != "L2" or number % 2 == 0,
                }
                for level, (tokens, time_s) in LEVELS.items()
            },
        }

    entries = [entry(number, question(number), PREFERRED[number % 6]) for number in range(prompts)]
    entries += [entry(number, of_a_kind(number), ("L2", "L0")[number % 2]) for number in range(KINDS)]
    path.write_text("".join(json.dumps(one) + "\n" for one in entries))
    return path


def start_judged_triton(
    supervisor: Supervisor, folder: Path, *, name: str, clock: Clock, position_bias: float, prompts: int
) -> TritonServer:
    """Start a Triton server with the stand-in model and judge."""
    installation = install(default_state_dir(), say=print)
    workload = write_judged_workload(folder / "w.jsonl", prompts=prompts)
    judge = stand_in_judge(workload, rules=JudgeRules(position_bias=position_bias))
    write_repository(folder / "models", [stand_in_llm(workload, model=MODEL), judge])
    ports = free_triton_ports()
    supervisor.start(
        ProcessSpec(
            name=name,
            command=tuple(installation.command(folder / "models", ports)),
            environment=installation.environment(clock.environment()),
            ready=ready_probe(ports),
        )
    )
    return TritonServer(supervisor, name, f"127.0.0.1:{ports.grpc}")


@dataclass
class EvaluatorProcess:
    """Evaluators as they run in production: processes with an environment."""

    supervisor: Supervisor
    kafka: KafkaSettings
    database: DatabaseSettings
    fleet: Path
    clock: Clock
    settings: Mapping[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def start(self, **changes: str) -> str:
        """Start one, wait until it is ready, and return the name of its process."""
        name = f"{self.kafka.topic_prefix}evaluator{len(self.names)}"
        self.names.append(name)
        (port,) = free_ports(1)
        environment = ServiceEnvironment(
            bootstrap_servers=self.kafka.bootstrap_servers,
            topic_prefix=self.kafka.topic_prefix,
            database_url=self.database.url.get_secret_value(),
            fleet_file=self.fleet,
            clock=self.clock.environment(),
        )
        settings = {"SPROUT_KAFKA_GROUP_PREFIX": self.kafka.group_prefix, **self.settings, **changes}
        self.supervisor.start(
            service_spec("evaluator", port=port, environment=environment, settings=settings, name=name)
        )
        return name

    def url(self, name: str) -> str:
        return str(self.supervisor.process(name).spec.url)

    def log(self, name: str) -> str:
        return self.supervisor.process(name).log.read_text()

    def stop_all(self) -> None:
        for name in self.names:
            if name in self.supervisor.names:
                self.supervisor.stop(name)


def judged_answer(
    level: str,
    *,
    options: Sequence[str] = (),
    tokens: int = 50,
    seconds: float = 1.0,
    **outcomes: float,
) -> JudgedAnswer:
    counted = tuple(options) or (f"p/{level}",)
    return JudgedAnswer(level, counted, counted[0], tokens, seconds, outcomes)


def judged_prompt(
    name: str,
    *,
    answers: Sequence[JudgedAnswer],
    text: str = "Why?",
    stratum: str = "qa",
    at: datetime = datetime(2023, 2, 10, 12, tzinfo=UTC),
) -> JudgedPrompt:
    return JudgedPrompt(name, name, stratum, stratum, at, extract_features(text), tuple(answers))


def shares(counts: Sequence[Any], *, group: str) -> dict[str, float]:
    """Preferred share by option."""
    return {one.option: one.successes / one.trials for one in counts if one.group == group}


async def ask_for_evaluation(url: str) -> None:
    """Start an evaluation of `MODEL` as a person does, once the evaluator at this URL leads."""
    await wait_until_ready_is(url + "/ready", 200, mentions="leader")
    response = await request_evaluation(url)
    assert response[0] == 202, response


async def request_evaluation(url: str, token: str = TOKEN) -> tuple[int, str]:
    """Status and text of the answer."""
    request = urllib.request.Request(
        f"{url}/evaluations?model={MODEL}", method="POST", headers={"Authorization": f"Bearer {token}"}
    )
    return await asyncio.to_thread(answer, request)


async def wait_until_ready_is(url: str, status: int, *, mentions: str = "") -> None:
    """Poll `/ready` until it has this status and mentions a text, for example the name of a failing dependency."""
    await until(lambda: asyncio.to_thread(answer, url), lambda found: found[0] == status and mentions in found[1])


def answer(url: str | urllib.request.Request) -> tuple[int, str]:
    """Status and text; 0 where there is no answer in time."""
    try:
        with urllib.request.urlopen(url, timeout=REPLY_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)
