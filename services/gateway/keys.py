"""API keys: stored as hashes in PostgreSQL, each with the tenant that its requests belong to."""

import hashlib
import secrets
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

import asyncpg

from shared.runtime.database import DatabaseStatus, DatabaseUnavailableError, within

PREFIX: Final = "sk-sprout-"
KEY_BYTES: Final = 32
MAX_CACHED: Final = 10_000
"""Keys whose validity is remembered, wrong ones included."""


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
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    grams_per_month: float | None = None
    most_level: str | None = None
    when_spent: Literal["refuse", "serve"] = "refuse"


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
            cache_s: how long a key is believed without asking PostgreSQL; while PostgreSQL is away for longer.
            timeout_s: how long PostgreSQL may take.
        """
        self._pool = pool
        self._status = status
        self._cache_s = cache_s
        self._timeout_s = timeout_s
        self._cache: OrderedDict[bytes, tuple[float, ApiKey | None]] = OrderedDict()

    async def find(self, secret: str) -> ApiKey | None:
        """The key, or None if there is no such key or it was revoked.

        Raises:
            DatabaseUnavailableError: PostgreSQL is away, and the key is not remembered.
        """
        digest, now_s = hash_of(secret), time.monotonic()
        remembered = self._cache.get(digest)
        if remembered is not None and now_s - remembered[0] <= self._cache_s:
            return remembered[1]
        try:
            with self._status.watch():
                row = await within(
                    self._timeout_s,
                    self._pool.fetchrow(
                        "SELECT id, name, tenant FROM api_keys WHERE hash = $1 AND revoked_at IS NULL", digest
                    ),
                )
        except DatabaseUnavailableError:
            if remembered is None or remembered[1] is None:
                raise
            return remembered[1]
        key = None if row is None else ApiKey(row["id"], row["name"], row["tenant"])
        self._cache[digest] = (now_s, key)
        self._cache.move_to_end(digest)
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return key

    async def create(self, *, name: str, tenant: str | None, now: datetime) -> tuple[ApiKey, str]:
        """Create a key; returns it with its secret, which is not stored."""
        with self._status.watch():
            async with self._pool.acquire() as connection:
                return await create_key(connection, name=name, tenant=tenant, now=now)


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
    """Revoke a key for good; returns whether there is such a key that was valid."""
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
