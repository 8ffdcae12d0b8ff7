"""Metrics of the gateway."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class GatewayMetrics:
    """The gateway's metrics, in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "sprout_gateway_requests",
            "HTTP requests by endpoint and status",
            ("endpoint", "status"),
            registry=registry,
        )
        self.first_byte = Histogram(
            "sprout_gateway_first_byte_seconds",
            "From the receipt of an HTTP request to its first byte, wall",
            ("endpoint",),
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.replies = Counter(
            "sprout_gateway_replies",
            "Parts of answers that were read from `replies`: of requests that wait here (own), and of those that have "
            "ended or are another gateway's (other)",
            ("of",),
            registry=registry,
        )
        self.cancelled = Counter(
            "sprout_gateway_cancelled", "Requests that were cancelled because nobody waits for them", registry=registry
        )
        self.refused = Counter(
            "sprout_gateway_refused", "Requests that a limit of their key or tenant refuses", ("limit",),
            registry=registry,
        )  # fmt: skip
        self.forced = Counter(
            "sprout_gateway_forced", "Requests that a carbon budget forces to another directive", registry=registry
        )
        self.unwritten = Counter(
            "sprout_gateway_unwritten",
            "Finished requests that are not stored: PostgreSQL is unavailable for too long; footprints replace them",
            registry=registry,
        )
        self.batch_lines = Counter(
            "sprout_gateway_batch_lines",
            "Lines of batches that got a result, by outcome: completed, failed, unfinished",
            ("outcome",),
            registry=registry,
        )
        self.batches = Gauge("sprout_gateway_batches", "Batches that this gateway works on", registry=registry)
        self._open = Gauge("sprout_gateway_open_requests", "Requests that wait for an answer", registry=registry)

    def watch_open(self, number: Callable[[], int]) -> None:
        """Read the number of open requests at every scrape."""
        self._open.set_function(number)
