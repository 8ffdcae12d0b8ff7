"""`sprout database`: the roles and schemas of the services in PostgreSQL."""

import asyncio
from pathlib import Path
from typing import Annotated

import asyncpg
import typer
from pydantic import SecretStr, ValidationError

from services import SERVICES
from shared.kafka.records import describe
from shared.runtime.database_roles import OPERATOR, create_roles, role_name
from shared.runtime.settings import DatabaseSettings, read_secret
from tools.cli.console import Exit, fail, out

CONNECT_TIMEOUT_S = 10.0

NAMES = (*(name for name, service in SERVICES.items() if service.needs_database), OPERATOR)
"""Who has a role."""

app = typer.Typer(no_args_is_help=True, help="Roles and schemas of the services in PostgreSQL.")


@app.callback()
def database() -> None:
    """Roles and schemas of the services in PostgreSQL."""


@app.command()
def create(
    password_files: Annotated[
        list[str],
        typer.Option(
            "--password-file",
            metavar="NAME=FILE",
            help=f"File with the password of a role; repeat it for each of {', '.join(NAMES)}",
        ),
    ],
    database: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The database, as its owner; default: SPROUT_DATABASE_URL and _PASSWORD_FILE"),
    ] = None,
) -> None:
    """Create a role per service that owns only its own schema, and the operator's; set their passwords.

    What exists is kept or corrected, and tables of an earlier version are handed to the service's role: run it at every
    start, and to change passwords. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no database.
    """
    passwords = dict(_password(given) for given in password_files)
    try:
        settings = DatabaseSettings() if database is None else DatabaseSettings(url=SecretStr(database))
    except ValidationError as error:
        fail(describe(error))
    try:
        changes = asyncio.run(_create(settings.url.get_secret_value(), passwords))
    except asyncpg.InvalidAuthorizationSpecificationError as error:
        fail(
            f"PostgreSQL rejects the login: {error}",
            remedy="check the URL and the password; for the Docker volume of an earlier version see docs/compose.md",
        )
    except (OSError, TimeoutError, asyncpg.InterfaceError) as error:
        fail(
            f"the database does not answer ({type(error).__name__}: {error})",
            remedy="check --database or SPROUT_DATABASE_URL",
            code=Exit.NOT_RUNNING,
        )
    except (ValueError, asyncpg.PostgresError) as error:
        fail(str(error))
    for change in changes:
        out.print(change, markup=False)
    out.print(f"set the passwords of {', '.join(map(role_name, passwords))}", markup=False)


async def _create(url: str, passwords: dict[str, str]) -> list[str]:
    connection = await asyncpg.connect(url, timeout=CONNECT_TIMEOUT_S)
    try:
        return await create_roles(connection, passwords)
    finally:
        await connection.close()


def _password(given: str) -> tuple[str, str]:
    """The name and the password of an option NAME=FILE.

    Raises:
        typer.BadParameter: the name is unknown, or the file cannot be read.
    """
    name, _, file = given.partition("=")
    if name not in NAMES or not file:
        raise typer.BadParameter(f"--password-file is NAME=FILE with a NAME of {', '.join(NAMES)}, not {given!r}")
    try:
        return name, read_secret(Path(file), "--password-file")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
