"""Which requests of a router start, and which wait: pauses, places, tenants, lanes, and limits of model servers."""

import asyncio
import gc
import json
import tomllib
import weakref
from contextvars import ContextVar
from types import SimpleNamespace

from aiokafka import TopicPartition
from prometheus_client import CollectorRegistry

from services.router.offsets import Commit
from services.router.recovery import to_kafka
from shared.fleet import Fleet
from tests.support.consumer import (
    KNOWN,
    NEW,
    UnlimitedCapacity,
    assigned,
    receive,
    record,
    request_consumer,
    run_ready,
)
from tests.support.deadlines import until
from tests.support.fleets import fleet_toml

TENANTS = '[[tenants]]\nname = "a"\n[[tenants]]\nname = "b"\n[[tenants]]\nname = "capped"\nmax_in_flight = 1\n'
FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"]) + TENANTS))
BATCH = TopicPartition("requests-batch", 0)


def ask(partition: TopicPartition, offset: int, tenant: str) -> SimpleNamespace:
    return record(partition, offset, json.dumps({"tenant": tenant, "prompt": "Why?"}).encode())


async def test_requests_wait_while_paused(requests, handled):
    await assigned(requests, KNOWN)
    requests.pause()
    delivery = asyncio.create_task(receive(requests, record(KNOWN, 0)))
    await run_ready()
    assert handled.offsets == []
    assert "still loading" in requests.problem()
    requests.resume()
    await delivery
    await until(lambda: handled.offsets == [(0, 0)])


async def test_a_running_request_does_not_keep_its_callers_context_in_memory(progress, consumer):
    """FastStream's context has the whole batch of a record."""

    class Batch:
        """Can be referenced weakly."""

    batch: ContextVar[Batch | None] = ContextVar("batch", default=None)
    seen: list[Batch | None] = []
    go = asyncio.Event()

    async def handle(record, fence):
        seen.append(batch.get())
        await go.wait()

    requests = request_consumer(handle, progress, consumer)
    await assigned(requests, KNOWN)
    batch.set(Batch())
    kept = weakref.ref(batch.get())
    await receive(requests, record(KNOWN, 0))
    await run_ready()
    assert seen == [None]
    batch.set(None)
    gc.collect()
    assert kept() is None
    go.set()


async def test_a_request_waits_for_a_free_place(requests, handled):
    await assigned(requests, KNOWN)
    handled.go.clear()
    await receive(requests, *(record(KNOWN, offset) for offset in range(5)))
    await run_ready()
    assert len(handled.offsets) == 4
    handled.go.set()
    await until(lambda: len(handled.offsets) == 5)


async def test_a_tenant_behind_many_requests_of_another_is_not_kept_waiting(progress, consumer, handled):
    requests = request_consumer(handled, progress, consumer, fleet=FLEET)
    await assigned(requests, KNOWN)
    handled.go.clear()
    await receive(requests, *(ask(KNOWN, offset, "a") for offset in range(50)))
    await receive(requests, *(ask(KNOWN, offset, "b") for offset in range(50, 54)))
    await run_ready()
    assert [offset for _, offset in handled.offsets] == [0, 1, 2, 3]
    handled.go.set()
    await until(lambda: requests.finished(KNOWN) == 54)
    assert max(handled.offsets.index((0, offset)) for offset in range(50, 54)) < 12


async def test_a_tenant_at_its_limit_leaves_places_to_others_and_strangers_share_one_part(progress, consumer, handled):
    requests = request_consumer(handled, progress, consumer, fleet=FLEET)
    await assigned(requests, KNOWN)
    handled.go.clear()
    tenants = ("capped", "capped", "x1", "x2", "x3", "x4", "a")
    await receive(requests, *(ask(KNOWN, offset, tenant) for offset, tenant in enumerate(tenants)))
    await run_ready()
    assert sorted(offset for _, offset in handled.offsets) == [0, 2, 3, 6]


async def test_nothing_beyond_a_waiting_record_is_committed(progress, consumer, handled):
    requests = request_consumer(handled, progress, consumer, fleet=FLEET)
    await assigned(requests, KNOWN)
    handled.go.clear()
    await receive(requests, ask(KNOWN, 0, "capped"), ask(KNOWN, 1, "capped"))
    handled.go.set()
    await receive(requests, *(ask(KNOWN, offset, "a") for offset in range(2, 9)))
    await until(lambda: requests.in_flight == 0)
    handled.go.clear()
    await receive(requests, ask(KNOWN, 9, "capped"), ask(KNOWN, 10, "capped"), ask(KNOWN, 11, "a"))
    await run_ready()
    await requests.shut_down()
    assert (0, 10) not in handled.offsets
    assert consumer.committed[KNOWN].offset == 9


async def test_waiting_records_stay_through_a_rebalance_that_leaves_their_partition_here(progress, consumer, handled):
    requests = request_consumer(handled, progress, consumer)
    await assigned(requests, KNOWN, NEW)
    handled.go.clear()
    await receive(requests, *(record(KNOWN, offset) for offset in range(6)), *(record(NEW, one) for one in range(3)))
    await run_ready()
    assert len(handled.offsets) == 4
    await requests.on_partitions_revoked([KNOWN, NEW])
    handled.go.set()
    await until(lambda: requests.in_flight == 0)
    await run_ready()
    assert len(handled.offsets) == 4  # none starts during a rebalance
    progress.stored, progress.answered = to_kafka({KNOWN: Commit(4, 5)}), {KNOWN: {4: 4}}
    await assigned(requests, KNOWN)
    await receive(requests, *(record(KNOWN, offset) for offset in range(4, 8)))
    await until(lambda: requests.finished(KNOWN) == 8)
    assert handled.offsets == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 5), (0, 6), (0, 7)]


async def test_a_lane_of_which_enough_records_wait_is_paused_and_others_are_read(progress, consumer, handled):
    lanes = {"requests": 3, "requests-batch": 1}
    consumer.assigned = {KNOWN, BATCH}
    requests = request_consumer(handled, progress, consumer, lanes=lanes, max_waiting=8)
    await assigned(requests, KNOWN, BATCH)
    handled.go.clear()
    await receive(requests, *(record(BATCH, offset) for offset in range(3)))
    assert consumer.paused == set()
    await receive(requests, *(record(BATCH, offset) for offset in range(3, 12)))
    assert consumer.paused == {BATCH}
    await run_ready()
    await receive(requests, record(KNOWN, 0))
    assert consumer.paused == {BATCH}
    handled.go.set()
    await until(lambda: consumer.paused == set())
    await until(lambda: len(handled.offsets) == 13)


async def test_a_lane_whose_oldest_request_does_not_end_is_paused_at_last(progress, consumer):
    go = asyncio.Event()

    async def handle(record, fence):
        if record.offset == 0:
            await go.wait()

    requests = request_consumer(handle, progress, consumer, max_waiting=10)
    await assigned(requests, KNOWN)
    offset = 0
    while not consumer.paused:
        await receive(requests, record(KNOWN, offset))
        await run_ready()
        offset += 1
        assert offset < 100
    assert offset >= 20
    go.set()
    await until(lambda: consumer.paused == set())


async def test_after_recovery_a_full_lane_stays_paused(progress, consumer, handled):
    requests = request_consumer(handled, progress, consumer, max_waiting=2)
    await assigned(requests, KNOWN)
    handled.go.clear()
    await receive(requests, *(record(KNOWN, offset) for offset in range(8)))
    assert consumer.paused == {KNOWN, NEW}
    await requests.on_partitions_revoked([KNOWN])
    await assigned(requests, KNOWN)
    await until(lambda: requests.problem() is None)
    assert consumer.paused == {KNOWN, NEW}
    handled.go.set()
    await until(lambda: consumer.paused == set())


class OneAtATime(UnlimitedCapacity):
    """Servers of model `m` with one slot, which a request takes when it is handled."""

    def __init__(self) -> None:
        self.taken = 0

    def has_capacity(self, model: str) -> bool:
        return self.taken == 0

    def is_limited(self, model: str) -> bool:
        return True


async def test_a_request_takes_its_capacity_before_the_next_one_starts(progress, consumer):
    capacity, started, go = OneAtATime(), [], asyncio.Event()

    async def handle(record, fence):
        capacity.taken += 1
        started.append(record.offset)
        await go.wait()
        capacity.taken -= 1

    requests = request_consumer(handle, progress, consumer, capacity=capacity)
    await assigned(requests, KNOWN)
    await receive(requests, *(record(KNOWN, offset) for offset in range(3)))
    await run_ready()
    assert started == [0]
    go.set()
    await until(lambda: len(started) == 3)
    capacity.freed()  # nothing waits


async def test_metrics_show_what_waits_by_lane_and_known_tenant(progress, consumer, handled):
    registry = CollectorRegistry()
    requests = request_consumer(handled, progress, consumer, fleet=FLEET, registry=registry)
    await assigned(requests, KNOWN)
    handled.go.clear()
    tenants = ["a"] * 6 + ["stranger-1", "stranger-2"]
    await receive(requests, *(ask(KNOWN, offset, tenant) for offset, tenant in enumerate(tenants)))
    await run_ready()

    def value(name, **labels):
        return registry.get_sample_value(f"sprout_router_{name}", labels)

    assert value("in_flight") == 4
    waiting = [value("waiting_records", lane="requests", tenant=tenant) for tenant in ("a", "b", "")]
    assert sum(waiting) == 4
    assert waiting[1] == 0
    assert value("waiting_records", lane="requests", tenant="stranger-1") is None
    assert value("waiting_bytes") > 4 * 640
    assert value("waiting_age_seconds") > 0
