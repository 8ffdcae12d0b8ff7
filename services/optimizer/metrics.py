"""Prometheus metrics of the optimizer."""

import math
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.optimizer.safety_margin import Calibration
from shared.messages import Policy, PoolCapacity
from shared.prequential import QualityInterval

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
        self._promise = Gauge(
            "sprout_optimizer_promise",
            "Promise by period, means over its requests relative to the baseline: promised and kept so far, and needed "
            "in the rest of the period",
            ("model", "metric", "what"),
            registry=registry,
        )
        self._out_of_sample = Gauge(
            "sprout_optimizer_quality_out_of_sample",
            "Quality of the policies by verdicts that they had not learned from, last week, relative to the baseline, "
            "with its 95 % interval: value is estimate, low or high; NaN without enough verdicts",
            ("model", "metric", "value"),
            registry=registry,
        )
        self._missed = Gauge(
            "sprout_optimizer_missed_promises",
            "Evaluations of the last 30 days that show a quality below what the policies promised: missed, of scored",
            ("model", "metric", "what"),
            registry=registry,
        )
        self._extra_z = Gauge(
            "sprout_optimizer_extra_confidence_z",
            "What is added to the safety margin because promises were missed too often, in standard errors",
            ("model", "metric"),
            registry=registry,
        )
        self._ages = Gauge(
            "sprout_optimizer_age_seconds",
            "Event time since the latest policy or evaluation of a model, or intensity of a zone; NaN without one",
            ("what", "name"),
            registry=registry,
        )

        self._overload = Gauge(
            "sprout_optimizer_overload",
            "Share by which the expected load exceeds the capacities of the model's pools",
            ("model",),
            registry=registry,
        )
        self._token_price = Gauge(
            "sprout_optimizer_token_price_joules",
            "Of a generated token: what one more costs (price), and all that the meter shows per token (meter); NaN "
            "where the energy is attributed",
            ("pool", "kind"),
            registry=registry,
        )
        self._needed = Gauge(
            "sprout_pool_endpoints_needed", "Endpoints that the pool needs now", ("pool",), registry=registry
        )
        self._awake = Gauge(
            "sprout_pool_endpoints_awake", "Endpoints that are to be awake", ("pool",), registry=registry
        )
        self._arrivals = Gauge(
            "sprout_pool_arrivals_per_second", "Requests per event second, recent mean", ("pool",), registry=registry
        )
        self._target = Gauge(
            "sprout_pool_target_batch",
            "Sequences that an endpoint is to have; NaN while that is unknown",
            ("pool",),
            registry=registry,
        )

    def watch_age(self, what: str, name: str, age_s: Callable[[], float | None]) -> None:
        """Read an age at every scrape; None is shown as NaN."""

        def age_or_nan() -> float:
            return _or_nan(age_s())

        self._ages.labels(what, name).set_function(age_or_nan)

    def set_policy(self, policy: Policy) -> None:
        """Show the current policy of a model."""
        self._version.labels(policy.model).set(policy.version)
        self._overload.labels(policy.model).set(policy.overload)
        for pool, price in policy.inputs.prices.items():
            self._token_price.labels(pool, "price").set(_or_nan(price.token_j))
            self._token_price.labels(pool, "meter").set(_or_nan(price.meter_token_j))
        if policy.reference_g_per_request > 0.0:
            saving = 1.0 - policy.expected_g_per_request / policy.reference_g_per_request
            self._saving.labels(policy.model).set(saving)
        for metric, bound in policy.bounds.items():
            self._bound.labels(policy.model, metric).set(bound)
        for metric, quality in policy.expected_quality.items():
            self._quality.labels(policy.model, metric).set(quality)

        if policy.promise is not None:
            account = policy.promise.current
            figures = {"promised": account.promised, "kept": account.kept, "rest": policy.promise.rest}
            for what, by_metric in figures.items():
                for metric, quality in by_metric.items():
                    self._promise.labels(policy.model, metric, what).set(quality)

    def set_calibrations(
        self, model: str, calibrations: Mapping[str, tuple[Calibration, QualityInterval | None]]
    ) -> None:
        """Show the quality out of sample of a model by metric."""
        for metric, (calibration, recent) in calibrations.items():
            self._missed.labels(model, metric, "scored").set(calibration.scored)
            self._missed.labels(model, metric, "missed").set(calibration.missed)
            self._extra_z.labels(model, metric).set(calibration.extra_z)
            values = (None, None, None) if recent is None else (recent.estimate, recent.low, recent.high)
            for name, value in zip(("estimate", "low", "high"), values, strict=True):
                self._out_of_sample.labels(model, metric, name).set(_or_nan(value))

    def set_capacity(self, plan: PoolCapacity) -> None:
        """Show the current plan of a pool."""
        self._needed.labels(plan.pool).set(plan.endpoints_needed)
        self._awake.labels(plan.pool).set(len(plan.awake))
        self._arrivals.labels(plan.pool).set(plan.requests_per_s)
        self._target.labels(plan.pool).set(_or_nan(plan.target_batch))

    def set_unknown_capacity(self, pool: str, *, endpoints: int) -> None:
        """Show that a pool has no valid plan: its endpoints are all awake."""
        self._awake.labels(pool).set(endpoints)
        for gauge in (self._needed, self._arrivals):
            gauge.labels(pool).set(math.nan)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
