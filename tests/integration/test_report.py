"""The report on real tables of the ledger in PostgreSQL; and the command that prints it."""

import asyncio
import json
from dataclasses import replace
from datetime import timedelta

import asyncpg
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from services.ledger.earlier import EarlierVersions
from services.ledger.metrics import LedgerMetrics
from services.ledger.rollup import RollUps
from services.ledger.savings import SavingPublisher
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Storage
from shared.fleet import load_fleet
from shared.metering.reading import read_fleet
from shared.runtime.clock import ManualClock
from shared.runtime.database import migrate, open_pool
from tests.support.metered import fleet_days, fleet_toml, metered_fleet, table_of
from tests.support.report import (
    DAY,
    MODEL,
    OPTIONS,
    POOL,
    REFERENCE,
    ZONE,
    intensity_at,
    made_day,
    policy_at,
    quality_at,
    record_of,
)
from tools.cli.main import app
from tools.reporting import NoLedgerError, collect_report, to_json
from tools.reporting.summary import summary_lines

pytestmark = pytest.mark.integration

IDLE_J, UNATTRIBUTED_J = 40_000.0, 1_500.0
COLUMNS = list(record_of("any"))


@pytest.fixture
async def ledger(database):
    """An empty ledger."""
    pool = await open_pool(database, schema="ledger")
    await migrate(pool, schema="ledger", package="services.ledger.migrations")
    yield pool
    await pool.close()


def url_of(database):
    return database.url.get_secret_value()


async def write_calls(pool, records, *, unsettled=()):
    """Write calls, and the footprints of the settled ones."""
    only_footprints = {"request_id", "processing_s", "energy_j", "intensity_g_per_kwh", "operational_g", "embodied_g"}
    call_columns = [name for name in COLUMNS if name not in only_footprints | {"total_g"}]
    plain = [{**record, "propensities": json.dumps(record["propensities"])} for record in records]
    await pool.executemany(
        f"INSERT INTO ledger.calls (id, settled, {', '.join(call_columns)}) "
        f"VALUES ($1, $2, {', '.join(f'${n + 3}' for n in range(len(call_columns)))})",
        [
            (row["request_id"], row["request_id"] not in unsettled, *(row[name] for name in call_columns))
            for row in plain
        ],
    )
    await pool.executemany(
        f"INSERT INTO ledger.footprints ({', '.join(COLUMNS)}) "
        f"VALUES ({', '.join(f'${n + 1}' for n in range(len(COLUMNS)))})",
        [tuple(row[name] for name in COLUMNS) for row in plain if row["request_id"] not in unsettled],
    )
    await adopt(pool)


async def adopt(pool):
    """Let the ledger take over rows of an earlier version, as after an upgrade."""
    storage = Storage()
    storage.attach(pool)
    await pool.execute("UPDATE ledger.footprints SET published = true")
    await EarlierVersions(storage).adopt_calls()
    while await EarlierVersions(storage).adopt_footprints():
        pass


async def write_day(pool, *, zones=None):
    """Write a day of requests, two evaluations, hourly policies and intensities, and meters that match the calls."""
    day = made_day(requests=500, seed=3, zones=zones)
    evaluation = [
        record_of(
            f"e{number}",
            purpose="evaluation",
            evaluation_id="evaluation-12",
            option=OPTIONS[number % 3],
            at=DAY + timedelta(hours=12, minutes=number),
            energy_j=800.0,
            intensity=intensity_at(12),
            source=None,
            policy_version=None,
        )
        for number in range(9)
    ]
    judge = record_of(
        "j0",
        purpose="judge",
        evaluation_id="evaluation-12",
        option="judge/L0",
        at=DAY + timedelta(hours=12.5),
        energy_j=120.0,
        intensity=intensity_at(12),
        source=None,
        policy_version=None,
    )
    await write_calls(pool, [*day.records, *evaluation, judge])
    everything = [*day.records, *evaluation, judge]
    for place in sorted({(str(r["endpoint"]), str(r["pool"]), str(r["zone"])) for r in everything}):
        await write_meter(pool, *place, sum(float(r["energy_j"]) for r in everything if r["endpoint"] == place[0]))
    await pool.executemany(
        "INSERT INTO ledger.intensity VALUES ($1, $2, $3, false, 'csv')",
        [
            (zone, DAY + timedelta(hours=hour), intensity_at(hour) * share)
            for hour in range(24)
            for zone, share in {ZONE: 1.0, **(zones or {})}.items()
        ],
    )
    policies = [policy_at(hour) for hour in range(24)]
    await pool.executemany(
        "INSERT INTO ledger.policies VALUES ($1, $2, $3, $4)",
        [(policy.model, policy.version, policy.created_at, policy.model_dump_json()) for policy in policies],
    )
    await pool.executemany(
        "INSERT INTO ledger.quality VALUES ($1, $2, $3, $4)",
        [
            (quality.evaluation_id, quality.model, quality.evaluated_at, quality.model_dump_json())
            for quality in (quality_at(1.0), quality_at(12.0))
        ],
    )
    await pool.execute(
        "INSERT INTO ledger.refusals VALUES ('x1', $1, 'deadline_exceeded', $2)", MODEL, DAY + timedelta(hours=3)
    )
    return day


async def write_meter(pool, endpoint, pool_name, zone, attributed_j):
    """Write an endpoint's day: two GPUs, one with a counter reset at noon; 24 intervals."""
    hourly_j = (attributed_j + IDLE_J + UNATTRIBUTED_J) / 24
    await pool.executemany(
        "INSERT INTO ledger.intervals (endpoint, started_at, finished_at, zone, pool, metered_j, attributed_j, idle_j, "
        "unattributed_j) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        [
            (
                endpoint,
                DAY + timedelta(hours=hour),
                DAY + timedelta(hours=hour + 1),
                zone,
                pool_name,
                hourly_j,
                attributed_j / 24,
                IDLE_J / 24,
                UNATTRIBUTED_J / 24,
            )
            for hour in range(24)
        ],
    )
    readings = []
    for hour in range(-2, 27):  # readings outside the settled time must not count
        steady = 5_000.0 + hourly_j * 0.6 * hour
        restarted = 9_000.0 + hourly_j * 0.4 * hour if hour < 12 else hourly_j * 0.4 * (hour - 11)
        readings += [
            (endpoint, DAY + timedelta(hours=hour), "gpu-0", steady),
            (endpoint, DAY + timedelta(hours=hour), "gpu-1", restarted),
        ]
    await pool.executemany("INSERT INTO ledger.readings VALUES ($1, $2, $3, $4)", readings)


async def test_a_day_is_reported_from_the_tables(ledger):
    day = await write_day(ledger)
    report = await collect_report(ledger)
    assert report.requests.answered == report.requests.settled == report.requests.compared == 500
    assert report.requests.refused_by_code == {"deadline_exceeded": 1}
    assert report.references == (REFERENCE,)
    assert report.saving.emitted_g == pytest.approx(day.emitted_g)
    truth = 100 * (1 - day.emitted_g / day.reference_g.sum())
    assert report.saving.saving_interval.low < truth < report.saving.saving_interval.high
    assert report.implied_saving_pct == pytest.approx(report.saving.saving_pct, abs=6.0)
    assert report.promised_saving_pct == pytest.approx(37.5)
    assert report.energy.difference_pct == pytest.approx(0.0, abs=1e-6)
    assert report.energy.judge_j == pytest.approx(120.0)
    assert len(report.hours) == 24
    assert sum(hour.reference_g for hour in report.hours) == pytest.approx(report.saving.reference_g)
    assert [row.calls for row in report.evaluations] == [0, 10]
    assert report.policies_published == 24
    assert report.quality.bound_kept
    assert 80 < report.quality.preference_pct < 100


async def test_two_zones_are_reported_separately_and_one_can_be_selected(ledger):
    day = await write_day(ledger, zones={"NORTH": 0.5})
    everything = await collect_report(ledger)
    north = await collect_report(ledger, zone="NORTH")
    served = [record for record in day.records if record["zone"] == "NORTH"]
    assert [row.zone for row in everything.zones] == ["NORTH", ZONE]
    assert sum(row.requests for row in everything.zones) == 500
    assert north.requests.settled == len(served)
    assert north.saving.emitted_g == pytest.approx(sum(float(record["total_g"]) for record in served))
    assert north.saving.reference_g == pytest.approx(everything.zones[0].saving.reference_g)
    assert north.energy.difference_pct == pytest.approx(0.0, abs=1e-6)
    assert sum(hour.reference_g for hour in north.hours) == pytest.approx(north.saving.reference_g)


async def test_a_period_limits_every_figure(ledger):
    day = await write_day(ledger)
    noon = DAY + timedelta(hours=12)
    report = await collect_report(ledger, since=DAY + timedelta(hours=6), until=noon)
    chosen = [record for record in day.records if DAY + timedelta(hours=6) <= record["started_at"] < noon]
    assert report.requests.answered == len(chosen)
    assert [hour.start.hour for hour in report.hours] == [6, 7, 8, 9, 10, 11]
    assert report.requests.refused == 0
    assert report.policies_published == 6
    assert not report.evaluations


async def test_unsettled_calls_are_counted_separately(ledger):
    records = [record_of(f"r{number}") for number in range(4)]
    await write_calls(ledger, records, unsettled={"r3"})
    report = await collect_report(ledger)
    assert (report.requests.answered, report.requests.settled, report.requests.unsettled) == (4, 3, 1)


async def test_requests_that_share_an_id_are_counted(ledger):
    await write_calls(ledger, [record_of(f"r{number}") for number in range(5)])
    await ledger.execute("UPDATE ledger.settled_calls SET request_id = 'r0' WHERE id IN ('r0', 'r1', 'r2')")
    report = await collect_report(ledger)
    assert (report.requests.answered, report.requests.shared_ids) == (5, 3)
    assert dict(summary_lines(report))["requests"].startswith("5 answered, all settled, 3 share their id with another")


async def test_another_model_has_no_requests(ledger):
    await write_day(ledger)
    report = await collect_report(ledger, model="other")
    assert report.requests.answered == 0
    assert report.saving.saving_pct is None
    assert report.energy.metered_j > 0


async def test_a_database_without_the_ledgers_tables_is_reported(database):
    with pytest.raises(NoLedgerError, match="ledger"):
        await collect_report(url_of(database))


async def test_empty_tables_make_an_empty_report(ledger):
    report = await collect_report(ledger)
    assert report.empty
    assert report.saving.saving_pct is None
    assert report.energy.difference_pct is None


async def write_fleet_days(pool, days):
    """Write calls, intervals and intensities of a metered fleet; the first token comes after 2 s."""
    await write_calls(pool, days.records)
    await pool.execute("UPDATE ledger.settled_calls SET first_token_at = started_at + interval '2 seconds'")
    columns = list(days.intervals[0])
    await pool.copy_records_to_table(
        "intervals",
        schema_name="ledger",
        columns=columns,
        records=[tuple(row[name] for name in columns) for row in days.intervals],
    )
    await pool.executemany(
        "INSERT INTO ledger.intensity VALUES ($1, $2, $3, false, 'csv')",
        [(ZONE, DAY + timedelta(hours=hour), intensity_at(hour % 24)) for hour in range(48)],
    )
    policy = policy_at(0)
    await pool.execute(
        "INSERT INTO ledger.policies VALUES ($1, $2, $3, $4)",
        policy.model,
        policy.version,
        policy.created_at,
        policy.model_dump_json(),
    )


async def test_the_saving_on_the_meter_is_estimated_from_the_tables(ledger):
    fleet = metered_fleet()
    days = fleet_days(fleet)
    await write_fleet_days(ledger, days)
    report = await collect_report(ledger, fleet=fleet, stretch=100.0)
    found = report.metered
    low, high = found.saving.saving_interval.low, found.saving.saving_interval.high
    assert low < days.saving_pct < high
    assert found.saving.saving_pct == pytest.approx(days.saving_pct, abs=1.5)
    assert found.fleet_energy_j == pytest.approx(days.actual_j + days.judge_j, rel=0.005)
    assert found.excluded_pools.keys() == {"spare"}
    assert found.latency.ttft_p95_ms == pytest.approx(20.0, rel=0.03)
    assert found.latency.tpot_p95_ms < 10.0
    assert found.reference_latency.requests == sum(r["decision_source"] == "switchback" for r in days.records)
    assert found.tpot_objective_ms == pytest.approx(12.0)
    assert report.requests.switchback == found.reference_latency.requests
    assert report.net.saving_pct == pytest.approx(report.saving.saving_pct)


async def test_the_database_sums_intervals_by_bin_as_they_are(ledger):
    fleet = metered_fleet()
    days = fleet_days(fleet, days=0.5, requests=500)
    days.intervals[7]["restarted"] = True
    days.intervals[60]["idle_s"] = 25.0
    await write_fleet_days(ledger, days)
    async with ledger.acquire() as connection, connection.transaction():
        readings = await read_fleet(connection, since=None, until=None, fleet=fleet)
    table, expected = readings.table, table_of(days)
    assert (table.endpoint, table.pool, table.first) == (expected.endpoint, expected.pool, expected.first)
    for name in ("metered_j", "idle_j", "unused_j", "covered_s", "busy_s"):
        np.testing.assert_allclose(getattr(table, name), getattr(expected, name), rtol=1e-6, atol=1e-3)
    assert table.metered_j.sum() == pytest.approx(sum(row["metered_j"] for row in days.intervals), rel=1e-9)
    assert table.lost.sum() in (1, 2)
    assert readings.interval_s == pytest.approx(100.0)
    assert readings.arrivals.requests.sum() == len(days.records)
    assert readings.arrivals.tokens.sum() == sum(record["completion_tokens"] for record in days.records)
    assert len(readings.quantiles) == 10
    assert np.mean(readings.quantiles) == pytest.approx(1.0, abs=0.05)


async def test_unsettled_requests_count_in_the_demand(ledger):
    fleet = metered_fleet()
    days = fleet_days(fleet, days=0.5, requests=50)
    await write_fleet_days(ledger, replace(days, records=days.records[1:]))
    await write_calls(ledger, days.records[:1], unsettled={days.records[0]["request_id"]})
    async with ledger.acquire() as connection, connection.transaction():
        readings = await read_fleet(connection, since=None, until=None, fleet=fleet)
    assert readings.arrivals.requests.sum() == 50


async def test_a_period_reads_the_reference_blocks_before_it(ledger):
    fleet = metered_fleet()
    days = fleet_days(fleet)
    await write_fleet_days(ledger, days)
    since, until = DAY + timedelta(hours=36), DAY + timedelta(hours=46)
    found = (await collect_report(ledger, since=since, until=until, fleet=fleet)).metered
    assert found.saving.hours == pytest.approx(10.0)
    assert found.reference_blocks > len(found.blocks)
    assert found.power[0].at >= since
    assert (await collect_report(ledger, model=MODEL, fleet=fleet)).metered.saving is None


async def test_the_ledger_publishes_the_same_saving_as_the_report(ledger):
    fleet = metered_fleet()
    clock = ManualClock(DAY + timedelta(hours=47.5))
    storage, registry, published = Storage(), CollectorRegistry(), []
    storage.attach(ledger)

    class Kafka:
        async def publish(self, message, *, key):
            published.append((key, message))

    def publisher(fleet):
        return SavingPublisher(
            Kafka(), fleet=fleet, storage=storage, settings=LedgerSettings(), clock=clock,
            metrics=LedgerMetrics(registry), is_responsible=lambda: True,
        )  # fmt: skip

    savings = publisher(fleet)
    for saving in await savings.compute():
        assert (saving.saved_g, saving.reason) == (None, "the ledger has no meter reading in this time")
    await write_fleet_days(ledger, fleet_days(fleet))
    await savings.publish()
    assert [key for key, _ in published] == [b"day", b"28-days"]
    for _, one in published:
        report = (await collect_report(ledger, since=one.since, fleet=fleet)).metered
        expected = report.saving
        assert one.saved_g == pytest.approx(expected.saved_g, rel=1e-9)
        assert (one.saved_g_low, one.saved_g_high) == pytest.approx(
            (expected.saved_g_interval.low, expected.saved_g_interval.high), rel=1e-9
        )
        assert 100 * one.saved_share == pytest.approx(expected.carbon_saving_pct, rel=1e-9)
        assert (one.without_g, one.hours) == pytest.approx((expected.without_g, expected.hours))
        assert (one.blocks, one.judge_subtracted) == (report.reference_blocks, True)
        value = registry.get_sample_value("sprout_ledger_metered_saving_grams", {"window": one.window})
        assert value == pytest.approx(expected.saved_g)
    day, month = (one for _, one in published)
    assert day.since == DAY + timedelta(days=1)
    assert day.at == clock.now()
    assert 23 < day.hours < 25 < month.hours < 49

    # Too few blocks: both say why. And a fleet that is too large.
    rare = metered_fleet(share=0.02)
    report = (await collect_report(ledger, since=day.since, fleet=rare)).metered
    registry = CollectorRegistry()
    (found, _) = await publisher(rare).compute()
    assert (found.saved_g, found.reason) == (None, report.reason)
    pool = fleet.pools[0]
    many = tuple(pool.endpoints[0].model_copy(update={"name": f"e{number}"}) for number in range(300))
    large = fleet.model_copy(update={"pools": (pool.model_copy(update={"endpoints": many}), *fleet.pools[1:])})
    registry = CollectorRegistry()
    (found, _) = await publisher(large).compute()
    assert "SPROUT_LEDGER_SAVING_MAX_ENDPOINTS (32)" in found.reason


async def test_the_command_takes_the_fleet_file_from_option_or_environment(ledger, database, tmp_path, monkeypatch):
    fleet = metered_fleet()
    await write_fleet_days(ledger, fleet_days(fleet))
    fleet_file = tmp_path / "fleet.toml"
    fleet_file.write_text(fleet_toml(), encoding="utf-8")
    assert load_fleet(fleet_file).switchback == fleet.switchback
    figures = tmp_path / "report.json"
    without = await sprout_report(database, "--no-hours")
    assert "give --fleet, or set SPROUT_FLEET_FILE" in " ".join(without.output.split())
    result = await sprout_report(database, "--fleet", str(fleet_file), "--json", str(figures))
    assert result.exit_code == 0, result.output
    written = json.loads(figures.read_text())
    assert 50 < written["saving_on_meter_pct"] < 60
    monkeypatch.setenv("SPROUT_FLEET_FILE", str(fleet_file))
    again = await sprout_report(database, "--no-hours")
    assert "servers could have slept" in " ".join(again.output.split())
    missing = await sprout_report(database, "--fleet", str(tmp_path / "none.toml"))
    assert missing.exit_code == 1
    assert "does not exist" in missing.output


async def sprout_report(database, *arguments):
    """Run the command, in a separate thread because it runs an event loop."""

    def invoke():
        return CliRunner().invoke(app, ["report", "--database", url_of(database), *arguments])

    return await asyncio.to_thread(invoke)


async def test_the_command_prints_tables_and_writes_files(ledger, database, tmp_path):
    await write_day(ledger)
    page, figures = tmp_path / "out" / "report.html", tmp_path / "report.json"
    result = await sprout_report(database, "--html", str(page), "--json", str(figures))
    assert result.exit_code == 0, result.output
    for words in (
        "carbon saved",
        "95 % interval",
        "answer quality",
        "Zones",
        "Hours (UTC)",
        "Prompt groups",
        "Evaluations",
        "gsm8k",
    ):
        assert words in result.output
    written = json.loads(figures.read_text())
    assert written["energy_attributed_j"] == pytest.approx(written["energy_metered_j"])
    assert {"carbon_saving_pct", "implied_saving_pct", "preference_pct", "evaluations", "policies_published"} <= set(
        written
    )
    text = page.read_text()
    assert "Plotly.react" in text
    assert 'src="http' not in text


async def test_the_command_reports_that_there_is_nothing_yet(ledger, database):
    result = await sprout_report(database, "--since", "2024-02-08")
    assert result.exit_code == 3
    assert "nothing to report yet" in result.output
    assert "--since 2024-02-08" in result.output


async def test_the_command_reports_that_there_is_no_ledger(database):
    result = await sprout_report(database)
    assert result.exit_code == 3
    assert "start the ledger" in result.output


async def test_the_command_rejects_an_invalid_time_and_an_unreachable_database(database):
    wrong_time = await sprout_report(database, "--since", "yesterday")
    assert wrong_time.exit_code == 2
    assert "--since" in wrong_time.output
    assert "must be a time" in wrong_time.output
    wrong_order = await sprout_report(database, "--since", "2024-02-09", "--until", "2024-02-08")
    assert wrong_order.exit_code == 2
    assert "--since must be before" in wrong_order.output
    result = await asyncio.to_thread(
        CliRunner().invoke, app, ["report", "--database", "postgresql://nobody@127.0.0.1:9/none"]
    )
    assert result.exit_code == 3
    assert "cannot read from the database" in result.output


async def test_roll_ups_replace_calls_and_intervals_and_the_report_stays_the_same(ledger):
    fleet = metered_fleet()
    await write_fleet_days(ledger, fleet_days(fleet))
    before = await collect_report(ledger, fleet=fleet, stretch=100.0)
    storage = Storage()
    storage.attach(ledger)
    assert await RollUps(storage).add_chunks() > 0
    assert await RollUps(storage).add_chunks() == 0
    assert_same(await collect_report(ledger, fleet=fleet, stretch=100.0), before)
    later = DAY + timedelta(days=60)
    await RollUps(storage).remove_old(rows_before=later, rollups_before=DAY - timedelta(days=1))
    for table in ("settled_calls", "intervals", "readings", "chunks", "dimensions"):
        assert await ledger.fetchval(f"SELECT count(*) FROM ledger.{table}") == 0
    assert_same(await collect_report(ledger, fleet=fleet, stretch=100.0), before, rel=0.02)
    await RollUps(storage).remove_old(rows_before=later, rollups_before=later)
    assert (await collect_report(ledger, fleet=fleet)).empty


def assert_same(found, expected, *, rel=1e-6):
    """Compare the figures of two reports, but for the points of the plot of power."""
    found, expected = ({**to_json(one)} for one in (found, expected))
    assert dict(differences(found, expected, rel)) == {}


def differences(found, expected, rel, path=""):
    """The figures that differ, by their path."""
    if path.endswith((".power", ".extrapolated_pct")):  # the latter counts bins beyond a threshold
        return
    if isinstance(expected, dict) and found.keys() == expected.keys():
        for name in expected:
            yield from differences(found[name], expected[name], rel, f"{path}.{name}")
    elif isinstance(expected, list) and len(found) == len(expected):
        for number, part in enumerate(expected):
            yield from differences(found[number], part, rel, f"{path}.{number}")
    elif isinstance(expected, float):
        if found != pytest.approx(expected, rel=rel, abs=1e-9):
            yield path, (found, expected)
    elif found != expected:
        yield path, (found, expected)


async def test_a_pool_with_any_search_path_works(ledger, database):
    await write_calls(ledger, [record_of("r1", option=f"{POOL}/L1", row={REFERENCE: 0.5, f"{POOL}/L1": 0.5})])
    pool = await asyncpg.create_pool(url_of(database), min_size=1, max_size=1)
    try:
        report = await collect_report(pool, model=MODEL)
    finally:
        await pool.close()
    assert report.requests.settled == 1


async def test_intervals_replace_readings_beyond_their_retention(ledger):
    await write_day(ledger)
    await ledger.execute("DELETE FROM ledger.readings WHERE at < $1", DAY + timedelta(hours=6))
    await ledger.execute("DELETE FROM ledger.calls WHERE settled AND started_at < $1", DAY + timedelta(hours=6))
    report = await collect_report(ledger)
    assert report.energy.difference_pct == pytest.approx(0.0, abs=1e-6)
    assert report.requests.answered == 500
