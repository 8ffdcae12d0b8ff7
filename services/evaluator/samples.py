"""Samples: which ones are kept, their table, and the consumer that fills it.

For every model and prompt group the reservoir is a uniform sample of bounded size. Each request's record hashes to a
number, with the deployment's key, and the smallest numbers stay. The result does not depend on the order of arrival,
and a redelivered sample changes nothing. (Algorithm R draws by position in the stream, so it would have to remember
every id that it rejected.) Prompts that were already evaluated are replaced first, because a second verdict on the same
prompt adds little evidence.

A model keeps a bounded number of samples, however many task labels its clients invent. Beyond that number the places
are divided by the groups' traffic with the highest-averages (D'Hondt) method: the n-th sample of a group with t
arrivals has the quotient n / t, and the largest quotients leave. A flood of labels that occur once so displaces no
group that is used. What is known of a group's traffic goes with its last sample.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import asyncpg

from services.evaluator.cost import carbon_by_hour, evaluation_energy
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.store import EvaluationStore
from shared.hashing import uniform
from shared.messages import Footprint, Sample
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseStatus, DatabaseUnavailableError

T = TypeVar("T")

_SALT: Final = "reservoir"

_SAMPLES_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtext('sprout.evaluator.samples'))"
"""Evaluators change the reservoir one after the other: each sees what the others have kept."""

_EVICT_BEYOND: Final = """
DELETE FROM reservoir USING (
    SELECT id FROM (
        SELECT id, draw,
               row_number() OVER (PARTITION BY prompt_group ORDER BY evaluations, draw, id)
                   / greatest(1, coalesce(traffic.samples, 1))::float8 AS quotient
        FROM reservoir LEFT JOIN (
            SELECT prompt_group, sum(samples) AS samples FROM arrivals WHERE model = $1 GROUP BY prompt_group
        ) AS traffic USING (prompt_group)
        WHERE model = $1
    ) AS ranked
    ORDER BY quotient, draw, id OFFSET $2
) AS beyond
WHERE reservoir.model = $1 AND reservoir.id = beyond.id
"""
_FORGET_TRAFFIC: Final = """
DELETE FROM arrivals WHERE model = $1 AND NOT EXISTS (
    SELECT FROM reservoir WHERE reservoir.model = $1 AND reservoir.prompt_group = arrivals.prompt_group
)
"""

Stratum = tuple[str, str]
"""(model, group)"""


@dataclass(frozen=True, slots=True)
class ReservoirEntry:
    """A sample in the reservoir, without its prompt.

    Attributes:
        id: identifies the request.
        sampled_at: event time.
        draw: in [0, 1); smaller numbers stay longer.
        evaluations: in which the sample took part.
    """

    id: str
    sampled_at: datetime
    draw: float
    evaluations: int = 0

    @classmethod
    def new(cls, identity: str, sampled_at: datetime, draw_key: bytes = b"") -> "ReservoirEntry":
        """A new sample with the number of its identity."""
        return cls(identity, sampled_at, uniform(_SALT, identity, draw_key))

    @property
    def rank(self) -> tuple[int, float, str]:
        """Lower ranks stay; the id breaks ties."""
        return (self.evaluations, self.draw, self.id)


@dataclass(frozen=True, slots=True)
class ReservoirUpdate:
    """Change of one stratum.

    Attributes:
        admitted: ids of new samples to store.
        evicted: ids of samples to delete with their prompts.
        unseen: number of offered samples that were not in the reservoir.
    """

    admitted: frozenset[str]
    evicted: frozenset[str]
    unseen: int


def admit(
    stored: Collection[ReservoirEntry], offered: Iterable[ReservoirEntry], *, capacity: int, oldest: datetime
) -> ReservoirUpdate:
    """Decide which samples of one stratum stay.

    Args:
        offered: new samples; some may be stored already.
        capacity: maximum number of samples.
        oldest: event time; older samples are evicted.
    """
    stored_ids = {one.id for one in stored}
    unseen = {one.id: one for one in offered if one.id not in stored_ids}
    candidates = [one for one in (*stored, *unseen.values()) if one.sampled_at >= oldest]
    kept = {one.id for one in sorted(candidates, key=lambda one: one.rank)[:capacity]}
    return ReservoirUpdate(frozenset(kept - stored_ids), frozenset(stored_ids - kept), len(unseen))


class SampleStore:
    """The tables `reservoir` and `arrivals`; methods raise `DatabaseUnavailableError`."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        status: DatabaseStatus,
        *,
        samples_per_group: int,
        samples_per_model: int,
        max_age: timedelta,
        draw_key: bytes = b"",
    ) -> None:
        """Use an open pool whose `search_path` is the evaluator's schema.

        Args:
            samples_per_group: capacity of each stratum.
            samples_per_model: capacity of all strata of a model together.
            max_age: retention of samples, event time.
            draw_key: secret of the deployment; empty: none.
        """
        self._pool = pool
        self._status = status
        self._samples_per_group = samples_per_group
        self._samples_per_model = samples_per_model
        self._max_age = max_age
        self._draw_key = draw_key

    async def add(self, samples: Sequence[Sample], *, now: datetime) -> None:
        """Offer samples to the reservoir, and delete those that they displace."""
        strata: dict[Stratum, dict[str, Sample]] = defaultdict(dict)
        for sample in samples:
            strata[sample.model, sample.group][sample.identity] = sample
        with self._status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute(_SAMPLES_LOCK)
                stored = await _lock_strata(connection, list(strata))
                await self._update(connection, strata, stored, oldest=now - self._max_age)
                for model in sorted({model for model, _ in strata}):
                    await self._limit(connection, model)

    async def delete_expired(self, *, now: datetime) -> None:
        """Delete samples and traffic counts that are older than the retention."""
        oldest = now - self._max_age
        with self._status.watch():
            async with self._pool.acquire() as connection, connection.transaction():
                await connection.execute("DELETE FROM reservoir WHERE sampled_at < $1", oldest)
                await connection.execute("DELETE FROM arrivals WHERE hour < $1", _hour(oldest))

    async def count(self, model: str) -> int:
        """Samples of a model in the reservoir."""
        with self._status.watch():
            count: int = await self._pool.fetchval("SELECT count(*) FROM reservoir WHERE model = $1", model)
        return count

    async def ids_by_group(self, model: str) -> dict[str, list[str]]:
        """Ids of a model's samples by group, in the order in which evaluations take them."""
        with self._status.watch():
            rows = await self._pool.fetch(
                "SELECT prompt_group, id FROM reservoir WHERE model = $1 ORDER BY evaluations, draw, id",
                model,
            )
        found: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            found[row["prompt_group"]].append(row["id"])
        return dict(found)

    async def traffic(self, model: str) -> dict[str, float]:
        """Samples that arrived within the retention, by group."""
        with self._status.watch():
            rows = await self._pool.fetch(
                "SELECT prompt_group, sum(samples) AS samples FROM arrivals WHERE model = $1 GROUP BY prompt_group",
                model,
            )
        return {row["prompt_group"]: float(row["samples"]) for row in rows}

    async def load(self, model: str, ids: Sequence[str]) -> list[Sample]:
        """The samples with these ids, in this order; samples that were deleted meanwhile are missing."""
        with self._status.watch():
            rows = await self._pool.fetch(
                "SELECT id, sample FROM reservoir WHERE model = $1 AND id = ANY($2::text[])",
                model,
                list(ids),
            )
        found = {row["id"]: Sample.model_validate_json(row["sample"]) for row in rows}
        return [found[one] for one in ids if one in found]

    async def _limit(
        self,
        connection: Any,  # noqa: ANN401 - asyncpg's proxy has no common base with a connection
        model: str,
    ) -> None:
        """Keep at most `samples_per_model` samples of a model."""
        samples = await connection.fetchval("SELECT count(*) FROM reservoir WHERE model = $1", model)
        if samples > self._samples_per_model:
            await connection.execute(_EVICT_BEYOND, model, self._samples_per_model)
            await connection.execute(_FORGET_TRAFFIC, model)

    async def _update(
        self,
        connection: Any,  # noqa: ANN401 - asyncpg's proxy has no common base with a connection
        strata: Mapping[Stratum, Mapping[str, Sample]],
        stored: Mapping[Stratum, Sequence[ReservoirEntry]],
        *,
        oldest: datetime,
    ) -> None:
        evicted: list[tuple[str, str]] = []
        admitted: list[tuple[object, ...]] = []
        counted: list[tuple[object, ...]] = []
        for (model, group), samples in strata.items():
            offered = {name: ReservoirEntry.new(name, one.sampled_at, self._draw_key) for name, one in samples.items()}
            update = admit(
                stored.get((model, group), ()), offered.values(), capacity=self._samples_per_group, oldest=oldest
            )
            evicted += [(model, name) for name in update.evicted]
            admitted += [
                (
                    *(model, name, samples[name].request_id, group, samples[name].tenant),
                    *(samples[name].sampled_at, offered[name].draw),
                    samples[name].model_dump_json(),
                )
                for name in update.admitted
            ]
            if update.unseen:
                newest = max(one.sampled_at for one in samples.values())
                counted.append((model, group, _hour(newest), update.unseen))
        await connection.executemany("DELETE FROM reservoir WHERE model = $1 AND id = $2", evicted)
        await connection.executemany(
            "INSERT INTO reservoir (model, id, request_id, prompt_group, tenant, sampled_at, draw, sample) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING",
            admitted,
        )
        await connection.executemany(
            "INSERT INTO arrivals AS known (model, prompt_group, hour, samples) VALUES ($1, $2, $3, $4) "
            "ON CONFLICT (model, prompt_group, hour) DO UPDATE SET samples = known.samples + excluded.samples",
            counted,
        )


class InputConsumer:
    """Writes samples and the energy of earlier evaluations to the database.

    While the database is unavailable, methods raise `DatabaseUnavailableError` after a pause, and Kafka redelivers the
    batch.
    """

    def __init__(
        self,
        models: Collection[str],
        *,
        clock: Clock,
        metrics: EvaluatorMetrics,
        on_new_samples: Callable[[], None],
        retry_pause_s: float,
    ) -> None:
        """Create; `connect` must be called before the subscribers start.

        Args:
            models: whose samples are kept.
            retry_pause_s: before a batch is redelivered that could not be stored, wall.
        """
        self._models = models
        self._clock = clock
        self._metrics = metrics
        self._on_new_samples = on_new_samples
        self._retry_pause_s = retry_pause_s
        self._samples: SampleStore | None = None
        self._evaluations: EvaluationStore | None = None

    def connect(self, samples: SampleStore, evaluations: EvaluationStore) -> None:
        """Use these stores from now on."""
        self._samples, self._evaluations = samples, evaluations

    async def add_samples(self, samples: Sequence[Sample]) -> None:
        """Offer samples to the reservoir."""
        # PostgreSQL's text cannot contain NUL.
        usable = [
            one
            for one in samples
            if one.model in self._models and "\0" not in one.identity + one.request_id + one.group + (one.tenant or "")
        ]
        if usable:
            async with self._pause_on_failure():
                await _connected(self._samples).add(usable, now=self._clock.now())
            self._on_new_samples()
        self._metrics.samples.labels("offered").inc(len(usable))
        self._metrics.samples.labels("rejected").inc(len(samples) - len(usable))

    async def add_footprints(self, footprints: Sequence[Footprint]) -> None:
        """Add the energy that the ledger attributed to evaluations, and the carbon of requests and evaluations."""
        energy = evaluation_energy(footprints)
        carbon = carbon_by_hour(one for one in footprints if one.model in self._models)
        if energy or carbon:
            async with self._pause_on_failure():
                await _connected(self._evaluations).add_footprints(energy, carbon)

    @asynccontextmanager
    async def _pause_on_failure(self) -> AsyncIterator[None]:
        try:
            yield
        except DatabaseUnavailableError:
            # FastStream redelivers at once, so the pause has to be here.
            await asyncio.sleep(self._retry_pause_s)
            raise


def _connected(store: T | None) -> T:
    if store is None:
        raise DatabaseUnavailableError("PostgreSQL is not connected yet")
    return store


async def _lock_strata(
    connection: Any,  # noqa: ANN401
    strata: Sequence[Stratum],
) -> dict[Stratum, list[ReservoirEntry]]:
    """The stored entries of the strata, locked until the end of the transaction."""
    rows = await connection.fetch(
        "SELECT model, prompt_group, id, sampled_at, draw, evaluations FROM reservoir "
        "WHERE (model, prompt_group) IN (SELECT * FROM unnest($1::text[], $2::text[])) FOR UPDATE",
        [model for model, _ in strata],
        [group for _, group in strata],
    )
    found: dict[Stratum, list[ReservoirEntry]] = defaultdict(list)
    for row in rows:
        entry = ReservoirEntry(row["id"], row["sampled_at"], row["draw"], row["evaluations"])
        found[row["model"], row["prompt_group"]].append(entry)
    return found


def _hour(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
