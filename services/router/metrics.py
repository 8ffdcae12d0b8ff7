"""The router's Prometheus metrics."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from functools import cache

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import IllegalStateError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.router.fair_queue import FairQueue
from services.router.policy import PolicyCache
from services.router.request_class import RequestClasses
from shared.fleet import Fleet
from shared.inference.pool import ServingPool
from shared.inference.pools import Pools
from shared.messages import GenerationResponse
from shared.runtime.clock import Clock
from shared.topics import REQUESTS

BACKLOG_INTERVAL_S = 1.0
"""Wall seconds between two updates of the backlog."""

_OVERHEAD_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


class RouterMetrics:
    """All metrics of one router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "sprout_router_requests",
            "Answered requests by outcome ('ok' or the error code), option and source of the decision",
            ("model", "outcome", "pool", "level", "source"),
            registry=registry,
        )
        self.tokens = Counter(
            "sprout_router_tokens",
            "Prompt and completion tokens of successful requests",
            ("model", "pool", "level", "kind"),
            registry=registry,
        )
        self._in_flight = Gauge("sprout_router_in_flight", "Requests being processed", registry=registry)
        self.lag_records = Gauge(
            "sprout_router_lag_records",
            "Unfinished records of an assigned partition, up to the end that the last fetch reported; a partition of "
            "another lane than requests is named LANE/PARTITION",
            ("partition",),
            registry=registry,
        )
        self._waiting_age_s = Gauge(
            "sprout_router_waiting_age_seconds",
            "Wall time since the oldest of the requests that wait in this router was sent; 0 if none waits",
            registry=registry,
        )
        self._waiting_records = Gauge(
            "sprout_router_waiting_records",
            "Requests read ahead that wait in this router, by lane and tenant; tenant '': not in the fleet file",
            ("lane", "tenant"),
            registry=registry,
        )
        self._waiting_bytes = Gauge(
            "sprout_router_waiting_bytes", "Memory of the requests that wait in this router", registry=registry
        )
        self.overhead_s = Histogram(
            "sprout_router_overhead_seconds",
            "Wall time from receipt of a request to its published response, without the time on model servers",
            buckets=_OVERHEAD_BUCKETS,
            registry=registry,
        )
        self.queued_s = Histogram(
            "sprout_router_queue_seconds",
            "Event time from the timestamp of a request to its receipt",
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self.first_token_s = Histogram(
            "sprout_router_first_token_seconds",
            "Event time from sending a request to a model server until the first token",
            ("model",),
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self.generation_s = Histogram(
            "sprout_router_generation_seconds",
            "Event time from sending a request to a model server until the last token",
            ("model", "level"),
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self.retries = Counter(
            "sprout_router_retries", "Attempts after a failed attempt of the same request", ("pool",), registry=registry
        )
        self.endpoint_failures = Counter(
            "sprout_router_endpoint_failures", "Failed attempts and health checks", ("endpoint",), registry=registry
        )
        self.fallbacks = Counter(
            "sprout_router_fallbacks",
            "Requests served by the reference because no policy was usable, by reason",
            ("model", "reason"),
            registry=registry,
        )
        self.unknown_group_versions = Counter(
            "sprout_router_unknown_group_versions",
            "Requests served by the policy's overall probabilities because its prompt groups were not loaded",
            ("model",),
            registry=registry,
        )
        self.control_sequences = Counter(
            "sprout_router_control_sequences",
            "Requests whose text contained control sequences of the chat template",
            registry=registry,
        )
        self.dead_letters = Counter(
            "sprout_router_dead_letters", "Dead letters by reason", ("reason",), registry=registry
        )
        self.samples = Counter(
            "sprout_router_samples", "Samples published for the evaluator", ("model",), registry=registry
        )
        self.skipped_records = Counter(
            "sprout_router_skipped_records",
            "Delivered records that were not started: already known here, or to be redelivered after a rebalance",
            registry=registry,
        )
        self.cancelled_requests = Counter(
            "sprout_router_cancelled_requests",
            "Running requests cancelled because their partition was lost or the router shut down; they are redelivered",
            registry=registry,
        )
        self.commits = Counter("sprout_router_commits", "Offset commits by outcome", ("outcome",), registry=registry)
        self._policy_age_s = Gauge(
            "sprout_router_policy_age_seconds",
            "Event time since the newest policy was created; NaN without a policy",
            ("model",),
            registry=registry,
        )
        self._intensity_age_s = Gauge(
            "sprout_router_intensity_age_seconds",
            "Event time since the newest carbon intensity; NaN without one",
            ("zone",),
            registry=registry,
        )

        self.switchback_requests = Counter(
            "sprout_router_switchback_requests",
            "Requests in reference blocks, in which the whole fleet serves without Sprout",
            ("model",),
            registry=registry,
        )
        self._reference_block = Gauge(
            "sprout_router_reference_block", "Whether a reference block is running: 1 or 0", registry=registry
        )
        self._endpoint_in_flight = Gauge(
            "sprout_router_endpoint_in_flight",
            "Requests of this router in flight on an endpoint",
            ("pool", "endpoint"),
            registry=registry,
        )
        self._endpoints_in_use = Gauge(
            "sprout_router_endpoints_in_use",
            "Endpoints of a pool with a request of this router in flight",
            ("pool",),
            registry=registry,
        )
        self._target_batch = Gauge(
            "sprout_router_target_batch",
            "Requests that an endpoint is to have at once, of all routers together; NaN while it is unknown",
            ("pool", "endpoint"),
            registry=registry,
        )

        # `labels` costs more than the increment itself, and every response needs several series.
        self._requests_of = cache(self.requests.labels)
        self._tokens_of = cache(self.tokens.labels)
        self._generation_s_of = cache(self.generation_s.labels)
        self._first_token_s_of = cache(self.first_token_s.labels)

    def watch_requests(self, queue: FairQueue, classes: RequestClasses, *, in_flight: Callable[[], int]) -> None:
        """Report the requests that wait and those in flight at every scrape."""

        def watch_waiting(lane: str, tenant: str) -> None:
            self._waiting_records.labels(lane, tenant).set_function(lambda: queue.waiting_of(lane, tenant))

        def age_s() -> float:
            oldest_ms = queue.oldest_ms()
            return 0.0 if oldest_ms is None else max(0.0, time.time() - oldest_ms / 1_000)

        for lane in classes.lanes.values():
            for tenant in classes.tenants():
                watch_waiting(lane, tenant)
        self._waiting_bytes.set_function(lambda: queue.wait_bytes)
        self._waiting_age_s.set_function(age_s)
        self._in_flight.set_function(in_flight)

    def watch_pools(self, pools: Pools) -> None:
        """Report the load of the endpoints at every scrape."""

        def watch_endpoint(pool: ServingPool, endpoint: str) -> None:
            labels = (pool.name, endpoint)
            self._endpoint_in_flight.labels(*labels).set_function(lambda: len(pool.running[endpoint]))
            self._target_batch.labels(*labels).set_function(lambda: pool.targets.by_endpoint.get(endpoint, math.nan))

        def watch_pool(pool: ServingPool) -> None:
            self._endpoints_in_use.labels(pool.name).set_function(lambda: pool.in_use)
            for endpoint in pool.clients:
                watch_endpoint(pool, endpoint)

        self._reference_block.set_function(pools.reference_block)
        for pool in pools:
            watch_pool(pool)

    def watch_ages(self, policies: PolicyCache, fleet: Fleet, clock: Clock) -> None:
        """Report the ages of policies and carbon intensities at every scrape."""

        def watch_policy(model: str) -> None:
            def age_s() -> float:
                policy = policies.policy(model)
                return math.nan if policy is None else (clock.now() - policy.created_at).total_seconds()

            self._policy_age_s.labels(model).set_function(age_s)

        def watch_intensity(zone: str) -> None:
            def age_s() -> float:
                known_s = policies.intensities.age_s(zone, clock.now())
                return math.nan if known_s is None else known_s

            self._intensity_age_s.labels(zone).set_function(age_s)

        for model in fleet.models:
            watch_policy(model.name)
        for zone in fleet.zones:
            watch_intensity(zone)

    def answered(self, response: GenerationResponse, *, overhead_s: float) -> None:
        """Count a published response.

        Args:
            overhead_s: wall seconds from receipt to publication, without the time on model servers.
        """
        decision = response.decision
        pool, level, source = (decision.pool, decision.level, decision.source) if decision else ("", "", "")
        outcome = response.error.code if response.error is not None else "ok"
        # Clients choose the name of an unknown model: it must not become a time series.
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


class Backlog:
    """Reports the unfinished records of every assigned partition.

    Every fetch reports the end of its partition, so this sends no requests to Kafka.
    """

    def __init__(
        self,
        get_consumer: Callable[[], AIOKafkaConsumer | None],
        *,
        finished: Callable[[TopicPartition], int | None],
        lanes: Mapping[str, str],
        metrics: RouterMetrics,
    ) -> None:
        """Set up.

        Args:
            finished: the offset of a partition before which all records are finished; None if none was started here.
            lanes: names, by full name of the topic.
        """
        self._lanes = lanes
        self._get_consumer = get_consumer
        self._finished = finished
        self._metrics = metrics
        self._reported: set[str] = set()

    async def watch(self) -> None:
        """Update the metric forever."""
        while True:
            self._report(await self._measure())
            await asyncio.sleep(BACKLOG_INTERVAL_S)

    async def _measure(self) -> dict[str, int]:
        consumer = self._get_consumer()
        lags: dict[str, int] = {}
        if consumer is None:
            return lags
        try:
            # `position` waits for a position that is not known yet.
            async with asyncio.timeout(BACKLOG_INTERVAL_S):
                for partition in consumer.assignment():
                    end = consumer.highwater(partition)
                    if end is None:
                        continue
                    finished = self._finished(partition)
                    if finished is None:
                        finished = await consumer.position(partition)
                    lane, number = self._lanes[partition.topic], partition.partition
                    lags[str(number) if lane == REQUESTS.name else f"{lane}/{number}"] = max(0, end - finished)
        except (IllegalStateError, TimeoutError):  # a rebalance is under way
            return {}
        return lags

    def _report(self, lags: dict[str, int]) -> None:
        for partition in self._reported - set(lags):
            self._metrics.lag_records.remove(partition)
        for partition, lag in lags.items():
            self._metrics.lag_records.labels(partition).set(lag)
        self._reported = set(lags)
