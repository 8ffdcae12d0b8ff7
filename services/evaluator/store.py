"""Tables of evaluations, their energy and carbon."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import asyncpg

from services.evaluator.budget import CEILING_WINDOW, Spending
from services.evaluator.cost import CallSums, CarbonKey, Energy, EnergyByPool
from services.evaluator.group_store import save_judged
from services.evaluator.quality import JudgedPrompt
from shared.messages import Quality
from shared.runtime.database import DatabaseStatus

EVALUATIONS_KEPT: Final = timedelta(days=365)
"""How long evaluations are kept, event time: as long as the topic `quality` keeps their results."""


@dataclass(frozen=True, slots=True)
class InterruptedEvaluation:
    """An evaluation that a process left unfinished."""

    reason: str
    evaluated_at: datetime


class EvaluationStore:
    """The tables `evaluations`, `energy` and `carbon`; methods raise `DatabaseUnavailableError`.

    Only the leader of the evaluator's copies evaluates. It marks evaluations that others left running as interrupted,
    which ends them: such an evaluation cannot be finished any more.
    """

    def __init__(self, pool: asyncpg.Pool, status: DatabaseStatus) -> None:
        """Use an open pool whose `search_path` is the evaluator's schema."""
        self._pool = pool
        self._status = status

    async def last_evaluation(self, model: str) -> datetime | None:
        """Event time of a model's last finished evaluation."""
        with self._status.watch():
            found: datetime | None = await self._pool.fetchval(
                "SELECT max(evaluated_at) FROM evaluations WHERE model = $1 AND status = 'finished'", model
            )
        return found

    async def recover_interrupted(self, model: str) -> InterruptedEvaluation | None:
        """Mark running evaluations of a model as interrupted; the caller must be the leader.

        Returns:
            The newest of them; None if there is none.
        """
        with self._status.watch():
            rows = await self._pool.fetch(
                "UPDATE evaluations SET status = 'interrupted' WHERE model = $1 AND status = 'running' "
                "RETURNING trigger, evaluated_at",
                model,
            )
        found = [InterruptedEvaluation(row["trigger"], row["evaluated_at"]) for row in rows]
        return max(found, key=lambda one: one.evaluated_at, default=None)

    async def start(self, evaluation_id: str, *, model: str, reason: str, at: datetime) -> None:
        """Record that an evaluation starts."""
        with self._status.watch():
            await self._pool.execute(
                "INSERT INTO evaluations (evaluation_id, model, trigger, evaluated_at, status) "
                "VALUES ($1, $2, $3, $4, 'running')",
                evaluation_id,
                model,
                reason,
                at,
            )

    async def fail(self, evaluation_id: str, error: str) -> None:
        """Record that an evaluation failed."""
        with self._status.watch():
            await self._pool.execute(
                "UPDATE evaluations SET status = 'failed', reason = $2 WHERE evaluation_id = $1", evaluation_id, error
            )

    async def finish(self, quality: Quality, *, evaluated: Iterable[str], judged: Sequence[JudgedPrompt]) -> bool:
        """Record the result of an evaluation, which is to be published.

        A sample that was deleted meanwhile, perhaps at its tenant's request, leaves no judged prompt behind.

        Args:
            evaluated: ids of the samples that took part, or were passed over.
            judged: those with a verdict.

        Returns:
            False if another process has marked it as interrupted; nothing is recorded then.
        """
        with self._status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                found = await connection.fetchval(
                    "UPDATE evaluations SET status = 'finished', quality = $2 "
                    "WHERE evaluation_id = $1 AND status = 'running' RETURNING true",
                    quality.evaluation_id,
                    quality.model_dump_json(),
                )
                if found is None:
                    # An earlier attempt may have been committed without an answer from PostgreSQL.
                    status = await connection.fetchval(
                        "SELECT status FROM evaluations WHERE evaluation_id = $1", quality.evaluation_id
                    )
                    return bool(status == "finished")
                kept = await connection.fetch(
                    "UPDATE reservoir SET evaluations = evaluations + 1 "
                    "WHERE model = $1 AND id = ANY($2::text[]) RETURNING id",
                    quality.model,
                    list(evaluated),
                )
                ids = {row["id"] for row in kept}
                kept_prompts = [one for one in judged if one.id in ids]
                await save_judged(connection, quality.model, kept_prompts, directives=quality.directives)
        return True

    async def unpublished(self) -> list[Quality]:
        """Results that may not have reached Kafka, oldest first."""
        with self._status.watch():
            rows = await self._pool.fetch(
                "SELECT quality FROM evaluations WHERE status = 'finished' AND NOT published ORDER BY evaluated_at"
            )
        return [Quality.model_validate_json(row["quality"]) for row in rows]

    async def mark_published(self, evaluation_id: str) -> None:
        """Record that a result has reached Kafka."""
        with self._status.watch():
            await self._pool.execute("UPDATE evaluations SET published = true WHERE evaluation_id = $1", evaluation_id)

    async def add_footprints(self, energy: EnergyByPool, carbon: Mapping[CarbonKey, CallSums]) -> None:
        """Add attributed energy and carbon.

        A redelivery adds joules and tokens alike, and the carbon of requests and evaluations alike.
        """
        with self._status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.executemany(
                    "INSERT INTO energy AS known (purpose, pool, joules, tokens) VALUES ($1, $2, $3, $4) "
                    "ON CONFLICT (purpose, pool) DO UPDATE SET joules = known.joules + excluded.joules, "
                    "tokens = known.tokens + excluded.tokens",
                    [(*key, one.joules, one.tokens) for key, one in sorted(energy.items())],
                )
                await connection.executemany(
                    "INSERT INTO carbon AS known (model, hour, evaluation_id, calls, grams) "
                    "VALUES ($1, $2, $3, $4, $5) ON CONFLICT (model, hour, evaluation_id) DO UPDATE SET "
                    "calls = known.calls + excluded.calls, grams = known.grams + excluded.grams",
                    [(*key, sums.calls, sums.grams) for key, sums in sorted(carbon.items())],
                )

    async def delete_expired(self, *, now: datetime) -> None:
        """Delete carbon that no budget needs any more, and old evaluations that are over and published."""
        with self._status.watch():
            await self._pool.execute("DELETE FROM carbon WHERE hour < $1", now - 2 * CEILING_WINDOW)
            await self._pool.execute(
                "DELETE FROM evaluations WHERE evaluated_at < $1 "
                "AND (published OR status IN ('failed', 'interrupted'))",
                now - EVALUATIONS_KEPT,
            )

    async def spending(self, model: str, *, now: datetime) -> Spending:
        """Carbon of a model's requests and evaluations."""
        with self._status.watch():
            (sums,) = await self._pool.fetch(
                "SELECT sum(grams) FILTER (WHERE evaluation_id = '' AND hour >= $2) AS requests_g, "
                "sum(grams) FILTER (WHERE evaluation_id <> '' AND trigger IS DISTINCT FROM 'first' AND hour >= $2) "
                "AS evaluator_g, "
                "sum(calls) FILTER (WHERE evaluation_id = '' AND hour >= $3) AS requests, "
                "min(hour) FILTER (WHERE evaluation_id = '' AND hour >= $3) AS since, "
                "sum(grams) FILTER (WHERE status = 'finished') AS finished_g "
                "FROM carbon LEFT JOIN evaluations USING (evaluation_id) WHERE carbon.model = $1",
                model,
                now - CEILING_WINDOW,
                now - timedelta(days=1),
            )
            prompts = await self._pool.fetchval(
                "SELECT sum((quality::json->>'prompts')::int) FROM evaluations WHERE status = 'finished' "
                "AND evaluation_id IN (SELECT evaluation_id FROM carbon WHERE model = $1)",
                model,
            )
        known_s = (now - sums["since"]).total_seconds() if sums["since"] is not None else 0.0
        return Spending(
            requests_g=sums["requests_g"] or 0.0,
            evaluator_g=sums["evaluator_g"] or 0.0,
            requests_per_s=float(sums["requests"]) / known_s if known_s > 0.0 else 0.0,
            g_per_prompt=(sums["finished_g"] or 0.0) / prompts if prompts else None,
        )

    async def energy(self) -> dict[tuple[str, str], Energy]:
        """Energy of earlier evaluations by (purpose, pool)."""
        with self._status.watch():
            rows = await self._pool.fetch("SELECT purpose, pool, joules, tokens FROM energy")
        return {(row["purpose"], row["pool"]): Energy(row["joules"], row["tokens"]) for row in rows}
