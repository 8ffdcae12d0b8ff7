"""What the evaluator keeps for prompt groups: the judged prompts, and the version in force."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import asyncpg

from services.evaluator.judged import JudgedAnswer, JudgedPrompt, Looks
from shared.grouping import FEATURES
from shared.messages import PromptGrouping


@dataclass(frozen=True, slots=True)
class Progress:
    """How much there is to learn from.

    Attributes:
        judged: prompts kept.
        fresh: of these, judged since the version in force was learned.
        learned_from: prompts that it was learned from; null: there is none.
    """

    judged: int
    fresh: int
    learned_from: int | None


class GroupStorage:
    """The tables `judged` and `prompt_groups`. Every method raises `RetryLaterError` while the database is away."""

    def __init__(self, pool: asyncpg.Pool, watched: Callable[[], AbstractContextManager[None]]) -> None:
        """Use an open pool.

        Args:
            watched: turns a database that is away into `RetryLaterError`.
        """
        self._pool = pool
        self._watched = watched

    async def progress(self, model: str) -> Progress:
        """How much there is to learn from."""
        with self._watched():
            (row,) = await self._pool.fetch(
                "SELECT count(*) AS judged, count(*) FILTER (WHERE learned_at IS NULL OR evaluated_at > learned_at) "
                "AS fresh, max(prompts) AS learned_from FROM judged LEFT JOIN prompt_groups ON version IS NOT NULL "
                "AND prompt_groups.model = judged.model WHERE judged.model = $1 AND features = $2",
                model,
                FEATURES,
            )
        return Progress(row["judged"], row["fresh"], row["learned_from"])

    async def judged(self, model: str, *, most: int) -> list[JudgedPrompt]:
        """The newest judged prompts, oldest first."""
        with self._watched():
            rows = await self._pool.fetch(
                "SELECT * FROM judged WHERE model = $1 AND features = $2 "
                "ORDER BY evaluated_at DESC, request_id LIMIT $3",
                model,
                FEATURES,
                most,
            )
        return [_judged(row) for row in reversed(rows)]

    async def groups_of(self, model: str, ids: Sequence[str]) -> dict[str, str]:
        """The groups that prompts which were judged before are counted in, by request id."""
        with self._watched():
            rows = await self._pool.fetch(
                "SELECT request_id, prompt_group FROM judged WHERE model = $1 AND request_id = ANY($2::text[])",
                model,
                list(ids),
            )
        return {row["request_id"]: row["prompt_group"] for row in rows}

    async def version(self, model: str) -> str | None:
        """The version in force; null where there is none."""
        with self._watched():
            version: str | None = await self._pool.fetchval("SELECT version FROM prompt_groups WHERE model = $1", model)
        return version

    async def grouping(self, model: str) -> PromptGrouping | None:
        """The newest version's message; null where there never was one."""
        with self._watched():
            message = await self._pool.fetchval("SELECT message FROM prompt_groups WHERE model = $1", model)
        return None if message is None else PromptGrouping.model_validate_json(message)

    async def keep(self, grouping: PromptGrouping, groups: Mapping[str, str]) -> None:
        """A version is in force, and is to be published.

        Args:
            groups: that judged prompts are counted in from now on, by request id.
        """
        with self._watched():
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
                    "WHERE model = $1 AND request_id = new.id",
                    grouping.model,
                    list(groups.keys()),
                    list(groups.values()),
                )

    async def unpublished(self) -> list[PromptGrouping]:
        """Versions that may not have reached Kafka."""
        with self._watched():
            rows = await self._pool.fetch("SELECT message FROM prompt_groups WHERE NOT published")
        return [PromptGrouping.model_validate_json(row["message"]) for row in rows]

    async def published(self, grouping: PromptGrouping) -> None:
        """A version has reached Kafka."""
        with self._watched():
            await self._pool.execute(
                "UPDATE prompt_groups SET published = true WHERE model = $1 AND version IS NOT DISTINCT FROM $2",
                grouping.model,
                grouping.version,
            )


async def keep_judged(connection: Any, model: str, prompts: Sequence[JudgedPrompt]) -> None:  # noqa: ANN401
    """Keep what was judged, the newest verdict on each prompt; in the caller's transaction."""
    await connection.executemany(
        "INSERT INTO judged (model, request_id, stratum, prompt_group, evaluated_at, features, looks, answers) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (model, request_id) DO UPDATE SET "
        "stratum = excluded.stratum, prompt_group = excluded.prompt_group, evaluated_at = excluded.evaluated_at, "
        "features = excluded.features, looks = excluded.looks, answers = excluded.answers",
        [
            (
                model,
                one.request_id,
                one.stratum,
                one.group,
                one.evaluated_at,
                FEATURES,
                one.looks.to_bytes(),
                json.dumps([answer.document() for answer in one.answers]),
            )
            for one in prompts
        ],
    )


def _judged(row: asyncpg.Record) -> JudgedPrompt:
    return JudgedPrompt(
        request_id=row["request_id"],
        stratum=row["stratum"],
        group=row["prompt_group"],
        evaluated_at=row["evaluated_at"],
        looks=Looks.from_bytes(row["looks"]),
        answers=tuple(JudgedAnswer.from_document(one) for one in json.loads(row["answers"])),
    )
