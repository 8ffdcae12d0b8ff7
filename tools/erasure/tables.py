"""Erases a person from the services' tables: prompts and verdicts are deleted, records of energy lose the link.

Joules, tokens and grams stay, so all sums still equal the meters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import asyncpg

from tools.erasure.subjects import Subjects

Action = Literal["deleted", "unlinked"]

STEP: Final = timedelta(days=1)
"""Time of the records that one transaction changes: the ledger's settlement waits for it."""

LEDGER_LOCKS: Final = ("SELECT pg_advisory_xact_lock(hashtext('sprout.ledger.erasure'))",)
"""The ledger must not hold a row under its old id meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonalTable:
    """A table with data of persons.

    Attributes:
        name: with its schema.
        key: the request id, SQL.
        tenant: the tenant, SQL; None: the table has none.
        time: column by which rows are unlinked step by step; None: rows are deleted.
        changes: what unlinks a row; None: `key` and `tenant` are columns, which are changed.
    """

    name: str
    key: str
    tenant: str | None = "tenant"
    time: str | None = None
    changes: str | None = None

    @property
    def action(self) -> Action:
        """What happens to the rows."""
        return "deleted" if self.time is None else "unlinked"

    @property
    def matches(self) -> str:
        """Condition for rows of the tenants $1 and the request ids $2."""
        by_id = f"{self.key} = ANY($2::text[])"
        # Without the first parameter PostgreSQL does not know its type.
        return f"({by_id} OR {self.tenant or 'NULL'} = ANY($1::text[]))"


_KEY = "coalesce(request_id, id)"
_TENANT = "(SELECT d.tenant FROM ledger.dimensions AS d WHERE d.id = dimension)"
_NEW_ID = "'erased-' || gen_random_uuid()"
"""A new random id, and no hash of the old one: whoever knows an id could compute its hash."""
_ACCOUNT_TENANT = (
    "coalesce(CASE WHEN account LIKE 'tenant/%' THEN substr(account, 8) END, "
    "(SELECT k.tenant FROM gateway.api_keys AS k WHERE 'key/' || k.id = account))"
)
"""The tenant of an account of the gateway, which is a key or a tenant."""
_UNLINK = f"id = {_NEW_ID}, request_id = NULL"
_KNOWN = """
SELECT request_id FROM ledger.footprints WHERE tenant = ANY($1::text[])
UNION
SELECT coalesce(c.request_id, c.id) FROM ledger.settled_calls AS c JOIN ledger.dimensions AS d ON d.id = c.dimension
WHERE d.tenant = ANY($1::text[])
"""

TABLES: Final = (
    PersonalTable(name="evaluator.reservoir", key="request_id"),
    PersonalTable(name="evaluator.judged", key="request_id"),
    PersonalTable(name="optimizer.counted", key="id", tenant=None),
    PersonalTable(name="gateway.requests", key="id"),
    PersonalTable(name="gateway.hours", key="key_id", time="hour"),
    PersonalTable(
        name="gateway.months", key="account", tenant=_ACCOUNT_TENANT, time="month", changes=f"account = {_NEW_ID}"
    ),
    PersonalTable(name="gateway.batches", key="id"),
    PersonalTable(name="gateway.files", key="id"),
    PersonalTable(name="ledger.refusals", key="request_id", tenant=None, time="at"),
    PersonalTable(name="ledger.calls", key="id", time="finished_at"),
    PersonalTable(name="ledger.footprints", key="request_id", time="started_at"),
    PersonalTable(name="ledger.rejections", key=_KEY, tenant=None, time="at", changes=_UNLINK),
    PersonalTable(name="ledger.open_calls", key=_KEY, tenant=_TENANT, time="finished_at", changes=_UNLINK),
    PersonalTable(name="ledger.settled_calls", key=_KEY, tenant=_TENANT, time="finished_at", changes=_UNLINK),
    # After the tables whose tenant it holds.
    PersonalTable(name="ledger.dimensions", key="NULL::text", time="used_at", changes="tenant = NULL"),
)
"""All tables with data of persons; those whose rows of a tenant are found through the ledger come before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFindings:
    """Rows of the subjects in a table.

    Attributes:
        before, after: number of rows; `after` is `before` in a dry run.
        known: the subjects that were found.
    """

    table: str
    action: Action
    before: int
    after: int
    known: frozenset[tuple[str, str]]


async def erase_from_tables(
    connection: asyncpg.Connection, subjects: Subjects, *, dry_run: bool
) -> list[TableFindings]:
    """Erase the subjects from every table that exists in the database.

    Raises:
        asyncpg.PostgresError: a statement failed; the steps before it have been done, and the command can be repeated.
    """
    tables = [one for one in TABLES if await connection.fetchval("SELECT to_regclass($1)", one.name) is not None]
    await _find_requests(connection, subjects, tables)
    before = [await _count(connection, table, subjects) for table in tables]
    if not dry_run:
        for table in tables:
            await _erase(connection, table, subjects)
    after = before if dry_run else [await _count(connection, table, subjects) for table in tables]
    return [
        TableFindings(table=table.name, action=table.action, before=first[0], after=last[0], known=first[1])
        for table, first, last in zip(tables, before, after, strict=True)
    ]


async def _find_requests(connection: asyncpg.Connection, subjects: Subjects, tables: Sequence[PersonalTable]) -> None:
    """Find requests of the tenants in tables that do not say whose they are, by what the ledger knows."""
    names = {table.name for table in tables}
    if "ledger.settled_calls" not in names:
        return
    for table in tables:
        if not table.name.startswith("ledger.") and table.changes is None:
            unknown = "" if table.tenant is None else f"AND one.{table.tenant} IS NULL"
            rows = await connection.fetch(
                f"SELECT one.{table.key} AS id FROM {table.name} AS one WHERE one.{table.key} IN ({_KNOWN}) {unknown}",
                list(subjects.tenants),
            )
            subjects.found.update(row["id"] for row in rows)


async def _count(
    connection: asyncpg.Connection, table: PersonalTable, subjects: Subjects
) -> tuple[int, frozenset[tuple[str, str]]]:
    """Number of rows of the subjects, and which of them have some."""
    tenants = "NULL::text[]" if table.tenant is None else f"array_agg(DISTINCT {table.tenant})"
    (row,) = await connection.fetch(
        f"SELECT count(*) AS rows, {tenants} AS tenants, "
        f"array_agg({table.key}) FILTER (WHERE {table.key} = ANY($2::text[])) AS requests "
        f"FROM {table.name} WHERE {table.matches}",
        *_parameters(subjects),
    )
    known = {("tenant", one) for one in row["tenants"] or () if one in subjects.tenants}
    known |= {("request", one) for one in row["requests"] or () if one in subjects.requests}
    return row["rows"], frozenset(known)


async def _erase(connection: asyncpg.Connection, table: PersonalTable, subjects: Subjects) -> None:
    if table.time is None:
        # Waits for writers that have not committed yet: what they add is deleted as well.
        async with connection.transaction():
            await connection.execute(f"LOCK TABLE {table.name} IN SHARE ROW EXCLUSIVE MODE")
            await connection.execute(
                f"DELETE FROM {table.name} WHERE {table.matches}",
                *_parameters(subjects),
            )
        return
    changes = table.changes
    if changes is None:
        changes = f"{table.key} = {_NEW_ID}" + (f", {table.tenant} = NULL" if table.tenant else "")
    unlink = f"UPDATE {table.name} SET {changes} WHERE"
    await _locked(connection, f"{unlink} {table.key} = ANY($1::text[])", subjects.request_ids)
    if table.tenant is not None and subjects.tenants:
        ((first, last),) = await connection.fetch(f"SELECT min({table.time}), max({table.time}) FROM {table.name}")
        while first is not None and first <= last:
            await _locked(
                connection,
                f"{unlink} {table.tenant} = ANY($1::text[]) AND {table.time} >= $2 AND {table.time} < $3",
                list(subjects.tenants),
                first,
                first + STEP,
            )
            first += STEP


async def _locked(connection: asyncpg.Connection, statement: str, *parameters: list[str] | datetime) -> None:
    async with connection.transaction():
        for lock in LEDGER_LOCKS:
            await connection.execute(lock)
        await connection.execute(statement, *parameters)


def _parameters(subjects: Subjects) -> tuple[Any, Any]:
    return list(subjects.tenants), subjects.request_ids
