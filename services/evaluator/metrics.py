"""What the evaluator tells Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class EvaluatorMetrics:
    """All metrics of one evaluator."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.evaluations = Counter(
            "sprout_evaluator_evaluations",
            "Evaluations by trigger and outcome: finished, or failed",
            ("model", "trigger", "outcome"),
            registry=registry,
        )
        self.running = Gauge("sprout_evaluator_running", "Evaluations that are running", ("model",), registry=registry)
        self.judged = Counter("sprout_evaluator_judged", "Prompts with a verdict", ("model",), registry=registry)
        self.abstentions = Counter(
            "sprout_evaluator_abstentions", "Prompts without a usable verdict", ("model",), registry=registry
        )
        self.dropped = Counter(
            "sprout_evaluator_dropped",
            "Prompts that a failed call took out of an evaluation",
            ("model",),
            registry=registry,
        )
        self.positions = Counter(
            "sprout_evaluator_positions",
            "Readings of the judge by the position it named: equal shares if it has no position bias",
            ("position",),
            registry=registry,
        )
        self.votes = Counter(
            "sprout_evaluator_votes",
            "Readings of prompts with a verdict: for the winner, or not",
            ("agreeing",),
            registry=registry,
        )
        self.samples = Counter(
            "sprout_evaluator_samples",
            "Samples: offered to the reservoir, or refused (unknown model, unusable id)",
            ("outcome",),
            registry=registry,
        )
        self.retries = Counter(
            "sprout_evaluator_retries", "Attempts that followed a failed one", ("pool",), registry=registry
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

    def watch_adjusted(self, model: str, value: Callable[[], float]) -> None:
        """Read a model's urgency-adjusted intensity whenever it is asked for."""
        self._adjusted.labels(model).set_function(value)
