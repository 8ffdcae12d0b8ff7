"""`sprout erase` on real Kafka and PostgreSQL: what goes, what stays, and until when."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from typer.testing import CliRunner

from shared.kafka.admin import create_topics
from shared.kafka.dead_letters import dead_letter_for
from shared.messages import GenerationRequest
from shared.runtime.clock import Clock
from shared.runtime.database import migrate, open_pool
from shared.topics import DEAD_LETTERS, REQUESTS, SAMPLES, TOPICS, requests_topic
from tests.support.evaluator import sample
from tests.support.report import DAY, record_of
from tests.support.router import producing, reading
from tools.cli.main import app
from tools.erasure.tables import TABLES
from tools.erasure.topics import PERSONAL_TOPICS

pytestmark = pytest.mark.integration

REJECTED = ("ledger.refusals", "ledger.rejections")
WITHOUT_REQUESTS = ("ledger.dimensions", "gateway.months")
SCHEMAS = ("evaluator", "gateway", "optimizer", "ledger")
SUMS = "SELECT count(*), sum(energy_j), sum(total_g), sum(completion_tokens) FROM ledger.footprints"


@pytest.fixture
async def stores(database):
    """The tables of all services, with requests r0 and r1 of the tenant `desk`, and r2 and r3 of `shop`."""
    for schema in SCHEMAS:
        pool = await open_pool(database, schema=schema)
        await migrate(pool, schema=schema, package=f"services.{schema}.migrations")
        await pool.close()
    connection = await asyncpg.connect(database.url.get_secret_value())
    for number in range(4):
        name, tenant = f"r{number}", "desk" if number < 2 else "shop"
        row = record_of(name, at=DAY + timedelta(days=number, hours=7)) | {"tenant": tenant}
        row["propensities"] = json.dumps(row["propensities"])
        places = ", ".join(f"${place + 1}" for place in range(len(row)))
        await connection.execute(
            f"INSERT INTO ledger.footprints ({', '.join(row)}) VALUES ({places})",
            *row.values(),
        )
        await connection.execute(
            "INSERT INTO ledger.calls (id, purpose, model, grp, tenant, pool, level, zone, endpoint, propensity, "
            "started_at, finished_at, completion_tokens, energy_j, settled) SELECT request_id, purpose, model, grp, "
            "tenant, pool, level, zone, endpoint, propensity, started_at, finished_at, completion_tokens, energy_j, "
            "true FROM ledger.footprints WHERE request_id = $1",
            name,
        )
        await connection.execute("INSERT INTO ledger.refusals VALUES ($1, 'm', 'no_endpoint', $2)", f"{name}-x", DAY)
        await connection.execute(f"CREATE TABLE ledger.day{number} PARTITION OF ledger.settled_calls FOR VALUES FROM "
                                 f"('2024-02-{8 + number:02}') TO ('2024-02-{9 + number:02}')")  # fmt: skip
        await connection.execute(
            "WITH d AS (INSERT INTO ledger.dimensions (digest, purpose, model, grp, tenant, pool, level, zone, "
            "endpoint, propensity, used_at) SELECT gen_random_uuid(), 'request', 'm', 'g', $2, 'p', 'L0', 'Z', 'e', 1, "
            "$3 RETURNING id), o AS (INSERT INTO ledger.open_calls SELECT 'requests/0/' || $1, $1, id, 'e', $3, $3, "
            "$3, 1, 1 FROM d) INSERT INTO ledger.settled_calls SELECT 'requests/1/' || $1, $1, 1, id, $3, $3, $3, 1, "
            "1, 1.0, 1.0, NULL, NULL, 0.0, false FROM d",
            name, tenant, row["started_at"],
        )  # fmt: skip
        await connection.execute(
            "INSERT INTO ledger.rejections VALUES ('requests/2/' || $1, $1 || '-x', 'm', 'no_endpoint', $2)", name, DAY
        )
        await connection.execute(
            "INSERT INTO gateway.requests (id, key_id, tenant, model, created_at, instance, expires_at_wall, "
            "minute_wall, reserved_tokens) VALUES ($1, 'k', $2, 'm', $3, '', $3, $3, 0)",
            name, tenant, DAY,
        )  # fmt: skip
        await connection.execute(
            "INSERT INTO gateway.hours VALUES ($1, $2, $3, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)", name, tenant, DAY
        )
        await connection.execute(
            "INSERT INTO gateway.months VALUES ('tenant/' || $1, $2, 1)", tenant, DAY + timedelta(days=number)
        )
        await connection.execute("INSERT INTO optimizer.counted (id) VALUES ($1)", name)
        await connection.execute(
            "INSERT INTO evaluator.reservoir (model, id, request_id, prompt_group, sampled_at, draw, sample, tenant) "
            "VALUES ('m', 'requests/' || $1, $1, 'qa', $2, 0.5, $3, $4)",
            name, DAY, f'{{"prompt": "{name}"}}', tenant,
        )  # fmt: skip
        await connection.execute(
            "INSERT INTO evaluator.judged (model, id, request_id, stratum, prompt_group, evaluated_at, features, "
            "looks, answers, tenant) VALUES ('m', $1, $1, 'qa', 'qa', $2, 2, '', '[]', $3)",
            name, DAY, None if number == 1 else tenant,
        )  # fmt: skip
        await connection.execute(
            "INSERT INTO gateway.files (id, owner, tenant, filename, purpose, bytes, created_at, expires_at) "
            "VALUES ($1, 'x', $2, 'input.jsonl', 'batch', 1, $3, $3)", name, tenant, DAY,
        )  # fmt: skip
        await connection.execute(
            "INSERT INTO gateway.batches (id, owner, key_id, tenant, endpoint, input_file_id, completion_window, "
            "status, created_at, expires_at) VALUES ($1, 'x', 'x', $2, 'e', $1, '24h', 'completed', $3, $3)",
            name, tenant, DAY,
        )  # fmt: skip
    yield connection
    await connection.close()


@pytest.fixture
def command(kafka, database, monkeypatch):
    monkeypatch.setenv("SPROUT_KAFKA_BOOTSTRAP_SERVERS", kafka.bootstrap_servers)
    monkeypatch.setenv("SPROUT_KAFKA_TOPIC_PREFIX", kafka.topic_prefix)
    monkeypatch.setenv("SPROUT_KAFKA_GROUP_PREFIX", kafka.group_prefix)
    monkeypatch.setenv("SPROUT_DATABASE_URL", database.url.get_secret_value())

    async def run(*arguments: str, exit_code: int = 0) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, app, ["erase", *arguments])
        assert result.exit_code == exit_code, result.output
        return result.output

    return run


async def written(kafka) -> None:
    """Two requests of `desk`, one of them without an id and invalid; and one sample."""
    async with producing(kafka) as producer, reading(kafka, REQUESTS) as requests:
        await producer.raw(GenerationRequest(id="r0", prompt="Why?", tenant="desk").model_dump_json().encode())
        await producer.raw(b'{"prompt": 3, "tenant": "desk"}')
        await producer.post(SAMPLES, sample(0).model_copy(update={"tenant": "desk"}), "qa")
        (bad,) = [one for one in await requests.read(until=2) if b'prompt": 3' in one.value]
        letter = dead_letter_for(bad, service="router", reason="invalid_message", detail="why", clock=Clock())
        await producer.post(DEAD_LETTERS, letter, "none")


async def document(command, *arguments: str, exit_code: int = 0):
    found = json.loads((await command(*arguments, "--json", exit_code=exit_code)).partition("\nerror:")[0])
    return (
        {one["table"]: (one["before"], one["after"]) for one in found["tables"]},
        {one["topic"]: one for one in found["topics"]},
        found["unknown"],
    )


async def test_a_tenant_is_erased_and_the_sums_stay(kafka, stores, command):
    await written(kafka)
    sums = await stores.fetchrow(SUMS)
    tables, topics, unknown = await document(command, "--tenant", "desk", "--dry-run")
    assert tables["evaluator.reservoir"] == (2, 2)
    tables, topics, unknown = await document(command, "--tenant", "desk", "--yes")
    assert tables == {table.name: (0 if table.name in REJECTED else 2, 0) for table in TABLES}
    assert unknown == []
    assert {name: one["records"] for name, one in topics.items() if one["records"]} == {
        "requests": 2, "samples": 1, "dead-letters": 1,
    }  # fmt: skip
    gone_by = datetime.fromisoformat(topics["dead-letters"]["gone_by"]) - datetime.now(UTC)
    assert timedelta(days=90) < gone_by < timedelta(days=91, hours=1)  # retention and the length of a segment
    assert await stores.fetchrow(SUMS) == sums
    assert await stores.fetchval("SELECT sum(energy_j) FROM ledger.calls") == sums[1]
    for table in TABLES:
        ids = [row[0] for row in await stores.fetch(f"SELECT {table.key} FROM {table.name}")]
        assert not {"r0", "r1"} & set(ids), table.name
        assert {"r2", "r3"} <= set(ids) or table.name in (*REJECTED, *WITHOUT_REQUESTS)
    # Again: the tables have nothing left.
    tables, _, unknown = await document(command, "--tenant", "desk", "--yes")
    assert set(tables.values()) == {(0, 0)}


async def test_requests_are_erased_by_id_and_unknown_ones_are_named(kafka, stores, command):
    tables, _, unknown = await document(command, "--request", "r2", "--request", "r3-x", "--request", "r9", "--yes")
    assert {name: before for name, (before, after) in tables.items()} == {
        table.name: int(table.name not in WITHOUT_REQUESTS) for table in TABLES
    }
    assert {after for _, after in tables.values()} == {0}
    assert unknown == [{"kind": "request", "name": "r9"}]
    assert await stores.fetchval("SELECT tenant FROM ledger.calls WHERE id LIKE 'erased-%'") is None
    printed = await command("--tenant", "no\x1bone", "--yes")
    assert "nothing is known of it" in printed
    assert "\x1b" not in printed
    await command(exit_code=2)
    await command("--tenant", "desk", exit_code=1)  # nobody confirms
    assert await stores.fetchval("SELECT count(*) FROM evaluator.reservoir WHERE tenant = 'desk'") == 2


async def test_topics_of_further_lanes_are_searched(kafka, stores, command, monkeypatch):
    night = requests_topic("night")
    await create_topics(kafka, specs=(night,))
    async with producing(kafka) as producer:
        record = await producer.producer.send_and_wait(kafka.topic(night), b'{"prompt": "Why?", "tenant": "desk"}')
    monkeypatch.setenv("SPROUT_ROUTER_LANES", "requests:4,night:1")
    _, topics, _ = await document(command, "--request", f"{record.topic}-{record.partition}-{record.offset}", "--yes")
    assert topics["night"]["records"] == 1


async def test_a_topic_that_is_too_long_is_bounded_in_time(kafka, stores, command):
    await written(kafka)
    _, topics, _ = await document(command, "--tenant", "desk", "--dry-run", "--read-at-most", "1")
    assert topics["requests"]["records"] is None
    assert datetime.fromisoformat(topics["requests"]["gone_by"]) > datetime.now(UTC) + timedelta(days=7)
    assert topics["samples"]["records"] == 1


async def test_every_table_with_a_persons_data_is_erased(stores):
    """A new table, or a new column, has to be added to what is erased, or to those without data of persons."""
    rows = await stores.fetch(
        "SELECT table_schema || '.' || table_name AS name, column_name AS column FROM information_schema.columns "
        "WHERE table_schema = ANY($1) AND column_name IN ('tenant', 'account', 'request_id', 'record', 'sample')",
        list(SCHEMAS),
    )
    partitions = {f"ledger.day{number}" for number in range(4)}
    # Keys are configuration.
    found = {row["name"] for row in rows} - {table.name for table in TABLES} - partitions
    assert found == {"gateway.api_keys", "gateway.limits"}


def test_every_topic_with_a_persons_data_is_searched():
    named = {"request_id", "tenant", "metadata", "value_base64"}
    found = {spec.name for spec in TOPICS if named & set(spec.message.model_fields)}
    assert found == {spec.name for spec in PERSONAL_TOPICS}


async def test_budgets_of_a_tenant_and_of_its_keys_lose_the_link_and_others_stay(kafka, stores, command):
    await stores.execute("INSERT INTO gateway.api_keys VALUES ('own', '1', 'n', 'desk', $1), ('other', '2', 'n', NULL, "
                         "$1)", DAY)  # fmt: skip
    for account in ("key/own", "key/other", "tenant/desk2"):
        await stores.execute("INSERT INTO gateway.months VALUES ($1, $2, 1)", account, DAY)
    await command("--tenant", "desk", "--yes")
    rows = await stores.fetch("SELECT account FROM gateway.months WHERE account NOT LIKE 'erased-%'")
    assert {row["account"] for row in rows} == {"tenant/shop", "tenant/desk2", "key/other"}
    assert await stores.fetchval("SELECT sum(grams) FROM gateway.months") == 7
