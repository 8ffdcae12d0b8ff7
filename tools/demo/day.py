"""The configuration of a demo: model, grid, time span, traffic, and the settings of the services.

In a replay, event time runs so fast that some default settings do not fit: at rate 720 ten wall milliseconds are seven
seconds of event time. Delays that cover the latency of messages are therefore longer here. Parameters of the paper (xi,
the evaluator's grace period, the trailing window) are the production defaults.
"""

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Literal

from deploy.local.config import ModelName, StackConfig
from shared.batch_curve import MEASURED
from shared.fleet import Switchback
from shared.messages import GenerationRequest
from shared.pools import Dispatch
from tools.demo.traffic import peak_load

World = Literal["sprout", "reference"]
"""`reference`: the same day without Sprout. No directives, requests spread over all servers, none asleep."""

LEAD_S = 26.0
"""Wall seconds between the start of the services and the start of the traffic."""
LATENESS_WALL_S = 2.5
"""Latency of messages on a busy machine of two cores, wall seconds."""
USUAL_PARSE_S = 9.5e-6
"""Time to read and write a request on the machine that the paces are for: two cores of an AMD EPYC, wall seconds."""
LARGEST_SLOWDOWN = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchedServers:
    """The model servers of a demo, each a simulated GPU with a measured batch curve.

    A few thousand requests a day would leave such servers idle. Their steps are therefore stretched: one request stands
    for as many as the factor says, at the same power. Latencies are divided by the factor in the report.

    Attributes:
        count: number of servers.
        curve: a name in `shared.batch_curve.MEASURED`.
        peak_batch: sequences per server at the peak of the reference's day, which the stretching achieves.
        target_batch: sequences on a server before the next one is used.
        tpot_objective_ms: most time per output token; `target_batch` keeps it.
    """

    count: int = 4
    curve: str = "qwen3-14b-h100"
    peak_batch: int = 64
    target_batch: int = 128
    tpot_objective_ms: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The load of a day, by model.

    Attributes:
        requests: number of requests in 24 hours.
        wall_s: wall seconds for 24 hours of event time, on a machine of usual speed.
        max_tokens: maximum length of an answer.
        evaluated_prompts: prompts per evaluation at most; each is answered at every level and judged in every order.
        min_samples: samples before the first evaluation. The optimizer needs 20 judged prompts per option.
        min_judged_to_learn: different judged prompts before prompt groups are learned.
        evaluator_concurrency: concurrent calls of the evaluator.
        sample_share: share of the requests that become samples for the evaluator.
        confidence_z: safety margin of the quality bounds, in standard errors; lower than the default, because few
            prompts are judged in one day.
        metric: the limited quality metric, and `xi` the share of it that may be lost.
        holdout: share of the requests that is always served without a directive; None: as the optimizer's default.
        tasks: tasks of the prompts; empty: all.
        batched: the simulated model servers; None: one real server.
    """

    requests: int
    wall_s: float
    max_tokens: int
    evaluated_prompts: int
    min_samples: int
    min_judged_to_learn: int
    evaluator_concurrency: int
    sample_share: float
    confidence_z: float = 1.0
    metric: str = "preference"
    xi: float = 0.1
    holdout: float | None = None
    tasks: frozenset[str] = frozenset()
    batched: BatchedServers | None = None


PACES: dict[ModelName, Pace] = {
    "llama-2-13b-chat": Pace(
        requests=16_000,
        wall_s=195.0,
        max_tokens=1024,
        evaluated_prompts=300,
        min_samples=400,
        # Different prompts: the first evaluation judges 300, some of them several times.
        min_judged_to_learn=80,
        # A server's batch: the evaluation is short and its server full.
        evaluator_concurrency=128,
        sample_share=1.0,
        confidence_z=0.5,
        # The share of an n-way choice would depend on how many options there are.
        metric="not_worse",
        xi=0.1,
        batched=BatchedServers(),
    ),
    # This model shares the CPU with all other processes, so few prompts are judged: too few to save anything with a
    # safety margin. Few requests need a large control group. The tasks are those that a model of this size can answer.
    "smollm2": Pace(
        requests=280,
        wall_s=400.0,
        max_tokens=160,
        evaluated_prompts=24,
        min_samples=24,
        # More than are judged in a day: too few to learn groups.
        min_judged_to_learn=600,
        evaluator_concurrency=4,
        sample_share=1.0,
        confidence_z=0.0,
        holdout=0.25,
        tasks=frozenset({"factual", "reading", "summary"}),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoDay:
    """The configuration of one demo.

    Attributes:
        start: event time at which the traffic starts, UTC.
        hours: duration of the traffic, event time.
        requests: number of requests in these hours.
        trace: CSV of the zone's carbon intensity.
        workload: recorded prompts and answers.
        mean_tokens: mean length of an answer without a directive.
        dispatch: of the requests to the servers.
        sleep: whether servers that are not needed sleep.
        small: whether there is a server with a smaller variant of the model.
    """

    model: ModelName
    zone: str
    trace: Path
    workload: Path
    start: datetime
    hours: float
    requests: int
    seed: int
    pace: Pace
    mean_tokens: float = 1.0
    dispatch: Dispatch = "pack"
    sleep: bool = True
    small: bool = False

    def __post_init__(self) -> None:
        if self.hours <= 0 or self.requests <= 0:
            raise ValueError(f"hours and requests must be greater than 0, got {self.hours} and {self.requests}")

    @property
    def end(self) -> datetime:
        """Event time at which the traffic ends."""
        return self.start + timedelta(hours=self.hours)

    @property
    def rate(self) -> float:
        """Event seconds per wall second."""
        return 86_400.0 / self.pace.wall_s

    @property
    def duration_s(self) -> float:
        """Duration of the traffic, wall seconds."""
        return self.hours * 3600.0 / self.rate

    @property
    def answer_s(self) -> float:
        """Mean time in flight of a request at the peak of the reference's day, event seconds."""
        batched = self.pace.batched
        if batched is None:
            return 0.0
        peak_per_s = self.requests / (self.hours * 3600.0) * peak_load(self.start, self.hours)
        return batched.count * batched.peak_batch / peak_per_s

    @property
    def stretch(self) -> float:
        """How many times as long as on the real server a step of a simulated server takes."""
        batched = self.pace.batched
        if batched is None:
            return 1.0
        return self.answer_s / (self.mean_tokens * MEASURED[batched.curve].step_time_s(batched.peak_batch))

    @property
    def switchback(self) -> Switchback:
        """Four blocks or more without Sprout; answers that began before a change end within the washout."""
        if self.pace.batched is None:
            return Switchback(share=0.0)
        return Switchback(
            share=1 / 12,
            block_s=max(self.hours * 3600.0 / 60, 1.9 * self.answer_s),
            washout_s=1.2 * self.answer_s,
            key=f"demo-{self.seed}",
        )


def stack_config(day: DemoDay, config: StackConfig, world: World = "sprout") -> StackConfig:
    """The stack's configuration for a demo: replay, model, servers, trace and service settings."""
    update: dict[str, object] = {
        "event_start": day.start,
        "rate": day.rate,
        "lead_s": LEAD_S,
        "model": day.model,
        "workload": day.workload,
        "zone": day.zone,
        "carbon": {day.zone: day.trace},
        "settings": service_settings(day),
    }
    batched = day.pace.batched
    if batched is not None:
        update |= {
            "servers": batched.count,
            "curve": batched.curve,
            "stretch": day.stretch,
            "tpot_objective_ms": batched.tpot_objective_ms * day.stretch,
            "dispatch": "spread",
        }
        if world == "sprout":
            update |= {
                "dispatch": day.dispatch,
                "target_batch": batched.target_batch,
                "sleep": day.sleep,
                "small": day.small,
                "switchback": day.switchback,
            }
    if world == "reference":
        # Without policies the router adds no directive.
        update["services"] = ("carbon_feed", "router", "ledger")
    else:
        # The demo's traffic comes over Kafka; an idle gateway takes 3 % of a core.
        update["services"] = tuple(name for name in config.services if name != "gateway")
    return config.model_copy(update=update)


def service_settings(day: DemoDay) -> dict[str, dict[str, str]]:
    """Environment variables by service."""
    settle_delay_s = LATENESS_WALL_S * day.rate
    holdout = {} if day.pace.holdout is None else {"SPROUT_OPTIMIZER_HOLDOUT": str(day.pace.holdout)}
    return {
        # Answers are streamed in parts of many tokens: at this rate a server generates thousands a second.
        "triton": {"SPROUT_TRITON_TICK_MS": "500"},
        "router": {
            "SPROUT_ROUTER_LOAD_REPORT_INTERVAL_S": "0.25",
            "SPROUT_ROUTER_SAMPLE_SHARE": str(day.pace.sample_share),
            # Late answers on a busy machine show in the latencies; they are not errors.
            "SPROUT_ROUTER_DEFAULT_DEADLINE_WALL_S": "600",
            # Streaming measures the time to first token.
            "SPROUT_ROUTER_STREAM_ALWAYS": "true",
        },
        "optimizer": {
            "SPROUT_OPTIMIZER_XI": json.dumps({day.pace.metric: day.pace.xi}),
            # Hardly any answer beats the baseline's on every prompt, so with no loss tolerated on a clean grid the
            # baseline would serve there.
            "SPROUT_OPTIMIZER_CONSTANT_BOUNDS": json.dumps(["not_worse"] if day.pace.metric == "not_worse" else []),
            "SPROUT_OPTIMIZER_CONFIDENCE_Z": str(day.pace.confidence_z),
            "SPROUT_OPTIMIZER_CAPACITY_INTERVAL_S": "0.5",
            "SPROUT_OPTIMIZER_CAPACITY_SHORTEST_S": "1",
            **holdout,
        },
        "evaluator": {
            # A day from nothing: there is no trailing week yet, and most of the evaluating falls into the first day.
            "SPROUT_EVALUATOR_OPPORTUNITY_RULE": "urgency",
            "SPROUT_EVALUATOR_MAX_CARBON_SHARE": "0.03",
            # Requests without a task label are one group until groups are learned. A sample that makes room for another
            # one while it is judged leaves no verdict, and at this rate an evaluation takes an hour or more.
            "SPROUT_EVALUATOR_SAMPLES_PER_GROUP": "5000",
            # From the first prompt on, even if the first policy comes late on a busy machine.
            "SPROUT_EVALUATOR_NOT_WORSE": "always" if day.pace.metric == "not_worse" else "bounded",
            "SPROUT_EVALUATOR_PROMPTS_PER_EVALUATION": str(day.pace.evaluated_prompts),
            "SPROUT_EVALUATOR_MIN_SAMPLES": str(day.pace.min_samples),
            "SPROUT_EVALUATOR_CONCURRENCY": str(day.pace.evaluator_concurrency),
            "SPROUT_EVALUATOR_MAX_TOKENS": str(day.pace.max_tokens),
            "SPROUT_EVALUATOR_MIN_JUDGED_TO_LEARN": str(day.pace.min_judged_to_learn),
            "SPROUT_EVALUATOR_LOAD_REPORT_INTERVAL_S": "0.25",
        },
        "ledger": {
            "SPROUT_LEDGER_SCRAPE_INTERVAL_S": "0.25",
            "SPROUT_LEDGER_SETTLE_DELAY_S": f"{settle_delay_s:.0f}",
            "SPROUT_LEDGER_SETTLE_INTERVAL_S": "1",
        },
    }


def machine_slowdown(during_s: float = 3.0) -> float:
    """How many times as long as on the usual machine a task takes here and now, between 1 and `LARGEST_SLOWDOWN`.

    The clients and services of a replay must keep up with its clock: if they lag, the simulated servers seem slow.

    Args:
        during_s: how long to measure; virtual machines have moments of very different speeds.
    """
    request = GenerationRequest(
        id="demo", model="demo", prompt="word " * 60, requested_at=datetime(2024, 1, 1, tzinfo=UTC)
    )
    text = request.model_dump_json()
    end = time.perf_counter() + during_s
    rounds: list[float] = []
    while not rounds or time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(500):
            GenerationRequest.model_validate_json(text).model_dump_json()
        rounds.append((time.perf_counter() - began) / 500)
    return min(LARGEST_SLOWDOWN, max(1.0, fmean(rounds) / USUAL_PARSE_S))
