"""Which endpoints the local stack puts to sleep and wakes, and when."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from deploy.local.sleeper import DRAIN_WALL_S, REPORT_WALL_S, Action, Backoff, PoolState, Topics, decide, wanted_awake
from shared.messages import EndpointLoad, LoadReport, PoolCapacity, PoolLoad
from shared.pools import Pool

NOW = datetime(2024, 2, 10, tzinfo=UTC)
NAMES = ("e0", "e1", "e2", "e3")
RELEASED = NOW - timedelta(seconds=60)


def pool(*, min_awake: int = 1, sleep: bool = True) -> Pool:
    endpoints = [{"name": name, "grpc": "localhost:1"} for name in NAMES]
    return Pool.model_validate(
        {"name": "p", "zone": "GB", "endpoints": endpoints, "sleep": sleep, "min_awake": min_awake}
    )


def capacity(*awake: str, at: datetime = NOW, valid_s: float = 600.0) -> PoolCapacity:
    return PoolCapacity(
        pool="p",
        at=at,
        valid_until=at + timedelta(seconds=valid_s),
        requests_per_s=1.0,
        in_flight=0,
        endpoints=len(NAMES),
        endpoints_needed=len(awake),
        awake=awake,
        reason="test",
    )


def report(*, instance: str = "router-a", age_s: float = 0.5, final: bool = False, **in_flight: int) -> LoadReport:
    endpoints = {name: EndpointLoad(in_flight=in_flight.get(name, 0)) for name in NAMES}
    return LoadReport(
        instance=instance,
        service="router",
        at=NOW - timedelta(seconds=age_s),
        interval_s=1.0,
        share=1.0,
        final=final,
        pools=(PoolLoad(pool="p", arrivals=0, waiting=0, endpoints=endpoints),),
    )


def state(message: PoolCapacity | None, *, loaded: tuple[str, ...] = NAMES, **changes: object) -> PoolState:
    released = {} if message is None else {name: RELEASED for name in NAMES if name not in message.awake}
    fields = {"pool": pool(), "capacity": message, "released": released, "reports": (report(),), "loaded": loaded}
    return PoolState(**(fields | changes))


def load(*names: str) -> list[Action]:
    return [Action("load", name) for name in names]


def unload(*names: str) -> list[Action]:
    return [Action("unload", name) for name in names]


class TestWhichEndpointsAreWanted:
    def test_those_of_the_capacity_message(self):
        assert wanted_awake(pool(), capacity("e0", "e2"), now=NOW) == {"e0", "e2"}

    @pytest.mark.parametrize(
        "message", [None, capacity("e0", at=NOW - timedelta(seconds=601))], ids=["no message", "expired"]
    )
    def test_all_without_a_valid_message(self, message):
        assert wanted_awake(pool(), message, now=NOW) == set(NAMES)
        assert decide(state(message, loaded=("e0",)), now=NOW) == load("e1", "e2", "e3")

    def test_all_of_a_pool_that_may_not_sleep(self):
        assert wanted_awake(pool(sleep=False), capacity("e0"), now=NOW) == set(NAMES)

    def test_at_least_min_awake_in_packing_order(self):
        assert wanted_awake(pool(min_awake=2), capacity(), now=NOW) == {"e0", "e1"}
        assert wanted_awake(pool(min_awake=2), capacity("e3"), now=NOW) == {"e0", "e3"}

    def test_unknown_names_do_not_count(self):
        assert wanted_awake(pool(), capacity("gone"), now=NOW) == {"e0"}


class TestOrder:
    def test_unloads_are_in_reverse_packing_order(self):
        assert decide(state(capacity("e0")), now=NOW) == unload("e3", "e2", "e1")

    def test_loads_come_first_in_packing_order(self):
        message = capacity("e0", "e1", "e2")
        assert decide(state(message, loaded=("e0", "e3")), now=NOW) == load("e1", "e2")
        assert decide(state(capacity("e2"), loaded=("e0", "e1", "e3")), now=NOW) == [*load("e2"), *unload("e3", "e1")]

    def test_as_many_as_wanted_stay_loaded_while_a_wanted_one_cannot_be_loaded(self):
        """e1 does not answer: e2 is kept in its place, e3 is not needed."""
        message = capacity("e0", "e1")
        assert decide(state(message, loaded=("e0", "e2", "e3"), unknown=("e1",)), now=NOW) == unload("e3")

    def test_nothing_is_done_with_an_endpoint_whose_state_is_unknown(self):
        assert decide(state(capacity("e0"), loaded=("e0", "e1", "e2"), unknown=("e2",)), now=NOW) == unload("e1")

    def test_nothing_is_done_if_all_is_as_wanted(self):
        assert decide(state(capacity("e0", "e1"), loaded=("e0", "e1")), now=NOW) == []


class TestWorkInFlight:
    def test_an_endpoint_with_work_in_flight_is_not_unloaded(self):
        reports = (report(), report(instance="router-b", e3=1), report(instance="evaluator", e1=2))
        assert decide(state(capacity("e0"), reports=reports), now=NOW) == unload("e2")

    def test_an_old_report_does_not_count(self):
        reports = (report(), report(instance="killed", age_s=REPORT_WALL_S + 0.1, e1=1, e2=1, e3=1))
        assert decide(state(capacity("e0"), reports=reports), now=NOW) == unload("e3", "e2", "e1")

    def test_the_last_report_of_a_stopped_instance_does_not_count(self):
        reports = (report(), report(instance="stopped", final=True, e3=1))
        assert decide(state(capacity("e0"), reports=reports), now=NOW) == unload("e3", "e2", "e1")

    def test_without_a_report_the_load_is_unknown_and_nothing_is_unloaded(self):
        assert decide(state(capacity("e0"), reports=()), now=NOW) == []
        assert decide(state(capacity("e0"), reports=(report(age_s=REPORT_WALL_S + 1),)), now=NOW) == []

    def test_a_report_from_before_the_routers_could_know_that_the_endpoint_is_released(self):
        released = dict.fromkeys(NAMES, NOW - timedelta(seconds=DRAIN_WALL_S + 0.2))
        assert decide(state(capacity("e0"), released=released, reports=(report(age_s=0.3),)), now=NOW) == []
        assert decide(state(capacity("e0"), released=released, reports=(report(age_s=0.1),)), now=NOW) != []

    def test_ages_are_wall_time_in_a_replay(self):
        reports = (report(age_s=720 * 0.5), report(instance="b", age_s=720 * (REPORT_WALL_S - 1), e3=1))
        released = dict.fromkeys(NAMES, NOW - timedelta(hours=12))
        message = state(capacity("e0"), released=released, reports=reports)
        assert decide(message, now=NOW, rate=720) == unload("e2", "e1")
        assert decide(message, now=NOW, rate=1) == []


SERVERS = {name: SimpleNamespace(loaded=True, busy=False) for name in NAMES}


class TestTopics:
    def released(self, *messages: PoolCapacity) -> dict[str, float]:
        topics = Topics([pool()])
        for message in messages:
            topics.receive(message)
        found = topics.state(pool(), SERVERS).released
        return {name: (at - NOW).total_seconds() for name, at in found.items()}

    def test_an_endpoint_is_released_by_the_first_message_that_leaves_it_out(self):
        first, second = capacity("e0", "e1"), capacity("e0", at=NOW + timedelta(seconds=60))
        assert self.released(first) == {"e2": 0, "e3": 0}
        assert self.released(first, second) == {"e1": 60, "e2": 0, "e3": 0}

    def test_an_endpoint_in_use_again_is_released_again(self):
        later = [NOW + timedelta(seconds=60 * number) for number in range(3)]
        messages = [capacity("e0", at=later[0]), capacity(*NAMES, at=later[1]), capacity("e0", "e1", at=later[2])]
        assert self.released(*messages) == {"e2": 120, "e3": 120}

    def test_after_an_invalid_message_every_endpoint_was_in_use(self):
        messages = [capacity("e0", valid_s=60), capacity("e0", at=NOW + timedelta(seconds=61))]
        assert self.released(*messages) == {"e1": 61, "e2": 61, "e3": 61}

    def test_the_newest_report_of_every_instance_counts_until_it_is_old_or_the_last(self):
        topics = Topics([pool()])
        for message in (report(age_s=9), report(age_s=1, e1=3), report(instance="b", age_s=8)):
            topics.receive(message)
        assert {one.at for one in topics.state(pool(), SERVERS).reports} == {
            NOW - timedelta(seconds=1), NOW - timedelta(seconds=8)
        }  # fmt: skip
        topics.forget(NOW - timedelta(seconds=5))
        assert [one.instance for one in topics.state(pool(), SERVERS).reports] == ["router-a"]
        topics.receive(report(final=True))
        topics.forget(NOW - timedelta(seconds=5))
        assert topics.state(pool(), SERVERS).reports == ()

    def test_other_pools_are_ignored(self):
        assert self.released(capacity("e0").model_copy(update={"pool": "judge"})) == {}

    def test_a_server_that_is_busy_or_not_known_has_an_unknown_state(self):
        servers = {
            "e0": SimpleNamespace(loaded=True, busy=False),
            "e1": SimpleNamespace(loaded=None, busy=False),
            "e2": SimpleNamespace(loaded=True, busy=True),
            "e3": SimpleNamespace(loaded=False, busy=False),
        }
        found = Topics([pool()]).state(pool(), servers)
        assert found.unknown == {"e1", "e2"}
        assert "e3" not in found.loaded


def test_waits_grow_up_to_a_limit():
    retry = Backoff()
    assert [retry.grow() for _ in range(7)] == [0.5, 1, 2, 4, 8, 15, 15]
    retry.reset()
    assert retry.grow() == 0.5
