"""API keys: stored as hashes in PostgreSQL, each with the tenant that its requests belong to."""

import asyncio
import hashlib
import math
import secrets
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias, TypeVar

import asyncpg

from shared.runtime.database import DatabaseStatus, DatabaseUnavailableError
from shared.runtime.workarounds import within

PREFIX: Final = "sk-sprout-"
KEY_BYTES: Final = 32
MAX_CACHED: Final = 10_000
"""Valid keys that are remembered, and as many wrong ones."""

WRONG_S: Final = 1.0
"""How long a key counts as wrong at most: it may just have been made, wall."""

T = TypeVar("T")

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
"""To the gateway's schema, by its `search_path`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of an account, which is a key or a tenant; None: none.

    Attributes:
        tokens_per_minute: prompts, estimated, and `max_tokens`, corrected by the answers.
        grams_per_month: carbon budget, gCO2eq.
        most_level: strictest directive level that is forced as the budget runs out.
        when_spent: what happens to requests then: refused, or served at `most_level`.
        defer_batches: where requests are refused, the lines of batches wait for a new budget.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    grams_per_month: float | None = None
    most_level: str | None = None
    when_spent: Literal["refuse", "serve"] = "refuse"
    defer_batches: bool = False


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A valid key, without its secret.

    Attributes:
        tenant: of its requests; None: of none.
    """

    id: str
    name: str
    tenant: str | None


def new_secret() -> str:
    """A new key, as the client sends it."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_of(secret: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(secret.encode("utf-8", errors="surrogatepass")).digest()


class KeyStore:
    """The table `api_keys`, with a cache."""

    def __init__(self, pool: asyncpg.Pool, status: DatabaseStatus, *, cache_s: float, timeout_s: float = 2.0) -> None:
        """Use an open pool whose `search_path` is the gateway's schema.

        Args:
            cache_s: how long a key is accepted without asking PostgreSQL again; longer while that is unavailable.
            timeout_s: how long PostgreSQL may take.
        """
        self._pool = pool
        self._status = status
        self._cache_s = cache_s
        self._timeout_s = timeout_s
        self._valid: OrderedDict[bytes, tuple[float, ApiKey]] = OrderedDict()
        # Apart, so that a client that tries many keys pushes no valid one out.
        self._wrong: OrderedDict[bytes, float] = OrderedDict()
        self._queries: dict[bytes, asyncio.Task[ApiKey | None]] = {}

    async def find(self, secret: str) -> ApiKey | None:
        """The key, or None if there is no such key or it was revoked.

        Raises:
            DatabaseUnavailableError: PostgreSQL is unavailable, and the key is not remembered.
        """
        digest, now_s = hash_of(secret), time.monotonic()
        found_s, key = self._valid.get(digest, (-math.inf, None))
        if key is not None and now_s - found_s <= self._cache_s:
            return key
        if now_s - self._wrong.get(digest, -math.inf) <= min(self._cache_s, WRONG_S):
            return None
        # Many requests may come at once with a key: one asks, the others wait for it.
        query = self._queries.get(digest)
        if query is None:
            query = self._queries[digest] = asyncio.create_task(self._query(digest))
            query.add_done_callback(lambda ended: self._ended(digest, ended))
        try:
            return await asyncio.shield(query)
        except DatabaseUnavailableError:
            if key is None:
                raise
            return key

    async def _query(self, digest: bytes) -> ApiKey | None:
        """Ask PostgreSQL for a key, and remember what it says."""
        with self._status.watch():
            row = await within(
                self._timeout_s,
                self._pool.fetchrow(
                    "SELECT id, name, tenant FROM api_keys WHERE hash = $1 AND revoked_at IS NULL", digest
                ),
            )
        if row is None:
            self._valid.pop(digest, None)
            _remember(self._wrong, digest, time.monotonic())
            return None
        key = ApiKey(row["id"], row["name"], row["tenant"])
        self._wrong.pop(digest, None)
        _remember(self._valid, digest, (time.monotonic(), key))
        return key

    def _ended(self, digest: bytes, query: "asyncio.Task[ApiKey | None]") -> None:
        del self._queries[digest]
        if not query.cancelled():
            query.exception()  # those that waited for it may have left

    async def create(self, *, name: str, tenant: str | None, now: datetime) -> tuple[ApiKey, str]:
        """Create a key; returns it with its secret, which is not stored."""
        with self._status.watch():
            async with self._pool.acquire() as connection:
                return await create_key(connection, name=name, tenant=tenant, now=now)


def _remember(cache: OrderedDict[bytes, T], digest: bytes, value: T) -> None:
    """Keep a value as the newest one of a bounded cache."""
    cache[digest] = value
    cache.move_to_end(digest)
    if len(cache) > MAX_CACHED:
        cache.popitem(last=False)


async def create_key(connection: Connection, *, name: str, tenant: str | None, now: datetime) -> tuple[ApiKey, str]:
    """Create a key; returns it with its secret, which is not stored."""
    secret = new_secret()
    key = ApiKey(f"key_{secrets.token_hex(8)}", name, tenant)
    await connection.execute(
        "INSERT INTO api_keys (id, hash, name, tenant, created_at) VALUES ($1, $2, $3, $4, $5)",
        key.id,
        hash_of(secret),
        name,
        tenant,
        now,
    )
    return key, secret


async def store_key(connection: Connection, secret: str, *, name: str, tenant: str | None, now: datetime) -> None:
    """Store a key whose secret is known; one that is stored already stays as it is."""
    await connection.execute(
        "INSERT INTO api_keys (id, hash, name, tenant, created_at) VALUES ($1, $2, $3, $4, $5) "
        "ON CONFLICT (hash) DO NOTHING",
        f"key_{secrets.token_hex(8)}",
        hash_of(secret),
        name,
        tenant,
        now,
    )


async def revoke_key(connection: Connection, key_id: str, *, now: datetime) -> bool:
    """Revoke a key permanently; returns whether there is such a key that was valid."""
    changed = await connection.execute(
        "UPDATE api_keys SET revoked_at = $2 WHERE id = $1 AND revoked_at IS NULL", key_id, now
    )
    return changed == "UPDATE 1"


async def set_limits(connection: Connection, account: str, limits: Limits) -> None:
    """Replace the limits of an account; what was used of them in this minute stays counted.

    Args:
        account: `key/ID`, or `tenant/NAME` for all keys of a tenant together.
    """
    columns = list(asdict(limits))
    changes = ", ".join(f"{name} = excluded.{name}" for name in columns)
    places = ", ".join(f"${number}" for number in range(2, len(columns) + 2))
    await connection.execute(
        f"INSERT INTO limits (account, {', '.join(columns)}) VALUES ($1, {places}) "
        f"ON CONFLICT (account) DO UPDATE SET {changes}",
        account,
        *asdict(limits).values(),
    )


async def list_keys(connection: Connection) -> list[dict[str, Any]]:
    """Every key with its limits, and every tenant that has limits, as rows of which `id` is null."""
    columns = ", ".join(f"l.{one.name}" for one in fields(Limits))
    rows = await connection.fetch(
        f"SELECT k.id, k.name, k.tenant, k.created_at, k.revoked_at, {columns} "
        "FROM api_keys AS k LEFT JOIN limits AS l ON l.account = 'key/' || k.id "
        f"UNION ALL SELECT NULL, NULL, substr(l.account, 8), NULL, NULL, {columns} "
        "FROM limits AS l WHERE l.account LIKE 'tenant/%' ORDER BY tenant NULLS FIRST, created_at NULLS FIRST, id"
    )
    return [dict(row) for row in rows]
