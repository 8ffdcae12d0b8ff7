"""Asks PostgreSQL whether requests are within their limits: those of one key that come at once share a statement."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import asyncpg

from services.gateway.keys import ApiKey
from services.gateway.limits import Verdict
from shared.messages import GenerationRequest
from shared.runtime.database import DatabaseStatus, DatabaseUnavailableError
from shared.runtime.workarounds import within

AT_ONCE: Final = 64
"""Requests of one statement: it holds the rows of their limits until its end."""

_ADMIT: Final = (
    "SELECT admit($1, $2, id, model, tokens, at, $7, $8) "
    "FROM unnest($3::text[], $4::text[], $5::bigint[], $6::timestamptz[]) WITH ORDINALITY AS "
    "requests (id, model, tokens, at, number) ORDER BY number"
)


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that may be published.

    Attributes:
        request: with the directive that its budgets force.
        key: whose request it is.
        at: event time.
        headers: of its answer.
        holds_place: whether it counts among a limited number of concurrent requests.
    """

    request: GenerationRequest
    key: ApiKey
    at: datetime
    headers: dict[str, str]
    holds_place: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A request that waits for its verdict."""

    request: GenerationRequest
    tokens: int
    at: datetime
    verdict: asyncio.Future[Verdict]


class AdmissionQueue:
    """Decides on requests, in the order in which they come.

    While a statement runs, the requests of its key wait, and the next statement decides on all of them. The requests of
    two keys never share one: transactions that lock the limits of several keys could wait for each other.
    """

    def __init__(
        self, pool: asyncpg.Pool, status: DatabaseStatus, *, instance: str, lease_s: float, timeout_s: float
    ) -> None:
        """Use an open pool whose `search_path` is the gateway's schema.

        Args:
            instance: of this gateway, in the table `instances`.
            lease_s: how long an admitted request counts as open at most, wall.
            timeout_s: longest wait for PostgreSQL, wall.
        """
        self._pool = pool
        self._status = status
        self._instance = instance
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._waiting: dict[ApiKey, deque[_Waiting]] = {}
        self._tasks: dict[ApiKey, asyncio.Task[None]] = {}

    async def decide(self, key: ApiKey, request: GenerationRequest, *, tokens: int, at: datetime) -> Verdict:
        """Count a request against the limits of its key and tenant.

        Args:
            tokens: that it counts as.
            at: event time.

        Raises:
            DatabaseUnavailableError: PostgreSQL is unavailable; after a `TimeoutError` the request may be counted.
        """
        verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        if key not in self._tasks:
            self._waiting[key] = deque()
            self._tasks[key] = asyncio.create_task(self._work(key))
        self._waiting[key].append(_Waiting(request, tokens, at, verdict))
        return await verdict

    async def _work(self, key: ApiKey) -> None:
        """Decide on the waiting requests of a key until there are none."""
        waiting = self._waiting[key]
        try:
            while waiting:
                batch = [waiting.popleft() for _ in range(min(AT_ONCE, len(waiting)))]
                await self._decide(key, [one for one in batch if not one.verdict.done()])  # some clients have left
        finally:
            del self._waiting[key], self._tasks[key]

    async def _decide(self, key: ApiKey, batch: list[_Waiting]) -> None:
        if not batch:
            return
        try:
            verdicts: Sequence[Verdict | Exception] = await self._ask(key, batch)
        except DatabaseUnavailableError as error:
            verdicts = [error] * len(batch)
        except Exception as error:  # noqa: BLE001 - somebody waits for each verdict
            if len(batch) > 1:  # one of them may be the reason
                for one in batch:
                    await self._decide(key, [one])
                return
            verdicts = [error]
        for one, verdict in zip(batch, verdicts, strict=True):
            if one.verdict.done():
                continue
            if isinstance(verdict, Verdict):
                one.verdict.set_result(verdict)
            else:
                one.verdict.set_exception(verdict)

    async def _ask(self, key: ApiKey, batch: list[_Waiting]) -> Sequence[Verdict]:
        with self._status.watch():
            rows = await within(
                self._timeout_s,
                self._pool.fetch(
                    _ADMIT,
                    key.id,
                    key.tenant,
                    [one.request.id for one in batch],
                    [one.request.model for one in batch],
                    [one.tokens for one in batch],
                    [one.at for one in batch],
                    self._instance,
                    self._lease_s,
                ),
            )
        return [Verdict.model_validate_json(row[0]) for row in rows]
