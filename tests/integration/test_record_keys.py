"""Tables are keyed by the request's record: requests under one id count each, one record counts once."""

from datetime import UTC, datetime, timedelta
from importlib import resources

import pytest

from services.evaluator import migrations as evaluator_migrations
from services.evaluator.group_store import GroupStore, save_judged
from services.evaluator.samples import SampleStore
from services.optimizer import migrations as optimizer_migrations
from services.optimizer.store import Store
from shared.messages import Footprint
from shared.runtime.database import DatabaseStatus, migrate, open_pool
from tests.support.evaluator import judged_answer, judged_prompt, sample
from tests.support.router import MODEL

pytestmark = pytest.mark.integration

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)


def footprint(record: str | None) -> Footprint:
    return Footprint(
        request_id="the same", record=record, purpose="request", model="m", group="qa", pool="p", level="L0", zone="GB",
        endpoint="e0", started_at=NOW, finished_at=NOW, processing_s=1.0, completion_tokens=10, energy_j=1.0,
        embodied_g=0.0,
    )  # fmt: skip


async def test_the_optimizer_counts_the_footprints_of_requests_under_one_id(database):
    pool = await open_pool(database, schema="optimizer_records")
    try:
        await migrate(pool, schema="optimizer_records", package=optimizer_migrations.__name__)
        store = Store(pool, status=DatabaseStatus(), remembered_footprints=1_000)
        counted = []

        async def count(*footprints: Footprint) -> int:
            return await store.count(footprints, lambda _, fresh: counted.extend(fresh))

        records = [f"requests/0/{offset}/1" for offset in range(60)]
        assert await count(*(footprint(record) for record in records)) == 60
        assert await count(*(footprint(record) for record in records[:30])) == 0  # redelivered
        assert await count(footprint(None)) == 1  # of an earlier ledger
        assert await count(footprint(None)) == 0
        assert len(counted) == 61
    finally:
        await pool.close()


async def test_the_evaluator_keeps_samples_under_one_id_and_those_of_an_earlier_version(database):
    schema = "evaluator_records"
    pool = await open_pool(database, schema=schema)
    status = DatabaseStatus()
    try:
        files = resources.files(evaluator_migrations.__name__)
        await pool.execute(f"CREATE SCHEMA {schema}")
        await pool.execute("CREATE TABLE migrations (name text PRIMARY KEY, applied_at timestamptz DEFAULT now())")
        for name in ("0001_evaluator.sql", "0002_prompt_groups.sql"):
            await pool.execute(files.joinpath(name).read_text())
            await pool.execute("INSERT INTO migrations (name) VALUES ($1)", name)
        earlier = sample(1, group="qa", at=NOW)
        await pool.execute(
            "INSERT INTO reservoir (model, request_id, prompt_group, sampled_at, draw, sample) "
            "VALUES ($1, $2, 'qa', $3, 0.5, $4)",
            MODEL,
            earlier.request_id,
            NOW,
            earlier.model_dump_json(),
        )
        await migrate(pool, schema=schema, package=evaluator_migrations.__name__)
        store = SampleStore(
            pool, status, samples_per_group=100, samples_per_model=100, max_age=timedelta(days=1), draw_key=b"k" * 16
        )
        samples = [
            earlier.model_copy(update={"request_id": "the same", "record": f"requests/0/{offset}/1"})
            for offset in range(60)
        ]
        await store.add(samples, now=NOW)
        await store.add([*samples, earlier], now=NOW)  # redelivered
        ids = (await store.ids_by_group(MODEL))["qa"]
        assert sorted(ids) == sorted([earlier.request_id, *(one.record for one in samples)])
        assert {one.identity for one in await store.load(MODEL, ids)} == set(ids)
        assert await store.traffic(MODEL) == {"qa": 60.0}
        rows = await pool.fetch("SELECT request_id, count(*) FROM reservoir GROUP BY request_id ORDER BY 2")
        assert [tuple(row) for row in rows] == [(earlier.request_id, 1), ("the same", 60)]
        groups = GroupStore(pool, status, max_judged_age=timedelta(days=1), directives={})
        judged = [judged_prompt(one, answers=[judged_answer("L0")]) for one in ids]
        async with pool.acquire() as connection:
            await save_judged(connection, MODEL, judged, directives={})
        assert {one.id for one in await groups.judged_prompts(MODEL, limit=100)} == set(ids)
    finally:
        await pool.close()
