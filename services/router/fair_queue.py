"""Decides which waiting request starts next, so that nobody takes all places; does no I/O.

A place is one request in flight. The lane with the fewest places for its weight is next, in it the tenant with the
fewest places, and of that tenant's requests the oldest. So places are shared, not starts: a tenant whose answers take
long starts fewer requests. Nobody's part is reserved: one tenant alone can have all places, and gives them up as its
requests end and others wait.

A request whose tenant or model is at its limit, whose model servers have no capacity, or whose memory would be too much
is passed by others. A request that does not fit in memory is passed only for a while.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka import TopicPartition

from services.router.offsets import Claim

RESUME_SHARE: Final = 0.75
"""A lane whose look-ahead was full is read again when it has fallen to this share: a paused partition is fetched again,
which should pay off."""


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A record that waits, or is processed.

    Attributes:
        claim: registered when the record was delivered.
        lane: name of its topic, without prefix.
        tenant: whose part of the places it takes; see `services.router.request_class`.
        model: logical model; None if no model server is needed.
        wait_bytes: what it takes in memory while it waits.
        run_bytes: estimate of what it takes while it is processed.
    """

    record: Any
    claim: Claim[TopicPartition]
    lane: str
    tenant: str
    model: str | None
    wait_bytes: int
    run_bytes: int
    number: int = 0


@dataclass(slots=True)
class _Tenant:
    """The requests of one tenant in one lane; `turn` orders tenants with equally many places."""

    name: str
    turn: int
    running: int = 0
    waiting: int = 0
    by_model: dict[str | None, deque[QueuedRequest]] = field(default_factory=dict)

    def heads(self) -> list[QueuedRequest]:
        """The oldest request of every model, oldest first."""
        return sorted((queue[0] for queue in self.by_model.values() if queue), key=lambda request: request.number)


@dataclass(slots=True)
class _Lane:
    """The requests of one lane; `turn` orders lanes with equal parts of the places."""

    weight: int
    turn: int = 0
    running: int = 0
    waiting: int = 0
    wait_bytes: int = 0
    tenants: dict[str, _Tenant] = field(default_factory=dict)
    with_waiting: dict[str, _Tenant] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """Limits of one router.

    Attributes:
        places: requests in flight.
        run_bytes: estimated memory of the requests in flight.
        lane_records, lane_bytes: requests of a lane that wait here, and their memory; Kafka keeps the others.
        tenant_places: by tenant; `default_tenant_places` for all others.
        model_places: of each model.
    """

    places: int
    run_bytes: int
    lane_records: int
    lane_bytes: int
    default_tenant_places: int
    model_places: int
    tenant_places: Mapping[str, int] = field(default_factory=dict)


class FairQueue:
    """The requests that wait, and counts of those in flight.

    Attributes:
        limits: of the requests that wait and those in flight.
    """

    def __init__(self, weights: Mapping[str, int], limits: QueueLimits) -> None:
        """Create an empty queue.

        Args:
            weights: by lane.
        """
        self.limits = limits
        self._lanes = {name: _Lane(weight) for name, weight in weights.items()}
        self._running = 0
        self._run_bytes = 0
        self._tenant_running: Counter[str] = Counter()
        self._model_running: Counter[str | None] = Counter()
        self._number = 0
        self._blocked: QueuedRequest | None = None  # the first one that did not fit in memory
        self._passed = 0  # requests that have started since then

    @property
    def running(self) -> int:
        """Requests in flight."""
        return self._running

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(lane.waiting for lane in self._lanes.values())

    @property
    def wait_bytes(self) -> int:
        """Memory of the requests that wait."""
        return sum(lane.wait_bytes for lane in self._lanes.values())

    def waiting_of(self, lane: str, tenant: str) -> int:
        """Requests of a tenant that wait in a lane."""
        found = self._lanes[lane].tenants.get(tenant)
        return 0 if found is None else found.waiting

    def oldest_ms(self) -> int | None:
        """The smallest timestamp of the requests that have waited longest; None if there is none."""
        heads = (head for lane in self._lanes.values() for one in lane.with_waiting.values() for head in one.heads())
        return min((stamp for head in heads if (stamp := head.record.timestamp) >= 0), default=None)

    def is_full(self, lane: str, *, share: float = 1.0) -> bool:
        """Whether no further record of a lane should be read.

        Args:
            share: of the limits.
        """
        one = self._lanes[lane]
        return one.waiting >= share * self.limits.lane_records or one.wait_bytes >= share * self.limits.lane_bytes

    def put(self, request: QueuedRequest) -> None:
        """Let a request wait."""
        self._number += 1
        request.number = self._number
        lane = self._lanes[request.lane]
        tenant = lane.tenants.get(request.tenant)
        if tenant is None:
            tenant = lane.tenants[request.tenant] = _Tenant(request.tenant, self._number)
        queue = tenant.by_model.get(request.model)
        if queue is None:
            queue = tenant.by_model[request.model] = deque()
        queue.append(request)
        lane.with_waiting[request.tenant] = tenant
        tenant.waiting += 1
        lane.waiting += 1
        lane.wait_bytes += request.wait_bytes

    def next(self, has_capacity: Callable[[str], bool]) -> QueuedRequest | None:
        """The request that is to start now, which then counts as in flight until `ended`; None if none may start.

        Args:
            has_capacity: whether the servers of a model can take another request.
        """
        if self._running >= self.limits.places:
            return None
        if self._blocked is not None and self._passed >= self.limits.places:
            # Only this one may start, unless something else than memory holds it back.
            if self._tenant_may(self._blocked) and self._model_may(self._blocked.model, has_capacity):
                return self._start(self._blocked) if self._fits(self._blocked) else None
            self._blocked = None
        models: dict[str | None, bool] = {}
        for request in self._candidates():
            model = request.model
            if model not in models:
                models[model] = self._model_may(model, has_capacity)
            if not models[model] or not self._tenant_may(request):
                continue
            if self._fits(request):
                return self._start(request)
            if self._blocked is None:
                self._blocked, self._passed = request, 0
        return None

    def ended(self, request: QueuedRequest) -> None:
        """A request is not in flight any more."""
        lane = self._lanes[request.lane]
        lane.running -= 1
        lane.tenants[request.tenant].running -= 1
        self._running -= 1
        self._run_bytes -= request.run_bytes
        self._tenant_running[request.tenant] -= 1
        self._model_running[request.model] -= 1

    def drop(self, is_lost: Callable[[QueuedRequest], bool]) -> int:
        """Remove waiting requests; returns their number."""
        dropped = 0
        for lane in self._lanes.values():
            for tenant in list(lane.with_waiting.values()):
                lost = {request for queue in tenant.by_model.values() for request in queue if is_lost(request)}
                if lost:
                    for model, queue in tenant.by_model.items():
                        tenant.by_model[model] = deque(request for request in queue if request not in lost)
                    self._no_longer_waiting(lane, tenant, lost)
                    dropped += len(lost)
        return dropped

    def _candidates(self) -> Iterator[QueuedRequest]:
        """The oldest request of each lane, tenant and model, in the order in which they should start."""
        lanes = [lane for lane in self._lanes.values() if lane.waiting]
        for lane in sorted(lanes, key=lambda one: (one.running / one.weight, one.turn)) if len(lanes) > 1 else lanes:
            tenants = list(lane.with_waiting.values())
            for tenant in sorted(tenants, key=lambda one: (one.running, one.turn)) if len(tenants) > 1 else tenants:
                yield from tenant.heads()

    def _tenant_may(self, request: QueuedRequest) -> bool:
        places = self.limits.tenant_places.get(request.tenant, self.limits.default_tenant_places)
        return self._tenant_running[request.tenant] < places

    def _model_may(self, model: str | None, has_capacity: Callable[[str], bool]) -> bool:
        return model is None or (self._model_running[model] < self.limits.model_places and has_capacity(model))

    def _fits(self, request: QueuedRequest) -> bool:
        """Whether its memory is free; a request that takes more than there is waits until it is the only one."""
        return not self._run_bytes or self._run_bytes + request.run_bytes <= self.limits.run_bytes

    def _start(self, request: QueuedRequest) -> QueuedRequest:
        lane = self._lanes[request.lane]
        tenant = lane.tenants[request.tenant]
        tenant.by_model[request.model].popleft()
        self._no_longer_waiting(lane, tenant, (request,))
        self._number += 1
        lane.turn = tenant.turn = self._number
        lane.running += 1
        tenant.running += 1
        self._running += 1
        self._run_bytes += request.run_bytes
        self._tenant_running[request.tenant] += 1
        self._model_running[request.model] += 1
        self._passed += 1
        return request

    def _no_longer_waiting(self, lane: _Lane, tenant: _Tenant, requests: Collection[QueuedRequest]) -> None:
        tenant.waiting -= len(requests)
        lane.waiting -= len(requests)
        lane.wait_bytes -= sum(request.wait_bytes for request in requests)
        if not tenant.waiting:
            del lane.with_waiting[tenant.name]
        if self._blocked is not None and self._blocked in requests:
            self._blocked = None
