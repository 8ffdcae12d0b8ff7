"""The ledger as a process, on real Kafka, PostgreSQL, and a real Triton server with the stand-in model."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer

from deploy.local.config import default_state_dir
from deploy.local.postgres import program_folder
from deploy.local.processes import ProcessSpec, Supervisor, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from deploy.local.triton import free_triton_ports, install, metrics_url, ready_probe
from deploy.triton.models import stand_in_llm
from deploy.triton.repository import write_repository
from shared.inference.base import GenerationError, GenerationParameters, generate
from shared.inference.triton.client import TritonClient
from shared.messages import (
    CarbonIntensity,
    Decision,
    EndpointCurve,
    EndpointLoad,
    ErrorDetail,
    Footprint,
    GenerationResponse,
    IntensityPoint,
    LoadReport,
    PoolLoad,
    Timing,
    Usage,
    UsageRecord,
)
from shared.runtime.clock import Clock
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import (
    CARBON_INTENSITY,
    DEAD_LETTERS,
    FOOTPRINTS,
    LOAD_REPORTS,
    POWER_CURVES,
    RESPONSES,
    USAGE,
    TopicSpec,
)
from tests.support.deadlines import DEADLINE_S, until
from tests.support.router import LEVELS, MODEL, ZONE, Producer, producing, question, reading, write_workload

pytestmark = pytest.mark.integration

RATE = 20.0
SETTLE_DELAY_S = 10.0 * RATE
"""Longer than a busy machine stands still between the end of a call and its message in Kafka."""
IDLE_W = 55.0
IN_FLIGHT = 2
"""Requests of `serve` at once."""
INTENSITY = 300.0
FLEET = """
[[directives]]
level = "L0"
[[models]]
name = "{model}"
chat_template = "llama-2"
[[pools]]
name = "p"
model = "{model}"
zone = "{zone}"
pue = 1.5
embodied_g_per_s = 0.01
{idle}
[[pools.endpoints]]
name = "e0"
grpc = "{grpc}"
metrics = "{metrics}"
gpus = ["stand-in-{model}"]
"""
SYSTEM = {"L0": "", "L1": "Always answer briefly.", "L2": "Always answer very briefly."}


@dataclass(frozen=True)
class Server:
    grpc: str
    metrics: str
    clock: Clock


@pytest.fixture(scope="module")
def server(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    installation = install(default_state_dir(), say=print)
    workload = write_workload(folder / "w.jsonl")
    write_repository(folder / "models", [stand_in_llm(workload, model=MODEL, idle_power_w=IDLE_W)])
    ports, clock = free_triton_ports(), Clock.starting(datetime(2024, 2, 10, tzinfo=UTC), rate=RATE)
    supervisor.start(
        ProcessSpec(
            name="ledger-triton",
            command=tuple(installation.command(folder / "models", ports)),
            environment=installation.environment(clock.environment()),
            ready=ready_probe(ports),
        )
    )
    yield Server(f"127.0.0.1:{ports.grpc}", metrics_url(ports), clock)
    supervisor.stop("ledger-triton")


class Ledgers:
    """Ledger processes, and their database."""

    def __init__(
        self, supervisor: Supervisor, kafka: KafkaSettings, database: DatabaseSettings, clock: Clock, fleet: Path
    ) -> None:
        self._supervisor, self._kafka, self._database = supervisor, kafka, database
        self._clock, self._fleet, self._numbers = clock, fleet, count()
        self.names: list[str] = []

    def start(self, **changes: str) -> str:
        (port,) = free_ports(1)
        name = f"{self._kafka.topic_prefix}ledger{next(self._numbers)}"
        environment = ServiceEnvironment(
            bootstrap_servers=self._kafka.bootstrap_servers,
            topic_prefix=self._kafka.topic_prefix,
            database_url=self._database.url.get_secret_value(),
            fleet_file=self._fleet,
            clock=self._clock.environment(),
        )
        settings = {
            "SPROUT_KAFKA_GROUP_PREFIX": self._kafka.group_prefix,
            "SPROUT_LEDGER_SCRAPE_INTERVAL_S": "0.2",
            "SPROUT_LEDGER_SETTLE_INTERVAL_S": "0.3",
            "SPROUT_LEDGER_SETTLE_DELAY_S": str(SETTLE_DELAY_S),
        }
        self._supervisor.start(
            service_spec("ledger", port=port, environment=environment, settings=settings | changes, name=name)
        )
        self.names.append(name)
        return name

    def kill(self, name: str) -> None:
        self._supervisor.process(name).kill()

    def stop(self, name: str) -> None:
        self.names.remove(name)
        self._supervisor.stop(name)

    def run_postgres(self, program: str, *arguments: str) -> None:
        """Run a client program of PostgreSQL on the ledger's database."""
        url = self._database.url.get_secret_value()
        subprocess.run([program_folder() / program, "--dbname", url, *arguments], check=True)

    async def fetch(self, query: str) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(
            self._database.url.get_secret_value(), server_settings={"search_path": "ledger"}
        )
        try:
            return await connection.fetch(query)
        finally:
            await connection.close()

    async def until(self, query: str, wanted: object) -> None:
        await until(lambda: self.fetch(query), lambda rows: rows[0][0] == wanted)


@pytest.fixture
def ledgers(
    supervisor: Supervisor, kafka: KafkaSettings, database: DatabaseSettings, server: Server, tmp_path: Path
) -> Iterator[Ledgers]:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        FLEET.format(model=MODEL, zone=ZONE, grpc=server.grpc, metrics=server.metrics, idle=f"idle_power_w = {IDLE_W}")
    )
    running = Ledgers(supervisor, kafka, database, server.clock, fleet)
    yield running
    for name in list(running.names):
        running.stop(name)


@pytest.fixture
async def producer(kafka: KafkaSettings) -> AsyncIterator[Producer]:
    async with producing(kafka) as made:
        yield made


async def give_intensity(producer: Producer, clock: Clock) -> None:
    at = clock.now() - timedelta(minutes=30)
    point = IntensityPoint(at=at, intensity_g_per_kwh=INTENSITY)
    message = CarbonIntensity(zone=ZONE, latest=point, source="test", published_at=at)
    await producer.post(CARBON_INTENSITY, message, ZONE)


async def serve(
    producer: Producer,
    server: Server,
    numbers: range,
    *,
    purpose: str = "request",
    tolerant: bool = False,
    expected: dict[str, float] | None = None,
) -> dict[str, float]:
    """Generate answers, and publish the messages of router or evaluator; returns the expected energy by id, J.

    Args:
        tolerant: answers may fail; these are not published.
        expected: what is returned, filled while the answers come.
    """
    expected = {} if expected is None else expected

    async def one(number: int) -> None:
        level = f"L{number % 3}"
        system = f"<<SYS>>\n{SYSTEM[level]}\n<</SYS>>\n\n" if SYSTEM[level] else ""
        prompt = f"<s>[INST] {system}{question(number % 40)} [/INST]"
        async with places:
            made = await generate(
                client, prompt, GenerationParameters(max_tokens=500), request_id=f"r{number}", timeout_s=DEADLINE_S
            )
        assert made.completion_tokens == LEVELS[level][0]
        expected[f"r{number}"] = made.completion_tokens * 6.0
        timing = {
            "started_at": made.started_at, "first_token_at": made.first_token_at, "finished_at": made.finished_at
        }  # fmt: skip
        if purpose == "request":
            response = GenerationResponse(
                request_id=f"r{number}", record=f"requests/0/{number}/1", model=MODEL, status="ok", text="...",
                finish_reason="cancelled" if number % 10 == 1 else "stop", endpoint="e0",
                decision=Decision(
                    source="policy", group="qa", pool="p", level=level, zone=ZONE, policy_version=3, propensity=0.25,
                    propensities={"p/L0": 0.75, f"p/{level}": 0.25},
                ),
                usage=Usage(
                    prompt_tokens=made.prompt_tokens, completion_tokens=made.completion_tokens, source="server"
                ),
                timing=Timing(received_at=made.started_at, **timing),
                requested_at=made.started_at, task="qa\x00", tenant="acme",
            )  # fmt: skip
            for _ in range(2):  # as after a double answer, which counts once
                await producer.post(RESPONSES, response, response.request_id)
        else:
            record = UsageRecord(
                id=f"r{number}", purpose="evaluation", evaluation_id="ev", model=MODEL, pool="p", level=level,
                zone=ZONE, endpoint="e0", group="qa", completion_tokens=made.completion_tokens, **timing,
            )  # fmt: skip
            await producer.post(USAGE, record, record.id)

    places = asyncio.Semaphore(IN_FLIGHT)
    async with TritonClient(server.grpc, model="ensemble", clock=server.clock) as client:
        done = await asyncio.gather(*(one(number) for number in numbers), return_exceptions=True)
        failed = [error for error in done if error is not None]
        if failed and not (tolerant and all(isinstance(error, GenerationError) for error in failed)):
            raise failed[0]
    return expected


PUBLISHED = "SELECT coalesce(sum(calls), 0)::int FROM chunks WHERE published"
BALANCE = """
SELECT (SELECT sum(server_s) FROM settled_calls) AS server_s, (SELECT sum(idle_s) FROM intervals) AS idle_s,
       (SELECT extract(epoch FROM max(finished_at) - min(started_at)) FROM intervals) AS length_s,
       (SELECT sum(metered_j) FROM intervals) AS metered, (SELECT sum(energy_j) FROM settled_calls) AS footprints,
       (SELECT sum(attributed_j) FROM intervals) AS attributed, (SELECT sum(idle_j) FROM intervals) AS idle,
       (SELECT sum(unattributed_j) FROM intervals) AS unattributed,
       (SELECT max(energy_j) FROM readings WHERE at <= (SELECT settled_until FROM meters))
           - (SELECT min(energy_j) FROM readings) AS counter
"""


async def test_every_metered_joule_is_accounted_and_each_call_gets_its_own_energy(kafka, ledgers, producer, server):
    await give_intensity(producer, server.clock)
    ledgers.start()
    expected = await serve(producer, server, range(60))
    expected |= await serve(producer, server, range(60, 90), purpose="evaluation")
    refused = GenerationResponse(
        request_id="no", model="gpt", status="error", error=ErrorDetail(code="unknown_model", message="no such model"),
        requested_at=server.clock.now(),
    )  # fmt: skip
    await producer.post(RESPONSES, refused, "no")
    await producer.producer.send_and_wait(kafka.topic(RESPONSES), b"{broken", key=b"k")
    await ledgers.until(PUBLISHED, 90)
    (sums,) = await ledgers.fetch(BALANCE)
    assert sums["metered"] == pytest.approx(sums["counter"], rel=1e-9)
    assert sums["footprints"] == pytest.approx(sums["attributed"], rel=1e-9)
    assert sums["footprints"] + sums["idle"] + sums["unattributed"] == pytest.approx(sums["counter"], rel=1e-9)
    assert sums["footprints"] == pytest.approx(sum(expected.values()), rel=0.05)
    assert sums["server_s"] + sums["idle_s"] == pytest.approx(float(sums["length_s"]), abs=1e-4)
    assert sums["unattributed"] < 0.05 * sums["footprints"]
    async with reading(kafka, FOOTPRINTS) as published:
        await published.read(until=90)
        ends = await published.consumer.end_offsets(published.consumer.assignment())
        found = {one.request_id: one for one in (Footprint.model_validate_json(r.value) for r in published.records)}
    assert len(published.records) == sum(ends.values()) == 90
    by_level: dict[str, list[float]] = {level: [] for level in LEVELS}
    for one in found.values():
        by_level[one.level].append(one.energy_j)
        assert one.intensity_g_per_kwh == pytest.approx(INTENSITY)
        grams = one.energy_j / 3.6e6 * 1.5 * INTENSITY + 0.01 * one.server_s
        assert 0 < one.server_s <= one.processing_s
        assert one.total_g == pytest.approx(grams)
    # The meter is read between the calls, or on a busy machine after several of them, which then share the energy.
    means = {level: sum(joules) / len(joules) for level, joules in by_level.items()}
    assert sorted(means, key=means.__getitem__) == sorted(LEVELS, key=lambda level: LEVELS[level][0])
    first, last = found["r1"], found["r61"]
    assert [found[name].finish_reason for name in ("r1", "r2", "r61")] == ["cancelled", "stop", None]
    assert (first.purpose, first.policy_version, first.propensity, first.tenant) == ("request", 3, 0.25, "acme")
    assert (last.purpose, last.evaluation_id) == ("evaluation", "ev")
    assert [tuple(row) for row in await ledgers.fetch("SELECT id, code FROM rejections")] == [("no", "unknown_model")]
    async with reading(kafka, DEAD_LETTERS) as letters:
        await letters.read(until=1)


async def test_a_killed_ledger_or_two_at_once_lose_and_duplicate_nothing(kafka, ledgers, producer, server):
    await give_intensity(producer, server.clock)
    first = ledgers.start()
    await serve(producer, server, range(30))
    ledgers.kill(first)
    await serve(producer, server, range(30, 60))
    ledgers.start()
    ledgers.start()
    await serve(producer, server, range(60, 90))
    await ledgers.until(PUBLISHED, 90)
    await ledgers.until("SELECT count(*) FROM open_calls", 0)
    (sums,) = await ledgers.fetch(BALANCE)
    assert sums["metered"] == pytest.approx(sums["counter"], rel=1e-9)
    assert sums["footprints"] + sums["idle"] + sums["unattributed"] == pytest.approx(sums["counter"], rel=1e-9)
    assert sums["footprints"] == pytest.approx(90 / 3 * 6.0 * 140, rel=0.1)
    (gaps,) = await ledgers.fetch(
        "SELECT count(*) FROM (SELECT started_at - lag(finished_at) OVER (ORDER BY started_at) AS gap FROM intervals) "
        "AS g WHERE gap <> interval '0'"
    )
    assert gaps[0] == 0


async def rewind(kafka: KafkaSettings, spec: TopicSpec, group: str, at: datetime) -> None:
    """Commit the offsets of a time for a group, as `kafka-consumer-groups.sh --reset-offsets --to-datetime` does."""
    consumer = AIOKafkaConsumer(
        kafka.topic(spec),
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=kafka.group(group),
        enable_auto_commit=False,
    )
    await consumer.start()
    try:
        while not consumer.assignment():
            await consumer.getmany(timeout_ms=100)
        ends = await consumer.end_offsets(consumer.assignment())
        since = await consumer.offsets_for_times(dict.fromkeys(ends, int(at.timestamp() * 1_000)))
        await consumer.commit({one: ends[one] if found is None else found.offset for one, found in since.items()})
    finally:
        await consumer.stop()


async def test_a_restored_backup_gets_the_later_calls_from_kafka(kafka, ledgers, producer, server, tmp_path):
    """As docs/operations.md says: the meter's energy of the time without readings is divided over its calls."""
    await give_intensity(producer, server.clock)
    first = ledgers.start()
    expected = await serve(producer, server, range(30))
    await ledgers.until(PUBLISHED, 30)
    at, backup = datetime.now(UTC), str(tmp_path / "ledger.dump")
    ledgers.run_postgres("pg_dump", "--format=custom", "--schema=ledger", f"--file={backup}")
    expected |= await serve(producer, server, range(30, 60))
    await ledgers.until(PUBLISHED, 60)
    ledgers.stop(first)
    await ledgers.fetch("DROP SCHEMA ledger CASCADE")
    ledgers.run_postgres("pg_restore", backup)
    await rewind(kafka, RESPONSES, "ledger.responses", at - timedelta(minutes=1))
    await rewind(kafka, USAGE, "ledger.usage", at - timedelta(minutes=1))
    ledgers.start()
    expected |= await serve(producer, server, range(60, 75))
    await ledgers.until(PUBLISHED, 75)
    await ledgers.until("SELECT count(*) FROM open_calls", 0)
    (sums,) = await ledgers.fetch(BALANCE)
    assert sums["metered"] == pytest.approx(sums["counter"], rel=1e-9)
    assert sums["footprints"] + sums["idle"] + sums["unattributed"] == pytest.approx(sums["counter"], rel=1e-9)
    assert sums["footprints"] == pytest.approx(sum(expected.values()), rel=0.1)
    assert [tuple(row) for row in await ledgers.fetch("SELECT count(*), count(DISTINCT id) FROM settled_calls")] == [
        (75, 75)
    ]
    # What the first ledger had published after the backup is published again, with its record.
    async with reading(kafka, FOOTPRINTS) as published:
        await published.read(until=105)
        found = [Footprint.model_validate_json(record.value) for record in published.records]
    assert {one.request_id for one in found} == set(expected)


MARKS = """
WITH hit AS (
    SELECT c.partial FROM settled_calls AS c JOIN intervals AS i
    ON c.started_at < i.finished_at AND c.finished_at > i.started_at WHERE i.restarted
)
SELECT (SELECT count(*) FROM intervals WHERE restarted) AS restarts,
       (SELECT count(*) FROM hit WHERE partial) AS marked, (SELECT count(*) FROM hit WHERE NOT partial) AS unmarked,
       (SELECT count(*) FROM settled_calls WHERE NOT partial AND energy_j = 0) AS without_energy,
       (SELECT array_agg(id) FROM settled_calls WHERE partial) AS partial,
       (SELECT count(*) FROM settled_calls WHERE NOT partial) AS complete
"""


async def test_calls_of_a_model_server_that_is_killed_under_load_are_partial_and_never_published(
    kafka, ledgers, producer, server, supervisor
):
    await give_intensity(producer, server.clock)
    ledgers.start(SPROUT_LEDGER_SCRAPE_INTERVAL_S="1")
    served = await serve(producer, server, range(30))
    running = asyncio.create_task(serve(producer, server, range(30, 120), tolerant=True, expected=served))
    await until(lambda: len(served) >= 60)
    supervisor.kill("ledger-triton")
    supervisor.respawn("ledger-triton").wait_ready()
    await running
    served |= await serve(producer, server, range(120, 150))
    await ledgers.until("SELECT count(*) FROM settled_calls", len(served))
    await ledgers.until(PUBLISHED, len(served))
    (marks,) = await ledgers.fetch(MARKS)
    (sums,) = await ledgers.fetch(BALANCE)
    assert marks["restarts"] >= 1
    assert marks["marked"] > 0
    assert (marks["unmarked"], marks["without_energy"]) == (0, 0)
    assert sums["footprints"] == pytest.approx(sums["attributed"], rel=1e-9)
    assert sums["attributed"] + sums["idle"] + sums["unattributed"] == pytest.approx(sums["metered"], rel=1e-9)
    assert sums["server_s"] + sums["idle_s"] == pytest.approx(float(sums["length_s"]), abs=1e-4)
    async with reading(kafka, FOOTPRINTS) as published:
        await published.read(until=marks["complete"])
    ids = {Footprint.model_validate_json(one.value).request_id for one in published.records}
    assert len(ids) == marks["complete"] == len(served) - len(marks["partial"])
    assert ids.isdisjoint(marks["partial"])


READ_LONG_AFTER_THE_CALLS = f"""
SELECT (SELECT max(at) FROM readings) > (SELECT max(finished_at) FROM open_calls) + interval '{4.0 * RATE} s'
"""


class ReportingRouter:
    """Publishes load reports of a router in the background, as long as it is used as a context."""

    def __init__(self, producer: Producer, clock: Clock) -> None:
        self._producer, self._clock = producer, clock
        self.oldest_started_at: datetime | None = None

    async def report(self, *, final: bool = False) -> None:
        load = EndpointLoad(in_flight=int(self.oldest_started_at is not None), oldest_started_at=self.oldest_started_at)
        report = LoadReport(
            instance="router-1", service="router", at=self._clock.now(), interval_s=0.3 * RATE, share=1.0, final=final,
            pools=(PoolLoad(pool="p", arrivals=0, waiting=0, endpoints={"e0": load}),),
        )  # fmt: skip
        await self._producer.post(LOAD_REPORTS, report, report.instance)

    async def __aenter__(self) -> "ReportingRouter":
        async def repeat() -> None:
            while True:
                await self.report()
                await asyncio.sleep(0.3)

        self._task = asyncio.create_task(repeat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        self.oldest_started_at = None
        await self.report(final=True)


async def test_an_endpoint_is_settled_up_to_the_oldest_running_call_and_its_curve_is_published(
    kafka, ledgers, producer, server
):
    await give_intensity(producer, server.clock)
    async with ReportingRouter(producer, server.clock) as router:
        ledgers.start(SPROUT_LEDGER_SETTLE_MARGIN_S="1", SPROUT_LEDGER_SETTLE_DELAY_S=str(1.5 * RATE))
        await ledgers.until("SELECT count(*) > 0 FROM meters", True)
        router.oldest_started_at = server.clock.now()
        await router.report()
        await serve(producer, server, range(60))
        await ledgers.until("SELECT count(*) FROM open_calls", 60)
        # Without the report, these calls would have been settled long before.
        await ledgers.until(READ_LONG_AFTER_THE_CALLS, True)
        (until,) = await ledgers.fetch("SELECT settled_until FROM meters")
        assert until["settled_until"] <= router.oldest_started_at
        assert (await ledgers.fetch("SELECT count(*) FROM settled_calls"))[0][0] == 0
    await ledgers.until(PUBLISHED, 60)
    (sums,) = await ledgers.fetch(BALANCE)
    assert sums["server_s"] + sums["idle_s"] == pytest.approx(float(sums["length_s"]), abs=1e-4)
    served = 60
    async with reading(kafka, POWER_CURVES) as curves:
        while not curves.records:
            with suppress(AssertionError):
                await curves.read(until=1, timeout_s=20.0)
                continue
            # On a busy machine the times of 60 calls may not tell the speed of the server.
            await serve(producer, server, range(served, served + 60))
            served += 60
    curve = EndpointCurve.model_validate_json(curves.records[-1].value)
    assert (curve.endpoint, curve.pool, curve.idle_w) == ("e0", "p", IDLE_W)
    assert curve.identifiable == (curve.reason == "")
