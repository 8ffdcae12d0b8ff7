"""Which endpoint is asked: the least busy that works, and how a failing one comes back."""

from collections import Counter

import pytest

from shared.inference.balancer import Balancer, CoolDownRules

RULES = CoolDownRules(failures=3, first_s=1.0, longest_s=4.0)


@pytest.fixture
def balancer() -> Balancer:
    return Balancer(dict.fromkeys("abc"), RULES)


def fail(balancer: Balancer, name: str, now_s: float, times: int = 3) -> None:
    for _ in range(times):
        balancer.failed(name, now_s)


def test_the_least_busy_endpoint_is_asked(balancer):
    balancer.began("a")
    balancer.began("a")
    balancer.began("b")
    assert balancer.choose(0.0) == "c"
    balancer.began("c")
    balancer.ended("b", probe=False)
    assert balancer.choose(0.0) == "b"


def test_equally_busy_ones_take_turns(balancer):
    chosen = Counter(balancer.choose(0.0) for _ in range(300))
    assert chosen == {"a": 100, "b": 100, "c": 100}


def test_a_request_avoids_the_endpoint_that_failed_it_while_there_is_another(balancer):
    balancer.began("b")
    balancer.began("c")
    assert balancer.choose(0.0, avoid={"a"}) in {"b", "c"}
    assert Balancer({"a": None}, RULES).choose(0.0, avoid={"a"}) == "a"


def test_a_single_failure_is_forgiven_and_several_in_a_row_are_not(balancer):
    fail(balancer, "a", 0.0, times=2)
    balancer.succeeded("a")
    fail(balancer, "a", 0.0, times=2)
    assert "a" in balancer.working()
    assert balancer.failed("a", 0.0)
    assert balancer.working() == ["b", "c"]
    assert {balancer.choose(0.5) for _ in range(10)} == {"b", "c"}


def test_after_the_pause_one_request_is_let_through_first(balancer):
    fail(balancer, "a", 0.0)
    assert balancer.choose(1.0) == "a"
    assert balancer.began("a")
    assert balancer.choose(1.0) in {"b", "c"}
    assert balancer.due_for_probe(1.0) == []
    balancer.ended("a", probe=True)
    assert balancer.succeeded("a")
    assert sorted(balancer.working()) == ["a", "b", "c"]


def test_a_relapse_doubles_the_pause_up_to_its_limit(balancer):
    now_s = 0.0
    fail(balancer, "a", now_s)
    for pause_s in (1.0, 2.0, 4.0, 4.0):
        assert "a" not in balancer.due_for_probe(now_s + pause_s - 0.01)
        now_s += pause_s
        assert balancer.due_for_probe(now_s) == ["a"]
        assert balancer.failed("a", now_s)


def test_requests_that_fail_late_do_not_prolong_the_pause(balancer):
    fail(balancer, "a", 0.0)
    assert not balancer.failed("a", 0.9)
    assert balancer.due_for_probe(1.0) == ["a"]


def test_when_all_are_left_alone_it_says_for_how_long():
    balancer = Balancer(dict.fromkeys("ab"), RULES)
    fail(balancer, "a", 0.0)
    fail(balancer, "b", 0.5)
    assert balancer.choose(0.6) is None
    assert balancer.opens_in_s(0.6) == pytest.approx(0.4)
    assert balancer.choose(1.0) == "a"
    balancer.began("a")
    assert balancer.opens_in_s(1.0) == pytest.approx(0.5)
    assert balancer.outstanding() == {"a": 1, "b": 0}


def test_an_endpoint_is_given_no_more_than_it_may_have_at_once():
    balancer = Balancer({"a": 1, "b": 2}, RULES)
    given = []
    while (name := balancer.choose(0.0)) is not None:
        balancer.began(name)
        given.append(name)
    assert Counter(given) == {"a": 1, "b": 2}
    assert balancer.full
    assert balancer.opens_in_s(0.0) == float("inf")
    balancer.ended("b", probe=False)
    assert balancer.choose(0.0) == "b"
    assert balancer.opens_in_s(0.0) == 0.0


def test_a_full_endpoint_is_no_way_out_for_a_request_that_failed_elsewhere():
    balancer = Balancer({"a": 1, "b": None}, RULES)
    balancer.began("a")
    assert balancer.choose(0.0, avoid={"b"}) == "b"


def test_a_health_check_brings_an_endpoint_back_on_trial(balancer):
    """It is there, but does it generate?"""
    fail(balancer, "a", 0.0)
    assert balancer.healthy("a")
    assert "a" in balancer.working()
    assert balancer.failed("a", 1.0)
    assert balancer.opens_in_s(1.0) == 0.0
    assert balancer.due_for_probe(2.9) == []  # twice as long as before
    assert balancer.due_for_probe(3.0) == ["a"]


def test_a_health_check_forgives_no_failed_request(balancer):
    fail(balancer, "a", 0.0, times=2)
    assert not balancer.healthy("a")
    assert balancer.failed("a", 0.0)


def test_an_answer_forgives_all(balancer):
    fail(balancer, "a", 0.0)
    balancer.healthy("a")
    balancer.succeeded("a")
    fail(balancer, "a", 5.0, times=2)
    assert "a" in balancer.working()
