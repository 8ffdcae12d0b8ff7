"""Databases of earlier schemas are upgraded with their rows, and what earlier versions write beside a new one.

The ledger's upgrade in place is in `test_ledger_settling`.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib import resources

import asyncpg
import pytest

from services.gateway.keys import KeyStore, hash_of
from shared.runtime.database import DatabaseStatus, migrate, open_pool
from shared.runtime.settings import DatabaseSettings

pytestmark = pytest.mark.integration

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


@asynccontextmanager
async def schema_of(database: DatabaseSettings, service: str, *, last: str) -> AsyncIterator[asyncpg.Pool]:
    """The tables of a service up to a migration, given by the begin of its name."""
    pool = await open_pool(database, schema=service)
    try:
        await pool.execute(f'CREATE SCHEMA "{service}"')
        await pool.execute(
            "CREATE TABLE migrations (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        for file in sorted(resources.files(f"services.{service}.migrations").iterdir(), key=lambda one: one.name):
            if file.name.endswith(".sql") and file.name[:4] <= last:
                await pool.execute(file.read_text(encoding="utf-8"))
                await pool.execute("INSERT INTO migrations (name) VALUES ($1)", file.name)
        yield pool
    finally:
        await pool.close()


async def upgrade(pool: asyncpg.Pool, service: str) -> list[str]:
    return await migrate(pool, schema=service, package=f"services.{service}.migrations")


SAMPLE = (
    "INSERT INTO reservoir (model, request_id, prompt_group, sampled_at, draw, sample) "
    "VALUES ('m', $1, 'qa', $2, 0.5, '{}') ON CONFLICT DO NOTHING"
)
VERDICT = (
    "INSERT INTO judged (model, request_id, stratum, prompt_group, evaluated_at, features, looks, answers) "
    "VALUES ('m', $1, 'qa', 'qa', $2, 8, '', '[]') ON CONFLICT (model, request_id) DO UPDATE SET stratum = 'qa'"
)
EVALUATION = (
    "INSERT INTO evaluations (evaluation_id, model, trigger, evaluated_at, status) "
    "VALUES ($1, 'm', 'first', $2, 'running')"
)
LATER_SAMPLE = (  # with the record, before tenants
    "INSERT INTO reservoir (model, id, request_id, prompt_group, sampled_at, draw, sample) "
    "VALUES ('m', $1, 'same', 'qa', $2, 0.5, '{}') ON CONFLICT DO NOTHING"
)
LATER_VERDICT = (  # with the record, before tenants, weights and hashes
    "INSERT INTO judged (model, id, request_id, stratum, prompt_group, evaluated_at, features, looks, answers) "
    "VALUES ('m', $1, 'same', 'qa', 'qa', $2, 8, '', '[]') ON CONFLICT (model, id) DO UPDATE SET stratum = 'qa'"
)


async def test_an_evaluator_of_the_first_release_is_refused_and_changes_nothing(database):
    """It identified a request by its id, of which there can be several; later ones can run beside the present one."""
    async with schema_of(database, "evaluator", last="0002") as pool:
        for statement in (SAMPLE, VERDICT, EVALUATION):
            await pool.execute(statement, "old", AT)
        assert len(await upgrade(pool, "evaluator")) == 6
        assert await pool.fetchval("SELECT id FROM reservoir") == "old"
        (verdict,) = await pool.fetch("SELECT id, weight, prompt_hash, directives FROM judged")
        assert tuple(verdict) == ("old", 1.0, "", "{}")

        with pytest.raises(asyncpg.NotNullViolationError):
            await pool.execute(SAMPLE, "older", AT)
        with pytest.raises(asyncpg.InvalidColumnReferenceError):
            await pool.execute(VERDICT, "older", AT)
        await pool.execute(EVALUATION, "older", AT)
        for statement in (LATER_SAMPLE, LATER_VERDICT):
            for record in ("requests/0/1/1", "requests/0/2/1", "requests/0/2/1"):
                await pool.execute(statement, record, AT)
        for table in ("reservoir", "judged"):
            assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 3


COUNT = "INSERT INTO counted (request_id) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING RETURNING request_id"
KEPT_POLICY = (
    "INSERT INTO policies AS known (model, version, message) VALUES ($1, 1, '{}') "
    "ON CONFLICT (model) DO UPDATE SET version = known.version + 1 RETURNING version"
)


async def test_an_optimizer_of_the_first_release_is_refused_before_it_counts(database):
    """So its footprints become dead letters, and are counted once when they are sent again."""
    async with schema_of(database, "optimizer", last="0001") as pool:
        assert len(await pool.fetch(COUNT, ["r1", "r2"])) == 2
        await pool.execute(
            "INSERT INTO consumption (model, state) VALUES ('m', $1)", json.dumps({"cells": {}, "traffic": {}})
        )
        assert await pool.fetchval(KEPT_POLICY, "m") == 1
        assert len(await upgrade(pool, "optimizer")) == 4
        assert [row["id"] for row in await pool.fetch("SELECT id FROM counted ORDER BY id")] == ["r1", "r2"]

        with pytest.raises(asyncpg.UndefinedColumnError):
            await pool.fetch(COUNT, ["r3"])
        assert await pool.fetchval("SELECT count(*) FROM counted") == 2
        assert await pool.fetchval(KEPT_POLICY, "m") == 2  # the versions continue, whoever publishes


NEW_KEY = "INSERT INTO api_keys (id, hash, name, tenant, created_at) VALUES ($1, $2, $1, 'acme', $3)"
OPEN_REQUEST = "SELECT admit($1, 'acme', $2, 'm', 10, $3, 'gateway', 60.0)"


async def test_gateways_of_every_earlier_schema_run_beside_the_present_one(database):
    async with schema_of(database, "gateway", last="0001") as pool:
        await pool.execute(NEW_KEY, "k1", hash_of("sk-sprout-one"), AT)
        assert len(await upgrade(pool, "gateway")) == 5
        await pool.execute(NEW_KEY, "k2", hash_of("sk-sprout-two"), AT)
        keys = KeyStore(pool, DatabaseStatus(), cache_s=0.0)
        for number, secret in enumerate(("sk-sprout-one", "sk-sprout-two"), start=1):
            key = await keys.find(secret)
            assert key is not None
            assert (key.id, key.tenant) == (f"k{number}", "acme")
            assert json.loads(await pool.fetchval(OPEN_REQUEST, key.id, f"r{number}", AT))["refusal"] is None
        assert await pool.fetchval("SELECT count(*) FROM requests") == 2
