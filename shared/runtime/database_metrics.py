"""Metrics of a service's database: latency and errors of its queries, connections of its pool."""

from typing import Any, Final

import asyncpg
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCIES_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Upper limits of the histogram's buckets, wall seconds."""


class DatabaseMetrics:
    """Latency and errors of the queries of a pool, and its connections."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "sprout_database_query_seconds",
            "Wall time of a query on PostgreSQL",
            buckets=LATENCIES_S,
            registry=registry,
        )
        self._errors = Counter(
            "sprout_database_errors", "Queries on PostgreSQL that failed", ["error"], registry=registry
        )
        self._connections = Gauge(
            "sprout_database_connections",
            "Connections of the pool: open, idle, or at most",
            ["state"],
            registry=registry,
        )

    async def observe_connection(self, connection: Any) -> None:  # noqa: ANN401 - a connection or its proxy
        """Observe the queries of a new connection: `init` of `asyncpg.create_pool`."""
        connection.add_query_logger(self._observe)

    def observe_pool(self, pool: asyncpg.Pool) -> None:
        """Export the number of connections of a pool."""
        self._connections.labels("open").set_function(pool.get_size)
        self._connections.labels("idle").set_function(pool.get_idle_size)
        self._connections.labels("max").set_function(pool.get_max_size)

    def _observe(self, query: Any) -> None:  # noqa: ANN401 - asyncpg's LoggedQuery, which holds texts and arguments
        self._seconds.observe(query.elapsed)
        if query.exception is not None:
            self._errors.labels(type(query.exception).__name__).inc()
