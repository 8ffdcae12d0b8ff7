"""Puts endpoints of the local stack to sleep and wakes them: `python -m deploy.local.sleeper`.

It reads the topics `capacity` and `load-reports`, and unloads and loads the model of an endpoint by Triton's model
control. It acts on pools with `sleep = true` only. An endpoint is put to sleep only while a valid message of `capacity`
leaves it out and every router and evaluator reports that it has nothing running there.

Where an orchestrator can scale the servers, it does that instead, by the metric `sprout_pool_endpoints_needed`.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from pydantic import ValidationError
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from shared.fleet import Fleet, FleetError, load_fleet
from shared.inference.triton.channel import CHANNEL_OPTIONS
from shared.kafka.records import PoisonMessageError, describe, parse_record
from shared.messages import LoadReport, PoolCapacity
from shared.pools import Endpoint, Pool
from shared.runtime.clock import Clock, ClockConfigurationError
from shared.runtime.logs import configure_logging, get_logger, printable
from shared.runtime.settings import FleetSettings, KafkaSettings, LogSettings
from shared.topics import CAPACITY, LOAD_REPORTS

REPORT_WALL_S: Final = 10.0
"""How long a load report counts, wall seconds; instances report about once a second."""
DRAIN_WALL_S: Final = 1.0
"""Wall seconds that routers get to learn from `capacity` that an endpoint is not to be used, until reports count."""
TICK_S: Final = 0.1
"""Wall seconds between two decisions."""
CHECK_S: Final = 2.0
"""Wall seconds between two questions to a server whether the model is loaded: the server may have been restarted."""
CHECK_TIMEOUT_S: Final = 5.0
LOAD_TIMEOUT_S: Final = 60.0
LAST_CALL_TIMEOUT_S: Final = 8.0
"""Longest time to wake an endpoint before this process exits."""
FIRST_RETRY_S: Final = 0.5
LONGEST_RETRY_S: Final = 15.0

What = Literal["load", "unload"]

_log = get_logger("deploy.local.sleeper")


# ---------------------------------------------------------------------------------------------------- the decision


@dataclass(frozen=True, slots=True)
class Action:
    """Load or unload the model of an endpoint."""

    what: What
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """What is known of a pool.

    Attributes:
        pool: of the fleet file; its order of endpoints is the packing order.
        capacity: the newest message; None if there was none.
        released: event time since which `capacity` leaves an endpoint out, by endpoint.
        reports: the newest load report of every instance.
        loaded: endpoints on which the model is loaded.
        unknown: endpoints whose state is not known, or about to change.
    """

    pool: Pool
    capacity: PoolCapacity | None
    released: Mapping[str, datetime]
    reports: Collection[LoadReport]
    loaded: Collection[str]
    unknown: Collection[str] = ()


def decide(state: PoolState, *, now: datetime, rate: float = 1.0) -> list[Action]:
    """The actions that bring a pool to what `capacity` asks for: loads in packing order, then unloads in reverse.

    As many endpoints as are wanted stay loaded, also while a wanted one cannot be loaded.

    Args:
        now: event time.
        rate: event seconds per wall second.
    """
    names = [endpoint.name for endpoint in state.pool.endpoints]
    wanted = wanted_awake(state.pool, state.capacity, now=now)
    known = [name for name in names if name not in state.unknown]
    actions = [Action("load", name) for name in known if name in wanted and name not in state.loaded]
    loaded = [name for name in known if name in state.loaded]
    spare = len(loaded) - len(wanted)
    for name in reversed(loaded):
        if spare > 0 and name not in wanted and _unused(state, name, now=now, rate=rate):
            actions.append(Action("unload", name))
            spare -= 1
    return actions


def wanted_awake(pool: Pool, capacity: PoolCapacity | None, *, now: datetime) -> set[str]:
    """The endpoints that are to be awake: at least `min_awake`; all while there is no valid message of `capacity`."""
    names = [endpoint.name for endpoint in pool.endpoints]
    if capacity is None or now > capacity.valid_until or not pool.sleep:
        return set(names)
    wanted = set(names) & set(capacity.awake)
    others = [name for name in names if name not in wanted]
    return wanted | set(others[: max(0, pool.min_awake - len(wanted))])


def _unused(state: PoolState, endpoint: str, *, now: datetime, rate: float) -> bool:
    """Whether every instance has reported, since the endpoint was released, that it has nothing running there."""
    released = state.released.get(endpoint)
    if released is None:
        return False
    oldest = now - timedelta(seconds=REPORT_WALL_S * rate)
    since = released + timedelta(seconds=DRAIN_WALL_S * rate)
    loads = [
        (report.at, pool.endpoints[endpoint].in_flight)
        for report in state.reports
        if report.at >= oldest and not report.final
        for pool in report.pools
        if pool.pool == state.pool.name and endpoint in pool.endpoints
    ]
    # Without any report the load is unknown.
    return bool(loads) and all(at >= since and in_flight == 0 for at, in_flight in loads)


# ------------------------------------------------------------------------------------------------------- the topics


class Topics:
    """The newest messages of `capacity` and `load-reports`, for some pools."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = {pool.name: pool for pool in pools}
        self._capacity: dict[str, PoolCapacity] = {}
        self._released: dict[str, dict[str, datetime]] = {name: {} for name in self._pools}
        self._reports: dict[str, LoadReport] = {}

    def receive(self, message: PoolCapacity | LoadReport) -> None:
        """Take a message, in the order of its topic."""
        if isinstance(message, LoadReport):
            self._reports[message.instance] = message
            return
        pool = self._pools.get(message.pool)
        if pool is None:
            return
        earlier = self._capacity.get(message.pool)
        # While no message was valid, every endpoint was in use.
        continued = earlier is not None and message.at <= earlier.valid_until
        released = self._released[message.pool] if continued else {}
        self._released[message.pool] = {
            endpoint.name: released.get(endpoint.name, message.at)
            for endpoint in pool.endpoints
            if endpoint.name not in message.awake
        }
        self._capacity[message.pool] = message

    def state(self, pool: Pool, servers: Mapping[str, "Server"]) -> PoolState:
        """What is known of a pool.

        Args:
            servers: by endpoint.
        """
        names = [endpoint.name for endpoint in pool.endpoints]
        return PoolState(
            pool=pool,
            capacity=self._capacity.get(pool.name),
            released=self._released[pool.name],
            reports=tuple(self._reports.values()),
            loaded={name for name in names if servers[name].loaded},
            unknown={name for name in names if servers[name].busy or servers[name].loaded is None},
        )

    def forget(self, before: datetime) -> None:
        """Forget the reports from before an event time, and those of instances that have stopped."""
        self._reports = {
            name: report for name, report in self._reports.items() if report.at >= before and not report.final
        }

    async def read(self, kafka: KafkaSettings, clock: Clock) -> None:
        """Read the topics from their start until cancelled; keeps trying while Kafka is unavailable."""
        retry = Backoff()
        while True:
            try:
                await self._read(kafka, clock, retry)
            except KafkaError as error:
                _log.warning("kafka_unavailable", error=str(error) or type(error).__name__, retry_s=retry.grow())
                await asyncio.sleep(retry.wait_s)

    async def _read(self, kafka: KafkaSettings, clock: Clock, retry: "Backoff") -> None:
        specs = {kafka.topic(spec): spec for spec in (CAPACITY, LOAD_REPORTS)}
        consumer = AIOKafkaConsumer(
            *specs,
            **kafka.client_options(),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=100,
            retry_backoff_ms=500,
        )
        try:
            await consumer.start()
            retry.reset()
            async for record in consumer:
                try:
                    message = parse_record(specs[record.topic], record, clock)
                except PoisonMessageError as error:
                    _log.warning("invalid_message", topic=record.topic, offset=record.offset, error=error.detail)
                    continue
                if isinstance(message, PoolCapacity | LoadReport):
                    self.receive(message)
        finally:
            await consumer.stop()


# ------------------------------------------------------------------------------------------------------ the servers


class Backoff:
    """Growing waits between attempts, wall seconds."""

    def __init__(self) -> None:
        self.wait_s = 0.0

    def grow(self) -> float:
        """Return the next wait."""
        self.wait_s = min(LONGEST_RETRY_S, 2 * self.wait_s) or FIRST_RETRY_S
        return self.wait_s

    def reset(self) -> None:
        """Begin with the shortest wait again."""
        self.wait_s = 0.0


class Server:
    """The model of one endpoint, loaded and unloaded by one call at a time.

    Attributes:
        loaded: whether the model is loaded; None while it is unknown.
        put_to_sleep: the model is unloaded, and this process did it.
    """

    def __init__(self, pool: Pool, endpoint: Endpoint) -> None:
        self.loaded: bool | None = None
        self.put_to_sleep = False
        self._name = endpoint.name
        self._model = pool.triton_model
        self._client = InferenceServerClient(endpoint.grpc, channel_args=CHANNEL_OPTIONS)
        self._running: asyncio.Task[None] | None = None
        self._retry = Backoff()
        self._next_check = 0.0

    @property
    def busy(self) -> bool:
        """Whether a call is running, or is not to be repeated yet."""
        return self._running is not None and not self._running.done()

    def check(self) -> None:
        """Ask the server, if it is time, whether the model is loaded; does not wait for the answer."""
        if not self.busy and time.monotonic() >= self._next_check:
            self._start(self._check())

    def act(self, what: What) -> None:
        """Load or unload the model; does not wait until that is done."""
        if not self.busy:
            self._start(self._load() if what == "load" else self._unload())

    async def finish(self) -> None:
        """Load the model if this process has unloaded it, and disconnect."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_CALL_TIMEOUT_S):
                while self.put_to_sleep:
                    await self._attempt(self._load())
        await self._client.close()

    def _start(self, call: Coroutine[None, None, None]) -> None:
        self._running = asyncio.create_task(self._attempt(call))

    async def _attempt(self, call: Coroutine[None, None, None]) -> None:
        try:
            await call
        except InferenceServerException as error:
            # What the failed call has done is unknown; the next check shows it.
            self.loaded = None
            wait_s = self._retry.grow()
            _log.warning("triton_failed", endpoint=self._name, error=error.message(), retry_s=wait_s)
            await asyncio.sleep(wait_s)
            self._next_check = 0.0
        else:
            self._retry.reset()
            self._next_check = time.monotonic() + CHECK_S

    async def _check(self) -> None:
        self.loaded = await self._client.is_model_ready(self._model, client_timeout=CHECK_TIMEOUT_S)
        if self.loaded:
            self.put_to_sleep = False

    async def _load(self) -> None:
        began = time.monotonic()
        await self._client.load_model(self._model, client_timeout=LOAD_TIMEOUT_S)
        self.loaded, self.put_to_sleep = True, False
        _log.info("awake", endpoint=self._name, loading_s=round(time.monotonic() - began, 2))

    async def _unload(self) -> None:
        self.put_to_sleep = True
        await self._client.unload_model(self._model, client_timeout=CHECK_TIMEOUT_S)
        self.loaded = False
        _log.info("asleep", endpoint=self._name)


async def run(fleet: Fleet, kafka: KafkaSettings, clock: Clock, stop: asyncio.Event) -> None:
    """Put endpoints to sleep and wake them until `stop` is set, then wake those that were put to sleep."""
    pools = [pool for pool in fleet.pools if pool.sleep]
    servers = {endpoint.name: Server(pool, endpoint) for pool in pools for endpoint in pool.endpoints}
    topics = Topics(pools)
    _log.info("started", pools=[pool.name for pool in pools], endpoints=list(servers))
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(topics.read(kafka, clock))
        while not stop.is_set():
            now = clock.now()
            topics.forget(now - timedelta(seconds=REPORT_WALL_S * clock.rate))
            for pool in pools:
                for action in decide(topics.state(pool, servers), now=now, rate=clock.rate):
                    servers[action.endpoint].act(action.what)
            for server in servers.values():
                server.check()
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await stop.wait()
        reading.cancel()
    await asyncio.gather(*(server.finish() for server in servers.values()))
    _log.info("stopped")


def main() -> None:
    """Run until SIGINT or SIGTERM."""
    try:
        logs, kafka, clock = LogSettings(), KafkaSettings(), Clock.from_environment()
        fleet = load_fleet(FleetSettings().file)
    except ValidationError as error:
        sys.exit(printable(f"sleeper: {describe(error, root=error.title)}", keep="\n"))
    except (ClockConfigurationError, FleetError) as error:
        sys.exit(printable(f"sleeper: {error}", keep="\n"))
    configure_logging("sleeper", logs)

    async def until_signal() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await run(fleet, kafka, clock, stop)

    asyncio.run(until_signal())


if __name__ == "__main__":
    main()
