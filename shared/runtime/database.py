"""PostgreSQL: a pool per service, one schema per service, migrations as ordered SQL files, metrics."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from typing import Any, Final, TypeVar

import asyncpg
import stamina
from asyncpg.pool import PoolConnectionProxy
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.kafka.handling import RetryLaterError
from shared.runtime.logs import get_logger
from shared.runtime.settings import DatabaseSettings

T = TypeVar("T")

TRANSIENT_ERRORS: Final = (
    OSError,  # TimeoutError included
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shutdown, crash, start, cancelled statement
    asyncpg.InsufficientResourcesError,  # disk full, out of memory, too many connections
    asyncpg.PostgresSystemError,  # I/O errors of the server
    asyncpg.TransactionRollbackError,  # deadlocks
    asyncpg.ReadOnlySQLTransactionError,  # the server has become a standby
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""Errors after which the same statement may succeed later.

asyncpg raises `InterfaceError` and `InternalClientError` when the server disappears in the middle of an operation; the
pool then discards the connection. An `InterfaceError` that is a `ValueError` is about a value of a statement instead.
"""

CHECK_INTERVAL_S: Final = 2.0
"""Wall seconds between two checks whether PostgreSQL answers."""

CHECK_TIMEOUT_S: Final = 4.0
"""Wall seconds that a check may take."""

RETRY_PAUSE_S: Final = 1.0
"""Wall seconds before an operation is tried again while PostgreSQL is unavailable."""

_log = get_logger(__name__)

LATENCIES_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Upper limits of the histogram's buckets, wall seconds."""


class DatabaseUnavailableError(RetryLaterError):
    """PostgreSQL does not answer; the operation can be tried again.

    A message whose handler raises it is delivered again.
    """


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn each of `TRANSIENT_ERRORS` into `DatabaseUnavailableError`.

    Raises:
        DatabaseUnavailableError: the operation inside did not reach PostgreSQL.
    """
    try:
        yield
    except TRANSIENT_ERRORS as error:
        if isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError):
            raise
        raise DatabaseUnavailableError(f"PostgreSQL is unavailable ({type(error).__name__})") from error


class MissingSchemaError(RuntimeError):
    """The service's schema does not exist, and its role may not create it."""


async def within(seconds: float, operation: Coroutine[Any, Any, T]) -> T:
    """Await an operation for a limited time.

    Unlike with `asyncio.timeout`, its cancellation is not waited for: asyncpg's takes until the end of the command's
    own timeout while the server hangs.

    Raises:
        TimeoutError: it takes longer, wall; it is cancelled in the background.
    """
    task = asyncio.create_task(operation)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else looks at it
            task.cancel()
    if not done:
        raise TimeoutError
    return task.result()


class DatabaseStatus:
    """Whether PostgreSQL answers, as the service's own operations show it: for readiness and for the log.

    Every operation runs in `with status.watch():`, which also translates its errors. Any success clears the problem;
    work whose failures must stay visible while other operations succeed reports them itself.
    """

    def __init__(self) -> None:
        self._problem: str | None = "PostgreSQL: not connected yet"
        self._out_of_resources = False

    def problem(self) -> str | None:
        """The readiness check; `None` while PostgreSQL answers."""
        return self._problem

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note whether the operation inside reached PostgreSQL; logs when that changes.

        Raises:
            DatabaseUnavailableError: it did not.
        """
        try:
            with translate_errors():
                yield
        except DatabaseUnavailableError as error:
            self._note_problem(str(error), error.__cause__)
            raise
        self.answered()

    def _note_problem(self, problem: str, cause: BaseException | None) -> None:
        if problem != self._problem:
            _log.warning("waiting for PostgreSQL", error=type(cause).__name__)
        self._problem = problem
        # A full disk lets `SELECT 1` pass.
        self._out_of_resources = isinstance(cause, (asyncpg.DiskFullError, asyncpg.OutOfMemoryError))

    def answered(self) -> None:
        """Note that PostgreSQL has answered."""
        if self._problem is not None:
            _log.info("PostgreSQL answers")
        self._problem = None
        self._out_of_resources = False

    async def check_forever(self, settings: DatabaseSettings) -> None:
        """Ask PostgreSQL again and again whether it answers, on a connection that does nothing else.

        The service's own operations may all wait for a server that has frozen, or have nothing to do.
        """
        connection: asyncpg.Connection[asyncpg.Record] | None = None
        try:
            while True:
                try:
                    with translate_errors():
                        async with asyncio.timeout(CHECK_TIMEOUT_S):
                            connection = connection or await asyncpg.connect(settings.url.get_secret_value())
                            await connection.execute("SELECT 1")
                except (DatabaseUnavailableError, asyncpg.PostgresError) as error:
                    unavailable = isinstance(error, DatabaseUnavailableError)
                    self._note_problem(
                        str(error) if unavailable else f"PostgreSQL refuses a connection ({type(error).__name__})",
                        error.__cause__ if unavailable else error,
                    )
                    if connection is not None:
                        connection.terminate()
                    connection = None
                else:
                    if not self._out_of_resources:
                        self.answered()
                await asyncio.sleep(CHECK_INTERVAL_S)
        finally:
            if connection is not None:
                connection.terminate()

    async def retry(self, operation: Callable[[], Awaitable[T]], *, pause_s: float = RETRY_PAUSE_S) -> T:
        """Await `operation()`, again and again while it raises `DatabaseUnavailableError`."""
        while True:
            try:
                return await operation()
            except DatabaseUnavailableError:
                await asyncio.sleep(pause_s)


class DatabaseMetrics:
    """Latency and errors of the queries of a pool, and its connections."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "sprout_database_query_seconds",
            "Wall time of a query on PostgreSQL",
            buckets=LATENCIES_S,
            registry=registry,
        )
        self._errors = Counter(
            "sprout_database_errors", "Queries on PostgreSQL that failed", ["error"], registry=registry
        )
        self._connections = Gauge(
            "sprout_database_connections",
            "Connections of the pool: open, idle, or at most",
            ["state"],
            registry=registry,
        )

    async def observe_connection(self, connection: Any) -> None:  # noqa: ANN401 - a connection or its proxy
        """Observe the queries of a new connection: `init` of `asyncpg.create_pool`."""
        connection.add_query_logger(self._observe)

    def observe_pool(self, pool: asyncpg.Pool) -> None:
        """Export the number of connections of a pool."""
        self._connections.labels("open").set_function(pool.get_size)
        self._connections.labels("idle").set_function(pool.get_idle_size)
        self._connections.labels("max").set_function(pool.get_max_size)

    def _observe(self, query: Any) -> None:  # noqa: ANN401 - asyncpg's LoggedQuery, which holds texts and arguments
        self._seconds.observe(query.elapsed)
        if query.exception is not None:
            self._errors.labels(type(query.exception).__name__).inc()


async def open_pool(
    settings: DatabaseSettings,
    *,
    schema: str,
    wait_s: float = 120.0,
    server_settings: Mapping[str, str] | None = None,
    metrics: DatabaseMetrics | None = None,
    stateless: bool = False,
) -> asyncpg.Pool:
    """Connect, waiting for the server to start; every connection's `search_path` is the service's schema.

    Args:
        schema: the service's own.
        wait_s: how long to wait, wall.
        server_settings: further parameters of every session.
        metrics: of the pool's queries and connections.
        stateless: no statement leaves anything in its session (a setting, a session's lock), so that sessions need not
            be reset: that is a round trip after each use of a connection.

    Raises:
        OSError, asyncpg.PostgresError: the server did not answer within `wait_s`, or rejected the login.
    """
    async for attempt in stamina.retry_context(on=TRANSIENT_ERRORS, attempts=None, timeout=wait_s, wait_max=5.0):
        with attempt:
            pool: asyncpg.Pool = await asyncpg.create_pool(
                settings.url.get_secret_value(),
                min_size=1,
                max_size=settings.pool_size,
                command_timeout=settings.command_timeout_s,
                server_settings={
                    "search_path": schema,
                    "application_name": f"sprout.{schema}",
                    **(server_settings or {}),
                },
                init=None if metrics is None else metrics.observe_connection,
                reset=_leave if stateless else None,
            )
    if metrics is not None:
        metrics.observe_pool(pool)
    return pool


async def _leave(connection: asyncpg.Connection) -> None:
    """Nothing is to be reset; asyncpg itself rolls an open transaction back."""


async def migrate(pool: asyncpg.Pool, *, schema: str, package: str) -> list[str]:
    """Apply the SQL files of `package` that have not been applied to this schema, in the order of their names.

    Several processes may start at once: an advisory lock lets one migrate while the others wait. A missing schema is
    created, if the role may; `sprout database create` creates it for a role that may not.

    Returns:
        The names of the files applied now.

    Raises:
        MissingSchemaError: there is no schema, and the role may not create it.
    """
    files = sorted(
        (entry for entry in resources.files(package).iterdir() if entry.name.endswith(".sql")),
        key=lambda entry: entry.name,
    )
    applied: list[str] = []
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext($1))", f"sprout.migrate.{schema}")
        await _create_schema(connection, schema)
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


async def _create_schema(connection: asyncpg.Connection | PoolConnectionProxy, schema: str) -> None:
    """Create the schema if it is missing.

    Not with `IF NOT EXISTS`: that needs the right to create schemas even if the schema exists.
    """
    if await connection.fetchval("SELECT to_regnamespace(quote_ident($1))", schema) is not None:
        return
    try:
        await connection.execute(f'CREATE SCHEMA "{schema}"')
    except asyncpg.InsufficientPrivilegeError as error:
        raise MissingSchemaError(
            f"PostgreSQL has no schema {schema!r}, and this role may not create it: run 'sprout database create'"
        ) from error
