"""What the evaluator keeps in PostgreSQL: the reservoir, its evaluations, and what earlier ones took."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from services.evaluator.group_storage import keep_judged
from services.evaluator.judged import JudgedPrompt
from services.evaluator.reservoir import Held, admit, drawn
from services.evaluator.spending import Energy
from shared.kafka.dead_letters import RetryLaterError
from shared.messages import Quality, Sample
from shared.runtime.database import TRANSIENT_ERRORS

RETRY_PAUSE_S = 1.0
"""Wall seconds before what needs the database is tried again."""

Stratum = tuple[str, str]
"""(model, group)"""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """An evaluation that a process left unfinished."""

    trigger: str
    evaluated_at: datetime


class Storage:
    """The evaluator's tables.

    Every method raises `RetryLaterError` while the database is away.

    Attributes:
        problem: what is wrong with the database, as far as is known; null while it works.
    """

    def __init__(self, pool: asyncpg.Pool, *, capacity: int, max_age: timedelta, max_judged_age: timedelta) -> None:
        """Use an open pool whose `search_path` is the evaluator's schema.

        Args:
            capacity: samples kept for each model and group.
            max_age: event time that a sample is kept for.
            max_judged_age: event time that verdicts are kept for.
        """
        self._pool = pool
        self._capacity = capacity
        self._max_age = max_age
        self._max_judged_age = max_judged_age
        self.problem: str | None = None

    # Samples

    async def keep(self, samples: Sequence[Sample], *, now: datetime) -> None:
        """Let samples into the reservoir, and delete those that they displace."""
        arrivals: dict[Stratum, dict[str, Sample]] = defaultdict(dict)
        for sample in samples:
            arrivals[sample.model, sample.group][sample.request_id] = sample
        with self.watched():
            async with self._pool.acquire() as connection, connection.transaction():
                held = await self._held(connection, list(arrivals))
                await self._change(connection, arrivals, held, oldest=now - self._max_age)

    async def expire(self, *, now: datetime) -> None:
        """Delete what is too old, prompts first of all."""
        oldest = now - self._max_age
        with self.watched():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute("DELETE FROM reservoir WHERE sampled_at < $1", oldest)
                await connection.execute("DELETE FROM arrivals WHERE hour < $1", _hour(oldest))
                await connection.execute("DELETE FROM judged WHERE evaluated_at < $1", now - self._max_judged_age)

    async def sample_count(self, model: str) -> int:
        """Samples of a model in the reservoir."""
        with self.watched():
            count: int = await self._pool.fetchval("SELECT count(*) FROM reservoir WHERE model = $1", model)
        return count

    async def available(self, model: str) -> dict[str, list[str]]:
        """Ids of a model's samples by group, in the order in which to take them."""
        with self.watched():
            rows = await self._pool.fetch(
                "SELECT prompt_group, request_id FROM reservoir WHERE model = $1 "
                "ORDER BY evaluations, draw, request_id",
                model,
            )
        found: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            found[row["prompt_group"]].append(row["request_id"])
        return dict(found)

    async def traffic(self, model: str) -> dict[str, float]:
        """How many samples of each group of a model have come lately."""
        with self.watched():
            rows = await self._pool.fetch(
                "SELECT prompt_group, sum(samples) AS samples FROM arrivals WHERE model = $1 GROUP BY prompt_group",
                model,
            )
        return {row["prompt_group"]: float(row["samples"]) for row in rows}

    async def samples(self, model: str, ids: Sequence[str]) -> dict[str, Sample]:
        """The samples themselves, by id; one that has been deleted meanwhile is missing."""
        with self.watched():
            rows = await self._pool.fetch(
                "SELECT request_id, sample FROM reservoir WHERE model = $1 AND request_id = ANY($2::text[])",
                model,
                list(ids),
            )
        return {row["request_id"]: Sample.model_validate_json(row["sample"]) for row in rows}

    # Evaluations

    @asynccontextmanager
    async def claim(self, model: str) -> AsyncIterator[bool]:
        """Be the one that evaluates a model; yields whether it is so. Another process may hold the claim."""
        with self.watched():
            connection = await self._pool.acquire()
        try:
            with self.watched():
                key = f"sprout.evaluate.{model}"
                claimed: bool = await connection.fetchval("SELECT pg_try_advisory_lock(hashtext($1))", key)
            yield claimed
        finally:
            # Gives the lock back: a released connection is reset.
            await self._pool.release(connection)

    async def last_evaluation(self, model: str) -> datetime | None:
        """Event time of a model's last finished evaluation."""
        with self.watched():
            found: datetime | None = await self._pool.fetchval(
                "SELECT max(evaluated_at) FROM evaluations WHERE model = $1 AND status = 'finished'", model
            )
        return found

    async def take_interrupted(self, model: str) -> Interrupted | None:
        """Mark what a process left running as interrupted; only to be called with the claim.

        Returns:
            The newest of them; null where there is none.
        """
        with self.watched():
            rows = await self._pool.fetch(
                "UPDATE evaluations SET status = 'interrupted' WHERE model = $1 AND status = 'running' "
                "RETURNING trigger, evaluated_at",
                model,
            )
        found = [Interrupted(row["trigger"], row["evaluated_at"]) for row in rows]
        return max(found, key=lambda one: one.evaluated_at, default=None)

    async def began(self, evaluation_id: str, *, model: str, trigger: str, at: datetime) -> None:
        """An evaluation begins."""
        with self.watched():
            await self._pool.execute(
                "INSERT INTO evaluations (evaluation_id, model, trigger, evaluated_at, status) "
                "VALUES ($1, $2, $3, $4, 'running')",
                evaluation_id,
                model,
                trigger,
                at,
            )

    async def failed(self, evaluation_id: str, reason: str) -> None:
        """An evaluation came to nothing."""
        with self.watched():
            await self._pool.execute(
                "UPDATE evaluations SET status = 'failed', reason = $2 WHERE evaluation_id = $1", evaluation_id, reason
            )

    async def finished(self, quality: Quality, *, evaluated: Iterable[str], judged: Sequence[JudgedPrompt]) -> None:
        """An evaluation has its result, which is to be published.

        Args:
            evaluated: ids of the samples that took part.
            judged: those that have a verdict, for prompt groups to be learned from.
        """
        with self.watched():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute(
                    "UPDATE evaluations SET status = 'finished', quality = $2 WHERE evaluation_id = $1",
                    quality.evaluation_id,
                    quality.model_dump_json(),
                )
                await connection.execute(
                    "UPDATE reservoir SET evaluations = evaluations + 1 "
                    "WHERE model = $1 AND request_id = ANY($2::text[])",
                    quality.model,
                    list(evaluated),
                )
                await keep_judged(connection, quality.model, judged)

    async def unpublished(self) -> list[Quality]:
        """Results that may not have reached Kafka, oldest first."""
        with self.watched():
            rows = await self._pool.fetch(
                "SELECT quality FROM evaluations WHERE status = 'finished' AND NOT published ORDER BY evaluated_at"
            )
        return [Quality.model_validate_json(row["quality"]) for row in rows]

    async def published(self, evaluation_id: str) -> None:
        """A result has reached Kafka."""
        with self.watched():
            await self._pool.execute("UPDATE evaluations SET published = true WHERE evaluation_id = $1", evaluation_id)

    # Energy

    async def add_energy(self, book: Mapping[tuple[str, str], Energy]) -> None:
        """Add what the ledger attributed; a repetition adds joules and tokens alike and so leaves their ratio."""
        with self.watched():
            await self._pool.executemany(
                "INSERT INTO energy AS known (purpose, pool, joules, tokens) VALUES ($1, $2, $3, $4) "
                "ON CONFLICT (purpose, pool) DO UPDATE SET joules = known.joules + excluded.joules, "
                "tokens = known.tokens + excluded.tokens",
                [(purpose, pool, one.joules, one.tokens) for (purpose, pool), one in book.items()],
            )

    async def energy(self) -> dict[tuple[str, str], Energy]:
        """The energy of earlier evaluations' calls by (purpose, pool)."""
        with self.watched():
            rows = await self._pool.fetch("SELECT purpose, pool, joules, tokens FROM energy")
        return {(row["purpose"], row["pool"]): Energy(row["joules"], row["tokens"]) for row in rows}

    async def pause(self) -> None:
        """Wait before another attempt."""
        await asyncio.sleep(RETRY_PAUSE_S)

    async def _held(self, connection: Any, strata: Sequence[Stratum]) -> dict[Stratum, list[Held]]:  # noqa: ANN401
        """What lies in the strata, locked until the transaction's end."""
        rows = await connection.fetch(
            "SELECT model, prompt_group, request_id, sampled_at, draw, evaluations FROM reservoir "
            "WHERE (model, prompt_group) IN (SELECT * FROM unnest($1::text[], $2::text[])) FOR UPDATE",
            [model for model, _ in strata],
            [group for _, group in strata],
        )
        found: dict[Stratum, list[Held]] = defaultdict(list)
        for row in rows:
            one = Held(row["request_id"], row["sampled_at"], row["draw"], row["evaluations"])
            found[row["model"], row["prompt_group"]].append(one)
        return found

    async def _change(
        self,
        connection: Any,  # noqa: ANN401
        arrivals: Mapping[Stratum, Mapping[str, Sample]],
        held: Mapping[Stratum, Sequence[Held]],
        *,
        oldest: datetime,
    ) -> None:
        evicted: list[Stratum] = []
        admitted: list[tuple[object, ...]] = []
        counted: list[tuple[object, ...]] = []
        for (model, group), samples in arrivals.items():
            newcomers = {one.request_id: drawn(one.request_id, one.sampled_at) for one in samples.values()}
            decision = admit(held.get((model, group), ()), newcomers.values(), capacity=self._capacity, oldest=oldest)
            evicted += [(model, request_id) for request_id in decision.evicted]
            admitted += [
                (model, name, group, samples[name].sampled_at, newcomers[name].draw, samples[name].model_dump_json())
                for name in decision.admitted
            ]
            if decision.fresh:
                newest = max(one.sampled_at for one in samples.values())
                counted.append((model, group, _hour(newest), decision.fresh))
        await connection.executemany("DELETE FROM reservoir WHERE model = $1 AND request_id = $2", evicted)
        await connection.executemany(
            "INSERT INTO reservoir (model, request_id, prompt_group, sampled_at, draw, sample) "
            "VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
            admitted,
        )
        await connection.executemany(
            "INSERT INTO arrivals AS known (model, prompt_group, hour, samples) VALUES ($1, $2, $3, $4) "
            "ON CONFLICT (model, prompt_group, hour) DO UPDATE SET samples = known.samples + excluded.samples",
            counted,
        )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Tells apart a database that is away from a mistake, and remembers which."""
        try:
            yield
        except TRANSIENT_ERRORS as error:
            self.problem = f"PostgreSQL is away ({type(error).__name__})"
            raise RetryLaterError(self.problem) from error
        self.problem = None


def _hour(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
