"""PostgreSQL: a pool per service, one schema per service, migrations as ordered SQL files."""

from importlib import resources

import asyncpg
import stamina

from shared.runtime.logs import get_logger
from shared.runtime.settings import DatabaseSettings

TRANSIENT_ERRORS = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""Errors after which the same statement may succeed later.

`InterfaceError` and `InternalClientError` are what asyncpg says of a connection whose server vanished in the middle of
an operation; the pool gives such a connection up.
"""

_log = get_logger(__name__)


async def open_pool(settings: DatabaseSettings, *, schema: str, wait_s: float = 120.0) -> asyncpg.Pool:
    """Connect, waiting for the server to come up; every connection's `search_path` is the service's schema.

    Raises:
        OSError, asyncpg.PostgresError: the server stayed away for `wait_s`, or refused the login.
    """
    async for attempt in stamina.retry_context(on=TRANSIENT_ERRORS, attempts=None, timeout=wait_s, wait_max=5.0):
        with attempt:
            pool: asyncpg.Pool = await asyncpg.create_pool(
                settings.url.get_secret_value(),
                min_size=1,
                max_size=settings.pool_size,
                command_timeout=settings.command_timeout_s,
                server_settings={"search_path": schema, "application_name": f"sprout.{schema}"},
            )
    return pool


async def migrate(pool: asyncpg.Pool, *, schema: str, package: str) -> list[str]:
    """Apply the SQL files of `package` that this schema has not seen, in the order of their names.

    Several processes may start at once: an advisory lock lets one migrate while the others wait.

    Returns:
        The names of the files applied now.
    """
    files = sorted(
        (entry for entry in resources.files(package).iterdir() if entry.name.endswith(".sql")),
        key=lambda entry: entry.name,
    )
    applied: list[str] = []
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext($1))", f"sprout.migrate.{schema}")
        await connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
        await connection.execute(
            f'CREATE TABLE IF NOT EXISTS "{schema}".migrations '
            "(name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        rows = await connection.fetch(f'SELECT name FROM "{schema}".migrations')
        done = {row["name"] for row in rows}
        for entry in files:
            if entry.name in done:
                continue
            await connection.execute(entry.read_text(encoding="utf-8"))
            await connection.execute(f'INSERT INTO "{schema}".migrations (name) VALUES ($1)', entry.name)
            applied.append(entry.name)
    if applied:
        _log.info("schema migrated", schema=schema, files=applied)
    return applied
