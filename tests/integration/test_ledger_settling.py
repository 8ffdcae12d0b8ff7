"""Intervals are settled in a real PostgreSQL: sums, broken meters, and a learned curve that survives a restart."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from services.ledger.attribution import Call
from services.ledger.metrics import LedgerMetrics
from services.ledger.reports import AwakeEndpoints
from services.ledger.settings import LedgerSettings
from services.ledger.settlement import IntervalSettlement
from services.ledger.sql import Storage
from shared.batch_curve import MEASURED
from shared.fleet import Directive, Endpoint, Fleet, Model, Pool
from shared.messages import EndpointCurve
from shared.runtime.clock import Clock
from shared.runtime.database import migrate, open_pool
from tests.support.batched_server import DAY_S, diurnal, poisson_arrivals, simulate

pytestmark = pytest.mark.integration

START = datetime(2024, 2, 1, tzinfo=UTC)
POOL = Pool(
    name="p",
    model="m",
    zone="Z",
    endpoints=tuple(Endpoint(name=f"e{n}", grpc=f"x:{n}", metrics=f"http://x:{n}/metrics") for n in range(2)),
)
FLEET = Fleet(directives=(Directive(level="L0"),), models=(Model(name="m", chat_template="chatml"),), pools=(POOL,))


@pytest.fixture
async def storage(database) -> AsyncIterator[Storage]:
    """An empty ledger."""
    pool = await open_pool(database, schema="ledger")
    await migrate(pool, schema="ledger", package="services.ledger.migrations")
    found = Storage()
    found.attach(pool)
    yield found
    await pool.close()


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
        return await self.settlement.run_once(latest, limits=limits, unmetered_until=latest)

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
    def iso(at_s: float) -> str:
        return (START + timedelta(seconds=at_s)).isoformat()

    await storage.add(
        "calls",
        [
            {
                "id": f"{endpoint}-{one.id}", "purpose": "request", "model": "m", "grp": "g", "pool": "p",
                "level": "L0", "zone": "Z", "endpoint": endpoint, "propensity": 1.0, "propensities": {},
                "started_at": iso(one.started_s),
                "first_token_at": None if one.first_token_s is None else iso(one.first_token_s),
                "finished_at": iso(one.finished_s), "prompt_tokens": one.prompt_tokens,
                "completion_tokens": one.completion_tokens,
            }
            for one in calls
        ],
    )  # fmt: skip


SUMS = """
SELECT (SELECT sum(metered_j) FROM intervals) AS metered_j,
       (SELECT sum(idle_j + unattributed_j) FROM intervals) AS rest_j,
       (SELECT sum(energy_j) FROM calls) AS calls_j, (SELECT sum(server_s) FROM calls) AS server_s,
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
        "SELECT count(*) FROM footprints WHERE abs(embodied_g - server_s * $1) > 1e-9", POOL.embodied_g_per_s
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
    rows = await storage.pool.fetch("SELECT request_id, partial, energy_j FROM footprints WHERE NOT partial")
    assert {row["request_id"] for row in rows} == {
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
    await storage.pool.execute("UPDATE calls SET server_s = NULL WHERE id = 'e0-old'")
    await process.until(e0=40)
    rows = await storage.pool.fetch("SELECT request_id, server_s, embodied_g FROM footprints ORDER BY request_id")
    found = {row["request_id"]: (row["server_s"], row["embodied_g"]) for row in rows}
    assert found["e0-old"] == (None, pytest.approx(10 * POOL.embodied_g_per_s))
    assert found["e0-new"] == (pytest.approx(4.5), pytest.approx(4.5 * POOL.embodied_g_per_s))


async def test_the_state_of_a_curve_is_small(storage):
    await add_readings(storage, "e0", range(0, 41, 10), range(0, 2_001, 500))
    await Settling(storage).until(e0=40)
    state = await storage.pool.fetchval("SELECT state FROM curves")
    assert len(state) < 3_000
    assert json.loads(state)["at_s"] == (START + timedelta(seconds=40)).timestamp()
