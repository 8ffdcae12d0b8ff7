"""Packing: as few endpoints as possible, in one order, without waking and emptying them by turns."""

import math
from collections import Counter

import pytest

from shared.inference.balancer import Balancer, CircuitBreakerSettings, PowerState
from tests.support.dispatch import Day, exponential, long_tailed, simulate

SETTINGS = CircuitBreakerSettings(circuit_failures=3, circuit_open_s=1.0, circuit_open_max_s=4.0)


def packing(targets: dict[str, int], *, share: float = 1.0, limit: int | None = None) -> Balancer:
    balancer = Balancer(dict.fromkeys(targets, limit), SETTINGS, dispatch="pack")
    balancer.set_targets(targets, share=share)
    return balancer


def send(balancer: Balancer, count: int, now_s: float = 0.0) -> Counter[str]:
    """Send requests; returns how many went where."""
    sent: Counter[str] = Counter()
    for _ in range(count):
        name = balancer.choose(now_s)
        assert name is not None
        balancer.began(name)
        sent[name] += 1
    return sent


def end(balancer: Balancer, name: str, count: int) -> None:
    for _ in range(count):
        balancer.ended(name, probe=False)


def fail(balancer: Balancer, name: str, now_s: float = 0.0) -> None:
    for _ in range(3):
        balancer.failed(name, now_s)


def test_endpoints_are_filled_in_order_and_then_overflow_to_the_next():
    balancer = packing({"a": 10, "b": 10, "c": 10})
    assert send(balancer, 10) == {"a": 10}
    assert send(balancer, 10) == {"b": 10}
    assert send(balancer, 5) == {"c": 5}
    end(balancer, "a", 3)
    assert send(balancer, 3) == {"a": 3}


def test_above_all_targets_the_endpoint_with_the_least_load_for_its_target_is_used_up_to_its_limit():
    balancer = packing({"a": 10, "b": 5}, limit=20)
    assert send(balancer, 30) == {"a": 20, "b": 10}
    assert send(balancer, 10) == {"b": 10}
    assert balancer.choose(0.0) is None
    assert balancer.at_capacity


def test_targets_are_the_processs_share_and_at_least_one():
    assert send(packing({"a": 10, "b": 10}, share=0.5), 5) == {"a": 5}
    assert send(packing({"a": 2, "b": 2, "c": 2}, share=0.01), 1) == {"a": 1}


def test_one_of_several_processes_exceeds_its_part_by_chance_before_another_endpoint_becomes_active():
    balancer = packing({"a": 90, "b": 90}, share=1 / 3)
    by_chance = math.ceil(2 * math.sqrt(30 * 2 / 3))
    assert send(balancer, 30 + by_chance) == {"a": 30 + by_chance}
    assert send(balancer, 1) == {"b": 1}


def test_a_load_that_stays_above_the_target_is_no_chance():
    balancer = packing({"a": 90, "b": 90}, share=1 / 3)
    send(balancer, 32)
    sent: Counter[str] = Counter()
    for _ in range(500):
        end(balancer, "a", 1)
        sent += send(balancer, 1)
        if sent["b"]:
            break
    assert 50 < sum(sent.values()) < 500


def test_the_last_endpoint_gets_no_more_requests_once_the_load_has_fitted_on_the_others_for_a_while():
    balancer = packing({"a": 10, "b": 10})
    send(balancer, 12)
    end(balancer, "a", 4)
    # The load has just fallen: the last endpoint is still used, before the first is quite full.
    assert send(balancer, 4) == {"a": 3, "b": 1}
    end(balancer, "a", 7)
    end(balancer, "b", 2)
    assert send(balancer, 8) == {"a": 8}
    assert balancer.outstanding() == {"a": 10, "b": 1}


def test_an_ejected_endpoint_is_replaced_by_the_next_and_probed_when_it_is_half_open():
    balancer = packing({"a": 10, "b": 10, "c": 10})
    send(balancer, 5)
    fail(balancer, "a")
    assert send(balancer, 12, now_s=0.5) == {"b": 10, "c": 2}
    assert balancer.choose(1.0) == "a"
    assert balancer.began("a")
    assert send(balancer, 1, now_s=1.0) == {"c": 1}
    balancer.ended("a", probe=True)
    balancer.succeeded("a")
    assert send(balancer, 3, now_s=1.1) == {"a": 3}


def test_a_retry_avoids_the_endpoint_that_failed():
    balancer = packing({"a": 10, "b": 10, "c": 10})
    assert balancer.choose(0.0, avoid={"a"}) == "b"
    assert send(balancer, 3) == {"a": 3}


def test_without_a_target_requests_are_spread():
    balancer = packing({"a": 10, "b": 10})
    balancer.set_targets({"a": 10}, share=1.0)
    assert not balancer.packs
    assert send(balancer, 10) == {"a": 5, "b": 5}
    balancer.set_targets({"a": 10, "b": 10}, share=1.0)
    balancer.dispatch = "spread"
    assert send(balancer, 2) == {"a": 1, "b": 1}


def test_a_sleeping_endpoint_is_not_used_and_has_no_failures():
    balancer = packing({"a": 2, "b": 2, "c": 2})
    fail(balancer, "a")
    assert balancer.set_asleep({"a", "c"}) == []
    assert balancer.available() == ["b"]
    assert balancer.due_for_probe(9.0) == []
    assert not balancer.failed("a", 9.0)
    assert send(balancer, 4, now_s=9.0) == {"b": 4}
    assert not balancer.at_capacity


def test_a_waking_endpoint_is_used_after_a_successful_health_check():
    balancer = packing({"a": 2, "b": 2})
    balancer.set_asleep({"a"})
    assert balancer.set_asleep(()) == ["a"]
    assert balancer.choose(0.0) == "b"
    assert balancer.due_for_probe(0.0) == ["a"]
    assert balancer.check_began("a")
    assert balancer.due_for_probe(0.0) == []
    balancer.check_ended("a", probe=True)
    assert not balancer.failed("a", 0.0)
    assert balancer.due_for_probe(0.0) == ["a"]
    assert balancer.healthy("a")
    assert balancer.power("a") is PowerState.AWAKE
    assert balancer.choose(0.0) == "a"


def test_while_all_endpoints_sleep_none_is_chosen():
    balancer = packing({"a": 2, "b": 2})
    balancer.set_asleep({"a", "b"})
    assert balancer.choose(0.0) is None
    assert balancer.next_admission_s(0.0) == math.inf
    assert not balancer.at_capacity


@pytest.mark.parametrize(
    ("endpoints", "target", "routers", "day"),
    [
        (4, 32, 1, 280), (4, 32, 2, 280), (4, 32, 3, 280), (4, 128, 1, 60), (4, 128, 2, 60), (4, 128, 3, 60),
        (16, 32, 3, 200),
        pytest.param(16, 32, 2, 250, marks=pytest.mark.statistical),
        pytest.param(16, 64, 1, 250, marks=pytest.mark.statistical),
    ],
)  # fmt: skip
def test_at_most_one_endpoint_more_than_the_fewest_is_in_use(endpoints, target, routers, day):
    call_time = (exponential, long_tailed)[routers % 2]
    found = simulate(
        endpoints=endpoints,
        target=target,
        routers=routers,
        dispatch="pack",
        seed=endpoints * target + routers,
        call_time=call_time,
        day=day,
    )
    assert found.close >= 0.9, found
    assert found.in_use <= found.fewest + 0.8, found
    assert found.above_target <= 0.05, found


def test_spreading_uses_nearly_all_endpoints_where_packing_follows_the_load():
    def day(**options) -> Day:
        return simulate(endpoints=4, target=64, routers=2, seed=5, day=100, **options)

    spread, packed = day(dispatch="spread"), day(dispatch="pack")
    assert spread.in_use > 3.9
    assert packed.in_use < 2.8
    # Up from one endpoint to four once, and a few times back and forth by chance.
    assert packed.filled <= 15
