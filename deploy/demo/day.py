"""What the demo plays: how long a day, how fast, with how much traffic, on which model, under which grid."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from deploy.local.fleet import ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How much a model is asked for in a day.

    Attributes:
        requests: in all.
        wall_s: wall seconds that 24 hours of event time take.
        max_tokens: of every answer.
        evaluated_prompts: in one evaluation, at most; each is answered at every level and judged in every order.
        first_samples: before the first evaluation; the optimizer trusts no option that was judged on fewer than 20.
        first_lesson: judged prompts before prompt groups are learned.
        evaluator_concurrency: calls that the evaluator makes at once.
        sample_share: of the requests, kept for the evaluator.
        caution: of the optimizer, in standard deviations of all traffic's quality: fewer than by default, for a day
            judges few prompts.
        tasks: kinds of prompts that are asked; none: all.
    """

    requests: int
    wall_s: float
    max_tokens: int
    evaluated_prompts: int
    first_samples: int
    first_lesson: int
    evaluator_concurrency: int
    sample_share: float
    caution: float = 1.0
    tasks: frozenset[str] = frozenset()


PACES: dict[ModelName, Pace] = {
    "llama-2-13b-chat": Pace(
        requests=4_000,
        wall_s=120.0,
        max_tokens=1024,
        evaluated_prompts=200,
        first_samples=200,
        first_lesson=180,
        evaluator_concurrency=12,
        sample_share=1.0,
    ),
    # A real model on the processor cores that everything else runs on as well: it has time for two dozen judged
    # prompts, too few for any caution to leave something to save. It is asked what a model of its size can answer.
    "smollm2": Pace(
        requests=160,
        wall_s=200.0,
        max_tokens=96,
        evaluated_prompts=30,
        first_samples=26,
        # More than a day judges: of so few nothing can be learned.
        first_lesson=600,
        evaluator_concurrency=4,
        sample_share=1.0,
        caution=0.0,
        tasks=frozenset({"factual", "reading", "summary"}),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoDay:
    """One run of the demo.

    Attributes:
        start: event time of the first request, UTC.
        hours: length of the traffic, event time.
        requests: how many are sent in these hours.
        trace: CSV of the zone's carbon intensity.
        workload: whose prompts are asked.
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
        """Event time of the end of the traffic."""
        return self.start + timedelta(hours=self.hours)

    @property
    def rate(self) -> float:
        """Event seconds per wall second."""
        return 86_400.0 / self.pace.wall_s

    @property
    def duration_s(self) -> float:
        """Wall seconds that the traffic takes."""
        return self.hours * 3600.0 / self.rate
