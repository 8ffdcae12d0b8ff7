"""The clock of the services jumps forward and back: none ends, all stay ready, and event time of messages does not run
backwards.

They run in this process, with a clock that the test moves; the ledger's meters are in `test_ledger_scraping`.
"""

import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaConsumer
from faststream.asgi import AsgiFastStream

from services import SERVICES
from services.carbon_feed.settings import CarbonFeedSettings
from services.evaluator.settings import EvaluatorSettings
from services.ledger.settings import LedgerSettings
from services.optimizer.settings import OptimizerSettings
from shared.fleet import load_fleet
from shared.messages import CarbonIntensity
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS, FOOTPRINTS, RESPONSES, SAMPLES
from tests.support.contract import EXAMPLES
from tests.support.deadlines import DEADLINE_S, until
from tests.support.evaluator import judged_fleet
from tests.support.router import ZONE, producing
from tests.support.traffic import committed

pytestmark = pytest.mark.integration

DAYS = 86_400.0
CONSUMED = (("evaluator", SAMPLES), ("optimizer", FOOTPRINTS), ("ledger.responses", RESPONSES))


class JumpingClock(Clock):
    """Shows wall time, 600 times as fast, and can be moved: an hour of the carbon intensity takes 6 s."""

    __slots__ = ("_offset_s",)

    def __init__(self) -> None:
        now_s = time.time()
        super().__init__(rate=600.0, origin_wall_s=now_s, origin_event_s=now_s)
        self.jump(0.0)

    def now_s(self) -> float:
        """Event time, seconds since the Unix epoch."""
        offset_s: float = object.__getattribute__(self, "_offset_s")
        return self.origin_event_s + (time.time() - self.origin_wall_s) * self.rate + offset_s

    def jump(self, offset_s: float) -> None:
        """Set how far the clock is ahead of one that was never moved."""
        object.__setattr__(self, "_offset_s", offset_s)


@pytest.fixture
def kept_alive() -> Iterator[None]:
    """A service of this process that fails asks it to end; the test reads of that in `/ready`."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


@asynccontextmanager
async def running(app: AsgiFastStream) -> AsyncIterator[httpx.AsyncClient]:
    """A service of this process, and a client of its HTTP interface."""
    async with app.lifespan_context():
        await app.start()
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
                yield client
        finally:
            await app.stop()


async def is_ready(client: httpx.AsyncClient) -> Any:
    return (await client.get("/ready")).json()


async def test_the_clock_jumps_forward_and_back_under_running_services(kept_alive, kafka, database, tmp_path):
    file = tmp_path / "fleet.toml"
    file.write_text(judged_fleet("127.0.0.1:9"))
    common = {"kafka": kafka, "fleet": load_fleet(file), "clock": (clock := JumpingClock())}
    feed = CarbonFeedSettings.model_validate({"providers": {ZONE: [{"kind": "constant", "intensity_g_per_kwh": 100}]}})
    settings = {"optimizer": OptimizerSettings(), "evaluator": EvaluatorSettings(), "ledger": LedgerSettings()}
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                running(SERVICES[name].load().build_app(settings=one, database=database, **common))
            )
            for name, one in settings.items()
        ]
        app = SERVICES["carbon_feed"].load().build_app(settings=feed, **common)
        clients.append(await stack.enter_async_context(running(app)))
        producer = await stack.enter_async_context(producing(kafka))
        intensities = await stack.enter_async_context(
            AIOKafkaConsumer(kafka.topic(CARBON_INTENSITY), **kafka.client_options(), auto_offset_reset="earliest")
        )
        times: list[datetime] = []
        for number, days in enumerate((0.0, 3.0, -3.0, 4.0)):
            clock.jump(days * DAYS)
            if days >= 0.0:  # before the last value nothing new is known
                begin = datetime.fromtimestamp(clock.now_s(), UTC) - timedelta(hours=1)
                times += await up_to(intensities, begin)
            for _, spec in CONSUMED:
                await producer.post(spec, EXAMPLES[spec.name], f"{number}")
            for group, spec in CONSUMED:
                await until(
                    lambda group=group, spec=spec: committed(kafka, group, topic=spec),
                    lambda found: all(offset == end for offset, end in found.values() if end),
                )
            for client in clients:
                await until(lambda client=client: is_ready(client), lambda found: found["status"] == "ready")
        assert times == sorted(set(times))
        assert times[-1] - times[0] > timedelta(days=3)
        assert await dead_letters(kafka) == 0


async def up_to(consumer: AIOKafkaConsumer, at: datetime) -> list[datetime]:
    """The times of the intensities up to the first that is of a time or later."""
    found: list[datetime] = []
    while not found or found[-1] < at:
        (records,) = (await consumer.getmany(timeout_ms=int(DEADLINE_S * 1_000), max_records=1)).values()
        found += [CarbonIntensity.model_validate_json(one.value).latest.at for one in records]
    return found


async def dead_letters(kafka: KafkaSettings) -> int:
    return sum(end for _, end in (await committed(kafka, "nobody", topic=DEAD_LETTERS)).values())
