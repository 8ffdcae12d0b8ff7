"""Tables of judged prompts and of prompt groups, which are learned from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from services.evaluator.quality import JudgedAnswer, JudgedPrompt
from shared.grouping import FEATURES, PromptFeatures
from shared.messages import PromptGrouping
from shared.runtime.database import DatabaseStatus


@dataclass(frozen=True, slots=True)
class LearningProgress:
    """Number of judged prompts that prompt groups can be learned from; one that was judged again counts once.

    Attributes:
        judged: stored prompts.
        unused: of these, first judged since the current version was learned.
        learned_from: prompts that the current version was learned from; None: there is no version.
    """

    judged: int
    unused: int
    learned_from: int | None


class GroupStore:
    """The tables `judged` and `prompt_groups`; methods raise `DatabaseUnavailableError`.

    Judged prompts count if they were judged at all of the fleet's levels, with its texts.
    """

    def __init__(
        self, pool: asyncpg.Pool, status: DatabaseStatus, *, max_judged_age: timedelta, directives: Mapping[str, str]
    ) -> None:
        """Use an open pool whose `search_path` is the evaluator's schema.

        Args:
            max_judged_age: retention of judged prompts, event time.
            directives: hashes of the fleet's texts, by level.
        """
        self._pool = pool
        self._status = status
        self._max_judged_age = max_judged_age
        self._directives = json.dumps(dict(directives))

    async def note_directives(self) -> None:
        """What earlier releases stored, which did not say with which texts, counts as judged with the fleet's.

        Groups that are changed by it are to be published again.
        """
        with self._status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute(
                    "UPDATE judged SET directives = $1::jsonb WHERE directives = '{}'", self._directives
                )
                await connection.execute(
                    "UPDATE prompt_groups SET published = false, "
                    "message = jsonb_set(message::jsonb, '{directives}', $1::jsonb)::text "
                    "WHERE version IS NOT NULL AND coalesce(message::jsonb->'directives', '{}') = '{}'",
                    self._directives,
                )

    async def last_directives(self, model: str) -> tuple[dict[str, str], int]:
        """Hashes of the texts in the last verdict, by level, and the number of verdicts that do not count.

        Without a verdict there are no hashes.
        """
        with self._status.watch():
            (row,) = await self._pool.fetch(
                "SELECT (array_agg(directives ORDER BY evaluated_at DESC))[1] AS last, "
                "count(*) FILTER (WHERE NOT directives @> $2::jsonb) AS others FROM judged WHERE model = $1",
                model,
                self._directives,
            )
        return json.loads(row["last"] or "{}"), row["others"]

    async def delete_expired(self, *, now: datetime) -> None:
        """Delete judged prompts that are older than the retention."""
        with self._status.watch():
            await self._pool.execute("DELETE FROM judged WHERE evaluated_at < $1", now - self._max_judged_age)

    async def progress(self, model: str) -> LearningProgress:
        """Number of judged prompts of a model."""
        with self._status.watch():
            (row,) = await self._pool.fetch(
                "SELECT count(*) AS judged, count(*) FILTER (WHERE learned_at IS NULL OR first_at > learned_at) "
                "AS unused, max(prompts) AS learned_from FROM (SELECT min(evaluated_at) AS first_at FROM judged "
                "WHERE model = $1 AND features = $2 AND directives @> $3::jsonb "
                "GROUP BY coalesce(nullif(prompt_hash, ''), id)) AS prompt "
                "LEFT JOIN prompt_groups ON version IS NOT NULL AND model = $1",
                model,
                FEATURES,
                self._directives,
            )
        return LearningProgress(row["judged"], row["unused"], row["learned_from"])

    async def judged_prompts(self, model: str, *, limit: int) -> list[JudgedPrompt]:
        """The newest judged prompts, oldest first."""
        with self._status.watch():
            rows = await self._pool.fetch(
                "SELECT * FROM judged WHERE model = $1 AND features = $2 AND directives @> $4::jsonb "
                "ORDER BY evaluated_at DESC, id LIMIT $3",
                model,
                FEATURES,
                limit,
                self._directives,
            )
        return [_judged_prompt(row) for row in reversed(rows)]

    async def groups_of(self, model: str, ids: Sequence[str]) -> dict[str, str]:
        """Groups of prompts that were judged before, by their ids."""
        with self._status.watch():
            rows = await self._pool.fetch(
                "SELECT id, prompt_group FROM judged WHERE model = $1 AND id = ANY($2::text[])",
                model,
                list(ids),
            )
        return {row["id"]: row["prompt_group"] for row in rows}

    async def version(self, model: str) -> str | None:
        """The current version of a model's groups; None if there is none."""
        with self._status.watch():
            version: str | None = await self._pool.fetchval("SELECT version FROM prompt_groups WHERE model = $1", model)
        return version

    async def grouping(self, model: str) -> PromptGrouping | None:
        """The newest message; None if there was never one."""
        with self._status.watch():
            message = await self._pool.fetchval("SELECT message FROM prompt_groups WHERE model = $1", model)
        return None if message is None else PromptGrouping.model_validate_json(message)

    async def save(self, grouping: PromptGrouping, group_of: Mapping[str, str]) -> None:
        """Store a new version, which is to be published, and re-label the judged prompts.

        Args:
            group_of: new group of judged prompts, by their ids.
        """
        with self._status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute(
                    "INSERT INTO prompt_groups (model, version, learned_at, prompts, message) "
                    "VALUES ($1, $2, $3, $4, $5) ON CONFLICT (model) DO UPDATE SET version = excluded.version, "
                    "learned_at = excluded.learned_at, prompts = excluded.prompts, message = excluded.message, "
                    "published = false",
                    grouping.model,
                    grouping.version,
                    grouping.learned_at,
                    grouping.prompts,
                    grouping.model_dump_json(),
                )
                await connection.execute(
                    "UPDATE judged SET prompt_group = new.name FROM unnest($2::text[], $3::text[]) AS new(id, name) "
                    "WHERE model = $1 AND judged.id = new.id",
                    grouping.model,
                    list(group_of.keys()),
                    list(group_of.values()),
                )

    async def unpublished(self) -> list[PromptGrouping]:
        """Versions that may not have reached Kafka."""
        with self._status.watch():
            rows = await self._pool.fetch("SELECT message FROM prompt_groups WHERE NOT published")
        return [PromptGrouping.model_validate_json(row["message"]) for row in rows]

    async def mark_published(self, grouping: PromptGrouping) -> None:
        """Record that a version has reached Kafka."""
        with self._status.watch():
            await self._pool.execute(
                "UPDATE prompt_groups SET published = true WHERE model = $1 AND version IS NOT DISTINCT FROM $2",
                grouping.model,
                grouping.version,
            )


async def save_judged(
    connection: Any,  # noqa: ANN401 - asyncpg's proxy has no common base with a connection
    model: str,
    prompts: Sequence[JudgedPrompt],
    *,
    directives: Mapping[str, str],
) -> None:
    """Store judged prompts in the caller's transaction; a newer verdict replaces an older one on the same prompt.

    Args:
        directives: hashes of the texts that were judged, by level.
    """
    texts = json.dumps(dict(directives))
    await connection.executemany(
        "INSERT INTO judged (model, id, request_id, stratum, prompt_group, evaluated_at, features, looks, answers, "
        "tenant, weight, prompt_hash, directives) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) "
        "ON CONFLICT (model, id) DO UPDATE SET "
        "stratum = excluded.stratum, prompt_group = excluded.prompt_group, evaluated_at = excluded.evaluated_at, "
        "features = excluded.features, looks = excluded.looks, answers = excluded.answers, tenant = excluded.tenant, "
        "weight = excluded.weight, prompt_hash = excluded.prompt_hash, directives = excluded.directives",
        [
            (
                model,
                one.id,
                one.request_id,
                one.stratum,
                one.group,
                one.evaluated_at,
                FEATURES,
                one.features.to_bytes(),
                json.dumps([answer.to_json() for answer in one.answers]),
                one.tenant,
                one.weight,
                one.prompt_hash,
                texts,
            )
            for one in prompts
        ],
    )


def _judged_prompt(row: asyncpg.Record) -> JudgedPrompt:
    return JudgedPrompt(
        id=row["id"],
        request_id=row["request_id"],
        stratum=row["stratum"],
        group=row["prompt_group"],
        evaluated_at=row["evaluated_at"],
        features=PromptFeatures.from_bytes(row["looks"]),
        answers=tuple(JudgedAnswer.from_json(one) for one in json.loads(row["answers"])),
        tenant=row["tenant"],
        weight=row["weight"],
        prompt_hash=row["prompt_hash"],
    )
