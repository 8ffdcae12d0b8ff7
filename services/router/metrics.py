"""What the router tells Prometheus."""

from collections.abc import Callable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.messages import GenerationResponse

_OVERHEAD_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


class RouterMetrics:
    """All metrics of one router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "sprout_router_requests",
            "Requests answered, by outcome (ok or the error's code), option and how it was chosen",
            ("model", "outcome", "pool", "level", "source"),
            registry=registry,
        )
        self.tokens = Counter(
            "sprout_router_tokens",
            "Tokens of served requests",
            ("model", "pool", "level", "kind"),
            registry=registry,
        )
        self.in_flight = Gauge("sprout_router_in_flight", "Requests being served", registry=registry)
        self.lag_records = Gauge(
            "sprout_router_lag_records",
            "Records of an assigned partition that are not finished, as far as the consumer has heard of them",
            ("partition",),
            registry=registry,
        )
        self._waiting_age_s = Gauge(
            "sprout_router_waiting_age_seconds",
            "Wall time since the record that waits for a free place was sent; 0 when none waits",
            registry=registry,
        )
        self.overhead_s = Histogram(
            "sprout_router_overhead_seconds",
            "Wall time from a request's receipt to its published answer, less the time on model servers",
            buckets=_OVERHEAD_BUCKETS,
            registry=registry,
        )
        self.queued_s = Histogram(
            "sprout_router_queue_seconds",
            "Event time from a request's own timestamp to its receipt",
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self.first_token_s = Histogram(
            "sprout_router_first_token_seconds",
            "Event time from sending to a model server until the first token",
            ("model",),
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self.generation_s = Histogram(
            "sprout_router_generation_seconds",
            "Event time from sending to a model server until the last token",
            ("model", "level"),
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self.retries = Counter(
            "sprout_router_retries", "Attempts that followed a failed one", ("pool",), registry=registry
        )
        self.endpoint_failures = Counter(
            "sprout_router_endpoint_failures", "Failed attempts and health checks", ("endpoint",), registry=registry
        )
        self.fallbacks = Counter(
            "sprout_router_fallbacks",
            "Requests served by the reference because no policy could be followed",
            ("model", "reason"),
            registry=registry,
        )
        self.ungrouped = Counter(
            "sprout_router_ungrouped",
            "Requests served by the row for all traffic because the policy's prompt groups were not known here",
            ("model",),
            registry=registry,
        )
        self.control_sequences = Counter(
            "sprout_router_control_sequences",
            "Requests whose text held control sequences of the chat template",
            registry=registry,
        )
        self.dead_letters = Counter(
            "sprout_router_dead_letters", "Messages that were no requests", ("reason",), registry=registry
        )
        self.samples = Counter("sprout_router_samples", "Samples published", ("model",), registry=registry)
        self.not_begun = Counter(
            "sprout_router_redelivered",
            "Records that were not begun because they are known here or will be redelivered",
            registry=registry,
        )
        self.given_up = Counter(
            "sprout_router_given_up",
            "Requests given up because their partition was lost or the router stopped; they are redelivered",
            registry=registry,
        )
        self.commits = Counter("sprout_router_commits", "Offset commits", ("outcome",), registry=registry)
        self._policy_age_s = Gauge(
            "sprout_router_policy_age_seconds",
            "Event time since the policy was made; NaN without one",
            ("model",),
            registry=registry,
        )
        self._intensity_age_s = Gauge(
            "sprout_router_intensity_age_seconds",
            "Event time since the newest carbon intensity; NaN without one",
            ("zone",),
            registry=registry,
        )

        # A series is looked up for every answer, which `labels` makes dearer than counting in it.
        self._requests_of = cache(self.requests.labels)
        self._tokens_of = cache(self.tokens.labels)
        self._generation_s_of = cache(self.generation_s.labels)
        self._first_token_s_of = cache(self.first_token_s.labels)

    def watch_waiting(self, age_s: Callable[[], float]) -> None:
        """Read the age of the oldest waiting record whenever it is asked for."""
        self._waiting_age_s.set_function(age_s)

    def watch_policy(self, model: str, age_s: Callable[[], float]) -> None:
        """Read a policy's age whenever it is asked for."""
        self._policy_age_s.labels(model).set_function(age_s)

    def watch_intensity(self, zone: str, age_s: Callable[[], float]) -> None:
        """Read an intensity's age whenever it is asked for."""
        self._intensity_age_s.labels(zone).set_function(age_s)

    def answered(self, response: GenerationResponse, *, overhead_s: float) -> None:
        """Count an answer.

        Args:
            overhead_s: wall seconds beside the model servers' own.
        """
        decision = response.decision
        pool, level, source = (decision.pool, decision.level, decision.source) if decision else ("", "", "")
        outcome = response.error.code if response.error is not None else "ok"
        # Producers choose the name of a model that is not served: it must not become a time series.
        model = response.model if outcome != "unknown_model" else ""
        self._requests_of(model, outcome, pool, level, source).inc()
        self.overhead_s.observe(overhead_s)
        if response.usage is None or response.timing is None:
            return
        self._tokens_of(model, pool, level, "completion").inc(response.usage.completion_tokens)
        if response.usage.prompt_tokens is not None:
            self._tokens_of(model, pool, level, "prompt").inc(response.usage.prompt_tokens)
        timing = response.timing
        self.queued_s.observe(max(0.0, (timing.received_at - response.requested_at).total_seconds()))
        self._generation_s_of(model, level).observe((timing.finished_at - timing.started_at).total_seconds())
        if timing.first_token_at is not None:
            self._first_token_s_of(model).observe((timing.first_token_at - timing.started_at).total_seconds())
