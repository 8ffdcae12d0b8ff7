"""What every service exports: build, process, lag, database; measured on real Kafka and PostgreSQL."""

import asyncio

import asyncpg
import pytest
from prometheus_client import CollectorRegistry

from shared.kafka.broker import build_broker
from shared.kafka.subscribe import subscribe_batches
from shared.messages import Sample
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseMetrics, open_pool
from shared.runtime.service import LagMeter
from shared.topics import SAMPLES
from tests.support.deadlines import DEADLINE_S
from tests.support.evaluator import sample
from tests.support.router import producing

pytestmark = pytest.mark.integration


async def test_the_lag_is_what_the_service_has_not_been_given(kafka):
    registry, clock = CollectorRegistry(), Clock()
    broker, dead_letters = build_broker(kafka, service="test", clock=clock, registry=registry)
    read, go_on = asyncio.Event(), asyncio.Event()

    @subscribe_batches(broker, kafka, dead_letters, SAMPLES, group="test", max_records=1)
    async def on_samples(_: list[Sample]) -> None:
        read.set()
        await go_on.wait()

    meter = LagMeter(broker, registry)

    async def lag_is(expected: float) -> None:
        labels = {"topic": kafka.topic(SAMPLES), "group": kafka.group("test")}
        async with asyncio.timeout(DEADLINE_S):
            while registry.get_sample_value("sprout_consumer_lag_records", labels) != expected:
                await meter.measure()
                await asyncio.sleep(0.05)

    async with producing(kafka) as producer:
        for number in range(3):
            await producer.post(SAMPLES, sample(number, at=clock.now()), "qa")
    await broker.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            await read.wait()
        await lag_is(2)
        go_on.set()
        await lag_is(0)
    finally:
        await broker.stop()


async def test_queries_and_connections_of_the_database_are_counted(database):
    registry = CollectorRegistry()
    pool = await open_pool(database, schema="test", metrics=DatabaseMetrics(registry))
    try:
        assert await pool.fetchval("SELECT 1") == 1
        with pytest.raises(asyncpg.UndefinedTableError):
            await pool.execute("SELECT * FROM absent")
        await asyncio.sleep(0)  # asyncpg reports a query in the next round of the event loop
        # The pool's own queries, which reset a connection that is given back, are counted, too.
        assert (registry.get_sample_value("sprout_database_query_seconds_count") or 0) >= 2
        assert registry.get_sample_value("sprout_database_errors_total", {"error": "UndefinedTableError"}) == 1
        for state, expected in (("open", 1), ("idle", 1), ("max", database.pool_size)):
            assert registry.get_sample_value("sprout_database_connections", {"state": state}) == expected
    finally:
        await pool.close()
