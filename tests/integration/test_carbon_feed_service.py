"""carbon_feed as a process on real Kafka: a recorded day is replayed; an invalid configuration is rejected."""

import asyncio
import json
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer

from deploy.local.processes import ProcessFailedError, Supervisor, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from shared.messages import CarbonIntensity
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from shared.topics import CARBON_INTENSITY
from tests.support.deadlines import DEADLINE_S, until
from tests.support.processes import leader
from tests.support.router import ZONE, fleet_toml

pytestmark = pytest.mark.integration

DAY = datetime(2024, 2, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
GAP = DAY + 3 * HOUR
HOURS = 120
"""Four minutes at the rate of these tests: services start slowly on a busy machine."""
HEADER = "Datetime (UTC),Zone Id,Carbon Intensity gCO₂eq/kWh (direct)\n"


def write_trace(path: Path, *, hours_before: int = 48) -> Path:
    """Some hours before and `HOURS` from `DAY` on, each hour its own value, one hour without."""
    hours = [DAY + number * HOUR for number in range(-hours_before, HOURS)]
    rows = [f"{at:%Y-%m-%d %H:%M:%S},{ZONE},{'' if at == GAP else 200 + at.hour}\n" for at in hours]
    path.write_text(HEADER + "".join(rows), encoding="utf-8")
    return path


class Feeds:
    """Starts carbon_feed as a process."""

    def __init__(self, supervisor: Supervisor, kafka: KafkaSettings, folder: Path) -> None:
        self.supervisor, self.kafka, self.folder = supervisor, kafka, folder
        self.name = f"{kafka.topic_prefix}carbon_feed"
        self.copies: list[str] = []
        (folder / "fleet.toml").write_text(fleet_toml(["127.0.0.1:9"]))

    def start(self, chain: list[dict[str, object]], *, clock: Clock, zone: str = ZONE, copy: str = "") -> str:
        name = self.name + copy
        self.copies.append(name)
        environment = ServiceEnvironment(
            bootstrap_servers=self.kafka.bootstrap_servers,
            topic_prefix=self.kafka.topic_prefix,
            database_url="",
            fleet_file=self.folder / "fleet.toml",
            clock=clock.environment(),
        )
        settings = {
            "SPROUT_KAFKA_GROUP_PREFIX": self.kafka.group_prefix,
            "SPROUT_CARBON_FEED_PROVIDERS": json.dumps({zone: chain}),
            "SPROUT_CARBON_FEED_ELECTRICITY_MAPS_TOKEN": "secret-token",
            "SPROUT_CARBON_FEED_ELECTRICITY_MAPS_URL": "http://127.0.0.1:9",  # nobody listens there
        }
        (port,) = free_ports(1)
        self.supervisor.start(
            service_spec("carbon_feed", port=port, environment=environment, settings=settings, name=name)
        )
        return name

    async def leader(self, *, other_than: str = "") -> str:
        """The copy that is the leader, once another one than this is."""
        return await leader(self.supervisor, [name for name in self.copies if name != other_than])

    async def logged(self, text: str, *, name: str = "") -> None:
        await until(lambda: self.log(name), lambda log: text in log)

    def log(self, name: str = "") -> str:
        return self.supervisor.process(name or self.name).log.read_text()


@pytest.fixture
def feeds(supervisor: Supervisor, kafka: KafkaSettings, tmp_path: Path):
    made = Feeds(supervisor, kafka, tmp_path)
    yield made
    for name in made.copies:
        if name in supervisor.names:
            supervisor.stop(name)


async def read(
    kafka: KafkaSettings, *, messages: int = 0, published_after: datetime | None = None, source: str = ""
) -> list[CarbonIntensity]:
    """The first messages of the zone, each is keyed by it: so many, or up to one that was published after a time, or
    to one of a source.
    """
    found: list[CarbonIntensity] = []
    async with (
        asyncio.timeout(DEADLINE_S),
        AIOKafkaConsumer(
            kafka.topic(CARBON_INTENSITY), bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest"
        ) as consumer,
    ):
        async for record in consumer:
            assert record.key == ZONE.encode()
            found.append(CarbonIntensity.model_validate_json(record.value))
            last = found[-1]
            if len(found) == messages or (published_after and last.published_at > published_after):
                return found
            if last.source == source:
                return found
    raise AssertionError("unreachable")


async def test_a_recorded_day_is_replayed_in_event_time_with_its_gaps(feeds, kafka, tmp_path):
    clock = Clock.starting(DAY, rate=1800.0)
    feeds.start([{"kind": "csv", "path": str(write_trace(tmp_path / "trace.csv"))}], clock=clock)
    messages = await read(kafka, messages=4)
    at = [message.latest.at for message in messages]
    assert at == sorted(set(at))
    assert GAP not in at
    for message in messages:
        assert message.latest.intensity_g_per_kwh == 200 + message.latest.at.hour
        assert message.latest.at <= message.published_at
        assert all(point.at < message.latest.at for point in message.history)
    # Of the hours that a busy machine oversleeps only the last one is published alone, and all are in the history.
    first, last = DAY - 48 * HOUR, messages[-1].latest.at
    hours = [first + number * HOUR for number in range((last - first) // HOUR)]
    assert [point.at for point in messages[-1].history] == [hour for hour in hours if hour != GAP]
    assert messages[0].history[0].at == first


async def test_if_the_live_provider_cannot_be_reached_the_next_one_is_used_and_no_secret_is_logged(feeds, kafka):
    feeds.start([{"kind": "electricity_maps"}, {"kind": "constant", "intensity_g_per_kwh": 412.5}], clock=Clock())
    (message,) = await read(kafka, messages=1)
    assert (message.source, message.latest.intensity_g_per_kwh) == ("constant", 412.5)
    await feeds.logged("electricity_maps cannot be reached")
    assert "secret-token" not in feeds.log()


async def test_a_restart_keeps_the_window_although_the_provider_offers_a_shorter_one(feeds, kafka, tmp_path):
    clock = Clock.starting(DAY, rate=1800.0)
    name = feeds.start([{"kind": "csv", "path": str(write_trace(tmp_path / "long.csv"))}], clock=clock)
    (before,) = await read(kafka, messages=1)
    feeds.supervisor.stop(name)
    short = write_trace(tmp_path / "short.csv", hours_before=1)
    feeds.start([{"kind": "csv", "path": str(short)}], clock=clock)
    after = (await read(kafka, source="csv:short.csv"))[-1]
    assert after.latest.at > before.latest.at
    assert after.history[0].at == before.history[0].at == DAY - 48 * HOUR


async def test_of_two_feeds_one_publishes_and_the_other_takes_over(feeds, kafka, tmp_path):
    clock = Clock.starting(DAY, rate=1800.0)
    chain = [{"kind": "csv", "path": str(write_trace(tmp_path / "trace.csv")), "repeat": True}]
    names = {feeds.start(chain, clock=clock, copy=copy) for copy in ("-a", "-b")}
    frozen = await feeds.leader()
    (standby,) = names - {frozen}
    process = feeds.supervisor.process(frozen)
    process.signal(signal.SIGSTOP)
    try:
        assert await feeds.leader(other_than=frozen) == standby
        await read(kafka, published_after=clock.now())
    finally:
        process.signal(signal.SIGCONT)
    await feeds.logged("re-joining group", name=frozen)
    killed = await feeds.leader()
    feeds.supervisor.kill(killed)
    await feeds.leader(other_than=killed)
    messages = await read(kafka, published_after=clock.now())
    published = [message.latest.at for message in messages]
    assert published == sorted(set(published))  # none twice, none of them late


@pytest.mark.parametrize(
    ("trace", "zone", "message"),
    [
        ("", ZONE, "is empty: it needs a header and one row an hour"),
        (HEADER, ZONE, "has a header and no rows"),
        (HEADER + "2024-02-08 00:00:00,ELSEWHERE,1\n", ZONE, f"has no zone '{ZONE}'; it has ELSEWHERE"),
        (HEADER + f"2024-02-08 00:00:00,{ZONE},\n", "ELSEWHERE", f"zones without a provider: {ZONE}"),
    ],
)
def test_an_invalid_configuration_is_named_at_the_start(feeds, tmp_path, trace, zone, message):
    path = tmp_path / "trace.csv"
    path.write_text(trace, encoding="utf-8")
    with pytest.raises(ProcessFailedError, match=message):
        feeds.start([{"kind": "csv", "path": str(path)}], clock=Clock(), zone=zone)
