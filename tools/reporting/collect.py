"""The one call that others make: a database in, a report out."""

import asyncio
from datetime import datetime

import asyncpg

from tools.reporting.assemble import assemble
from tools.reporting.books import Selection
from tools.reporting.model import Report
from tools.reporting.queries import read_books


async def collect_report(
    database: asyncpg.Pool | str,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    model: str | None = None,
    zone: str | None = None,
) -> Report:
    """Read the ledger's books and work out the report.

    Args:
        database: a pool, or the URL of a database to connect to for this once.
        since: calls that began at or after it; aware.
        until: calls that began before it; aware.
        model: one logical model; the energy and carbon accounts stay those of all, as the meters are.
        zone: what was served in one grid zone.

    Raises:
        NoBooksError: the ledger has never set up its tables there.
        TooManyCallsError: the period is too long for one report.
        OSError, asyncpg.PostgresError, asyncpg.InterfaceError: the database could not be reached, or refused.
    """
    selection = Selection(since=since, until=until, model=model, zone=zone)
    if isinstance(database, str):
        connection = await asyncpg.connect(database)
        try:
            books = await read_books(connection, selection)
        finally:
            await connection.close()
    else:
        async with database.acquire() as pooled:
            books = await read_books(pooled, selection)
    return await asyncio.to_thread(assemble, books)
