"""Intervals are settled in a real PostgreSQL: sums, broken meters, and a learned curve that survives a restart."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from faststream.kafka import KafkaPublishMessage
from prometheus_client import CollectorRegistry

from services.ledger.attribution import Call
from services.ledger.calls import Labels, NewCall
from services.ledger.earlier import EarlierVersions
from services.ledger.metrics import LedgerMetrics
from services.ledger.outbox import FootprintOutbox
from services.ledger.reports import AwakeEndpoints
from services.ledger.rollup import RollUps
from services.ledger.settings import LedgerSettings
from services.ledger.settlement import IntervalSettlement
from services.ledger.sql import EARLIER_LOCKS, ENDPOINT_LOCK, SERVER_SETTINGS, Storage, add_partition
from shared.batch_curve import MEASURED
from shared.fleet import Directive, Fleet, Model
from shared.messages import EndpointCurve, Footprint
from shared.pools import Endpoint, Pool
from shared.runtime.clock import Clock
from shared.runtime.database import migrate, open_pool
from shared.runtime.settings import DatabaseSettings
from tests.support.batched_server import DAY_S, diurnal, poisson_arrivals, simulate
from tests.support.deadlines import until

pytestmark = pytest.mark.integration

START = datetime(2024, 2, 1, tzinfo=UTC)
POOL = Pool(
    name="p",
    model="m",
    zone="Z",
    endpoints=tuple(Endpoint(name=f"e{n}", grpc=f"x:{n}", metrics=f"http://x:{n}/metrics") for n in range(2)),
)
FLEET = Fleet(directives=(Directive(level="L0"),), models=(Model(name="m", chat_template="chatml"),), pools=(POOL,))


@asynccontextmanager
async def ledger_in(database: DatabaseSettings, schema: str) -> AsyncIterator[Storage]:
    """An empty ledger."""
    pool = await open_pool(database, schema=schema, server_settings=SERVER_SETTINGS)
    await migrate(pool, schema=schema, package="services.ledger.migrations")
    found = Storage()
    found.attach(pool)
    yield found
    await pool.close()


@pytest.fixture
async def storage(database) -> AsyncIterator[Storage]:
    """An empty ledger."""
    async with ledger_in(database, "ledger") as found:
        yield found


class Settling:
    """A ledger process, without Kafka and meters."""

    def __init__(self, storage: Storage, fleet: Fleet = FLEET, **settings: float) -> None:
        self.registry = CollectorRegistry()
        self.settlement = IntervalSettlement(
            fleet,
            settings=LedgerSettings(**settings),
            storage=storage,
            metrics=LedgerMetrics(self.registry),
            awake=AwakeEndpoints(),
            clock=Clock(),
        )

    async def until(self, **seconds: float) -> tuple[EndpointCurve, ...]:
        """Settle endpoints up to some times."""
        limits = {name: START + timedelta(seconds=until_s) for name, until_s in seconds.items()}
        latest = max(limits.values())
        return await self.settlement.run_once(latest, limits=limits)

    def value(self, name: str, **labels: str) -> float | None:
        """A metric."""
        return self.registry.get_sample_value(name, labels)


async def add_readings(storage: Storage, endpoint: str, times: Sequence[float], counter: Sequence[float]) -> None:
    rows = [
        (endpoint, START + timedelta(seconds=float(at_s)), "g", float(energy_j))
        for at_s, energy_j in zip(times, counter, strict=True)
    ]
    await storage.pool.executemany("INSERT INTO readings (endpoint, at, gpu, energy_j) VALUES ($1, $2, $3, $4)", rows)


async def add_calls(storage: Storage, endpoint: str, calls: Sequence[Call]) -> None:
    def at(at_s: float) -> datetime:
        return START + timedelta(seconds=at_s)

    labels = Labels("request", None, "m", "g", None, None, "p", "L0", "Z", endpoint, None, "policy", 1.0, ())
    await storage.add_calls(
        [
            NewCall(
                id=f"{endpoint}-{one.id}", request_id=None, labels=labels, started_at=at(one.started_s),
                first_token_at=None if one.first_token_s is None else at(one.first_token_s),
                finished_at=at(one.finished_s), prompt_tokens=one.prompt_tokens,
                completion_tokens=one.completion_tokens,
            )
            for one in calls
        ],
    )  # fmt: skip


SUMS = """
WITH shares AS (SELECT energy_j, server_s FROM settled_calls UNION ALL SELECT energy_j, server_s FROM open_calls)
SELECT (SELECT sum(metered_j) FROM intervals) AS metered_j,
       (SELECT sum(idle_j + unattributed_j) FROM intervals) AS rest_j,
       (SELECT sum(energy_j) FROM shares) AS calls_j, (SELECT sum(server_s) FROM shares) AS server_s,
       (SELECT sum(idle_s) FROM intervals) AS idle_s,
       (SELECT sum(extract(epoch FROM finished_at - started_at))::float8 FROM intervals) AS length_s
"""


async def test_a_day_of_two_servers_sums_to_meter_and_clock_and_the_curve_survives_restarts(storage):
    truth = replace(MEASURED["qwen3-14b-h100"], prompt_token_s=0.0001).stretched(300)
    rate = 5.0 / (truth.step_time_s(5.0) * 150.0)
    times = np.arange(0.0, DAY_S + 1, 300.0)
    traces = {}
    for seed, endpoint in enumerate(("e0", "e1")):
        trace = simulate(truth, poisson_arrivals(diurnal(rate), 1.9 * rate, until_s=DAY_S, seed=seed))
        await add_readings(storage, endpoint, times, trace.counter(times))
        await add_calls(storage, endpoint, trace.calls)
        traces[endpoint] = trace
    curves: dict[str, EndpointCurve] = {}
    for until_s in range(3_600, int(DAY_S) + 1, 3_600):
        # Another process settles every hour; one endpoint lags behind the other.
        found = await Settling(storage).until(e0=until_s, e1=until_s - 1_000.0)
        curves |= {one.endpoint: one for one in found}
    await Settling(storage).until(e1=DAY_S)
    for curve in curves.values():
        assert curve.identifiable, curve.reason
        assert curve.pool == "p"
        for name in ("idle_w", "step_j", "token_j", "step_s", "token_s"):
            assert getattr(curve, name) == pytest.approx(getattr(truth, name), rel=0.05), name
            assert 0 < curve.standard_errors[name] < 0.1 * getattr(truth, name)
    (sums,) = await storage.pool.fetch(SUMS)
    counted_j = sum(trace.counter(times)[-1] for trace in traces.values())
    assert sums["metered_j"] == pytest.approx(counted_j, rel=1e-9)
    assert sums["calls_j"] + sums["rest_j"] == pytest.approx(counted_j, rel=1e-9)
    assert sums["server_s"] + sums["idle_s"] == pytest.approx(2 * DAY_S, rel=1e-9)
    assert sums["length_s"] == pytest.approx(2 * DAY_S, rel=1e-12)
    wrong = await storage.pool.fetchval(
        "SELECT count(*) FROM settled_calls WHERE abs(embodied_g - server_s * $1) > 1e-9", POOL.embodied_g_per_s
    )
    assert wrong == 0


async def test_broken_meters_are_named_and_their_calls_are_partial(storage):
    await add_readings(storage, "e0", range(0, 101, 10), [0, 500, *[1_000] * 7, 1_500, 2_000])
    await add_readings(storage, "e1", range(0, 101, 10), [0, 500, 1_000, 1_500, *range(100, 3_600, 500)])
    calls = [Call(f"c{n}", 10.0 * n + 1, None, 10.0 * n + 9, 5, 20) for n in range(10)]
    for endpoint in ("e0", "e1"):
        await add_calls(storage, endpoint, calls)
    process = Settling(storage, meter_stall_s=30.0)
    await process.until(e0=60, e1=40)
    problem = process.settlement.meter_problem()
    assert "endpoint e0 stands still while tokens are generated" in problem
    assert "endpoint e1 was reset" in problem
    await process.until(e0=100, e1=100)
    assert process.settlement.meter_problem() is None
    rows = await storage.pool.fetch("SELECT id, partial, energy_j FROM settled_calls WHERE NOT partial")
    assert {row["id"] for row in rows} == {
        *(f"e0-c{n}" for n in (0, 1, 8, 9)),
        *(f"e1-c{n}" for n in range(10) if n != 3),
    }
    assert min(row["energy_j"] for row in rows) > 0
    assert process.value("sprout_ledger_meter_stalls_total", endpoint="e0") == 6
    assert process.value("sprout_ledger_counter_restarts_total", endpoint="e1") == 1


async def test_rows_of_an_earlier_version_are_charged_for_their_whole_time(storage):
    await add_readings(storage, "e0", range(0, 41, 10), range(0, 2_001, 500))
    await add_calls(storage, "e0", [Call("old", 5.0, None, 15.0, 5, 20), Call("new", 12.0, None, 18.0, 5, 20)])
    process = Settling(storage)
    await process.until(e0=10)
    await storage.pool.execute("UPDATE open_calls SET server_s = NULL WHERE id = 'e0-old'")
    await process.until(e0=40)
    rows = await storage.pool.fetch("SELECT id, server_s, embodied_g FROM settled_calls ORDER BY id")
    found = {row["id"]: (row["server_s"], row["embodied_g"]) for row in rows}
    assert found["e0-old"] == (None, pytest.approx(10 * POOL.embodied_g_per_s))
    assert found["e0-new"] == (pytest.approx(4.5), pytest.approx(4.5 * POOL.embodied_g_per_s))


async def test_the_state_of_a_curve_is_small(storage):
    await add_readings(storage, "e0", range(0, 41, 10), range(0, 2_001, 500))
    await Settling(storage).until(e0=40)
    state = await storage.pool.fetchval("SELECT state FROM curves")
    assert len(state) < 3_000
    assert json.loads(state)["at_s"] == (START + timedelta(seconds=40)).timestamp()


async def test_many_calls_between_two_readings_are_settled_in_chunks_and_get_the_same(database):
    """As after an outage: nobody read the meter for an hour, in which 3,000 calls ran."""
    random = np.random.default_rng(1)
    starts = np.sort(random.uniform(100.0, 3_700.0, 3_000))
    calls = [
        Call(f"{n}", float(at), float(at + 0.3), float(at + random.uniform(1, 60)), 20, int(random.integers(2, 400)))
        for n, at in enumerate(starts.round(6))
    ]
    shares = []
    fleet = FLEET.model_copy(update={"pools": (POOL.model_copy(update={"idle_power_w": 0.5}),)})
    for most in (100, 100_000):
        async with ledger_in(database, f"ledger{most}") as storage:
            await add_readings(storage, "e0", (0, 100, 3_600, 3_700, 4_000), (0, 50, 1.5e6, 1.6e6, 1.7e6))
            await add_calls(storage, "e0", calls)
            process = Settling(storage, fleet, chunk_calls=most)
            await process.until(e0=3_900)
            await process.until(e0=4_000)
            (sums,) = await storage.pool.fetch(SUMS)
            assert sums["metered_j"] == pytest.approx(1.7e6, rel=1e-12)
            assert sums["calls_j"] + sums["rest_j"] == pytest.approx(1.7e6, rel=1e-9)
            assert sums["server_s"] + sums["idle_s"] == pytest.approx(4_000, rel=1e-9)
            rows = await storage.pool.fetch("SELECT id, energy_j, server_s, partial FROM settled_calls ORDER BY id")
            assert len(rows) == len(calls)
            assert not any(row["partial"] for row in rows)
            shares.append(np.array([(row["energy_j"], row["server_s"]) for row in rows]))
            largest = await storage.pool.fetchval("SELECT max(calls) FROM chunks")
            assert largest == len(calls) or largest <= 2 * most
            assert await storage.pool.fetchval("SELECT count(*) FROM open_calls") == 0
    np.testing.assert_allclose(shares[0], shares[1], rtol=1e-6)


async def test_a_counter_that_was_reset_while_many_calls_ran_marks_them_all(storage):
    calls = [Call(f"{n}", 100.0 + n, None, 103.0 + n, 20, 50) for n in range(1_000)]
    await add_readings(storage, "e0", (0, 100, 1_200, 1_300), (5_000, 6_000, 3_000, 3_500))
    await add_calls(storage, "e0", calls)
    await Settling(storage, chunk_calls=100).until(e0=1_300)
    (sums,) = await storage.pool.fetch(SUMS)
    assert sums["metered_j"] == pytest.approx(1_000 + 3_000 + 500)
    assert sums["calls_j"] + sums["rest_j"] == pytest.approx(4_500)
    assert await storage.pool.fetchval("SELECT bool_and(partial) FROM settled_calls")
    assert await storage.pool.fetchval("SELECT bool_and(restarted) FROM intervals WHERE calls > 0")


async def test_calls_that_start_at_one_moment_are_settled_whatever_the_size_of_a_chunk(storage):
    calls = [Call(f"{n}", 50.0, None, 60.0 + n % 7, 20, 50) for n in range(500)]
    await add_readings(storage, "e0", (0, 100), (0, 1_000))
    await add_calls(storage, "e0", calls)
    await Settling(storage, chunk_calls=100).until(e0=100)
    assert await storage.pool.fetchval("SELECT count(*) FROM settled_calls") == 500


async def test_late_calls_are_settled_in_chunks(storage):
    await add_readings(storage, "e0", range(0, 1_001, 10), range(0, 10_001, 100))
    await Settling(storage).until(e0=1_000)
    await add_calls(storage, "e0", [Call(f"{n}", 100.0 + n, None, 103.0 + n, 20, 50) for n in range(800)])
    process = Settling(storage, chunk_calls=100)
    await process.until(e0=1_000)
    (sums,) = await storage.pool.fetch(SUMS)
    assert sums["calls_j"] + sums["rest_j"] == pytest.approx(10_000)
    assert await storage.pool.fetchval("SELECT count(*) FROM settled_calls") == 800
    assert process.value("sprout_ledger_late_calls_total") == 800


async def test_two_answers_of_one_record_are_one_call_and_two_records_with_one_id_are_two(storage):
    labels = Labels("request", None, "m", "g", None, None, "p", "L0", "Z", "e0", None, "policy", 1.0, ())

    def call(record: str | None, request_id: str, at_s: float) -> NewCall:
        at = START + timedelta(seconds=at_s)
        key, kept = (request_id, None) if record is None else (record, request_id)
        return NewCall(key, kept, labels, at, None, at + timedelta(seconds=5), 5, 20)

    await add_readings(storage, "e0", range(0, 101, 10), range(0, 1_001, 100))
    await storage.add_calls([call("requests/0/1/9", "same", 10), call("requests/0/2/9", "same", 20)])
    await storage.add_calls([call("requests/0/1/9", "same", 12), call(None, "plain", 30)])
    await Settling(storage).until(e0=50)
    await storage.add_calls([call("requests/0/2/9", "same", 25), call(None, "plain", 33)])
    await Settling(storage).until(e0=100)
    rows = await storage.pool.fetch("SELECT id, request_id FROM settled_calls ORDER BY id")
    assert [tuple(row) for row in rows] == [
        ("plain", None), ("requests/0/1/9", "same"), ("requests/0/2/9", "same")
    ]  # fmt: skip
    assert await storage.pool.fetchval("SELECT count(*) FROM open_calls") == 0


async def test_an_upgrade_takes_over_what_an_earlier_version_wrote_and_keeps_it_from_settling(database):
    """The earlier version still runs: it writes calls, and tries to settle."""
    async with ledger_in(database, "ledger") as storage:
        pool = storage.pool
        await add_readings(storage, "e0", range(0, 101, 10), range(0, 1_001, 100))
        for number, (settled, energy_j) in enumerate([(True, 50.0), (False, 20.0), (False, 0.0)]):
            await pool.execute(
                "INSERT INTO calls (id, purpose, model, grp, pool, level, zone, endpoint, propensity, started_at, "
                "first_token_at, finished_at, completion_tokens, energy_j, server_s, accounted_until, settled) "
                "VALUES ($1, 'request', 'm', 'g', 'p', 'L0', 'Z', 'e0', 1, $2, $2, $3, 20, $4, $5, $6, $7)",
                f"old{number}", START + timedelta(seconds=5 + 10 * number), START + timedelta(seconds=12 + 10 * number),
                energy_j, 2.0 if energy_j else None, START + timedelta(seconds=20) if energy_j else None, settled,
            )  # fmt: skip
        await pool.execute(
            "INSERT INTO footprints (request_id, purpose, model, grp, pool, level, zone, endpoint, propensity, "
            "started_at, finished_at, processing_s, completion_tokens, energy_j, embodied_g) SELECT id, purpose, "
            "model, grp, pool, level, zone, endpoint, propensity, started_at, finished_at, 7, completion_tokens, "
            "energy_j, 0.1 FROM calls WHERE settled"
        )
        await pool.execute(
            "INSERT INTO meters (endpoint, metered_from, settled_until) VALUES ('e0', $1, $2)", START,
            START + timedelta(seconds=20),
        )  # fmt: skip
        earlier = EarlierVersions(storage)
        await earlier.lock(pool)
        for name in EARLIER_LOCKS:
            assert not await pool.fetchval("SELECT pg_try_advisory_xact_lock(hashtext($1))", name)
        # The message of a call that the earlier version has already stored is read again.
        labels = Labels("request", None, "m", "g", None, None, "p", "L0", "Z", "e0", None, "policy", 1.0, ())
        at = START + timedelta(seconds=25)
        await storage.add_calls([NewCall("requests/0/7/1", "old2", labels, at, at, at + timedelta(seconds=7), 5, 20)])
        assert await earlier.adopt_calls() == 2
        await Settling(storage).until(e0=100)
        rows = {row["id"]: row["energy_j"] for row in await pool.fetch("SELECT id, energy_j FROM settled_calls")}
        assert rows.keys() == {"old1", "old2"}
        assert rows["old1"] > 20.0
        messages: list[Footprint] = []
        outbox = FootprintOutbox(Collecting(messages), storage=storage, metrics=LedgerMetrics(CollectorRegistry()))
        await outbox.publish_pending()
        await outbox.publish_pending()
        assert sorted(one.request_id for one in messages) == ["old0", "old1", "old2"]
        assert await earlier.adopt_footprints() == 1
        assert await earlier.adopt_footprints() == 0
        rollups = RollUps(storage)
        assert await rollups.add_chunks() > 0
        assert await pool.fetchval("SELECT sum(calls) FROM hourly_calls") == 3
        assert await pool.fetchval("SELECT count(*) FROM footprints") == 0
        await earlier.unlock()


class Collecting:
    """Takes the place of a publisher of batches."""

    def __init__(self, messages: list[Footprint]) -> None:
        self._messages = messages

    async def publish(self, *messages: KafkaPublishMessage, **_: object) -> None:
        self._messages += [Footprint.model_validate_json(one.body) for one in messages]


async def test_two_ledgers_settle_different_endpoints_at_once(storage):
    for endpoint in ("e0", "e1"):
        await add_readings(storage, endpoint, range(0, 101, 10), range(0, 1_001, 100))
        await add_calls(storage, endpoint, [Call(f"{n}", 10.0 * n + 1, None, 10.0 * n + 9, 5, 20) for n in range(10)])
    until = START + timedelta(seconds=100)
    async with storage.pool.acquire() as other, other.transaction():
        assert await other.fetchval(ENDPOINT_LOCK, "e0")
        await Settling(storage).until(e0=100, e1=100)
        assert await storage.pool.fetchval("SELECT array_agg(DISTINCT endpoint) FROM intervals") == ["e1"]
    found = await asyncio.gather(
        *(Settling(storage).settlement.settle_chunk("e0", until, watermark=until) for _ in range(2))
    )
    assert sorted(one.calls for one in found) == [0, 10]
    (sums,) = await storage.pool.fetch(SUMS)
    assert sums["calls_j"] + sums["rest_j"] == pytest.approx(2_000)


async def test_a_call_that_was_stored_again_while_it_was_settled_counts_once(storage):
    await add_readings(storage, "e0", range(0, 101, 10), range(0, 1_001, 100))
    await add_calls(storage, "e0", [Call("a", 11.0, None, 19.0, 5, 20), Call("b", 71.0, None, 79.0, 5, 20)])
    await Settling(storage).until(e0=50)
    await storage.pool.execute(
        "INSERT INTO open_calls (id, dimension, endpoint, started_at, finished_at, completion_tokens) "
        "SELECT id, dimension, 'e0', started_at, finished_at, 20 FROM settled_calls WHERE id = 'e0-a'"
    )
    await Settling(storage).until(e0=100)
    (sums,) = await storage.pool.fetch(SUMS)
    assert sums["calls_j"] + sums["rest_j"] == pytest.approx(1_000)
    assert await storage.pool.fetchval("SELECT count(*) FROM settled_calls") == 2
    assert await storage.pool.fetchval("SELECT count(*) FROM open_calls") == 0


async def test_a_transaction_that_waited_for_another_ones_partition_uses_it(storage):
    async def add() -> None:
        async with storage.pool.acquire() as connection, connection.transaction():
            await add_partition(connection, START)

    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    async with storage.pool.acquire() as connection, connection.transaction():
        await add_partition(connection, START)
        other = asyncio.create_task(add())
        await until(lambda: storage.pool.fetchval(waiting))
    await other
    partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'settled_calls'::regclass"
    assert await storage.pool.fetchval(partitions) == 1
