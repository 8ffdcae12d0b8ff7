"""Pools of a process: targets from learned curves, sleeping endpoints, reference blocks, load reports."""

import asyncio
import tomllib
from datetime import UTC, datetime, timedelta

import pytest
from faststream.kafka import TestKafkaBroker
from prometheus_client import CollectorRegistry

from shared.batch_curve import MEASURED, BatchCurve
from shared.fleet import Fleet
from shared.inference.balancer import CircuitBreakerSettings
from shared.inference.base import EndpointUnavailable
from shared.inference.load_reports import LoadReporter
from shared.inference.pool import CLIENTS
from shared.inference.pools import Pools
from shared.kafka.broker import build_broker
from shared.messages import EndpointCurve, LoadReport, PoolCapacity
from shared.runtime.clock import ManualClock
from shared.runtime.settings import KafkaSettings
from shared.switchback import SwitchbackSchedule
from shared.topics import LOAD_REPORTS
from tests.support.deadlines import DEADLINE_S
from tests.support.fleets import fleet_toml

NOW = datetime(2024, 2, 3, 12, tzinfo=UTC)
CURVE = MEASURED["qwen3-14b-h100"]
NAMES = ("e0", "e1", "e2")


class FakeClient:
    """A client whose health check fails while its endpoint's name is in `down`."""

    def __init__(self, name: str, down: set[str]) -> None:
        self.name = name
        self.down = down
        self.checks = 0

    async def probe(self, **_):
        self.checks += 1
        if self.name in self.down:
            raise EndpointUnavailable(f"{self.name}: down")

    async def is_ready(self, **_):
        return True

    async def close(self):
        return


class Fixture:
    """A pool of three endpoints, and on request one of another model."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        pool: dict | None = None,
        switchback: dict | None = None,
        other_model: bool = False,
    ):
        self.down: set[str] = set()
        document = tomllib.loads(fleet_toml([f"h:{number}" for number in range(len(NAMES))]))
        document["pools"][0] |= {"dispatch": "pack", "target_batch": 4, "sleep": True} | (pool or {})
        document["switchback"] |= switchback or {}
        if other_model:
            document["models"].append({"name": "n", "chat_template": "llama-2"})
            endpoint = {"name": "f0", "grpc": "h:9"}
            document["pools"].append({"name": "q", "model": "n", "zone": "GB", "endpoints": [endpoint]})
        self.fleet = Fleet.model_validate(document)
        self.clock = ManualClock(NOW)
        self.failures: list[str] = []
        # Another kind of inference server is one entry.
        monkeypatch.setitem(CLIENTS, "triton", lambda _, endpoint, **__: FakeClient(endpoint.name, self.down))
        self.pools = Pools(
            self.fleet,
            clock=self.clock,
            circuit_breaker=CircuitBreakerSettings(circuit_failures=2),
            on_failure=self.failures.append,
            check_interval_s=1.0,
            check_timeout_s=1.0,
            beside_evaluators=True,
        )
        self.pool = self.pools["p"]

    def sent(self, count: int) -> list[str]:
        """Where so many requests go; they stay in flight."""
        names = []
        for _ in range(count):
            name = self.pool.choose(avoid=set())
            assert name is not None
            self.pool.lease(name, self.clock.now()).__enter__()
            names.append(name)
        return names

    def capacity(self, *awake: str, valid_s: float = 60.0, reserved: dict[str, int] | None = None) -> None:
        now = self.clock.now()
        self.pools.update_capacity(
            PoolCapacity(
                pool="p", at=now, valid_until=now + timedelta(seconds=valid_s), requests_per_s=1, in_flight=1,
                endpoints=3, endpoints_needed=len(awake), awake=awake, reason="test",
                reserved=reserved or {},
            )
        )  # fmt: skip

    async def check(self, *, every: bool = True) -> None:
        await self.pool.check(timeout_s=1.0, every=every)


@pytest.fixture
def make(monkeypatch):
    return lambda **options: Fixture(monkeypatch, **options)


def learned(endpoint: str = "e0", *, curve: BatchCurve = CURVE, identifiable: bool = True) -> EndpointCurve:
    return EndpointCurve(
        endpoint=endpoint, pool="p", at=NOW, idle_w=curve.idle_w, step_j=curve.step_j, token_j=curve.token_j,
        step_s=curve.step_s, token_s=curve.token_s, identifiable=identifiable, intervals=50, mean_batch=20,
    )  # fmt: skip


OBJECTIVE = {"target_batch": None, "tpot_objective_ms": 1e3 * CURVE.step_time_s(32)}


async def test_a_target_follows_from_the_objective_and_the_learned_curve(make):
    fixture = make(pool=OBJECTIVE)
    assert len(set(fixture.sent(3))) == 3
    fixture.pools.update_curve(learned(identifiable=False))
    assert fixture.pool.targets.by_endpoint == {}
    fixture.pools.update_curve(learned())
    # Endpoints without a curve of their own are assumed to be like the others.
    assert fixture.pool.targets.by_endpoint == dict.fromkeys(NAMES, 32)
    assert fixture.sent(31) == ["e0"] * 31
    fixture.pools.update_curve(learned("e1", curve=CURVE.stretched(1.02)))
    targets = fixture.pool.targets.by_endpoint
    assert targets["e0"] == 32
    assert targets["e1"] < targets["e2"] < 32
    # At a constant batch a curve stops being identifiable; the last good one counts.
    fixture.pools.update_curve(learned(identifiable=False))
    assert fixture.pool.targets.by_endpoint == targets


async def test_unknown_targets_and_an_objective_that_no_batch_keeps_are_logged_once(make, capsys):
    fixture = make(pool=OBJECTIVE | {"tpot_objective_ms": 1.0})
    fixture.pool.arrived()
    for _ in range(2):
        fixture.pools.set_share(1.0)
    for _ in range(2):
        fixture.pools.update_curve(learned())
    assert fixture.pool.targets.by_endpoint == dict.fromkeys(NAMES, 1)
    log = "".join(capsys.readouterr())
    assert log.count("requests are spread until the target batch is known") == 1
    assert log.count("no batch keeps the latency objectives") == 1


async def test_a_process_fills_its_share_of_the_target(make):
    fixture = make(pool={"target_batch": 12})
    fixture.pools.set_share(1.0)
    assert fixture.sent(12) == ["e0"] * 12
    other = make(pool={"target_batch": 12})
    other.pools.set_share(0.25)
    assert Fixture.sent(other, 3) == ["e0"] * 3


async def test_requests_leave_room_for_the_calls_of_evaluators(make):
    fixture = make(pool={"target_batch": 4})
    fixture.capacity("e0", "e1", "e2", reserved={"e0": 3})
    sent = fixture.sent(5)
    assert sent.count("e0") == 1
    assert sent.count("e1") == 4
    expired = make(pool={"target_batch": 4})
    expired.capacity("e0", "e1", "e2", valid_s=-1.0, reserved={"e0": 3})
    assert expired.sent(3) == ["e0"] * 3


async def test_in_a_reference_block_dispatch_is_the_configured_one(make):
    fixture = make(switchback={"share": 0.5, "block_s": 600, "washout_s": 60})
    schedule = SwitchbackSchedule(fixture.fleet.switchback)
    for _ in range(12):
        # Nothing has applied the change: a busy process is asked before its timer has fired.
        block = fixture.pools.reference_block()
        assert block == schedule.is_reference(fixture.clock.now())
        assert fixture.pool.balancer.dispatch == ("spread" if block else "pack")
        fixture.clock.advance(timedelta(seconds=600))


async def test_sleeping_endpoints_are_neither_used_nor_checked_and_do_not_fail(make):
    fixture = make()
    await fixture.check()
    fixture.down |= {"e1", "e2"}
    fixture.capacity("e0")
    for _ in range(3):
        await fixture.check()
    assert fixture.sent(9) == ["e0"] * 9
    assert [client.checks for client in fixture.pool.clients.values()] == [4, 1, 1]
    fixture.pool.failed("e1", "the model was unloaded")
    assert fixture.failures == []
    assert fixture.pools.unreachable() is None


async def test_a_woken_endpoint_is_used_after_its_health_check(make):
    fixture = make()
    await fixture.check()
    fixture.down |= {"e0", "e1"}
    fixture.capacity("e2")
    fixture.capacity("e0", "e2")
    for _ in range(5):
        await fixture.check(every=False)
    assert fixture.sent(2) == ["e2"] * 2
    assert fixture.failures == []
    fixture.down.clear()
    await fixture.check(every=False)
    assert fixture.sent(1) == ["e0"]


async def test_after_a_capacity_message_has_expired_all_endpoints_are_to_be_awake(make):
    fixture = make()
    await fixture.check()
    fixture.capacity("e0", valid_s=60)
    fixture.clock.advance(timedelta(seconds=61))
    fixture.pools.set_share(1.0)
    await fixture.check(every=False)
    assert fixture.sent(5) == ["e0"] * 4 + ["e1"]


async def test_endpoints_of_a_pool_without_sleep_stay_in_use(make):
    fixture = make(pool={"sleep": False})
    fixture.capacity("e1")
    assert fixture.sent(1) == ["e0"]


async def test_it_is_said_how_many_endpoints_fail_and_sleep(make, capsys):
    fixture = make()
    fixture.down |= set(NAMES)
    fixture.capacity("e0")
    await fixture.check()
    reason = "all endpoints of pool p that are awake fail; 2 are asleep"
    assert fixture.pools.unreachable() == f"no endpoint answers for m: {reason}"
    await fixture.check()
    assert "".join(capsys.readouterr()).count(reason) == 1
    fixture.capacity()
    assert "all 3 endpoints of pool p are asleep" in fixture.pools.unreachable()


async def test_a_request_waits_while_all_endpoints_sleep(make):
    fixture = make()
    fixture.capacity()
    assert fixture.pool.choose(avoid=set()) is None
    waiting = asyncio.create_task(fixture.pool.wait_for_endpoint(30.0))
    await asyncio.sleep(0)
    assert fixture.pool.load(arrivals_before=0).waiting == 1
    fixture.capacity("e1")
    await fixture.check(every=False)
    await waiting
    assert fixture.pool.choose(avoid=set()) == "e1"


async def test_a_load_report_has_arrivals_and_the_oldest_call_of_every_endpoint(make):
    fixture = make()
    kafka = KafkaSettings()
    broker, _ = build_broker(kafka, service="router", clock=fixture.clock, registry=CollectorRegistry())
    reports: list[LoadReport] = []
    reported = asyncio.Event()

    @broker.subscriber(kafka.topic(LOAD_REPORTS))
    async def on_report(report: LoadReport) -> None:
        reports.append(report)
        reported.set()

    reporter = LoadReporter(broker, fixture.pools, kafka=kafka, clock=fixture.clock, service="router", interval_s=0.01)
    fixture.pools.set_share(0.25)
    async with TestKafkaBroker(broker):
        fixture.pool.arrived()
        fixture.pool.arrived()
        fixture.clock.advance(timedelta(seconds=5))
        with fixture.pool.lease("e1", NOW), fixture.pool.lease("e1", NOW + timedelta(seconds=1)):
            running = asyncio.create_task(reporter.run())
            async with asyncio.timeout(DEADLINE_S):
                await reported.wait()
        await reporter.finish()
        await running
    assert [report.final for report in reports].index(True) == len(reports) - 1
    first, last = reports[0], reports[-1]
    assert (first.service, first.share, first.interval_s, first.final) == ("router", 0.25, 5.0, False)
    (load,) = first.pools
    assert (load.pool, load.arrivals, load.waiting) == ("p", 2, 0)
    assert set(load.endpoints) == set(NAMES)
    assert (load.endpoints["e1"].in_flight, load.endpoints["e1"].oldest_started_at) == (2, NOW)
    assert (load.endpoints["e0"].in_flight, load.endpoints["e0"].oldest_started_at) == (0, None)
    assert last.final
    assert last.instance == first.instance
    assert last.pools[0].arrivals == 0
    assert last.pools[0].endpoints["e1"].in_flight == 0


async def test_capacity_is_that_of_a_models_own_pools(make):
    endpoints = [{"name": "e0", "grpc": "h:0", "max_in_flight": 2}, {"name": "e1", "grpc": "h:1", "max_in_flight": 1}]
    fixture = make(pool={"dispatch": "spread", "target_batch": None, "endpoints": endpoints}, other_model=True)
    pools, freed = fixture.pools, []
    pools.on_capacity(lambda: freed.append(True))
    assert pools.is_limited("m")
    assert not pools.is_limited("n")  # its endpoint has no limit
    fixture.sent(2)
    assert pools.has_capacity("m")
    last = fixture.pool.choose(avoid=set())
    lease = fixture.pool.lease(last, fixture.clock.now())
    lease.__enter__()
    assert not pools.has_capacity("m")
    assert pools.has_capacity("n")
    assert freed == []
    lease.__exit__(None, None, None)
    assert freed == [True]
    assert pools.has_capacity("m")
    pools.set_share(0.5)  # targets, sleep and dispatch may have changed
    assert len(freed) == 2
