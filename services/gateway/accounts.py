"""The requests of every key in PostgreSQL: admitted within its limits, and booked with their footprints.

Admission is one round trip (see `admission`). What became of a request is written in batches in the background; a
gateway that dies loses its last batch, whose tokens and energy then arrive with the footprints.
"""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import asyncpg

from services.gateway.admission import Admission, AdmissionQueue
from services.gateway.errors import ApiError
from services.gateway.estimates import Estimate, Estimates
from services.gateway.keys import ApiKey
from services.gateway.limits import Verdict, counted_tokens, forced_level, stricter_directive
from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings
from shared.messages import Footprint, GenerationRequest, GenerationResponse
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseStatus, DatabaseUnavailableError
from shared.runtime.logs import get_logger

BATCH: Final = 500
"""Finished requests that are written at once."""

LINGER_S: Final = 0.1
"""How long a finished request waits for others, where nobody waits for it, wall."""

RELEASE_WAIT_S: Final = 1.0
"""Longest wait of an answer until its place among the concurrent requests is free again, wall."""

LEASE_MARGIN_S: Final = 60.0
"""After a request's deadline it counts as open for this long at most, wall."""

REMOVED_AT_ONCE: Final = 5_000
"""Old rows of one statement."""

REMOVAL_PAUSE_S: Final = 600.0

_LARGEST_COUNT: Final = 2**31 - 1
_LARGEST_AMOUNT: Final = 1e12
"""Of joules and grams of one request: what is larger would spoil the sums."""

_FOOTPRINT_FIELDS: Final = (
    "record", "pool", "level", "zone", "prompt_tokens", "completion_tokens", "energy_j", "intensity_g_per_kwh",
    "operational_g", "embodied_g", "total_g",
)  # fmt: skip

_log = get_logger(__name__)


class DeferredError(Exception):
    """The line of a batch waits for a new carbon budget."""


class Accounts:
    """Admits requests, and keeps what became of them."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        status: DatabaseStatus,
        *,
        levels: Sequence[str],
        settings: GatewaySettings,
        clock: Clock,
        metrics: GatewayMetrics,
    ) -> None:
        """Use an open pool whose `search_path` is the gateway's schema.

        Args:
            levels: of the catalogue, the reference first.
        """
        self._pool = pool
        self._status = status
        self._levels = levels
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._instance = uuid4().hex
        self._admissions = AdmissionQueue(
            pool,
            status,
            instance=self._instance,
            lease_s=settings.deadline_s + LEASE_MARGIN_S,
            timeout_s=settings.admission_timeout_s,
        )
        self._finished: deque[dict[str, Any]] = deque()
        self._written = 0
        self._accepted = 0
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._progress = asyncio.Condition()

    async def admit(self, key: ApiKey, request: GenerationRequest) -> Admission:
        """Count a request against the limits of its key and tenant.

        Raises:
            ApiError: a limit is reached, or nobody can say whether.
        """
        now, tokens = self._clock.now(), counted_tokens(request)
        try:
            verdict = await self._admissions.decide(key, request, tokens=tokens, at=now)
        except asyncio.CancelledError:
            self.finish(Admission(request, key, now, {}), None)  # it may be counted yet
            raise
        except DatabaseUnavailableError as error:
            if isinstance(error.__cause__, TimeoutError):
                self.finish(Admission(request, key, now, {}), None)  # it may have been counted
            if not self._settings.serve_without_database:
                raise ApiError.unavailable("the limits of this API key cannot be checked at the moment") from None
            return Admission(request, key, now, {})
        defers = verdict.refusal == "budget" and await self._defers_batches(verdict)
        refused = verdict.error(tokens, now, defers_batches=defers)
        if refused is not None:
            self._metrics.refused.labels(verdict.refusal or "").inc()
            raise refused
        return self._admitted(key, request, verdict, tokens, now)

    async def admit_line(self, key: ApiKey, request: GenerationRequest) -> Admission | float:
        """Count the request of a batch's line against the tokens and the carbon budget of its key and tenant.

        Returns:
            How many wall seconds to wait, where the tokens of this minute do not suffice.

        Raises:
            ApiError: the key was revoked, its carbon budget is spent, or the line is larger than its limit.
            DeferredError: the carbon budget is spent, and lets batches wait.
            DatabaseUnavailableError: PostgreSQL is unavailable.
        """
        now, tokens = self._clock.now(), counted_tokens(request)
        with self._status.watch():
            found = await self._pool.fetchval(
                "SELECT admit_line($1, $2, $3, $4, $5, $6)", key.id, key.tenant, request.id, request.model, tokens, now
            )
        verdict = Verdict.model_validate_json(found)
        if verdict.refusal == "tokens" and not verdict.is_too_large(tokens):
            return verdict.reset_s
        if verdict.refusal == "budget" and await self._defers_batches(verdict):
            raise DeferredError
        refused = verdict.error(tokens, now)
        if refused is not None:
            raise refused
        return self._admitted(key, request, verdict, tokens, now)

    async def _defers_batches(self, verdict: Verdict) -> bool:
        """Whether all carbon budgets that are spent, and refuse requests because of it, let batches wait.

        Raises:
            DatabaseUnavailableError: PostgreSQL is unavailable.
        """
        with self._status.watch():
            return bool(
                await self._pool.fetchval(
                    "SELECT bool_and(defer_batches) FROM limits WHERE account = ANY($1) AND when_spent = 'refuse'",
                    verdict.spent(),
                )
            )

    def _admitted(
        self, key: ApiKey, request: GenerationRequest, verdict: Verdict, tokens: int, now: datetime
    ) -> Admission:
        """The request with the directive that its budgets force."""
        level = forced_level(verdict.accounts, self._levels, now)
        directive = stricter_directive(request.directive, level, self._levels)
        if directive != request.directive:
            self._metrics.forced.inc()
            request = request.model_copy(update={"directive": directive})
        return Admission(request, key, now, verdict.headers(tokens), verdict.limits_concurrency)

    def answered(self, admission: Admission, response: GenerationResponse, estimates: Estimates) -> None:
        """Note that a request is over, with estimates of its energy and carbon."""
        self.finish(
            admission,
            response,
            estimates.of(response.model, response.decision, response.usage) if response.usage else None,
            reference_g=estimates.reference_grams(response.model, response.decision),
        )

    def finish(
        self,
        admission: Admission,
        response: GenerationResponse | None,
        estimate: Estimate | None = None,
        *,
        reference_g: float | None = None,
    ) -> None:
        """Note that a request is over; the background task writes it.

        Args:
            response: None: none has arrived, so nobody knows what was generated.
            estimate: of its energy and carbon.
            reference_g: estimate of the reference option for the same request.
        """
        if len(self._finished) >= self._settings.max_unwritten_requests:
            self._metrics.unwritten.inc()
            return
        self._finished.append(_finished_row(admission, response, estimate or Estimate(), reference_g))
        self._accepted += 1
        self._wake.set()

    async def written(self) -> None:
        """Wait until what has been finished so far is written, `RELEASE_WAIT_S` at most."""
        number = self._accepted
        self._hurry.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_WAIT_S), self._progress:
                await self._progress.wait_for(lambda: self._written >= number)

    async def book(self, footprints: Iterable[Footprint]) -> None:
        """Add footprints to their requests; those of requests of other producers are left out.

        Raises:
            DatabaseUnavailableError: PostgreSQL is unavailable.
        """
        rows = [_footprint_row(one) for one in footprints if one.purpose == "request"]
        if rows:
            with self._status.watch():
                await self._pool.execute("SELECT book($1)", json.dumps(rows))

    async def fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """The rows of a query.

        Raises:
            DatabaseUnavailableError: PostgreSQL is unavailable.
        """
        with self._status.watch():
            return list(await self._pool.fetch(statement, *arguments))

    async def run(self) -> None:
        """Write finished requests, until cancelled; then write the rest."""
        try:
            while True:
                await self._wake.wait()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_S):
                        await self._hurry.wait()
                self._hurry.clear()
                await self._status.retry(self._write, pause_s=0.5)
        finally:
            with contextlib.suppress(DatabaseUnavailableError):
                await self._write()
                with self._status.watch():
                    await self._pool.execute("DELETE FROM instances WHERE id = $1", self._instance)

    async def renew(self) -> None:
        """Say that this gateway lives: without that its requests do not count as open any more.

        Raises:
            DatabaseUnavailableError: PostgreSQL is unavailable.
        """
        with self._status.watch():
            await self._pool.execute(
                "INSERT INTO instances VALUES ($1, clock_timestamp() + make_interval(secs => $2)) "
                "ON CONFLICT (id) DO UPDATE SET expires_at_wall = excluded.expires_at_wall",
                self._instance,
                self._settings.lease_s,
            )

    async def keep_lease(self) -> None:
        """Renew the lease, until cancelled."""
        while True:
            with contextlib.suppress(DatabaseUnavailableError):
                await self.renew()
            await asyncio.sleep(self._settings.lease_s / 3)

    async def remove_old(self) -> None:
        """Remove old requests and sums, and gateways that died, until cancelled."""
        while True:
            now = self._clock.now()
            with contextlib.suppress(DatabaseUnavailableError):
                while await self._remove(now - timedelta(days=self._settings.footprint_days)):
                    pass
                await self._remove_sums(now - timedelta(days=self._settings.usage_days))
            await asyncio.sleep(REMOVAL_PAUSE_S)

    async def _remove(self, before: datetime) -> bool:
        """Remove some old rows; returns whether there may be more."""
        with self._status.watch():
            await self._pool.execute(
                "DELETE FROM instances WHERE expires_at_wall < clock_timestamp() - interval '1 hour'"
            )
            removed = await self._pool.execute(
                "DELETE FROM requests WHERE id IN "
                "(SELECT id FROM requests WHERE created_at < $1 ORDER BY created_at LIMIT $2)",
                before,
                REMOVED_AT_ONCE,
            )
        return removed == f"DELETE {REMOVED_AT_ONCE}"

    async def _remove_sums(self, before: datetime) -> None:
        """Remove sums of hours and months that began before a time."""
        with self._status.watch():
            await self._pool.execute("DELETE FROM hours WHERE hour < $1", before)
            await self._pool.execute("DELETE FROM months WHERE month < $1", before)

    async def _write(self) -> None:
        """Write all that is finished.

        Raises:
            DatabaseUnavailableError: PostgreSQL is unavailable; nothing is lost.
        """
        while self._finished:
            batch = [self._finished[number] for number in range(min(BATCH, len(self._finished)))]
            rows = {row["id"]: row for row in reversed(batch)}  # of several with one id the first counts
            with self._status.watch():
                try:
                    await self._pool.execute("SELECT finish($1)", json.dumps(list(rows.values())))
                except asyncpg.DataError as error:
                    _log.error("finished requests cannot be stored", error=type(error).__name__, requests=len(batch))
                except asyncpg.TransactionRollbackError as error:
                    raise DatabaseUnavailableError("PostgreSQL has rolled back") from error
            for _ in batch:
                self._finished.popleft()
            self._written += len(batch)
            async with self._progress:
                self._progress.notify_all()
        self._wake.clear()


def _finished_row(
    admission: Admission, response: GenerationResponse | None, estimate: Estimate, reference_g: float | None
) -> dict[str, Any]:
    request, key = admission.request, admission.key
    row: dict[str, Any] = {
        "id": request.id,
        "key_id": key.id,
        "tenant": key.tenant,
        "model": request.model,
        "created_at": admission.at.isoformat(),
        "answered": response is not None and response.status == "ok",
    }
    if response is not None:
        usage, decision = response.usage, response.decision
        failed = response.status == "error" and usage is None
        row |= {
            "record": response.record,
            "prompt_tokens": 0 if failed else _count(None if usage is None else usage.prompt_tokens),
            "completion_tokens": 0 if failed else _count(None if usage is None else usage.completion_tokens),
            "estimated_j": _amount(estimate.joules),
            "estimated_g": _amount(estimate.grams),
            "estimate_source": estimate.source,
            "reference_g": _amount(reference_g),
        }
        if decision is not None:
            row |= {"pool": decision.pool, "level": decision.level, "zone": decision.zone}
    return _storable(row)


def _footprint_row(footprint: Footprint) -> dict[str, Any]:
    row = footprint.model_dump(mode="json", include=set(_FOOTPRINT_FIELDS))
    row |= {name: _count(row[name]) for name in ("prompt_tokens", "completion_tokens")}
    row |= {
        name: _amount(row[name])
        for name in ("energy_j", "intensity_g_per_kwh", "operational_g", "embodied_g", "total_g")
    }
    return _storable({"id": footprint.request_id, **row})


def _count(number: int | None) -> int | None:
    return None if number is None else min(number, _LARGEST_COUNT)


def _amount(number: float | None) -> float | None:
    return None if number is None else min(number, _LARGEST_AMOUNT)


def _storable(row: dict[str, Any]) -> dict[str, Any]:
    """Replace NUL, which PostgreSQL cannot store."""
    return {name: value.replace("\x00", "\ufffd") if isinstance(value, str) else value for name, value in row.items()}
