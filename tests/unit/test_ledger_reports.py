"""Settlement waits for the calls that routers and evaluators report as running, and for no others."""

from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs

from services.ledger.reports import LISTEN_S, AwakeEndpoints, RunningCalls
from services.ledger.settings import LedgerSettings
from shared.fleet import Directive, Fleet, Judge, Model
from shared.messages import EndpointLoad, LoadReport, PoolCapacity, PoolLoad
from shared.pools import Endpoint, Pool
from shared.runtime.clock import Clock

START = datetime(2024, 2, 1, tzinfo=UTC)
RATE = 100.0
MARGIN_S = 2.0
SETTINGS = LedgerSettings(
    settle_delay_s=350.0, settle_margin_s=MARGIN_S, settle_max_wait_s=60.0, report_timeout_s=10.0
)  # fmt: skip
FLEET = Fleet(
    directives=(Directive(level="L0"),),
    models=(Model(name="m", chat_template="chatml"),),
    pools=(
        Pool(name="p", model="m", zone="Z", endpoints=tuple(Endpoint(name=f"e{n}", grpc=f"x:{n}") for n in (1, 2))),
        Pool(name="judge", zone="Z", endpoints=(Endpoint(name="j", grpc="x:9"),)),
    ),
    judge=Judge(pool="judge"),
)


def at(wall_s: float) -> datetime:
    """Event time, some wall seconds after the start."""
    return START + timedelta(seconds=wall_s * RATE)


class Deployment:
    """Wall time, and what the ledger knows from reports."""

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.running = RunningCalls(
            FLEET, settings=SETTINGS, clock=Clock(rate=RATE), wall_s=lambda: self.wall_s
        )  # fmt: skip
        assert self.running.limits(at(0)) == {}

    def report(
        self,
        instance: str,
        oldest: dict[str, datetime | None],
        *,
        share: float = 1.0,
        final: bool = False,
    ) -> None:
        service = "evaluator" if instance.startswith("evaluator") else "router"
        pools = tuple(
            PoolLoad(
                pool=pool.name,
                arrivals=0,
                waiting=0,
                endpoints={
                    endpoint.name: EndpointLoad(
                        in_flight=int(oldest[endpoint.name] is not None), oldest_started_at=oldest[endpoint.name]
                    )
                    for endpoint in pool.endpoints
                },
            )
            for pool in FLEET.pools
            if all(endpoint.name in oldest for endpoint in pool.endpoints)
        )
        self.running.update([
            LoadReport(
                instance=instance, service=service, at=at(self.wall_s), interval_s=RATE,
                share=share, final=final, pools=pools,
            )
        ])  # fmt: skip

    def limit(self, endpoint: str) -> datetime | None:
        """The limit if every published call is in PostgreSQL."""
        return self.running.limits(at(self.wall_s)).get(endpoint)


@pytest.fixture
def deployment() -> Deployment:
    return Deployment()


IDLE = {"e1": None, "e2": None}


def test_nothing_is_settled_before_instances_have_had_time_to_report(deployment):
    deployment.wall_s = LISTEN_S - 0.1
    assert deployment.running.limits(at(deployment.wall_s)) == {}


def test_without_reports_the_fixed_delay_applies(deployment):
    deployment.wall_s = 20
    assert deployment.limit("e1") == at(20) - timedelta(seconds=350)


def test_an_endpoint_is_settled_up_to_its_oldest_running_call_however_long_that_runs(deployment):
    started = at(1.5)
    for second in range(2, 31):
        deployment.wall_s = second
        deployment.report("router-1", {"e1": started, "e2": None})
    assert deployment.limit("e1") == started
    assert deployment.limit("e2") == at(30 - MARGIN_S)


def test_the_end_of_a_call_counts_once_its_message_has_had_time_to_arrive(deployment):
    """The report is published before the response: the call must not be late."""
    started = at(2)
    for second in (3, 4, 5):
        deployment.wall_s = second
        deployment.report("router-1", {"e1": started, "e2": None})
    for second in (6, 7):  # ended at 5.5; its response is on its way until 7.4
        deployment.wall_s = second
        deployment.report("router-1", IDLE)
        assert deployment.limit("e1") == started
    deployment.wall_s = 7.5
    assert deployment.limit("e1") == started
    deployment.wall_s = 8
    deployment.report("router-1", IDLE)
    assert deployment.limit("e1") == at(6)


def test_a_call_that_started_after_the_report_is_waited_for(deployment):
    deployment.wall_s = 5
    deployment.report("router-1", IDLE)
    deployment.wall_s = 9.9
    assert deployment.limit("e1") == at(5)


def test_all_instances_count(deployment):
    for second in (4, 6, 8):
        deployment.wall_s = second
        deployment.report("router-1", {"e1": at(3), "e2": None}, share=0.5)
        deployment.report("router-2", {"e1": None, "e2": at(2)}, share=0.5)
    assert (deployment.limit("e1"), deployment.limit("e2")) == (at(3), at(2))


def test_a_router_that_died_is_waited_for_only_as_long_as_it_may_be_alive(deployment):
    deployment.wall_s = 4
    deployment.report("router-1", {"e1": at(3), "e2": None}, share=0.5)
    for second in range(5, 16):
        deployment.wall_s = second
        deployment.report("router-2", IDLE, share=0.5 if second < 10 else 1.0)
        if second <= 14:
            assert (deployment.limit("e1") or at(3)) <= at(3)
    with capture_logs() as logs:
        assert deployment.limit("e1") == at(13)
    assert [one["instance"] for one in logs] == ["router-1"]


def test_a_router_that_stopped_is_not_waited_for(deployment):
    for second in (4, 5):
        deployment.wall_s = second
        deployment.report("router-1", {"e1": at(3), "e2": None}, share=0.5)
        deployment.report("router-2", IDLE, share=0.5)
    deployment.wall_s = 6
    deployment.report("router-1", IDLE, share=0.0, final=True)
    deployment.report("router-2", IDLE, share=1.0)
    with capture_logs() as logs:
        for second in (7, 8, 9):
            deployment.wall_s = second
            deployment.report("router-2", IDLE, share=1.0)
        assert deployment.limit("e1") == at(7)
    assert logs == []


def test_when_the_last_instance_has_stopped_the_fixed_delay_applies(deployment):
    deployment.wall_s = 5
    deployment.report("router-1", IDLE, final=True)
    deployment.wall_s = 9
    assert deployment.limit("e1") == at(9) - timedelta(seconds=350)


def test_while_an_older_router_does_not_report_the_fixed_delay_applies_too(deployment):
    for second in (4, 6, 8, 10):
        deployment.wall_s = second
        deployment.report("router-1", IDLE, share=0.6)
    assert deployment.limit("e1") == at(10) - timedelta(seconds=350)
    for second in (12, 14):
        deployment.wall_s = second
        deployment.report("router-1", {"e1": at(5), "e2": None}, share=0.6)
    assert deployment.limit("e1") == at(5)


def test_an_evaluator_alone_says_all_about_the_judge_but_not_about_the_models(deployment):
    for second in (4, 6, 8, 10):
        deployment.wall_s = second
        deployment.report("evaluator-1", {"j": at(7.5), **IDLE}, share=0.0)
    assert deployment.limit("j") == at(7.5)
    assert deployment.limit("e1") == at(10) - timedelta(seconds=350)


def test_a_router_alone_does_not_say_all_about_the_judge(deployment):
    for second in (4, 6, 8, 10):
        deployment.wall_s = second
        deployment.report("router-1", {"j": None, **IDLE})
    assert deployment.limit("j") == at(10) - timedelta(seconds=350)


def test_a_new_instance_holds_settlement_until_its_first_report_has_aged(deployment):
    deployment.wall_s = 8
    deployment.report("router-1", IDLE)
    assert deployment.limit("e1") is None
    deployment.wall_s = 10
    deployment.report("router-1", IDLE)
    assert deployment.limit("e1") == at(8)


def test_a_call_that_never_ends_holds_settlement_for_a_limited_time_and_is_logged_once(deployment):
    with capture_logs() as logs:
        for second in range(3, 80):
            deployment.wall_s = second
            deployment.report("router-1", {"e1": at(1), "e2": None})
            limit = deployment.limit("e1")
    assert limit == at(79 - 60)
    assert [(one["event"], one["endpoint"]) for one in logs] == [
        ("a call has been running for too long; its endpoint is settled without it", "e1")
    ]


def test_reports_that_arrive_while_the_watermark_stands_still_are_bounded(deployment):
    deployment.wall_s = 4
    for number in range(3_000):
        deployment.wall_s = 4 + number / 1_000
        deployment.report("router-1", {"e1": at(3), "e2": None})
    assert deployment.running.limits(at(6.5)) == {"e1": at(3), "e2": at(4), "j": at(6.5) - timedelta(seconds=350)}


def capacity(wall_s: float, *awake: str, valid_s: float = 10.0) -> PoolCapacity:
    return PoolCapacity(
        pool="p", at=at(wall_s), valid_until=at(wall_s + valid_s), requests_per_s=0, in_flight=0, endpoints=2,
        endpoints_needed=len(awake), awake=awake, reason="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "since", "until", "kept"),
    [
        ("e1", 1, 9, True),
        ("e2", 1, 3, True),
        ("e2", 1, 4, True),
        ("e2", 1, 5, False),
        ("e2", 5, 6, False),
        ("e2", 8, 9, True),
        ("e2", 17, 40, True),  # the last message is not valid any more: all serve
        ("e1", -1, 3, False),  # nothing is known from before the first message
    ],
)
def test_which_endpoints_were_needed_is_known_from_the_messages_about_capacity(endpoint, since, until, kept):
    awake = AwakeEndpoints()
    awake.update([capacity(0, "e1", "e2"), capacity(4, "e1"), capacity(7, "e1", "e2")])
    assert awake.kept("p", endpoint, at(since).timestamp(), at(until).timestamp()) == kept


def test_without_any_message_all_endpoints_are_needed():
    assert AwakeEndpoints().kept("p", "e1", 0, 1)
