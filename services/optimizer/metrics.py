"""Prometheus metrics of the optimizer."""

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.messages import Policy

_SOLVE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 10.0)


class OptimizerMetrics:
    """All metrics of one optimizer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.solve_s = Histogram(
            "sprout_optimizer_solve_seconds",
            "Wall time to build and solve the program of a model",
            ("model",),
            buckets=_SOLVE_BUCKETS,
            registry=registry,
        )
        self.solves = Counter(
            "sprout_optimizer_solves",
            "Solved programs by trigger and status",
            ("model", "trigger", "status"),
            registry=registry,
        )
        self.policies = Counter(
            "sprout_optimizer_policies", "Policies published", ("model", "status"), registry=registry
        )
        self.footprints = Counter(
            "sprout_optimizer_footprints",
            "Footprints read: counted, known (redelivered), or unknown (of a model or option not in the fleet)",
            ("outcome",),
            registry=registry,
        )
        self._version = Gauge(
            "sprout_optimizer_policy_version", "Version of the current policy", ("model",), registry=registry
        )
        self._saving = Gauge(
            "sprout_optimizer_expected_saving_ratio",
            "1 - expected grams per request / grams if the reference served all requests",
            ("model",),
            registry=registry,
        )
        self._bound = Gauge(
            "sprout_optimizer_quality_bound",
            "Minimum quality required, relative to the baseline (no directive)",
            ("model", "metric"),
            registry=registry,
        )
        self._quality = Gauge(
            "sprout_optimizer_expected_quality",
            "Lower confidence bound of the quality, relative to the baseline (no directive)",
            ("model", "metric"),
            registry=registry,
        )
        self._ages = Gauge(
            "sprout_optimizer_age_seconds",
            "Event time since the latest policy or evaluation of a model, or intensity of a zone; NaN without one",
            ("what", "name"),
            registry=registry,
        )

    def watch_age(self, what: str, name: str, age_s: Callable[[], float | None]) -> None:
        """Read an age at every scrape; None is shown as NaN."""

        def age_or_nan() -> float:
            age = age_s()
            return math.nan if age is None else age

        self._ages.labels(what, name).set_function(age_or_nan)

    def set_policy(self, policy: Policy) -> None:
        """Show the current policy of a model."""
        self._version.labels(policy.model).set(policy.version)
        if policy.reference_g_per_request > 0.0:
            saving = 1.0 - policy.expected_g_per_request / policy.reference_g_per_request
            self._saving.labels(policy.model).set(saving)
        for metric, bound in policy.bounds.items():
            self._bound.labels(policy.model, metric).set(bound)
        for metric, quality in policy.expected_quality.items():
            self._quality.labels(policy.model, metric).set(quality)
