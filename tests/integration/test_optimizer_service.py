"""The optimizer as a process, on real Kafka and PostgreSQL."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from pydantic import SecretStr
from typer.testing import CliRunner

from deploy.local.postgres import create_database
from deploy.local.processes import Supervisor, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from services.optimizer import migrations
from services.optimizer.promise import Account, Period, Sums
from services.optimizer.store import ACCOUNT_RETENTION, Store
from shared.kafka.admin import create_topics
from shared.messages import (
    CarbonIntensity,
    EndpointCurve,
    EndpointLoad,
    EvaluationCost,
    Footprint,
    GroupEvidence,
    IntensityPoint,
    LoadReport,
    Message,
    PackedArray,
    Policy,
    PoolCapacity,
    PoolLoad,
    PromptGrouping,
    Quality,
    QualityCount,
)
from shared.runtime.database import DatabaseStatus, migrate, open_pool
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import (
    CAPACITY,
    CARBON_INTENSITY,
    FOOTPRINTS,
    LOAD_REPORTS,
    POLICIES,
    POWER_CURVES,
    PROMPT_GROUPS,
    QUALITY,
    TopicSpec,
)
from tests.support.deadlines import DEADLINE_S
from tests.support.fleets import fleet_toml
from tests.support.processes import leader
from tools.cli.main import app

pytestmark = pytest.mark.integration

LEVELS = ("L0", "L1")
FLEET = fleet_toml(["127.0.0.1:9"], levels=LEVELS)
PACKED = fleet_toml(["127.0.0.1:9"] * 3, levels=LEVELS, pool='dispatch = "pack"\ntarget_batch = 8\nsleep = true')
NOW = datetime.now(UTC)


def intensity(value: float) -> CarbonIntensity:
    hour = NOW.replace(minute=0, second=0, microsecond=0)
    history = [IntensityPoint(at=hour - timedelta(hours=48 - n), intensity_g_per_kwh=100.0 + 4 * n) for n in range(48)]
    latest = IntensityPoint(at=hour, intensity_g_per_kwh=value)
    return CarbonIntensity(zone="GB", latest=latest, history=history, source="test", published_at=datetime.now(UTC))


def footprint(number: int, level: str, *, model: str = "m") -> Footprint:
    """Of a call that was attributed 1000 J at L0 and 300 J at L1."""
    return Footprint(
        request_id=f"{level}-{number}", purpose="request", model=model, group="qa", pool="p", level=level, zone="GB",
        endpoint="e0", started_at=NOW, finished_at=NOW, processing_s=4.0 if level == "L0" else 1.0,
        completion_tokens=10, energy_j=1_000.0 if level == "L0" else 300.0, embodied_g=0.0,
    )  # fmt: skip


def quality(name: str, *, successes: dict[str, float]) -> Quality:
    counts = [
        QualityCount(group="qa", option=f"p/{level}", metric="preference", successes=won, trials=100)
        for level, won in successes.items()
    ]
    cost = EvaluationCost(generations=1, judgements=1, completion_tokens=1, processing_s=1.0)
    return Quality(
        evaluation_id=name, model="m", evaluated_at=NOW, trigger="first", counts=counts, prompts=100, abstentions=0,
        cost=cost,
    )  # fmt: skip


def grouping(*, learned_at: datetime) -> PromptGrouping:
    """Two groups: L0 is preferred in the first, L1 in the second."""
    counts = [
        QualityCount(group=group, option=f"p/{level}", metric="preference", successes=won, trials=100)
        for group, row in {"v.00": {"L0": 90, "L1": 10}, "v.01": {"L0": 20, "L1": 80}}.items()
        for level, won in row.items()
    ]
    return PromptGrouping(
        model="m", version="v", learned_at=learned_at, prompts=200, names=("v.00", "v.01"), features=1,
        arrays={"weights": PackedArray(dtype="<f4", shape=(0,), data="")}, traffic={"v.00": 0.5, "v.01": 0.5},
        evidence=(GroupEvidence(evaluated_at=learned_at, counts=counts),),
    )  # fmt: skip


@pytest.fixture
async def other_database(database: DatabaseSettings) -> AsyncIterator[DatabaseSettings]:
    """A second database, of another fleet; dropped after the test."""
    url = f"{database.url.get_secret_value()}b"
    await create_database(url)
    yield database.model_copy(update={"url": SecretStr(url)})
    connection = await asyncpg.connect(database.url.get_secret_value())
    try:
        await connection.execute(f'DROP DATABASE "{url.rpartition("/")[2]}" WITH (FORCE)')
    finally:
        await connection.close()


class Peers:
    """The other services."""

    def __init__(
        self, kafka: KafkaSettings, producer: AIOKafkaProducer, consumer: AIOKafkaConsumer, plans: AIOKafkaConsumer
    ) -> None:
        self.kafka, self.producer, self.consumer, self.plans = kafka, producer, consumer, plans

    async def send(self, spec: TopicSpec, key: str, *messages: Message) -> None:
        for message in messages:
            await self.producer.send(self.kafka.topic(spec), message.model_dump_json().encode(), key=key.encode())
        await self.producer.flush()

    async def policy(self, wanted, *, within_s: float = DEADLINE_S) -> Policy:
        async with asyncio.timeout(within_s):
            async for record in self.consumer:
                found = Policy.model_validate_json(record.value)
                if wanted(found):
                    return found
        raise AssertionError("unreachable")

    async def versions(self) -> list[int]:
        """The versions of all policies so far."""
        (partition,) = self.consumer.assignment()
        (end,) = (await self.consumer.end_offsets([partition])).values()
        await self.consumer.seek_to_beginning(partition)
        found: list[int] = []
        async with asyncio.timeout(DEADLINE_S):
            while await self.consumer.position(partition) < end:
                found.append(Policy.model_validate_json((await self.consumer.getone()).value).version)
        return found

    async def plan(self, wanted, *, within_s: float = DEADLINE_S) -> PoolCapacity:
        async with asyncio.timeout(within_s):
            async for record in self.plans:
                found = PoolCapacity.model_validate_json(record.value)
                if wanted(found):
                    return found
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def reporting(self, *in_flight: int) -> AsyncIterator[None]:
        """A router that has this many requests in flight on e0, e1, ..."""

        async def report() -> None:
            while True:
                await self.send(LOAD_REPORTS, "router-1", load_report(*in_flight))
                await asyncio.sleep(0.3)

        task = asyncio.create_task(report())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def peers(kafka: KafkaSettings) -> AsyncIterator[Peers]:
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    policies, plans = (
        AIOKafkaConsumer(kafka.topic(spec), bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest")
        for spec in (POLICIES, CAPACITY)
    )
    clients = (producer, policies, plans)
    for client in clients:
        await client.start()
    try:
        yield Peers(kafka, producer, policies, plans)
    finally:
        for client in clients:
            await client.stop()


def start(
    supervisor: Supervisor, kafka: KafkaSettings, database: DatabaseSettings, fleet: Path, **settings: str
) -> str:
    name = f"{kafka.topic_prefix}optimizer-{time.monotonic_ns()}"
    environment = ServiceEnvironment(
        bootstrap_servers=kafka.bootstrap_servers,
        topic_prefix=kafka.topic_prefix,
        database_url=database.url.get_secret_value(),
        fleet_file=fleet,
        clock={},
    )
    settings = {
        "SPROUT_KAFKA_GROUP_PREFIX": kafka.group_prefix,
        "SPROUT_OPTIMIZER_ESTIMATES_INTERVAL_MIN": "0.001",
        **settings,
    }
    (port,) = free_ports(1)
    supervisor.start(service_spec("optimizer", port=port, environment=environment, settings=settings, name=name))
    return name


def curve(endpoint: str) -> EndpointCurve:
    """At a batch of 8 a step takes 0.1 s and 30 J, of which 10 J are idle power: 3.75 J a token."""
    return EndpointCurve(
        endpoint=endpoint, pool="p", at=NOW, idle_w=100.0, step_j=12.0, token_j=1.0, step_s=0.06, token_s=0.005,
        identifiable=True, intervals=100, mean_batch=4.0,
    )  # fmt: skip


def load_report(*in_flight: int, arrivals: int = 2) -> LoadReport:
    endpoints = {f"e{place}": EndpointLoad(in_flight=number) for place, number in enumerate(in_flight)}
    load = PoolLoad(pool="p", arrivals=arrivals, waiting=0, endpoints=endpoints)
    return LoadReport(
        instance="router-1", service="router", at=datetime.now(UTC), interval_s=0.3, share=1.0, pools=(load,)
    )


async def explained(kafka: KafkaSettings, expected: Policy) -> None:
    """`sprout policy explain` finds the policy on its topic and rebuilds the program that it was solved from."""
    arguments = ["policy", "explain", "m", "--json", "--version", str(expected.version)]
    env = {"SPROUT_KAFKA_TOPIC_PREFIX": kafka.topic_prefix}
    result = await asyncio.to_thread(
        CliRunner().invoke, app, [*arguments, "--bootstrap", kafka.bootstrap_servers], env=env
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["rebuilt_g_per_request"] == pytest.approx(expected.expected_g_per_request, rel=1e-6)
    assert found["probabilities"]["qa"] == pytest.approx(expected.row("qa"))
    (limit,) = found["limits"]
    assert limit["slack"] == pytest.approx(0.0, abs=1e-4)
    assert limit["carbon_points_per_point"] > 0.0


async def test_evidence_becomes_a_policy_and_a_restart_continues_where_it_was(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    name = start(supervisor, kafka, database, fleet)
    try:
        async with peers(kafka) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            await around.send(FOOTPRINTS, "f", footprint(0, "L0", model="unknown"))
            for level in ("L0", "L1"):
                await around.send(FOOTPRINTS, "f", *(footprint(n, level) for n in range(40)))
            cautious = await around.policy(lambda one: one.inputs.weights.get("qa") == 1.0)
            assert cautious.status == "reference"
            assert cautious.overall == cautious.row("qa") == {"p/L0": 1.0}
            assert "judged prompts" in cautious.reason or "footprints" in cautious.reason

            await around.send(QUALITY, "m", quality("e1", successes={"p/L0"[2:]: 60, "L1": 40}))
            bold = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
            assert bold.status == "optimal"
            assert bold.bounds["preference"] == pytest.approx(0.9)
            assert bold.expected_quality["preference"] == pytest.approx(0.9, abs=1e-6)
            assert bold.row("qa")["p/L1"] == pytest.approx(0.161, abs=0.02)  # 0.3 without a safety margin
            assert bold.expected_g_per_request < bold.reference_g_per_request
            assert bold.version > cautious.version
            await explained(kafka, bold)

            supervisor.kill(name)
            await around.send(FOOTPRINTS, "f", *(footprint(n, "L0") for n in range(40)))  # redelivered
            name = start(supervisor, kafka, database, fleet)
            await around.send(CARBON_INTENSITY, "GB", intensity(100.0))
            clean = await around.policy(lambda one: one.version > bold.version)
            assert clean.version == bold.version + 1
            assert clean.inputs.k0_g_per_kwh == 100.0  # the last policy was published, so it was not repeated
            assert clean.bounds["preference"] == 1.0
            assert clean.row("qa") == {"p/L0": 1.0}
            assert clean.inputs.estimates["qa"]["p/L0"].requests == pytest.approx(40.0, rel=0.01)

            learned = grouping(learned_at=datetime.now(UTC))
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            await around.send(PROMPT_GROUPS, "m", learned)
            grouped = await around.policy(lambda one: one.group_version == "v")
            assert grouped.groups.keys() == {"v.00", "v.01"}
            assert grouped.row("v.01").get("p/L1", 0.0) > grouped.row("v.00").get("p/L1", 0.0)

            supervisor.kill(name)
            name = start(supervisor, kafka, database, fleet)
            await around.send(CARBON_INTENSITY, "GB", intensity(250.0))
            again = await around.policy(lambda one: one.version > grouped.version)
            assert again.group_version == "v"  # it waited for the topic of prompt groups to be read
    finally:
        supervisor.stop(name)


async def test_a_fleet_without_verdicts_starts_with_what_another_one_knew(
    supervisor, kafka, database, other_database, tmp_path
):
    """`sprout policy export-prior` reads the policies of a running fleet; another optimizer begins with it."""
    fleet, prior = tmp_path / "fleet.toml", tmp_path / "prior.json"
    fleet.write_text(FLEET)
    names = [start(supervisor, kafka, database, fleet)]
    try:
        async with peers(kafka) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            for level in ("L0", "L1"):
                await around.send(FOOTPRINTS, "f", *(footprint(n, level) for n in range(40)))
            await around.send(QUALITY, "e1", quality("e1", successes={"L0": 60, "L1": 40}))
            known = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
        result = await asyncio.to_thread(
            CliRunner().invoke,
            app,
            ["policy", "export-prior", str(prior), "--bootstrap", kafka.bootstrap_servers],
            env={"SPROUT_KAFKA_TOPIC_PREFIX": kafka.topic_prefix, "SPROUT_FLEET_FILE": str(fleet)},
        )
        assert result.exit_code == 0, result.output

        prefix = f"{kafka.topic_prefix}other."
        other = kafka.model_copy(update={"topic_prefix": prefix, "group_prefix": prefix})
        await create_topics(other)
        settings = {"SPROUT_OPTIMIZER_PRIOR_FILE": str(prior)}
        names.append(start(supervisor, other, other_database, fleet, **settings))
        async with peers(other) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            await around.send(FOOTPRINTS, "f", *(footprint(n, "L0") for n in range(40)))
            first = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
            # 50 verdicts of the earlier fleet instead of its 100: the same means, a wider margin.
            assert first.inputs.estimates["qa"]["p/L1"].trials == pytest.approx(50.0)
            assert 0.05 < first.row("qa")["p/L1"] < known.row("qa")["p/L1"]
            saved = [1.0 - one.expected_g_per_request / one.reference_g_per_request for one in (first, known)]
            assert 0.0 < saved[0] < saved[1]
    finally:
        for name in names:
            supervisor.stop(name)


async def test_footprints_that_follow_an_evaluation_make_a_policy_at_once(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    settings = {"SPROUT_OPTIMIZER_ESTIMATES_INTERVAL_MIN": "600", "SPROUT_OPTIMIZER_EVALUATION_INTERVAL_S": "1"}
    name = start(supervisor, kafka, database, fleet, **settings)
    try:
        async with peers(kafka) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            await around.send(FOOTPRINTS, "f", *(footprint(n, "L0") for n in range(40)))
            # While the optimizer was away, two evaluations of the model came in: both count.
            await around.send(QUALITY, "e1", quality("e1", successes={"L0": 60, "L1": 40}))
            await around.send(QUALITY, "e2", quality("e2", successes={"L0": 60, "L1": 40}))
            first = await around.policy(lambda one: one.inputs.weights.get("qa") == 1.0)
            assert "footprints" in first.reason
            await around.send(FOOTPRINTS, "f", *(footprint(n, "L1") for n in range(40)))
            useful = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
            assert useful.inputs.estimates["qa"]["p/L1"].trials == pytest.approx(200.0, rel=0.01)
    finally:
        supervisor.stop(name)


async def test_of_two_optimizers_one_publishes_and_the_other_takes_over(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    names = [start(supervisor, kafka, database, fleet) for _ in range(2)]
    try:
        async with peers(kafka) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            for level in ("L0", "L1"):  # both copies count them
                await around.send(FOOTPRINTS, level, *(footprint(n, level) for n in range(40)))
            await around.send(QUALITY, "e1", quality("e1", successes={"L0": 60, "L1": 40}))
            before = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0.1)
            killed = await leader(supervisor, names)
            supervisor.kill(killed)
            (left,) = set(names) - {killed}
            assert await leader(supervisor, [left]) == left
            await around.send(CARBON_INTENSITY, "GB", intensity(100.0))
            after = await around.policy(lambda one: one.inputs.k0_g_per_kwh == 100.0)
            assert after.inputs.estimates["qa"]["p/L1"].requests == pytest.approx(40.0, rel=0.01)
            assert after.version > before.version
            versions = await around.versions()
            assert versions == list(range(1, after.version + 1))  # none twice
    finally:
        for name in set(names) & set(supervisor.names):
            supervisor.stop(name)


async def test_curves_and_load_reports_become_prices_and_awake_endpoints(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(PACKED)
    settings = {
        "SPROUT_OPTIMIZER_LOAD_EXPIRY_S": "1",
        "SPROUT_OPTIMIZER_CAPACITY_INTERVAL_S": "0.2",
        "SPROUT_OPTIMIZER_CAPACITY_DWELL_MIN": "0.05",
        "SPROUT_OPTIMIZER_PSEUDO_REQUESTS": "0.001",
    }
    name = start(supervisor, kafka, database, fleet, **settings)
    try:
        async with peers(kafka) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            for level in ("L0", "L1"):
                await around.send(FOOTPRINTS, "f", *(footprint(n, level) for n in range(40)))
            await around.send(QUALITY, "m", quality("e1", successes={"L0": 60, "L1": 40}))
            attributed = await around.policy(lambda one: one.inputs.weights.get("qa") == 1.0)
            assert attributed.inputs.prices["p"].basis == "attributed"
            assert "no power curve of its endpoints is known yet" in attributed.reason
            joules = attributed.inputs.estimates["qa"]["p/L0"].energy_kwh * 3.6e6
            assert joules == pytest.approx(1_000.0, rel=0.01)

            await around.send(POWER_CURVES, "e0", curve("e0"))
            priced = await around.policy(lambda one: one.inputs.prices["p"].basis == "average")
            price = priced.inputs.prices["p"]
            assert (price.batch, price.token_j) == (8.0, pytest.approx(3.75))
            cell = priced.inputs.estimates["qa"]["p/L0"]
            assert cell.energy_kwh * 3.6e6 == pytest.approx(10 * 3.75, rel=0.01)
            assert cell.server_s == pytest.approx(10 * 0.1 / 8, rel=0.01)

            async with around.reporting(6, 5, 0):
                plan = await around.plan(lambda one: True)
                # 11 requests and a margin of 2 * sqrt(11) need 3 endpoints with 8 each.
                assert (plan.target_batch, plan.in_flight, plan.endpoints_needed) == (8, 11, 3)
                assert plan.awake == ("e0", "e1", "e2")
            async with around.reporting(1, 0, 0):
                plan = await around.plan(lambda one: len(one.awake) == 1)
                assert plan.awake == ("e0",)
                assert len(plan.forecast) == 6

                supervisor.kill(name)
                name = start(supervisor, kafka, database, fleet, **settings)
                again = await around.plan(lambda one: one.at > plan.at)
                assert again.awake == ("e0",)
    finally:
        supervisor.stop(name)


async def test_the_arrivals_by_hour_of_day_are_stored(database):
    pool = await open_pool(database, schema="optimizer_profiles")
    try:
        await migrate(pool, schema="optimizer_profiles", package=migrations.__name__)
        store = Store(pool, status=DatabaseStatus(), remembered_footprints=1_000)
        assert await store.arrival_profiles() == {}
        for arrivals in (1.0, 2.0):
            profiles = {"p": {"12": [5.0, arrivals, 60.0]}, "q": {}}
            await store.put_arrival_profiles(profiles)
            assert await store.arrival_profiles() == profiles
    finally:
        await pool.close()


BY_PERIOD = {"SPROUT_OPTIMIZER_PROMISE": "period", "SPROUT_OPTIMIZER_XI": json.dumps({"preference": 0.1})}


async def test_a_period_that_ended_while_the_optimizer_was_away_is_closed(supervisor, kafka, database, tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET)
    name = start(supervisor, kafka, database, fleet, **BY_PERIOD)
    try:
        async with peers(kafka) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            for level in ("L0", "L1"):
                await around.send(FOOTPRINTS, "f", *(footprint(n, level) for n in range(40)))
            await around.send(QUALITY, "m", quality("e1", successes={"L0": 60, "L1": 40}))
            found = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
            promise = found.promise
            assert promise is not None
            assert promise.current.start <= NOW < promise.current.end
            assert promise.current.end - promise.current.start == timedelta(days=30)
            # This hour is one of the dirtiest: the others of the period need more than it has to give.
            assert found.bounds["preference"] == pytest.approx(0.9)
            assert 0.9 < promise.rest["preference"] < 1.0
            assert sum(hours.share for hours in found.inputs.later) > 0.9
            await explained(kafka, found)

            supervisor.kill(name)
            pool = await open_pool(database, schema="optimizer")
            try:
                await pool.execute("UPDATE promise_booked SET until = $1", promise.current.start - timedelta(hours=30))
            finally:
                await pool.close()
            name = start(supervisor, kafka, database, fleet, **BY_PERIOD)
            await around.send(CARBON_INTENSITY, "GB", intensity(100.0))
            closed = await around.policy(lambda one: one.version > found.version)
            assert closed.promise is not None
            assert closed.promise.previous is not None
            assert closed.promise.previous.end == closed.promise.current.start
            for account in (closed.promise.previous, closed.promise.current):
                assert account.requests > 0.0
                assert account.promised["preference"] == pytest.approx(found.bounds["preference"], abs=0.01)
    finally:
        supervisor.stop(name)


async def test_time_is_booked_once_into_an_account_that_outlives_its_process(database):
    pool = await open_pool(database, schema="optimizer_account")
    start_of_day = datetime(2026, 3, 2, tzinfo=UTC)
    until = start_of_day

    def book(account: Account) -> None:
        begin = account.booked_until or start_of_day
        account.booked_until = until
        if begin < until:
            account.add(begin, 10.0, promised={"preference": 0.95}, kept={"preference": 0.9})

    try:
        await migrate(pool, schema="optimizer_account", package=migrations.__name__)
        for hour in (1, 2):
            until = start_of_day + timedelta(hours=hour)
            store = Store(pool, status=DatabaseStatus(), remembered_footprints=1_000)
            # Two copies of the optimizer at once: the row of the model is locked.
            both = await asyncio.gather(*(store.book_promise("m", book, since=start_of_day) for _ in range(2)))
            for account in both:
                assert account.total(Period.at(start_of_day, days=1))["preference"] == Sums(
                    10.0 * hour, pytest.approx(9.5 * hour), pytest.approx(9.0 * hour)
                )
        until = start_of_day + ACCOUNT_RETENTION + timedelta(hours=1)
        await store.book_promise("m", book, since=until)
        # The row of the first hour is older than the retention; the time since the second one is booked at its start.
        hours = await pool.fetch("SELECT hour FROM promise_account ORDER BY hour")
        assert [row["hour"] for row in hours] == [start_of_day + timedelta(hours=hour) for hour in (1, 2)]
    finally:
        await pool.close()
