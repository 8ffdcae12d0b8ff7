"""`sprout report`: how much carbon was saved, at which quality, and where every joule went."""

import asyncio
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import asyncpg
import typer
from pydantic import ValidationError

from shared.kafka.dead_letters import describe
from shared.runtime.settings import DatabaseSettings
from tools.cli.console import Exit, fail, local_state, out, say
from tools.reporting import NoBooksError, Report, TooManyCallsError, collect_report, render_html, render_tables, to_json

DATABASE_VARIABLE = "SPROUT_DATABASE_URL"

Moment = Annotated[str | None, typer.Option(metavar="TIME", help="ISO 8601, event time; UTC unless it has a zone")]


def report(
    *,
    since: Moment = None,
    until: Moment = None,
    model: Annotated[str | None, typer.Option(help="Only this model's requests; energy stays that of all")] = None,
    zone: Annotated[str | None, typer.Option(help="Only what was served in this grid zone")] = None,
    hours: Annotated[bool, typer.Option("--hours/--no-hours", help="Print a row for every hour")] = True,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every figure")] = None,
    database: Annotated[
        str | None,
        typer.Option(metavar="URL", help=f"The ledger's database; default: {DATABASE_VARIABLE}, else the local stack"),
    ] = None,
) -> None:
    """Print grams, the saving with its interval, directive mix, quality and the energy balance.

    The saving is measured against the counterfactual that the reference had served every request.
    Exit codes: 0 printed, 1 failed, 3 there is nothing to report yet or no database.
    """
    first, last = _moment(since, "--since"), _moment(until, "--until")
    if first is not None and last is not None and first >= last:
        fail("--since must lie before --until")
    found = _collect(_database_url(database), since=first, until=last, model=model, zone=zone)
    if found.empty:
        fail(
            "there is nothing to report yet: no call in the books" + _narrowed(since, until, model, zone),
            remedy='send a request, for example sprout send "Why is the sky blue?", and ask again',
            code=Exit.NOT_RUNNING,
        )
    render_tables(found, out, hours=hours)
    if html is not None:
        _write(html, render_html(found))
    if json_file is not None:
        _write(json_file, json.dumps(to_json(found), indent=2) + "\n")


def _collect(
    url: str, *, since: datetime | None, until: datetime | None, model: str | None, zone: str | None
) -> Report:
    try:
        return asyncio.run(collect_report(url, since=since, until=until, model=model, zone=zone))
    except NoBooksError as error:
        fail(str(error), remedy="for the local stack: sprout up", code=Exit.NOT_RUNNING)
    except TooManyCallsError as error:
        fail(str(error))
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        fail(
            f"no answer from the database ({type(error).__name__}: {error})",
            remedy=f"check --database or {DATABASE_VARIABLE}, or start the local stack: sprout up",
            code=Exit.NOT_RUNNING,
        )


def _database_url(given: str | None) -> str:
    """The database named, the environment's, or the local stack's; leaves with an error where there is none."""
    if given:
        return given
    if os.environ.get(DATABASE_VARIABLE):
        try:
            return DatabaseSettings().url.get_secret_value()
        except ValidationError as error:
            fail(describe(error))
    state = local_state()
    if state is None or not state.database_url:
        fail(
            "no local stack is running, and no other database was named",
            remedy=f"start one with 'sprout up', or give --database URL or {DATABASE_VARIABLE}",
            code=Exit.NOT_RUNNING,
        )
    return state.database_url


def _moment(text: str | None, option: str) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        fail(f"{option} must be a time such as 2024-02-08 or 2024-02-08T06:00, got {text!r}")
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _narrowed(since: str | None, until: str | None, model: str | None, zone: str | None) -> str:
    asked = {"--since": since, "--until": until, "--model": model, "--zone": zone}
    given = " ".join(f"{option} {value}" for option, value in asked.items() if value is not None)
    return f" for {given}" if given else ""


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")
    say(f"wrote {path}")
