"""The optimizer's tables in PostgreSQL: consumption, evaluations, last policies, the account of the promise by period,
and arrivals by hour of day.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import asyncpg
from pydantic import TypeAdapter

from services.optimizer.costs import Consumption
from services.optimizer.promise import Account, Sums
from shared.messages import Footprint, Policy, Quality
from shared.prequential import QualityScore
from shared.runtime.database import DatabaseStatus

ACCOUNT_RETENTION = timedelta(days=366)
"""How long an account is kept after the optimizer needs it."""

_scores = TypeAdapter(QualityScore)

Apply = Callable[[Consumption, Sequence[Footprint]], None]
"""Counts footprints into a model's consumption."""


class Store:
    """The optimizer's tables. Every method raises `DatabaseUnavailableError` while the database is unavailable.

    Attributes:
        status: whether the last operation reached the database.
    """

    def __init__(self, pool: asyncpg.Pool, *, status: DatabaseStatus, remembered_footprints: int) -> None:
        """Use an open pool whose `search_path` is the optimizer's schema."""
        self.status = status
        self._pool = pool
        self._remembered = remembered_footprints

    async def count(self, footprints: Sequence[Footprint], apply: Apply) -> int:
        """Count footprints that were not counted yet, in one transaction.

        Each of the last `remembered_footprints` footprints is counted once, however often and to whichever process it
        is delivered.

        Returns:
            How many footprints were new.
        """
        by_id = {footprint.identity: footprint for footprint in footprints}
        with self.status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                # Sorted, so that two processes lock the rows in the same order and cannot deadlock.
                new = await connection.fetch(
                    "INSERT INTO counted (id) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING RETURNING id",
                    sorted(by_id),
                )
                fresh = [by_id[row["id"]] for row in new]
                for model in sorted({footprint.model for footprint in fresh}):
                    consumption = await self._locked_consumption(connection, model)
                    apply(consumption, [footprint for footprint in fresh if footprint.model == model])
                    await connection.execute(
                        "UPDATE consumption SET state = $2, updated_at = now() WHERE model = $1",
                        model,
                        json.dumps(consumption.to_document()),
                    )
                await connection.execute(
                    "DELETE FROM counted WHERE position <= (SELECT max(position) FROM counted) - $1", self._remembered
                )
        return len(fresh)

    async def use_directives(self, hashes: Mapping[str, str], *, now_s: float) -> set[str]:
        """Drop the consumption of levels that have another text now; evaluations stay, and say what they compared.

        What earlier releases stored, which did not say it, counts as measured with the present texts.

        Args:
            hashes: of the present texts, by level.
            now_s: event time.

        Returns:
            Levels with another text.
        """
        levels: set[str] = set()
        with self.status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute(
                    "UPDATE evaluations SET message = jsonb_set(message, '{directives}', $1::jsonb) "
                    "WHERE coalesce(message->'directives', '{}') = '{}'",
                    json.dumps(hashes),
                )
                rows = await connection.fetch("SELECT model, state FROM consumption ORDER BY model FOR UPDATE")
                for row in rows:
                    consumption = Consumption.from_document(json.loads(row["state"]))
                    levels.update(consumption.drop_reworded(hashes, now_s=now_s))
                    await connection.execute(
                        "UPDATE consumption SET state = $2, updated_at = now() WHERE model = $1",
                        row["model"],
                        json.dumps(consumption.to_document()),
                    )
        return levels

    async def consumption(self) -> dict[str, Consumption]:
        """Consumption of every model."""
        with self.status.watch():
            rows = await self._pool.fetch("SELECT model, state FROM consumption")
        return {row["model"]: Consumption.from_document(json.loads(row["state"])) for row in rows}

    async def add_evaluations(self, evaluations: Sequence[Quality], *, oldest: datetime) -> int:
        """Insert evaluations that are not stored yet; delete those before `oldest`. Returns how many were new."""
        values = [
            (one.evaluation_id, one.model, one.evaluated_at, one.model_dump_json())
            for one in evaluations
            if one.evaluated_at >= oldest
        ]
        with self.status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute("DELETE FROM evaluations WHERE evaluated_at < $1", oldest)
                if not values:
                    return 0
                new = await connection.fetch(
                    "INSERT INTO evaluations (evaluation_id, model, evaluated_at, message) "
                    "SELECT * FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::jsonb[]) "
                    "ON CONFLICT DO NOTHING RETURNING evaluation_id",
                    *(list(column) for column in zip(*values, strict=True)),
                )
        return len(new)

    async def evaluations(self) -> list[Quality]:
        """Every stored evaluation, oldest first."""
        with self.status.watch():
            rows = await self._pool.fetch("SELECT message FROM evaluations ORDER BY evaluated_at, evaluation_id")
        return [Quality.model_validate_json(row["message"]) for row in rows]

    async def add_quality_scores(self, scores: Sequence[QualityScore], *, oldest: datetime) -> None:
        """Insert scores that are not stored yet, whichever copy of the optimizer made them; delete old ones."""
        with self.status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute("DELETE FROM quality_scores WHERE evaluated_at < $1", oldest)
                await connection.executemany(
                    "INSERT INTO quality_scores (evaluation_id, metric, model, evaluated_at, score) "
                    "VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
                    [
                        (one.evaluation_id, one.metric, one.model, one.until, _scores.dump_json(one).decode())
                        for one in scores
                    ],
                )

    async def quality_scores(self) -> list[QualityScore]:
        """Every stored score, oldest first."""
        with self.status.watch():
            rows = await self._pool.fetch("SELECT score FROM quality_scores ORDER BY evaluated_at, evaluation_id")
        return [_scores.validate_json(row["score"]) for row in rows]

    async def add_policy(self, policy: Policy, *, after: int) -> Policy:
        """Store a policy as its model's last, with the next version; returns it with that version.

        Args:
            after: version of the last policy that Kafka has; 0 if it has none.
        """
        with self.status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                version = await connection.fetchval(
                    "INSERT INTO policies AS known (model, version, message) VALUES ($1, $2::bigint + 1, '{}') "
                    "ON CONFLICT (model) DO UPDATE SET version = greatest(known.version, $2) + 1 RETURNING version",
                    policy.model,
                    after,
                )
                numbered = policy.model_copy(update={"version": version})
                await connection.execute(
                    "UPDATE policies SET message = $2 WHERE model = $1", policy.model, numbered.model_dump_json()
                )
        return numbered

    async def book_promise(self, model: str, book: Callable[[Account], None], *, since: datetime) -> Account:
        """Book the time up to now into a model's account of the promise, in one transaction; returns the account.

        Args:
            model: its account is locked meanwhile, so that no time is booked twice.
            book: books into the account.
            since: earlier hours are not read; those before the retention are deleted.
        """
        with self.status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute("INSERT INTO promise_booked (model) VALUES ($1) ON CONFLICT DO NOTHING", model)
                account = Account(
                    booked_until=await connection.fetchval(
                        "SELECT until FROM promise_booked WHERE model = $1 FOR UPDATE", model
                    )
                )
                rows = await connection.fetch(
                    "SELECT hour, metric, requests, promised, kept FROM promise_account "
                    "WHERE model = $1 AND hour >= $2",
                    model,
                    since,
                )
                for row in rows:
                    sums = Sums(row["requests"], row["promised"], row["kept"])
                    account.hours.setdefault(row["hour"], {})[row["metric"]] = sums
                book(account)
                await connection.executemany(
                    "INSERT INTO promise_account (model, hour, metric, requests, promised, kept) "
                    "VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (model, hour, metric) DO UPDATE "
                    "SET requests = excluded.requests, promised = excluded.promised, kept = excluded.kept",
                    [
                        (model, hour, metric, sums.requests, sums.promised, sums.kept)
                        for hour in sorted(account.changed)
                        for metric, sums in account.hours[hour].items()
                    ],
                )
                await connection.execute(
                    "UPDATE promise_booked SET until = $2 WHERE model = $1", model, account.booked_until
                )
                await connection.execute(
                    "DELETE FROM promise_account WHERE model = $1 AND hour < $2", model, since - ACCOUNT_RETENTION
                )
        return account

    async def arrival_profiles(self) -> dict[str, dict[str, Any]]:
        """Arrivals by hour of day, by pool."""
        with self.status.watch():
            rows = await self._pool.fetch("SELECT pool, state FROM arrival_profiles")
        return {row["pool"]: json.loads(row["state"]) for row in rows}

    async def put_arrival_profiles(self, profiles: Mapping[str, Mapping[str, Any]]) -> None:
        """Store the arrivals by hour of day, by pool."""
        with self.status.watch():
            await self._pool.executemany(
                "INSERT INTO arrival_profiles (pool, state) VALUES ($1, $2) "
                "ON CONFLICT (pool) DO UPDATE SET state = excluded.state, updated_at = now()",
                [(pool, json.dumps(state)) for pool, state in profiles.items()],
            )

    async def probe(self) -> None:
        """Run a query, for `status`."""
        with self.status.watch():
            await self._pool.fetchval("SELECT 1")

    async def _locked_consumption(self, connection: Any, model: str) -> Consumption:  # noqa: ANN401
        """A model's consumption, with its row locked until the transaction ends."""
        await connection.execute(
            "INSERT INTO consumption (model, state) VALUES ($1, $2) ON CONFLICT DO NOTHING",
            model,
            json.dumps(Consumption().to_document()),
        )
        state = await connection.fetchval("SELECT state FROM consumption WHERE model = $1 FOR UPDATE", model)
        return Consumption.from_document(json.loads(state))
