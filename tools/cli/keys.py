"""`sprout keys`: API keys of the gateway, with their limits and carbon budgets."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import asyncpg
import typer
from pydantic import TypeAdapter, ValidationError

from services.gateway.keys import Connection, Limits, create_key, list_keys, revoke_key, set_limits
from shared.messages import Identifier, Level
from shared.runtime.logs import printable
from tools.cli.console import Exit, fail, out, print_text, say
from tools.cli.report import DATABASE_VARIABLE, default_database

T = TypeVar("T")

SCHEMA = "gateway"
CONNECT_S = 10.0
MOST = 2**31 - 1

app = typer.Typer(no_args_is_help=True, help="Create, list, limit and revoke API keys of the gateway.")

Database = Annotated[
    str | None,
    typer.Option(metavar="URL", help=f"The gateway's database; default: {DATABASE_VARIABLE}, else the local stack"),
]
Tenant = Annotated[str | None, typer.Option(help="Tenant of the key's requests", metavar="NAME")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]
RequestsPerMinute = Annotated[int | None, typer.Option(min=0, max=MOST, help="Most requests in a minute")]
TokensPerMinute = Annotated[
    int | None,
    typer.Option(min=0, max=MOST, help="Most tokens in a minute: prompts, and max_tokens until the answer is there"),
]
Concurrent = Annotated[int | None, typer.Option(min=0, max=MOST, help="Most requests at once")]
CarbonBudget = Annotated[float | None, typer.Option(min=0, metavar="GRAMS", help="gCO2eq in a calendar month, UTC")]
MostLevel = Annotated[
    str | None,
    typer.Option(metavar="LEVEL", help="Strictest directive that is forced while more is spent than the month's path"),
]
ServeWhenSpent = Annotated[
    bool, typer.Option("--serve-when-spent", help="Serve at --most-level when the budget is spent; default: refuse")
]


@app.command()
def create(
    *,
    name: Annotated[str, typer.Option(help="What the key is for")] = "",
    tenant: Tenant = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    carbon_budget: CarbonBudget = None,
    most_level: MostLevel = None,
    serve_when_spent: ServeWhenSpent = False,
    as_json: AsJson = False,
    database: Database = None,
) -> None:
    """Create a key, and print its secret, once: only a hash of it is stored.

    Exit codes: 0 created, 1 failed, 2 wrong usage, 3 no database.
    """
    tenant = None if tenant is None else _valid(Identifier, tenant, "--tenant")
    limits = _limits(requests_per_minute, tokens_per_minute, concurrent, carbon_budget, most_level, serve_when_spent)

    async def work(connection: Connection) -> tuple[str, str]:
        async with connection.transaction():
            key, secret = await create_key(
                connection, name=_stored(name, "--name"), tenant=tenant, now=datetime.now(UTC)
            )
            if limits != Limits():
                await set_limits(connection, f"key/{key.id}", limits)
        return key.id, secret

    key_id, secret = _run(work, database)
    if as_json:
        print(json.dumps({"id": key_id, "api_key": secret, "name": name, "tenant": tenant}))
        return
    say(f"created {key_id}; keep its secret, which cannot be shown again:")
    print(secret)


@app.command()
def limit(
    key: Annotated[str | None, typer.Argument(metavar="[ID]", help="Id of a key")] = None,
    *,
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="All keys of a tenant together, instead")] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    carbon_budget: CarbonBudget = None,
    most_level: MostLevel = None,
    serve_when_spent: ServeWhenSpent = False,
    database: Database = None,
) -> None:
    """Replace the limits of a key or a tenant; those that are not given end. They hold for the next request.

    Exit codes: 0 changed, 1 no such key, 2 wrong usage, 3 no database.
    """
    if (key is None) == (tenant is None):
        raise typer.BadParameter("give either the id of a key or --tenant")
    limits = _limits(requests_per_minute, tokens_per_minute, concurrent, carbon_budget, most_level, serve_when_spent)
    name = f"tenant/{_valid(Identifier, tenant, '--tenant')}" if key is None else f"key/{_stored(key, 'ID')}"

    async def work(connection: Connection) -> bool:
        if key is not None and not await connection.fetchval("SELECT count(*) FROM api_keys WHERE id = $1", key):
            return False
        await set_limits(connection, name, limits)
        return True

    if not _run(work, database):
        fail(f"there is no key {key}", remedy="see: sprout keys list")
    say(f"changed {name}")


@app.command("list")
def list_all(*, as_json: AsJson = False, database: Database = None) -> None:
    """List keys with their limits, without secrets.

    Exit codes: 0 printed, 1 failed, 2 wrong usage, 3 no database.
    """
    rows = _run(list_keys, database)
    if as_json:
        print(json.dumps(rows, default=datetime.isoformat, indent=2))
        return
    from rich.table import Table  # noqa: PLC0415 - slow to import

    table = Table("key", "tenant", "name", "created", "state", "requests/min", "tokens/min", "at once", "g/month",
                  "most level", box=None)  # fmt: skip
    for row in rows:
        state = "" if row["id"] is None else "revoked" if row["revoked_at"] else "valid"
        created = "" if row["created_at"] is None else f"{row['created_at']:%Y-%m-%d}"
        figures = (row[name] for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests",
                                          "grams_per_month", "most_level"))  # fmt: skip
        table.add_row(
            *(_cell(one) for one in (row["id"] or "all of the tenant", row["tenant"], row["name"], created, state)),
            *(_cell(one) for one in figures),
        )
    out.print(table)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="Id of the key, as 'sprout keys list' prints it")],
    *,
    database: Database = None,
) -> None:
    """Revoke a key permanently, from the next request on.

    Exit codes: 0 revoked, 1 no such valid key, 2 wrong usage, 3 no database.
    """
    key = _stored(key, "ID")
    if not _run(lambda connection: revoke_key(connection, key, now=datetime.now(UTC)), database):
        fail(f"there is no valid key {key}", remedy="see: sprout keys list")
    print_text(f"revoked {key}")


def _limits(  # noqa: PLR0917 - one for each option
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrent: int | None,
    carbon_budget: float | None,
    most_level: str | None,
    serve_when_spent: bool,
) -> Limits:
    """The limits that the options say."""
    if carbon_budget is not None and not math.isfinite(carbon_budget):
        raise typer.BadParameter("--carbon-budget must be a number")
    if carbon_budget is None and (most_level is not None or serve_when_spent):
        raise typer.BadParameter("--most-level and --serve-when-spent need --carbon-budget")
    if serve_when_spent and most_level is None:
        raise typer.BadParameter("--serve-when-spent needs --most-level")
    return Limits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent,
        grams_per_month=carbon_budget,
        most_level=None if most_level is None else _valid(Level, most_level, "--most-level"),
        when_spent="serve" if serve_when_spent else "refuse",
    )


def _valid(kind: Any, text: str | None, option: str) -> str:  # noqa: ANN401 - a type
    try:
        return _stored(str(TypeAdapter(kind).validate_python(text)), option)
    except ValidationError as error:
        raise typer.BadParameter(f"{option}: {error.errors()[0]['msg']}") from None


def _stored(text: str, option: str) -> str:
    if "\x00" in text:
        raise typer.BadParameter(f"{option}: must not contain NUL")
    return text


def _cell(value: object) -> str:
    from rich.markup import escape  # noqa: PLC0415 - slow to import

    return "" if value is None else escape(f"{value:g}" if isinstance(value, float) else printable(str(value)))


def _run(work: Callable[[Connection], Awaitable[T]], database: str | None) -> T:
    """Await `work` on a connection to the gateway's schema; exits with an error if that is not possible."""

    async def connected() -> T:
        connection = await asyncpg.connect(url, timeout=CONNECT_S, server_settings={"search_path": SCHEMA})
        try:
            return await work(connection)
        finally:
            await connection.close()

    url = database or default_database()
    try:
        return asyncio.run(connected())
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        fail(
            "the database has no tables of the gateway",
            remedy="a gateway creates them when it starts: start one",
            code=Exit.NOT_RUNNING,
        )
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        fail(
            f"cannot use the database ({type(error).__name__}: {error})",
            remedy=f"check --database or {DATABASE_VARIABLE}, or start the local stack: sprout up",
            code=Exit.NOT_RUNNING,
        )
