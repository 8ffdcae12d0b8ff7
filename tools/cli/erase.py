"""`sprout erase`: remove what the tables hold of a tenant or a request, and say what Kafka keeps, and how long."""

import asyncio
import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import asyncpg
import typer
from aiokafka.errors import KafkaError
from rich.table import Column, Table
from rich.text import Text

from shared.runtime.logs import printable
from tools.cli.console import Bootstrap, Exit, Target, fail, find_target, out, print_text, quiet_clients, unreachable
from tools.cli.report import DATABASE_VARIABLE, default_database
from tools.erasure.subjects import Subjects
from tools.erasure.tables import TableFindings, erase_from_tables
from tools.erasure.topics import TopicFindings, search_topics


def erase(
    *,
    tenants: Annotated[
        list[str] | None, typer.Option("--tenant", metavar="TENANT", help="Erase this tenant; repeatable")
    ] = None,
    requests: Annotated[
        list[str] | None, typer.Option("--request", metavar="ID", help="Erase the request with this id; repeatable")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count; change nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON; needs --yes or --dry-run")] = False,
    read_at_most: Annotated[
        int, typer.Option(min=0, metavar="N", help="Topics with more records are not read, only bounded in time")
    ] = 200_000,
    database: Annotated[
        str | None, typer.Option(metavar="URL", help=f"Default: {DATABASE_VARIABLE}, else the local stack")
    ] = None,
    bootstrap: Bootstrap = None,
) -> None:
    """Erase prompts, samples and verdicts of tenants or requests, and unlink their energy records from them.

    Joules and grams stay, so sums still equal the meters. Kafka removes no single record: the command says, topic by
    topic, when the last one goes. It can be repeated. The database's user must be the operator's, or own all schemas.

    Exit codes: 0 done, 1 failed or to be repeated, 2 wrong usage, 3 no Kafka or no database.
    """
    subjects = Subjects(frozenset(tenants or ()), frozenset(requests or ()))
    if not (subjects.tenants or subjects.requests):
        raise typer.BadParameter("name a --tenant or a --request")
    if any("\0" in name or not name for name in subjects.tenants | subjects.requests):
        raise typer.BadParameter("a name must not be empty, nor contain NUL")
    if as_json and not (yes or dry_run):
        raise typer.BadParameter("--json needs --yes or --dry-run")
    target = find_target(bootstrap)
    url = database or default_database()
    quiet_clients()
    if not (yes or dry_run):
        names = ", ".join([*(f"tenant {one}" for one in sorted(subjects.tenants)), *sorted(subjects.requests)])
        typer.confirm(printable(f"Erase {names} permanently?"), abort=True)
    topics, tables = _run(target, url, subjects, read_at_most=read_at_most, dry_run=dry_run)
    missing = _missing(subjects, topics, tables)
    pending = [one.topic for one in topics if one.pending]
    if as_json:
        print(json.dumps(_document(subjects, topics, tables, missing, dry_run=dry_run), indent=2))
    else:
        _print(topics, tables, dry_run=dry_run)
        for kind, name in missing:
            print_text(f"{kind} {name!r}: nothing is known of it")
    if pending and not dry_run:
        fail(
            f"services have not read all records of {', '.join(pending)} yet, and will store what they find",
            remedy="repeat the command when they have: sprout status shows their lag",
        )


def _run(
    target: Target, url: str, subjects: Subjects, *, read_at_most: int, dry_run: bool
) -> tuple[list[TopicFindings], list[TableFindings]]:
    async def run() -> tuple[list[TopicFindings], list[TableFindings]]:
        connection = await asyncpg.connect(url)
        try:
            topics = await search_topics(target.kafka, subjects, limit=read_at_most)
            return topics, await erase_from_tables(connection, subjects, dry_run=dry_run)
        finally:
            await connection.close()

    try:
        return asyncio.run(run())
    except KafkaError as error:
        unreachable(target, error)
    except asyncpg.InsufficientPrivilegeError as error:
        fail(
            f"the database denies it: {error}",
            remedy="use the operator's login (sprout database create), or one that owns the services' schemas",
        )
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        fail(
            f"cannot erase in the database ({type(error).__name__}: {error})",
            remedy=f"check --database or {DATABASE_VARIABLE}; the command can be repeated",
            code=Exit.NOT_RUNNING,
        )


def _missing(subjects: Subjects, topics: list[TopicFindings], tables: list[TableFindings]) -> list[tuple[str, str]]:
    """Subjects that occur nowhere, as far as the topics were read."""
    known = frozenset[tuple[str, str]]().union(*(one.known for one in topics), *(one.known for one in tables))
    asked = [("tenant", name) for name in subjects.tenants] + [("request", name) for name in subjects.requests]
    return sorted(one for one in asked if one not in known)


def _print(topics: list[TopicFindings], tables: list[TableFindings], *, dry_run: bool) -> None:
    shown = Table(Column("table", no_wrap=True), "rows", "would be" if dry_run else "", "rows left")
    for row in tables:
        shown.add_row(row.table, str(row.before), row.action, "" if dry_run else str(row.after))
    out.print(shown)
    kept = Table(Column("topic", no_wrap=True), "records", "Kafka has removed them by (UTC)")
    for one in topics:
        kept.add_row(
            one.topic,
            "not read: too many" if one.records is None else str(one.records),
            Text("never: the topic keeps them for ever" if one.stays else _time(one.gone_by)),
        )
    out.print(kept)
    print_text("Kafka removes no single record before the topic's retention ends.")


def _time(time: datetime | None) -> str:
    return "" if time is None else f"{time:%Y-%m-%d %H:%M}"


def _document(
    subjects: Subjects,
    topics: list[TopicFindings],
    tables: list[TableFindings],
    missing: list[tuple[str, str]],
    *,
    dry_run: bool,
) -> dict[str, Any]:
    return {
        "tenants": sorted(subjects.tenants),
        "requests": sorted(subjects.requests),
        "dry_run": dry_run,
        "unknown": [{"kind": kind, "name": name} for kind, name in missing],
        "tables": [_plain(one) for one in tables],
        "topics": [_plain(one) | {"stays": one.stays} for one in topics],
    }


def _plain(found: TableFindings | TopicFindings) -> dict[str, Any]:
    return {
        name: content.isoformat() if isinstance(content, datetime) else content
        for name, content in asdict(found).items()
        if name != "known"
    }
