"""API keys: stored as hashes in PostgreSQL, each with the tenant that its requests belong to."""

import hashlib
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import asyncpg

from shared.runtime.database import DatabaseStatus, DatabaseUnavailableError

PREFIX: Final = "sk-sprout-"
KEY_BYTES: Final = 32
MAX_CACHED: Final = 10_000
"""Keys whose validity is remembered, wrong ones included."""


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

    def __init__(self, pool: asyncpg.Pool, status: DatabaseStatus, *, cache_s: float) -> None:
        """Use an open pool whose `search_path` is the gateway's schema.

        Args:
            cache_s: how long a key is believed without asking PostgreSQL; while PostgreSQL is away for longer.
        """
        self._pool = pool
        self._status = status
        self._cache_s = cache_s
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
                row = await self._pool.fetchrow(
                    "SELECT id, name, tenant FROM api_keys WHERE hash = $1 AND revoked_at IS NULL", digest
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
        secret = new_secret()
        key = ApiKey(f"key_{secrets.token_hex(8)}", name, tenant)
        with self._status.watch():
            await self._pool.execute(
                "INSERT INTO api_keys (id, hash, name, tenant, created_at) VALUES ($1, $2, $3, $4, $5)",
                key.id,
                hash_of(secret),
                name,
                tenant,
                now,
            )
        return key, secret


async def store_key(
    connection: "asyncpg.Connection[asyncpg.Record]", secret: str, *, name: str, tenant: str | None, now: datetime
) -> None:
    """Store a key whose secret is known; one that is stored already stays as it is.

    Args:
        connection: whose `search_path` is the gateway's schema.

    Raises:
        asyncpg.PostgresError: the server refused.
    """
    await connection.execute(
        "INSERT INTO api_keys (id, hash, name, tenant, created_at) VALUES ($1, $2, $3, $4, $5) "
        "ON CONFLICT (hash) DO NOTHING",
        f"key_{secrets.token_hex(8)}",
        hash_of(secret),
        name,
        tenant,
        now,
    )
