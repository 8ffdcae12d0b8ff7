"""What is older than its retention goes, and what may still be needed stays: tables of evaluator and gateway."""

from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry

from services.evaluator.store import EVALUATIONS_KEPT, EvaluationStore
from services.gateway.accounts import Accounts
from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings
from shared.runtime.clock import ManualClock
from shared.runtime.database import DatabaseStatus, migrate, open_pool

pytestmark = pytest.mark.integration

NOW = datetime(2026, 6, 15, 12, 30, tzinfo=UTC)


async def migrated(database, schema: str):
    pool = await open_pool(database, schema=schema)
    await migrate(pool, schema=schema, package=f"services.{schema}.migrations")
    return pool


async def test_old_evaluations_go_unless_their_result_is_not_published(database):
    rows = {
        "new": ("finished", True, 364),
        "old": ("finished", True, 366),
        "old and not published": ("finished", False, 366),
        "old and failed": ("failed", False, 366),
        "old and running": ("running", False, 366),
    }
    assert timedelta(days=365) == EVALUATIONS_KEPT
    async with await migrated(database, "evaluator") as pool:
        for name, (status, published, days) in rows.items():
            await pool.execute(
                "INSERT INTO evaluations (evaluation_id, model, trigger, evaluated_at, status, published) "
                "VALUES ($1, 'm', 'first', $2, $3, $4)",
                name, NOW - timedelta(days=days), status, published,
            )  # fmt: skip
        await EvaluationStore(pool, DatabaseStatus()).delete_expired(now=NOW)
        kept = {row["evaluation_id"] for row in await pool.fetch("SELECT evaluation_id FROM evaluations")}
    assert kept == {"new", "old and not published", "old and running"}


async def test_old_sums_of_usage_go_and_the_budget_of_this_month_stays(database):
    async with await migrated(database, "gateway") as pool:
        for days in (0, 61, 63):
            at = NOW - timedelta(days=days)
            await pool.execute("INSERT INTO hours VALUES ('k', 't', $1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)", at)
            await pool.execute(
                "INSERT INTO months VALUES ('key/k', date_trunc('month', $1, 'UTC'), 1) ON CONFLICT DO NOTHING", at
            )
        accounts = Accounts(
            pool,
            DatabaseStatus(),
            levels=("L0",),
            settings=GatewaySettings(usage_days=62),
            clock=ManualClock(NOW),
            metrics=GatewayMetrics(CollectorRegistry()),
        )
        await accounts._remove_sums(NOW - timedelta(days=62))
        hours = [row["hour"] for row in await pool.fetch("SELECT hour FROM hours ORDER BY hour")]
        months = [row["month"].month for row in await pool.fetch("SELECT month FROM months")]
    assert hours == [NOW - timedelta(days=61), NOW]
    assert months == [6]
