"""Which waiting request starts next: shares of lanes, tenants and models, limits, memory."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from services.router.fair_queue import FairQueue, QueuedRequest, QueueLimits


def limits(**given) -> QueueLimits:
    defaults = {"places": 4, "run_bytes": 1_000, "lane_records": 100, "lane_bytes": 10_000}
    values = {**defaults, **given}
    return QueueLimits(**{"default_tenant_places": values["places"], "model_places": values["places"], **values})


class Fixture:
    """A queue, with requests that are named in the order of their arrival: a0, a1, b2, ..."""

    def __init__(self, weights: dict[str, int] | None = None, **given) -> None:
        self.queue = FairQueue(weights or {"requests": 1}, limits(**given))
        self.running: dict[str, QueuedRequest] = {}
        self.full: set[str] = set()
        self.made = 0

    def put(self, tenant: str, count: int = 1, *, lane: str = "requests", model: str | None = "m", bytes_: int = 10):
        for _ in range(count):
            record = SimpleNamespace(name=f"{tenant}{self.made}", timestamp=1_000 + self.made)
            self.made += 1
            self.queue.put(QueuedRequest(record, None, lane, tenant, model, 20, bytes_))

    def start(self, count: int = 1_000) -> list[str]:
        """Start as many as may start; returns their names."""
        names: list[str] = []
        while len(names) < count and (request := self.queue.next(lambda model: model not in self.full)) is not None:
            names.append(request.record.name)
            self.running[request.record.name] = request
        return names

    def end(self, *names: str) -> None:
        for name in names or list(self.running):
            self.queue.ended(self.running.pop(name))


def test_one_tenant_alone_has_all_places_in_the_order_of_arrival():
    fixture = Fixture()
    fixture.put("a", 6)
    assert fixture.start() == ["a0", "a1", "a2", "a3"]
    fixture.end("a2")
    assert fixture.start() == ["a4"]


def test_a_tenant_behind_many_requests_of_another_gets_the_next_places_until_both_have_equally_many():
    fixture = Fixture()
    fixture.put("a", 90)
    fixture.start()
    fixture.put("b", 9)
    fixture.end("a0")
    assert fixture.start() == ["b90"]
    fixture.end("a1")
    assert fixture.start() == ["b91"]
    fixture.end("a2")
    assert fixture.start() == ["a4"]
    fixture.end("b90")
    assert fixture.start() == ["b92"]


def test_tenants_with_equally_many_places_take_turns():
    fixture = Fixture(places=1)
    for tenant in "abc":
        fixture.put(tenant, 3)
    order = ""
    for _ in range(9):
        order += fixture.start()[0][0]
        fixture.end()
    assert order == "abcabcabc"


def test_a_tenant_whose_requests_come_one_by_one_does_not_precede_another_that_waits():
    fixture = Fixture(places=1)
    fixture.put("a", 9)
    order = ""
    for _ in range(6):
        fixture.put("b")
        order += fixture.start()[0][0]
        fixture.end()
    assert order == "ababab"


def test_lanes_share_the_places_by_their_weights():
    fixture = Fixture({"requests": 4, "batch": 1}, places=10)
    fixture.put("a", 50, lane="batch")
    assert len(fixture.start()) == 10
    fixture.put("b", 50)
    for _ in range(20):
        fixture.end(next(iter(fixture.running)))
        fixture.start()
    lanes = [request.lane for request in fixture.running.values()]
    assert (lanes.count("requests"), lanes.count("batch")) == (8, 2)


def test_a_tenant_at_its_limit_is_passed():
    fixture = Fixture(default_tenant_places=3, tenant_places={"a": 1})
    fixture.put("a", 3)
    fixture.put("b", 5)
    assert sorted(fixture.start()) == ["a0", "b3", "b4", "b5"]
    fixture.end("b3", "b4", "b5")
    assert fixture.start() == ["b6", "b7"]


def test_a_full_model_holds_back_only_its_own_requests():
    fixture = Fixture(places=5, model_places=3)
    fixture.put("a", 9, model="slow")
    fixture.put("a", 1, model="m")
    fixture.put("b", 1, model="m")
    fixture.put("a", 1, model=None)
    assert sorted(fixture.start(), key=lambda name: int(name[1:])) == ["a0", "a1", "a2", "a9", "b10"]
    fixture.end()
    fixture.full = {"slow", "m"}
    assert fixture.start() == ["a11"]  # no model server is needed to say that a model is unknown
    fixture.full = set()
    assert fixture.start() == ["a3", "a4", "a5"]


def test_memory_is_bounded_and_a_large_request_is_passed_only_for_a_while():
    fixture = Fixture()
    fixture.put("a", 1, bytes_=100)
    fixture.start()
    fixture.put("big", 1, bytes_=5_000)
    fixture.put("a", 90, bytes_=100)
    started = []
    while not (names := fixture.start(1)) or not names[0].startswith("big"):
        started += names
        fixture.end(*names)
        if not names:
            fixture.end()
    assert len(started) == 4
    assert fixture.start() == []  # it is alone: more than the memory there is
    fixture.end()
    assert len(fixture.start()) == 4


def test_requests_fill_the_memory_there_is():
    fixture = Fixture(places=100)
    fixture.put("a", 30, bytes_=100)
    assert len(fixture.start()) == 10


def test_a_lane_is_full_by_records_or_by_memory():
    fixture = Fixture({"requests": 1, "batch": 1}, lane_records=4, lane_bytes=1_000)
    fixture.put("a", 3)
    assert fixture.queue.is_full("requests", share=0.75)
    assert not fixture.queue.is_full("requests")
    fixture.put("a", 1)
    assert fixture.queue.is_full("requests")
    assert not fixture.queue.is_full("batch")
    small = Fixture(lane_bytes=60)
    small.put("a", 3)
    assert small.queue.is_full("requests")
    small.start()
    assert not small.queue.is_full("requests")
    assert small.queue.wait_bytes == 0


def test_lost_requests_leave_the_queue():
    fixture = Fixture(run_bytes=50)
    fixture.put("a", 1, bytes_=40)
    fixture.put("b", 2, bytes_=40)
    fixture.put("a", 2, bytes_=40)
    assert fixture.start() == ["a0"]
    assert fixture.queue.drop(lambda request: request.record.name in {"b1", "b2", "a3"}) == 3
    assert (fixture.queue.waiting, fixture.queue.wait_bytes) == (1, 20)
    assert (fixture.queue.waiting_of("requests", "b"), fixture.queue.waiting_of("requests", "nobody")) == (0, 0)
    fixture.end()
    assert fixture.start() == ["a4"]
    assert fixture.queue.drop(lambda _: True) == 0


def test_the_oldest_request_is_known():
    fixture = Fixture(places=1)
    assert fixture.queue.oldest_ms() is None
    fixture.put("a", 2)
    fixture.put("b", 2)
    assert fixture.queue.oldest_ms() == 1_000
    fixture.start()
    assert fixture.queue.oldest_ms() == 1_001


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("put"),
            st.sampled_from("abc"),
            st.sampled_from(["requests", "batch"]),
            st.sampled_from(["m", "n", None]),
            st.sampled_from([10, 400, 3_000]),
        ),
        st.tuples(st.just("end"), st.integers(0, 10)),
        st.tuples(st.just("full"), st.sets(st.sampled_from(["m", "n"]))),
        st.tuples(st.just("drop"), st.sampled_from("abc")),
    ),
    max_size=40,
)


@given(STEPS)
def test_in_any_order_no_limit_is_exceeded_and_every_request_starts_once(steps):
    fixture = Fixture({"requests": 3, "batch": 1}, tenant_places={"a": 2}, model_places=3)
    queue, expected, seen = fixture.queue, set(), set()
    for kind, *arguments in steps:
        if kind == "put":
            tenant, lane, model, size = arguments
            expected.add(f"{tenant}{fixture.made}")
            fixture.put(tenant, lane=lane, model=model, bytes_=size)
        elif kind == "end" and fixture.running:
            fixture.end(sorted(fixture.running)[arguments[0] % len(fixture.running)])
        elif kind == "full":
            (fixture.full,) = arguments
        elif kind == "drop":
            waiting = {name for name in expected - seen if name.startswith(arguments[0])}
            assert queue.drop(lambda request, tenant=arguments[0]: request.tenant == tenant) == len(waiting)
            expected -= waiting
        started = fixture.start()
        assert not seen.intersection(started)
        seen.update(started)
        running = list(fixture.running.values())
        assert len(running) == queue.running <= 4
        assert sum(request.tenant == "a" for request in running) <= 2
        assert max(sum(request.model == model for request in running) for model in ("m", "n")) <= 3
        assert sum(request.run_bytes for request in running) <= 1_000 or len(running) == 1
        assert queue.waiting == len(expected - seen)
        assert queue.wait_bytes == 20 * queue.waiting
    fixture.full = set()
    for _ in range(3 * len(expected) + 1):
        fixture.end()
        seen.update(fixture.start())
    assert seen == expected
