"""Prometheus metrics of the evaluator."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class EvaluatorMetrics:
    """All metrics of one evaluator process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.evaluations = Counter(
            "sprout_evaluator_evaluations",
            "Evaluations by trigger and outcome (finished, failed)",
            ("model", "trigger", "outcome"),
            registry=registry,
        )
        self.running = Gauge("sprout_evaluator_running", "Evaluations in progress", ("model",), registry=registry)
        self.postponed = Gauge(
            "sprout_evaluator_postponed",
            "Whether an evaluation is due but postponed, by reason: 1 or 0",
            ("model", "reason"),
            registry=registry,
        )
        self.judged_prompts = Counter(
            "sprout_evaluator_judged_prompts", "Prompts with a verdict", ("model",), registry=registry
        )
        self.abstentions = Counter(
            "sprout_evaluator_abstentions",
            "Prompts without a verdict: no answer got a majority of the judge's votes",
            ("model",),
            registry=registry,
        )
        self.dropped_prompts = Counter(
            "sprout_evaluator_dropped_prompts",
            "Prompts removed from an evaluation because a call failed",
            ("model",),
            registry=registry,
        )
        self.judge_positions = Counter(
            "sprout_evaluator_judge_positions",
            "Votes of the judge by the position that it named; equal shares without position bias",
            ("position",),
            registry=registry,
        )
        self.judge_votes = Counter(
            "sprout_evaluator_judge_votes",
            "Votes on prompts with a verdict: for the winner (yes) or for another answer (no)",
            ("agreeing",),
            registry=registry,
        )
        self.samples = Counter(
            "sprout_evaluator_samples",
            "Samples: offered to the reservoir, or rejected (unknown model, unusable id)",
            ("outcome",),
            registry=registry,
        )
        self.retries = Counter(
            "sprout_evaluator_retries", "Attempts after a failed attempt", ("pool",), registry=registry
        )
        self.endpoint_failures = Counter(
            "sprout_evaluator_endpoint_failures", "Failed attempts and health checks", ("endpoint",), registry=registry
        )
        self._adjusted = Gauge(
            "sprout_evaluator_adjusted_intensity",
            "Urgency-adjusted carbon intensity, gCO2eq/kWh; NaN before the first evaluation",
            ("model",),
            registry=registry,
        )

    def observe_adjusted_intensity(self, model: str, read: Callable[[], float]) -> None:
        """Call `read` for a model's urgency-adjusted intensity at every scrape."""
        self._adjusted.labels(model).set_function(read)
