"""The configuration of a demo: model, grid, time span, traffic, and the settings of the services.

In a replay, event time runs so fast that some default settings do not fit: at rate 720 ten wall milliseconds are seven
seconds of event time. Delays that cover the latency of messages are therefore longer here. Parameters of the paper (xi,
the evaluator's grace period, the trailing window) are the production defaults.
"""

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from deploy.local.config import ModelName, StackConfig

LEAD_S = 12.0
"""Wall seconds between the start of the services and the start of the traffic."""
LATENESS_WALL_S = 2.5
"""Latency of messages on a busy machine of two cores, wall seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The load of a day, by model.

    Attributes:
        requests: number of requests in 24 hours.
        wall_s: wall seconds for 24 hours of event time.
        max_tokens: maximum length of an answer.
        evaluated_prompts: prompts per evaluation at most; each is answered at every level and judged in every order.
        min_samples: samples before the first evaluation. The optimizer needs 20 judged prompts per option.
        min_judged_to_learn: judged prompts before prompt groups are learned.
        evaluator_concurrency: concurrent calls of the evaluator.
        sample_share: share of the requests that become samples for the evaluator.
        confidence_z: safety margin of the quality bounds, in standard errors; lower than the default, because few
            prompts are judged in one day.
        tasks: tasks of the prompts; empty: all.
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
    tasks: frozenset[str] = frozenset()


PACES: dict[ModelName, Pace] = {
    "llama-2-13b-chat": Pace(
        requests=4_000,
        wall_s=120.0,
        max_tokens=1024,
        evaluated_prompts=200,
        min_samples=200,
        min_judged_to_learn=180,
        evaluator_concurrency=12,
        sample_share=1.0,
    ),
    # This model shares the CPU with all other processes, so only about 30 prompts are judged: too few to save anything
    # with a safety margin. The tasks are those that a model of this size can answer.
    "smollm2": Pace(
        requests=160,
        wall_s=200.0,
        max_tokens=96,
        evaluated_prompts=30,
        min_samples=26,
        # More than are judged in a day: too few to learn groups.
        min_judged_to_learn=600,
        evaluator_concurrency=4,
        sample_share=1.0,
        confidence_z=0.0,
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


def stack_config(day: DemoDay, config: StackConfig) -> StackConfig:
    """The stack's configuration for a demo: replay, model, trace and service settings."""
    return config.model_copy(
        update={
            "event_start": day.start,
            "rate": day.rate,
            "lead_s": LEAD_S,
            "model": day.model,
            "workload": day.workload,
            "zone": day.zone,
            "carbon": {day.zone: day.trace},
            "settings": service_settings(day),
        }
    )


def service_settings(day: DemoDay) -> dict[str, dict[str, str]]:
    """Environment variables by service."""
    settle_delay_s = LATENESS_WALL_S * day.rate
    return {
        "router": {
            "SPROUT_ROUTER_SAMPLE_SHARE": str(day.pace.sample_share),
            # Streaming measures the time to first token.
            "SPROUT_ROUTER_STREAM_ALWAYS": "true",
        },
        "optimizer": {
            "SPROUT_OPTIMIZER_XI": json.dumps({"preference": 0.1}),
            "SPROUT_OPTIMIZER_CONFIDENCE_Z": str(day.pace.confidence_z),
        },
        "evaluator": {
            "SPROUT_EVALUATOR_PROMPTS_PER_EVALUATION": str(day.pace.evaluated_prompts),
            "SPROUT_EVALUATOR_MIN_SAMPLES": str(day.pace.min_samples),
            "SPROUT_EVALUATOR_CONCURRENCY": str(day.pace.evaluator_concurrency),
            "SPROUT_EVALUATOR_MAX_TOKENS": str(day.pace.max_tokens),
            "SPROUT_EVALUATOR_MIN_JUDGED_TO_LEARN": str(day.pace.min_judged_to_learn),
        },
        "ledger": {
            "SPROUT_LEDGER_SCRAPE_INTERVAL_S": "0.5",
            "SPROUT_LEDGER_SETTLE_DELAY_S": f"{settle_delay_s:.0f}",
            "SPROUT_LEDGER_SETTLE_INTERVAL_S": "1",
        },
    }
