"""Endpoints that a pool needs, now and later, and which ones are awake."""

import asyncio
import json
import math
import tomllib
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from services.optimizer.capacity import ArrivalProfile, CapacityPlanner, plan_changed
from services.optimizer.capacity_service import CapacityService
from services.optimizer.loads import LoadReports, PoolDemand
from services.optimizer.metrics import OptimizerMetrics
from services.optimizer.prices import PoolPrices
from services.optimizer.settings import OptimizerSettings
from shared.batch_curve import MEASURED
from shared.fleet import Fleet
from shared.messages import EndpointCurve, EndpointLoad, LoadReport, PoolCapacity, PoolLoad
from shared.runtime.clock import ManualClock
from shared.runtime.database import DatabaseUnavailableError
from shared.switchback import SwitchbackSchedule
from tests.support.fleets import fleet_toml

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
CURVE = MEASURED["qwen3-14b-h100"]
NAMES = ("e0", "e1", "e2", "e3")
SETTINGS = OptimizerSettings()


def fleet(*, switchback: dict[str, Any] | None = None, **pool: Any) -> Fleet:
    """A pool `p` of four endpoints that sleep, 10 requests each."""
    document = tomllib.loads(fleet_toml([f"h:{n}" for n in range(1, 5)]))
    document["pools"][0] |= {"dispatch": "pack", "target_batch": 10, "sleep": True} | pool
    document["pools"][0] = {name: value for name, value in document["pools"][0].items() if value is not None}
    if switchback is not None:
        document["switchback"] = switchback
    return Fleet.model_validate(document)


class Planned:
    """A planner on a clock of its own."""

    def __init__(self, of: Fleet | None = None, *, event_per_wall: float = 1.0, **settings: Any) -> None:
        self.fleet = of or fleet()
        self.prices = PoolPrices(self.fleet)
        made = OptimizerSettings(**({"capacity_margin": 0.0} | settings))
        self.planner = CapacityPlanner(self.fleet, made, event_per_wall=event_per_wall)
        self.now = NOON

    def __call__(self, in_flight: int, *, rate: float = 0.0, after_s: float = 1.0, waiting: int = 0, **running: int):
        """The plan after some event seconds."""
        self.now += timedelta(seconds=after_s)
        (plan,) = self.planner.plan({"p": PoolDemand(rate, in_flight, waiting, running)}, self.prices, self.now)
        return plan

    def learn(self, **more: Any) -> None:
        self.prices.update_curves([curve_of("e0", **more)])


def curve_of(endpoint: str, **more: Any) -> EndpointCurve:
    made = {
        "idle_w": CURVE.idle_w, "step_j": CURVE.step_j, "token_j": CURVE.token_j, "step_s": CURVE.step_s,
        "token_s": CURVE.token_s, "identifiable": True, "intervals": 100, "mean_batch": 8.0,
    }  # fmt: skip
    return EndpointCurve(endpoint=endpoint, pool="p", at=NOON, **(made | more))


def report(
    instance: str = "r1", *, service: str = "router", at: datetime = NOON, arrivals: int = 0, waiting: int = 0,
    in_flight: dict[str, int] | None = None, **more: Any,
) -> LoadReport:  # fmt: skip
    running = dict.fromkeys(NAMES, 0) | (in_flight or {})
    endpoints = {name: EndpointLoad(in_flight=number) for name, number in running.items()}
    load = PoolLoad(pool="p", arrivals=arrivals, waiting=waiting, endpoints=endpoints)
    return LoadReport(instance=instance, service=service, at=at, interval_s=2.0, share=1.0, pools=(load,), **more)


# Load reports


def known(*reports: LoadReport) -> LoadReports:
    """Reports that were received at once, after which every instance has had time to report."""
    found = LoadReports(expiry_s=5.0)
    found.update(report("old"), wall_s=-5.0)
    assert found.demand(wall_s=-5.0) is None
    for one in reports:
        found.update(one, wall_s=0.0)
    return found


def test_the_demand_is_that_of_all_instances_together():
    found = known(
        report("r1", arrivals=4, waiting=2, in_flight={"e0": 3}),
        report("r2", arrivals=2, in_flight={"e0": 1, "e2": 1}),
        report("ev", service="evaluator", arrivals=1, in_flight={"e0": 2}),
    )
    demand = found.demand(wall_s=0.5)["p"]
    running, evaluation = {"e0": 6, "e1": 0, "e2": 1, "e3": 0}, {"e0": 2, "e1": 0, "e2": 0, "e3": 0}
    assert demand == PoolDemand(pytest.approx(3.5), 9, waiting=2, running=running, evaluation=evaluation)


def test_arrivals_are_counted_once_and_a_late_report_keeps_the_last_rate():
    found = known(report("r1", arrivals=4), report("r1", arrivals=8, at=NOON + timedelta(seconds=2)))
    assert found.demand(wall_s=1.0)["p"].arrivals_per_s == pytest.approx(3.0)
    assert found.demand(wall_s=2.0)["p"].arrivals_per_s == pytest.approx(3.0)
    found.update(report("r1", arrivals=0, at=NOON + timedelta(seconds=4)), wall_s=2.5)
    found.update(report("r1", arrivals=99, at=NOON), wall_s=2.5)  # delivered late
    assert found.demand(wall_s=3.0)["p"].arrivals_per_s == 0.0


def test_an_instance_that_stops_or_is_silent_is_not_counted():
    found = known(report("r1", in_flight={"e0": 3}), report("r2", in_flight={"e1": 4}))
    found.update(report("r2", at=NOON + timedelta(seconds=2), final=True), wall_s=1.0)
    assert found.demand(wall_s=1.0)["p"].in_flight == 3
    found.update(report("ev", service="evaluator", in_flight={"e1": 1}), wall_s=4.0)
    assert found.demand(wall_s=5.5) is None  # the evaluator alone says nothing about the traffic


def test_nothing_is_known_until_every_instance_had_time_to_report():
    found = LoadReports(expiry_s=5.0)
    assert found.demand(wall_s=0.0) is None
    found.update(report("r1"), wall_s=1.0)
    assert found.demand(wall_s=1.0) is None
    found.update(report("r1", at=NOON + timedelta(seconds=4)), wall_s=5.0)
    assert found.demand(wall_s=5.9) is None
    assert found.demand(wall_s=6.0) is not None


# Endpoints needed now


def test_it_takes_the_fewest_endpoints_whose_targets_carry_the_requests_and_the_margin():
    plan = Planned()
    assert [plan(n).endpoints_needed for n in (0, 1, 10, 11, 40, 99)] == [1, 1, 1, 2, 4, 4]
    assert Planned(fleet(min_awake=2))(0).endpoints_needed == 2
    careful = Planned(capacity_margin=2.0)
    assert [careful(n).endpoints_needed for n in (5, 9, 16)] == [1, 2, 3]  # 9 and 2 * 3 are more than 10


def test_endpoints_wake_at_once_and_sleep_after_the_dwell_time():
    plan = Planned(capacity_dwell_min=10.0)
    assert plan(5).awake == ("e0",)
    assert plan(25).awake == ("e0", "e1", "e2")
    awake = [len(plan(5, after_s=60.0).awake) for _ in range(12)]
    assert awake == [3] * 10 + [1] * 2
    # Demand that goes up and down within the dwell time neither wakes nor empties an endpoint by turns.
    assert {len(plan(n, after_s=60.0).awake) for n in (15, 5, 5, 15, 5, 15, 5, 5)} == {2}


def test_times_last_some_wall_seconds_in_a_replay():
    plan = Planned(event_per_wall=720.0, capacity_dwell_min=10.0, capacity_shortest_s=2.0)
    assert len(plan(25).awake) == 3
    assert [len(plan(5, after_s=720.0).awake) for _ in range(4)] == [3, 3, 1, 1]
    assert plan(5).valid_until - plan.now == timedelta(seconds=15 * 720)


def test_endpoints_in_use_when_the_optimizer_starts_stay_awake_for_the_dwell_time():
    plan = Planned(capacity_dwell_min=10.0)
    assert len(plan(5, e0=4, e2=1).awake) == 3
    assert len(plan(5, after_s=700.0).awake) == 1


def test_an_endpoint_that_gets_no_requests_is_replaced_until_it_does():
    plan = Planned(wake_lead_s=60.0, capacity_dwell_min=1.0)
    plan(15, e0=10, e1=5)
    # e0 fails: e1 takes everything, and more than its target.
    awake = [len(plan(15, e1=15, after_s=30.0).awake) for _ in range(4)]
    assert awake == [2, 2, 3, 3]
    for _ in range(10):
        found = plan(15, e1=10, e2=5, after_s=60.0)
    assert found.awake == ("e0", "e1", "e2")
    assert found.reason.endswith("without e0, which gets no requests")
    # With little to do the others still take its place; once it serves again, it is the only one.
    assert plan(3, e1=3, after_s=300.0).awake == ("e0", "e1")
    plan(3, e0=1, e1=2, after_s=60.0)
    assert plan(3, e0=3, after_s=120.0).awake == ("e0",)


def test_if_requests_wait_while_the_only_awake_endpoint_is_idle_the_next_one_wakes():
    plan = Planned(wake_lead_s=60.0, capacity_dwell_min=1.0)
    plan(3, e0=3)
    found = [plan(4, waiting=4, after_s=30.0).awake for _ in range(3)]
    assert found == [("e0",), ("e0",), ("e0", "e1")]
    # If that one fails as well, another wakes.
    assert [len(plan(4, waiting=4, after_s=30.0).awake) for _ in range(3)] == [2, 2, 3]


def test_an_idle_endpoint_that_nobody_needs_is_not_replaced():
    plan = Planned(wake_lead_s=60.0)
    plan(25, e0=10, e1=10, e2=5)
    for _ in range(9):
        assert len(plan(5, e0=5, after_s=60.0).awake) == 3


def test_a_pool_that_does_not_sleep_is_awake_and_still_says_what_it_needs():
    plan = Planned(fleet(sleep=False))(5)
    assert (plan.endpoints_needed, plan.awake) == (1, NAMES)
    assert "do not sleep" in plan.reason


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        ({"target_batch": None, "tpot_objective_ms": 20.0}, "no power curve of its endpoints is known yet"),
        ({"target_batch": None, "dispatch": "spread"}, "no target_batch and no latency objective"),
    ],
)
def test_without_a_target_every_endpoint_is_needed_and_the_reason_is_named(pool, reason):
    plan = Planned(fleet(**pool))(5)
    assert (plan.target_batch, plan.endpoints_needed, plan.awake) == (None, 4, NAMES)
    assert plan.reason == f"all, because the target batch is unknown: {reason}"


def test_the_target_follows_from_the_learned_curve_and_an_impossible_objective_is_named():
    plan = Planned(fleet(target_batch=None, tpot_objective_ms=1_000.0 * CURVE.step_time_s(30)))
    plan.learn()
    assert (plan(31).target_batch, len(plan(31).awake)) == (30, 2)
    hopeless = Planned(fleet(target_batch=None, tpot_objective_ms=5.0))
    hopeless.learn()
    found = hopeless(3)
    assert (found.target_batch, found.endpoints_needed) == (1, 3)
    assert found.reason.endswith("no batch keeps tpot_objective_ms = 5: a step takes 12 ms for one sequence")


# Switchback


@pytest.mark.parametrize("sleep", [False, True])
def test_in_a_reference_block_and_a_little_before_all_are_awake(sleep):
    of = fleet(switchback={"share": 0.1, "block_s": 1_800.0, "sleep": sleep})
    schedule = SwitchbackSchedule(of.switchback)
    start = schedule.next_change(NOON)
    if schedule.is_reference(NOON):
        start = schedule.next_change(start)
    plan = Planned(of, wake_lead_s=300.0, capacity_dwell_min=1.0)

    def awake(at: datetime) -> int:
        plan.now = at
        return len(plan(5, after_s=0.0).awake)

    minutes = (-10, -6, -4, 1, 29, 31)
    found = [awake(start + timedelta(minutes=minute)) for minute in minutes]
    assert found == ([1] * 6 if sleep else [1, 1, 4, 4, 4, 1])


# Forecast


def day(plan: Planned, rates: dict[int, float], *, seconds: float = 100.0, step_s: float = 300.0) -> PoolCapacity:
    """A day with given arrivals per second by hour; requests take `seconds`."""
    for _ in range(int(86_400 / step_s)):
        rate = rates.get((plan.now + timedelta(seconds=step_s)).hour, 0.05)
        made = plan(round(rate * seconds), rate=rate, after_s=step_s)
    return made


def test_on_the_first_day_the_forecast_is_flat():
    plan = Planned(forecast_h=4)
    for _ in range(20):
        found = plan(15, rate=0.15, after_s=60.0)
    assert [one.endpoints_needed for one in found.forecast] == [2] * 4
    assert [one.at - plan.now for one in found.forecast] == [timedelta(hours=hour) for hour in range(1, 5)]


def test_the_forecast_follows_the_hours_of_earlier_days_at_the_present_level():
    plan = Planned(forecast_h=6)
    rates = dict.fromkeys((14, 15, 16), 0.25)
    day(plan, rates)
    found = day(plan, rates)
    assert found.at.hour == 12
    # At 13, 14, ... 18 o'clock: between the middles of two hours it is linear.
    assert [one.endpoints_needed for one in found.forecast] == [1, 2, 3, 3, 2, 1]
    for _ in range(12):
        busy = plan(10, rate=0.10, after_s=120.0)  # twice as many as usual
    assert max(one.endpoints_needed for one in busy.forecast) == 4


def test_endpoints_are_awake_before_the_forecast_needs_them():
    plan = Planned(wake_lead_s=3_600.0)
    rates = dict.fromkeys((13, 14), 0.35)
    day(plan, rates)
    found = day(plan, rates)
    assert found.endpoints_needed == 1
    assert len(found.awake) >= 2
    assert "needed soon" in found.reason


def test_answers_of_reference_blocks_do_not_change_the_time_in_flight():
    of = fleet(switchback={"share": 0.5, "block_s": 1_800.0, "washout_s": 0.0})
    schedule = SwitchbackSchedule(of.switchback)
    plan = Planned(of, forecast_h=1)
    for _ in range(200):
        long = schedule.is_reference(plan.now + timedelta(seconds=60))
        plan(30 if long else 5, rate=0.1, after_s=60.0)
    while schedule.is_reference(plan.now):
        plan.now += timedelta(minutes=1)
    for _ in range(20):
        found = plan(5, rate=0.1, after_s=60.0)
    assert found.forecast[0].endpoints_needed == 1


def test_the_arrivals_by_hour_of_day_can_be_stored_and_decay():
    made = ArrivalProfile(half_life_s=86_400.0)
    made.add(1.0, seconds=3_000.0, at=NOON + timedelta(minutes=30))
    again = ArrivalProfile(half_life_s=86_400.0)
    again.load_document(json.loads(json.dumps(made.to_document())))
    assert again.rate(NOON + timedelta(minutes=30)) == pytest.approx(1.0)
    assert again.rate(NOON - timedelta(hours=2)) is None
    again.add(3.0, seconds=3_000.0, at=NOON + timedelta(days=1, minutes=30))
    assert again.rate(NOON + timedelta(days=1, minutes=30)) == pytest.approx(7.0 / 3.0)
    assert again.rate(NOON + timedelta(days=9)) is None  # hardly anything is left


def test_profiles_of_pools_that_are_gone_are_ignored():
    planner = CapacityPlanner(fleet(), SETTINGS)
    planner.restore_profiles({"gone": {}, "p": {"12": [NOON.timestamp(), 600.0, 3_600.0]}})
    assert planner.profiles() == {"p": {"12": [NOON.timestamp(), 600.0, 3_600.0]}}


# Publication


def test_a_plan_is_published_if_it_changed_or_is_half_through_its_validity():
    plan = Planned()
    first = plan(5)
    assert plan_changed(None, first)
    assert not plan_changed(first, plan(6))
    assert plan_changed(first, plan(15))
    plan = Planned()
    assert plan_changed(plan(5), plan(5, after_s=301.0))


@pytest.fixture
def service():
    """A capacity service on a manual clock, and what it published."""
    sent: list[PoolCapacity] = []

    async def publish(plan: PoolCapacity) -> None:
        sent.append(plan)

    registry, of, clock = CollectorRegistry(), fleet(), ManualClock(NOON)
    settings, prices = OptimizerSettings(load_expiry_s=0.05), PoolPrices(of)
    made = CapacityService(
        CapacityPlanner(of, settings),
        prices,
        publish,
        is_leader=lambda: True,
        settings=settings,
        clock=clock,
        metrics=OptimizerMetrics(registry),
    )
    return made, sent, prices, clock, registry


async def test_nothing_is_published_without_a_live_router(service, monkeypatch):
    made, sent, prices, clock, registry = service
    wall = [100.0]
    monkeypatch.setattr("services.optimizer.capacity_service.time.monotonic", lambda: wall[0])

    async def plan(*reports: LoadReport, after_s: float = 0.04) -> None:
        wall[0] += after_s
        clock.advance(timedelta(seconds=60))
        made.add_load_reports(reports)
        await made.plan_once()

    def metric(name: str) -> float | None:
        return registry.get_sample_value(f"sprout_pool_{name}", {"pool": "p"})

    await plan()
    await plan(report("ev", service="evaluator"))
    assert (sent, prices.load) == ([], {})
    for _ in range(3):
        await plan(report("r1", at=clock.now(), in_flight={"e0": 6}))
    (found,) = sent
    assert (found.awake, found.in_flight) == (("e0", "e1"), 6)  # with a margin of 2 * sqrt(6)
    assert prices.load == {"p": pytest.approx(3.0)}
    assert (metric("endpoints_needed"), metric("endpoints_awake"), metric("target_batch")) == (2.0, 2.0, 10.0)
    await plan(after_s=1.0)
    assert (len(sent), prices.load) == (1, {})
    assert metric("endpoints_awake") == 2.0  # what was published is still valid
    for _ in range(10):
        await plan(after_s=1.0)
    assert metric("endpoints_awake") == 4.0
    assert math.isnan(metric("endpoints_needed"))


async def test_without_postgresql_the_arrivals_are_stored_later(service, monkeypatch):
    made, *_ = service
    monkeypatch.setattr("services.optimizer.capacity_service._SHORTEST_STORE_INTERVAL_S", 0.001)
    monkeypatch.setattr("services.optimizer.capacity_service._STORE_INTERVAL_S", 0.001)
    stored = asyncio.Event()
    outcomes = iter([DatabaseUnavailableError("PostgreSQL is unavailable"), None])

    class FailingStore:
        async def put_arrival_profiles(self, profiles: dict[str, Any]) -> None:
            assert profiles == {"p": {}}
            if (error := next(outcomes)) is not None:
                raise error
            stored.set()
            await asyncio.sleep(60.0)

    task = asyncio.create_task(made.store_profiles(FailingStore()))
    async with asyncio.timeout(5.0):
        await stored.wait()
    task.cancel()


@pytest.mark.statistical
def test_over_a_day_of_random_arrivals_the_awake_endpoints_carry_the_load_and_seldom_change():
    plan = Planned(fleet(target_batch=16), capacity_margin=2.0)
    rng = np.random.default_rng(1)
    ends, now_s, step_s = np.zeros(0), 0.0, 30.0
    overloaded, awake, ideal = 0, [], []
    while now_s < 86_400.0:
        rate = 0.09 - 0.07 * math.cos((now_s / 3_600.0 + 9.0) / 24.0 * 2.0 * math.pi)
        number = rng.poisson(rate * step_s)
        started = now_s + rng.uniform(0.0, step_s, number)
        now_s += step_s
        ends = np.concatenate([ends, started + rng.exponential(300.0, number)])
        ends = ends[ends > now_s]
        awake.append(len(plan(len(ends), rate=number / step_s, after_s=step_s).awake))
        ideal.append(min(4, max(1, math.ceil(len(ends) / 16))))
        overloaded += len(ends) > 16 * awake[-1] and awake[-1] < 4
    assert overloaded == 0
    assert np.mean(awake) < np.mean(ideal) + 1.0
    assert np.count_nonzero(np.diff(awake)) < 60


def test_a_plan_has_the_calls_of_evaluators_for_which_routers_leave_room():
    planned = Planned()
    demand = PoolDemand(0.0, 15, running={"e0": 15}, evaluation={"e0": 5, "e1": 0})
    (plan,) = planned.planner.plan({"p": demand}, planned.prices, NOON)
    assert plan.reserved == {"e0": 8}
    same = plan.model_copy(update={"at": NOON + timedelta(seconds=1)})
    assert not plan_changed(plan, same)
    assert plan_changed(plan, same.model_copy(update={"reserved": {}}))
