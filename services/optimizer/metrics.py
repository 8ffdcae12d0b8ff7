"""What the optimizer tells Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.messages import Policy

_SOLVE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 10.0)


class OptimizerMetrics:
    """All metrics of one optimizer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.solve_s = Histogram(
            "sprout_optimizer_solve_seconds",
            "Wall time to state and solve the program of a model",
            ("model",),
            buckets=_SOLVE_BUCKETS,
            registry=registry,
        )
        self.solves = Counter(
            "sprout_optimizer_solves",
            "Solutions, by what called for them and how they came out",
            ("model", "trigger", "status"),
            registry=registry,
        )
        self.policies = Counter(
            "sprout_optimizer_policies", "Policies published", ("model", "status"), registry=registry
        )
        self.footprints = Counter(
            "sprout_optimizer_footprints",
            "Footprints read: counted, known (delivered again), or unknown (a model or option that the fleet lacks)",
            ("outcome",),
            registry=registry,
        )
        self._version = Gauge(
            "sprout_optimizer_policy_version", "Version of the policy in force", ("model",), registry=registry
        )
        self._saving = Gauge(
            "sprout_optimizer_expected_saving_ratio",
            "1 - expected grams per request / grams on the reference",
            ("model",),
            registry=registry,
        )
        self._bound = Gauge(
            "sprout_optimizer_quality_bound",
            "Least quality required, relative to the reference's",
            ("model", "metric"),
            registry=registry,
        )
        self._quality = Gauge(
            "sprout_optimizer_expected_quality",
            "Quality counted on, relative to the reference's",
            ("model", "metric"),
            registry=registry,
        )
        self._ages = Gauge(
            "sprout_optimizer_age_seconds",
            "Event time since the latest policy or evaluation of a model or intensity of a zone; NaN without one",
            ("what", "name"),
            registry=registry,
        )

    def watch_age(self, what: str, name: str, age_s: Callable[[], float]) -> None:
        """Read an age whenever it is asked for."""
        self._ages.labels(what, name).set_function(age_s)

    def in_force(self, policy: Policy) -> None:
        """Show a policy."""
        self._version.labels(policy.model).set(policy.version)
        if policy.reference_g_per_request > 0.0:
            saving = 1.0 - policy.expected_g_per_request / policy.reference_g_per_request
            self._saving.labels(policy.model).set(saving)
        for metric, bound in policy.bounds.items():
            self._bound.labels(policy.model, metric).set(bound)
        for metric, quality in policy.expected_quality.items():
            self._quality.labels(policy.model, metric).set(quality)
